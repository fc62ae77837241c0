// One call of the library, compiled into each of two translation units with other flags.
#pragma once

#include <cstddef>
#include <string>

struct Attended {
  float out[2];
  float lse;
  std::string kernel;  ///< the name of the functor's type, which the flags must change
};

constexpr std::ptrdiff_t kv_len = 37;

Attended attend_with_base_flags(const float* q, const float* k, const float* v);
Attended attend_with_other_flags(const float* q, const float* k, const float* v);
