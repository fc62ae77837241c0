// Right values with the flags of a user: compiled and run with a matrix of flags, instruction sets and compilers,
// mostly with the first functor only, and with all functors if ALL_FUNCTORS is defined. Expected values are plain
// loops in double without tests for infinity, because -ffast-math also applies to them.
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <longspan/partial.hpp>
#include <longspan/softmax_attention.hpp>
#include <type_traits>
#include <vector>

#if defined(ALL_FUNCTORS)
#include <longspan/dilated_attention.hpp>
#include <longspan/infini_attention.hpp>
#include <longspan/landmark_attention.hpp>
#endif

namespace {

using namespace longspan;

int failures = 0;

void check(bool right, const char* law, const char* type, double got, double wanted) {
  if (right) return;
  ++failures;
  std::printf("%s (%s): got %.9g, wanted %.9g\n", law, type, got, wanted);
}

/// Tests the bits: with -ffinite-math-only a compiler assumes that `x == infinity` is false.
template <class Real>
bool is_minus_infinity(Real x) {
  if constexpr (sizeof(Real) == 4) return std::bit_cast<std::uint32_t>(x) == 0xff800000u;
  if constexpr (sizeof(Real) == 8) return std::bit_cast<std::uint64_t>(x) == 0xfff0000000000000u;
}

/// Minus infinity read from memory, as from a bias tensor.
float minus_infinity() {
  static volatile std::uint32_t bits = 0xff800000u;
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits));
}

template <class T>
constexpr const char* name = std::is_same_v<T, float>    ? "float"
                             : std::is_same_v<T, double> ? "double"
                                                         : "bfloat16";
/// The error that the contract allows, plus the rounding of a 16-bit output.
template <class T>
constexpr double allowed = std::is_same_v<T, float>    ? 4e-6
                           : std::is_same_v<T, double> ? 1e-14
                                                       : 8e-3;

/// Small numbers that are exact in every element type.
double number(Index n) { return static_cast<double>(n * 37 % 17 - 8) / 8; }

/// One head with `queries` queries and `keys` keys.
template <class T>
struct Case {
  Index queries, keys, head_dim, value_dim;
  std::vector<T> q, k, v, out;
  std::vector<Arithmetic<T>> lse;

  Case(Index n, Index m, Index d, Index dv) : queries(n), keys(m), head_dim(d), value_dim(dv) {
    fill(q, n * d, 1), fill(k, m * d, 5), fill(v, m * dv, 9);
    out.resize(std::size_t(n * dv));
    lse.resize(std::size_t(n));
  }
  static void fill(std::vector<T>& x, Index size, Index seed) {
    for (Index i = 0; i < size; ++i) x.push_back(static_cast<T>(number(i * seed + i / 7 + seed)));
  }
  template <class Functor>
  void run(const Functor& attend) {
    const auto view = [](auto& x, Index rows, Index cols) {
      return compact_view(x.data(), 1, 1, rows, cols);
    };
    attend(view(std::as_const(q), queries, head_dim), view(std::as_const(k), keys, head_dim),
           view(std::as_const(v), keys, value_dim), view(out, queries, value_dim),
           compact_rows_view(lse.data(), 1, 1, queries));
  }
  double score(Index i, Index j) const {
    double s = 0;
    for (Index c = 0; c < head_dim; ++c)
      s += static_cast<double>(q[std::size_t(i * head_dim + c)]) *
           static_cast<double>(k[std::size_t(j * head_dim + c)]);
    return s / std::sqrt(static_cast<double>(head_dim));
  }
  double value(Index j, Index c) const { return static_cast<double>(v[std::size_t(j * value_dim + c)]); }
  double got(Index i, Index c) const { return static_cast<double>(out[std::size_t(i * value_dim + c)]); }

