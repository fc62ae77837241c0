// Where q, k and v come from: the bytes of a text, or tensors of a model.
#pragma once

#include <functional>
#include <string>

#include "compare/contender.hpp"
#include "compare/options.hpp"

namespace bench {

struct Source {
  std::string description;
  Index available = 0;  ///< tokens
  Shape shape;          ///< of the first token; the length is the caller's
  std::function<Inputs<float>(Index length)> first;
};

/// Throws UsageError, or longspan::FileError for a file that is no tensor.
Source open_source(const Options& options);

}  // namespace bench
