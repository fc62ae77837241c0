// Two translation units of one program, compiled for different processors (or one with OpenMP and one
// without): the program links, each unit runs its own kernel, and they agree.
#include <cmath>
#include <cstdio>
#include <longspan/longspan.hpp>

#include "attend.hpp"

namespace {

bool near(float a, float b) { return std::abs(a - b) <= 1e-5F * (1 + std::abs(b)); }

}  // namespace

int main() {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    std::puts("skipped: this processor has no AVX2");
    return 77;
  }
#endif
  const float q[] = {0.5F, -0.25F};
  float k[2 * kv_len], v[2 * kv_len];
  for (std::ptrdiff_t x = 0; x < 2 * kv_len; ++x) {
    k[x] = std::sin(static_cast<float>(x));
    v[x] = std::cos(static_cast<float>(3 * x));
  }
  const Attended base = attend_with_base_flags(q, k, v), other = attend_with_other_flags(q, k, v);
  if (base.kernel == other.kernel) {
    std::printf("both translation units run %s: one was thrown away\n", base.kernel.c_str());
    return 1;
  }
  if (!near(base.out[0], other.out[0]) || !near(base.out[1], other.out[1]) || !near(base.lse, other.lse)) {
    std::printf("got [%g %g], lse %g and [%g %g], lse %g\n", double(base.out[0]), double(base.out[1]),
                double(base.lse), double(other.out[0]), double(other.out[1]), double(other.lse));
    return 1;
  }
  // Scores lie within half a unit of 0, so the log-sum-exp lies near log(kv_len).
  return std::abs(base.lse - std::log(float(kv_len))) < 1 ? 0 : 1;
}