  /// Checks out and lse of query i, where key j has the weight weight_of(j); 0 is none.
  template <class WeightOf>
  void check_row(const char* law, Index i, const WeightOf& weight_of, bool with_lse = true) const {
    double sum = 0;
    std::vector<double> o(std::size_t(value_dim), 0.0);
    for (Index j = 0; j < keys; ++j) {
      const double weight = weight_of(j);
      sum += weight;
      for (Index c = 0; c < value_dim; ++c) o[std::size_t(c)] += weight * value(j, c);
    }
    for (Index c = 0; c < value_dim; ++c) {
      const double wanted = sum > 0 ? o[std::size_t(c)] / sum : 0.0;
      check(std::abs(got(i, c) - wanted) <= allowed<T>, law, name<T>, got(i, c), wanted);
    }
    if (!with_lse) return;
    const auto l = lse[std::size_t(i)];
    if (sum > 0) {
      const double wanted = std::log(sum);
      check(std::abs(static_cast<double>(l) - wanted) <= allowed<T> * 2, law, name<T>, static_cast<double>(l),
            wanted);
    } else {
      check(is_minus_infinity(l), law, name<T>, static_cast<double>(l), -1);
    }
  }
};

/// Query 0 sees no key, query i the keys before i.
template <class T>
void causal_softmax(Index queries) {
  Case<T> c(queries, 70, 20, 13);
  softmax_attention attend{causal{}};
  attend.first_query = -1;
  c.run(attend);
  for (Index i = 0; i < queries; ++i)
    c.check_row("causal, and an empty row", i,
                [&](Index j) { return j < i ? std::exp(c.score(i, j)) : 0.0; });
}

void partials() {
  constexpr Index rows = 3, cols = 11;
  std::vector<float> a(rows * cols, 2.0f), b(rows * cols, 5.0f), out(rows * cols, 9.0f);
  std::vector<float> of_a{minus_infinity(), 1.0f, minus_infinity()}, of_b{3.0f, 1.0f, minus_infinity()},
      lse(rows, 7.0f);
  const auto part = [](auto& o, auto& l) {
    return Partial<const float>{compact_view(std::as_const(o).data(), 1, 1, rows, cols),
                                compact_rows_view(std::as_const(l).data(), 1, 1, rows)};
  };
  merge({part(a, of_a), part(b, of_b)}, Partial<float>{compact_view(out.data(), 1, 1, rows, cols),
                                                       compact_rows_view(lse.data(), 1, 1, rows)});
  const double wanted[] = {5, 3.5, 0};
  for (Index i = 0; i < rows; ++i) {
    for (Index c = 0; c < cols; ++c) {
      const double got = out[std::size_t(i * cols + c)];
      check(std::abs(got - wanted[i]) < 1e-6, "merge with an empty partial", "float", got, wanted[i]);
    }
  }
  check(std::abs(lse[0] - 3.0f) < 1e-6f, "lse of a merge with an empty partial", "float", lse[0], 3);
  check(std::abs(lse[1] - 1.693147f) < 1e-6f, "lse of a merge", "float", lse[1], 1.693147);
  check(is_minus_infinity(lse[2]), "lse of a merge of empty partials", "float", lse[2], -1);
}

#if defined(ALL_FUNCTORS)
void softmax(Index queries) {
  Case<float> c(queries, 70, 20, 13);
  c.run(softmax_attention{});
  for (Index i = 0; i < queries; ++i)
    c.check_row("softmax over all keys", i, [&](Index j) { return std::exp(c.score(i, j)); });
}

/// Every second key has the score -infinity; for query 1 all keys have.
void hidden_scores() {
  Case<float> hidden(20, 40, 8, 8);
  std::vector<float> bias(20 * 40, 0.0f);
  for (Index i = 0; i < 20; ++i) {
    for (Index j = 0; j < 40; ++j)
      bias[std::size_t(i * 40 + j)] = j % 2 == 0 || i == 1 ? minus_infinity() : 0.0f;
  }
  softmax_attention attend{additive_bias{compact_view(std::as_const(bias).data(), 1, 1, 20, 40)}};
  attend.first_query = 20;
  hidden.run(attend);
  for (Index i = 0; i < 20; ++i) {
    hidden.check_row("a score of -infinity hides its key", i,
                     [&](Index j) { return j % 2 == 0 || i == 1 ? 0.0 : std::exp(hidden.score(i, j)); });
  }
}

