// The variants of attend_npy, each of which has its own .cpp file.
#pragma once

#include <string_view>

#include "arguments.hpp"

namespace attend_npy {

struct Variant {
  std::string_view name;
  std::string_view help;  ///< one line for each key
  void (*run)(const Arguments&);
  bool has_gates = false;     ///< takes --beta
  bool shows_memory = false;  ///< takes --memory-out and --norm-out
  bool has_gradient = false;  ///< takes --dout, --dlse, --dq, --dk and --dv
};

extern const Variant softmax, softmax_stream, landmark, landmark_stream, infini, hybrid_stream, dilated,
    dilated_stream;

}  // namespace attend_npy
