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
  Shape shape;          ///< for one token; the caller sets the length
  std::function<Inputs<float>(Index length)> first;
};

/// Throws UsageError, or longspan::FileError if a file is not a tensor.
Source open_source(const Options& options);

}  // namespace bench