/// Blocks of 8 keys with their landmark at the end.
void landmarks_of_eight() {
  Case<float> c(40, 40, 16, 8);
  c.run(landmark_attention{landmarks::every(8)});
  for (Index i = 0; i < 40; ++i) {
    const auto is_landmark = [](Index j) { return j % 8 == 7; };
    const auto weight = [&](Index j) { return std::exp(c.score(i, j)); };
    const auto seen = [&](Index j) { return j <= i && !is_landmark(j); };
    c.check_row("landmark", i, [&](Index j) {
      if (!seen(j)) return 0.0;
      const Index own = i / 8, block = j / 8;
      if (block == own) return weight(j);
      double in_block = 0;
      for (Index t = block * 8; t < block * 8 + 7; ++t) in_block += weight(t);
      return weight(block * 8 + 7) * weight(j) / in_block;
    });
  }
}

/// Whole segments of 16 tokens, and every second token of segments of 64; one softmax in which a key of both counts
/// twice.
void dilated_twice() {
  Case<float> c(64, 64, 16, 8);
  c.run(dilated_attention{{{16, 1}, {64, 2}}, causal{}});
  for (Index i = 0; i < 64; ++i) {
    c.check_row("dilated", i, [&](Index j) {
      const int times = int(i / 16 == j / 16) + int(i % 2 == 0 && j % 2 == 0);
      return j <= i ? times * std::exp(c.score(i, j)) : 0.0;
    });
  }
}

/// Three segments of 16, gate 1/2: half of the local softmax plus half of the memory's output.
void infini_of_sixteen() {
  Case<float> c(48, 48, 8, 8);
  infini_attention attend{softmax_attention{causal{}}};
  attend.segment = 16;
  const auto view = [](auto& x) { return compact_view(x.data(), 1, 1, 48, 8); };
  attend(view(std::as_const(c.q)), view(std::as_const(c.k)), view(std::as_const(c.v)), view(c.out));
  const auto phi = [](float x) { return x > 0 ? x + 1.0 : std::exp(static_cast<double>(x)); };
  for (Index i = 0; i < 48; ++i) {
    const Index begin = i / 16 * 16;
    for (Index column = 0; column < 8; ++column) {
      double local = 0, sum = 0, memory = 0, norm = 0;
      for (Index j = begin; j <= i; ++j) {
        const double weight = std::exp(c.score(i, j));
        local += weight * c.value(j, column), sum += weight;
      }
      for (Index j = 0; j < begin; ++j) {
        double weight = 0;
        for (Index x = 0; x < 8; ++x)
          weight += phi(c.q[std::size_t(i * 8 + x)]) * phi(c.k[std::size_t(j * 8 + x)]);
        memory += weight * c.value(j, column), norm += weight;
      }
      const double wanted = 0.5 * local / sum + (norm > 0 ? 0.5 * memory / norm : 0.0);
      check(std::abs(c.got(i, column) - wanted) < 4e-6, "infini", "float", c.got(i, column), wanted);
    }
  }
}

#endif

}  // namespace

int main() {
  for (const Index queries : {Index{5}, Index{20}}) {  // the decode kernel and the prefill kernel
    causal_softmax<float>(queries);
#if defined(ALL_FUNCTORS)
    causal_softmax<double>(queries);
    causal_softmax<Eigen::bfloat16>(queries);
    softmax(queries);
#endif
  }
  partials();
#if defined(ALL_FUNCTORS)
  hidden_scores();
  landmarks_of_eight();
  dilated_twice();
  infini_of_sixteen();
#endif
  if (failures == 0) std::printf("all values are right\n");
  return failures == 0 ? 0 : 1;
}
