// The floating-point mode of this thread.
#pragma once

#include <limits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace test {

#if defined(__SSE2__) || defined(__aarch64__)
inline constexpr bool can_ignore_denormals = true;
#else
inline constexpr bool can_ignore_denormals = false;
#endif

/// True if denormal products and denormal operands count as 0.
inline bool denormals_count_as_zero() {
  volatile float least = std::numeric_limits<float>::min(), half = 0.5f, denormal = 1e-41f, huge = 1e30f;
  volatile float product = least * half, from_denormal = denormal * huge;
  return product == 0.0f && from_denormal == 0.0f;
}

/// A copy of a thread's mode: MXCSR without its exception flags.
class FloatingPointMode {
 public:
  bool is_that_of_this_thread() const { return mode_ == mode(); }

 private:
  static unsigned mode() {
#if defined(__SSE2__)
    return _mm_getcsr() & ~0x3fu;
#else
    return denormals_count_as_zero();
#endif
  }
  unsigned mode_ = mode();
};

}  // namespace test
