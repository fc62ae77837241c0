// One program of translation units compiled with different flags: it links, each unit that this processor
// can run has its own kernel, and all results agree.
#include <cmath>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "unit.hpp"

namespace {

constexpr longspan::Index length = 37, dim = 8;

struct Results {
  float out[length * dim] = {};
  float lse[length] = {};
};

bool near(const Results& a, const Results& b) {
  const auto close = [](float x, float y) { return std::abs(x - y) <= 1e-5F * (1 + std::abs(y)); };
  for (longspan::Index i = 0; i < length * dim; ++i) {
    if (!close(a.out[i], b.out[i])) return false;
  }
  for (longspan::Index i = 0; i < length; ++i) {
    if (!close(a.lse[i], b.lse[i])) return false;
  }
  return true;
}

/// The units that this processor can run; the first one is the base.
std::vector<std::pair<std::string, Unit>> units() {
  std::vector<std::pair<std::string, Unit>> all{{"base", unit_base()},
                                                {"no_openmp", unit_no_openmp()},
                                                {"no_exceptions", unit_no_exceptions()},
                                                {"fast_math", unit_fast_math()},
                                                {"scalar", unit_scalar()}};
#if defined(__x86_64__)
  const auto supports_v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
  const auto supports_avx2 = supports_v2 && __builtin_cpu_supports("avx2");
  const auto supports_fma = supports_avx2 && __builtin_cpu_supports("fma");
  const auto supports_v3 = supports_fma && __builtin_cpu_supports("bmi2");
  const auto supports_v4 = supports_v3 && __builtin_cpu_supports("avx512f") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
  if (supports_v2) all.emplace_back("v2", unit_v2());
  if (supports_avx2) all.emplace_back("avx2", unit_avx2());
  if (supports_fma) all.emplace_back("avx2_fma", unit_avx2_fma());
  if (supports_v3) all.emplace_back("v3", unit_v3());
  if (supports_v4) all.emplace_back("v4", unit_v4());
#endif
  return all;
}

}  // namespace

int main() {
  std::vector<float> q(length * dim), k(length * dim), v(length * dim);
  for (std::size_t x = 0; x < q.size(); ++x) {
    q[x] = std::sin(static_cast<float>(2 * x + 1));
    k[x] = std::sin(static_cast<float>(x));
    v[x] = std::cos(static_cast<float>(3 * x));
  }
  const auto input = [](const std::vector<float>& x) {
    return longspan::compact_view(x.data(), 1, 1, length, dim);
  };
  const longspan::StreamShape shape{.head_dim = dim, .value_dim = dim};

  Results of_base, stream_of_base;
  std::vector<std::string> kernels;
  int failures = 0;
  const auto check = [&](bool is_right, const std::string& unit, const char* what) {
    if (!is_right) std::printf("%s: %s\n", unit.c_str(), what), ++failures;
  };
  const auto all = units();
  for (const auto& [name, unit] : all) {
    Results result, of_stream;
    const auto out = longspan::compact_view(result.out, 1, 1, length, dim);
    const auto lse = longspan::compact_rows_view(result.lse, 1, 1, length);
    unit.attend(input(q), input(k), input(v), out, lse, longspan::Pairing::half_split);
    unit.extend(shape, {.page_size = 16}, input(q), input(k), input(v),
                longspan::compact_view(of_stream.out, 1, 1, length, dim),
                longspan::compact_rows_view(of_stream.lse, 1, 1, length));
    if (name == "base") of_base = result, stream_of_base = of_stream;
    check(near(result, of_base), name, "its call differs from that of the base");
    check(near(of_stream, stream_of_base), name, "its stream differs from that of the base");
    check(unit.pass({out, lse}).lse.data == result.lse, name, "a partial is not passed on correctly");
    for (const std::string& kernel : kernels)
      check(kernel != unit.kernel, name,
            "its kernel has the name of another unit's kernel, so the linker drops one");
    kernels.emplace_back(unit.kernel);
    for (const auto& [other, thrower] : all) {
      if (name != "no_exceptions" && other != "no_exceptions")
        check(unit.catches(thrower.fail), name, "it does not catch an error of another unit");
    }
  }
  std::printf("%d units, %d failures\n", static_cast<int>(all.size()), failures);
  return failures == 0 ? 0 : 1;
}
