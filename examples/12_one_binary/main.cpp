// One program for every x86-64 processor: the same kernel, compiled five times, chosen when the program starts.
//
// After copying, change: `attend` in kernel.cpp to the call of your engine, and the list in CMakeLists.txt to the
// processors that you care for. This file, like all of your program but kernel.cpp, is compiled for the oldest of
// them.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "kernel.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

struct Kernel {
  const char* name;
  Attend* attend;
};

#if defined(__x86_64__)
static bool has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  const unsigned bf16 = 1u << 22, tile = 1u << 24;
  return (edx & bf16) != 0 && (edx & tile) != 0;
}
#endif

/// The kernels that this processor can run, the fastest last.
static std::vector<Kernel> kernels() {
  std::vector<Kernel> usable{{"the baseline", attend_baseline}};
#if defined(__x86_64__)
  const bool v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
  const bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("avx512cd");
  if (v2) usable.push_back({"x86-64-v2", attend_v2});
  if (v3) usable.push_back({"x86-64-v3", attend_v3});
  if (v4) usable.push_back({"x86-64-v4", attend_v4});
  if (v4 && has_amx()) usable.push_back({"x86-64-v4 with AMX", attend_amx});
#endif
  return usable;
}

int main() {
  using Eigen::bfloat16;
  const longspan::Index heads = 4, length = 512, head_dim = 64;
  const auto wave = [&](float frequency) {
    std::vector<bfloat16> x(static_cast<std::size_t>(heads * length * head_dim));
    for (std::size_t n = 0; n < x.size(); ++n)
      x[n] = static_cast<bfloat16>(std::sin(frequency * static_cast<float>(n % 65521)));
    return x;
  };
  const std::vector<bfloat16> q = wave(0.1F), k = wave(0.2F), v = wave(0.3F);
  const auto input = [&](const std::vector<bfloat16>& x) {
    return longspan::compact_view(x.data(), 1, heads, length, head_dim);
  };

  const std::vector<Kernel> usable = kernels();
  std::printf("this processor runs the kernel for %s\n", usable.back().name);

  // To see that all agree, which a program would not do: within the rounding of weights and outputs to bfloat16.
  std::vector<bfloat16> first;
  float difference = 0;
  for (const Kernel& kernel : usable) {
    std::vector<bfloat16> out(q.size());
    kernel.attend(input(q), input(k), input(v),
                  longspan::compact_view(out.data(), 1, heads, length, head_dim));
    if (first.empty()) first = out;
    for (std::size_t n = 0; n < out.size(); ++n)
      difference = std::max(difference, std::abs(static_cast<float>(out[n]) - static_cast<float>(first[n])));
  }
  const bool agree = difference < 0.02F;
  std::printf("%d kernels %s\n", static_cast<int>(usable.size()), agree ? "agree" : "DISAGREE");
  return agree ? 0 : 1;
}
