// The inner loops for a few queries compared with scalar loops.
#include "longspan/detail/decode/row_kernel.hpp"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/simd/element_packets.hpp"
#include "support/catch.hpp"
#include "support/guarded_memory.hpp"
#include "support/random.hpp"

namespace {

using namespace longspan::detail;
using Eigen::bfloat16;
using Eigen::half;
using longspan::Index;
using test::Guard;
using test::GuardedArray;
using test::Random;

template <class Real>
inline constexpr double u = double(std::numeric_limits<Real>::epsilon()) / 2;

template <class T>
void fill(T* x, Index count, Random& random) {
  for (Index i = 0; i < count; ++i) x[i] = static_cast<T>(static_cast<float>(random.normal()));
}

/// Checks `queries` = 1, 2, 4, 8, at most as many as a packet has lanes.
template <int queries, class Real, class Check>
void for_each_count(const Check& check) {
  if constexpr (queries <= 8 && queries <= lanes<Real>) {
    check.template operator()<queries>();
    for_each_count<2 * queries, Real>(check);
  }
}

template <int queries, class Real, class Tk>
bool scores_are_right(Index keys, Index head_dim, Index gap, Random& random) {
  const Index k_stride = head_dim + gap, q_stride = round_up(head_dim, lanes<Real>);
  const GuardedArray<Tk> k(keys * k_stride - gap,
                           Guard::behind);  // nothing after the last column of the last row
  fill(k.data(), keys * k_stride - gap, random);
  std::vector<Real> q(static_cast<std::size_t>(queries * q_stride), Real(0));
  for (Index g = 0; g < queries; ++g) fill(q.data() + g * q_stride, head_dim, random);
  std::vector<Real> s(static_cast<std::size_t>(round_up(keys * queries, lanes<Real>)), Real(777));
  score_keys<queries>(k.data(), k_stride, keys, q.data(), q_stride, head_dim, s.data());
  for (std::size_t n = 0; n < s.size(); ++n) {
    const Index j = std::min(static_cast<Index>(n) / queries, keys - 1), g = static_cast<Index>(n) % queries;
    double wanted = 0, size = 0;
    for (Index c = 0; c < head_dim; ++c) {
      const double x =
          static_cast<double>(k.data()[j * k_stride + c]) *
          double(q[static_cast<std::size_t>(g * q_stride + interleaved_index<Real, Tk>(c, head_dim))]);
      wanted += x;
      size += std::abs(x);
    }
    if (!(std::abs(double(s[n]) - wanted) <= double(head_dim + 4) * u<Real> * size)) return false;
  }
  return true;
}

template <class Real, class Tk>
void check_scores() {
  Random random(1);
  for_each_count<1, Real>([&]<int queries>() {
    for (const Index keys : {1, 2, 3, 15, 16, 17, 128}) {
      for (const Index head_dim : {0, 1, 7, 8, 15, 16, 17, 31, 33, 64, 65}) {
        INFO("queries=" << queries << " keys=" << keys << " head_dim=" << head_dim);
        CHECK(scores_are_right<queries, Real, Tk>(keys, head_dim, 3, random));
        CHECK(scores_are_right<queries, Real, Tk>(keys, head_dim, 0, random));
      }
    }
  });
}

template <int queries, int packets, class Real, class Tv>
bool values_are_right(Index keys, Index last_columns, Random& random) {
  constexpr Index w = lanes<Real>;
  const Index columns = (packets - 1) * w + last_columns, v_stride = columns + 2, p_stride = queries + 1;
  const Index o_stride = packets * w;
  const GuardedArray<Tv> v(std::max<Index>(0, keys * v_stride - 2), Guard::behind);
  fill(v.data(), std::max<Index>(0, keys * v_stride - 2), random);
  std::vector<Real> p(static_cast<std::size_t>(keys * p_stride + 1)), scale(queries);
  std::vector<Real> o(static_cast<std::size_t>(queries * o_stride));
  fill(p.data(), keys * p_stride, random);
  fill(scale.data(), queries, random);
  fill(o.data(), queries * o_stride, random);
  const std::vector<Real> before = o;
  add_values<queries, packets, PrefetchHint::reused>(v.data(), v_stride, last_columns, keys, p.data(),
                                                     p_stride, o.data(), o_stride, scale.data());
  for (Index g = 0; g < queries; ++g) {
    for (Index c = 0; c < columns; ++c) {
      const Index place = packets % 2 == 0 ? interleaved_index<Real, Tv>(c, columns) : c;
      const auto at = static_cast<std::size_t>(g * o_stride + place);
      double wanted = double(scale[static_cast<std::size_t>(g)]) * double(before[at]),
             size = std::abs(wanted);
      for (Index j = 0; j < keys; ++j) {
        const double x = double(p[static_cast<std::size_t>(j * p_stride + g)]) *
                         static_cast<double>(v.data()[j * v_stride + c]);
        wanted += x;
        size += std::abs(x);
      }
      if (!(std::abs(double(o[at]) - wanted) <= double(keys + 3) * u<Real> * size)) return false;
    }
  }
  return true;
}

template <class Real, class Tv>
void check_values() {
  Random random(2);
  for_each_count<1, Real>([&]<int queries>() {
    for (const Index keys : {0, 1, 2, 5, 128}) {
      for (Index last = 1; last <= lanes<Real>; last += lanes < Real >> 4 ? 3 : 1) {
        INFO("queries=" << queries << " keys=" << keys << " last_columns=" << last);
        CHECK(values_are_right<queries, 1, Real, Tv>(keys, last, random));
      }
      INFO("queries=" << queries << " keys=" << keys);
      CHECK(values_are_right<queries, 2, Real, Tv>(keys, lanes<Real>, random));
    }
  });
}

/// add_long_values has the bits of add_values, which is checked above, and writes nothing after the last packet.
template <int queries, class Real, class Tv>
bool long_values_are_right(Index keys, Index columns, Index gap, Random& random) {
  constexpr Index w = lanes<Real>;
  const Index v_stride = columns + gap, o_stride = round_up(columns, w) + w;
  const GuardedArray<Tv> v(std::max<Index>(0, keys * v_stride - gap), Guard::behind);
  fill(v.data(), std::max<Index>(0, keys * v_stride - gap), random);
  std::vector<Real> p(static_cast<std::size_t>(keys * queries)), scale(queries);
  std::vector<Real> o(static_cast<std::size_t>(queries * o_stride));
  fill(p.data(), keys * queries, random);
  fill(scale.data(), queries, random);
  fill(o.data(), queries * o_stride, random);
  std::vector<Real> wanted = o, sum(static_cast<std::size_t>(queries * round_up(columns, w)));
  add_long_values<queries, PrefetchHint::streaming>(v.data(), v_stride, columns, keys, p.data(), sum.data(),
                                                    o.data(), o_stride, scale.data());
  constexpr Index pair = loads_in_pairs<Real, Tv> ? 2 : 1;
  Index c = 0;
  for (; c + pair * w <= columns; c += pair * w) {
    add_values<queries, pair, PrefetchHint::none>(v.data() + c, v_stride, w, keys, p.data(), queries,
                                                  wanted.data() + c, o_stride, scale.data());
  }
  for (; c < columns; c += w) {
    add_values<queries, 1, PrefetchHint::streaming>(v.data() + c, v_stride, std::min(w, columns - c), keys,
                                                    p.data(), queries, wanted.data() + c, o_stride,
                                                    scale.data());
  }
  return std::memcmp(o.data(), wanted.data(), o.size() * sizeof(Real)) == 0;
}

template <class Real, class Tv>
void check_long_values() {
  Random random(3);
  for_each_count<1, Real>([&]<int queries>() {
    for (const Index keys : {0, 1, 3, 4, 5, 128}) {
      for (const Index columns : {1, 7, 16, 17, 31, 32, 48, 63, 64, 65, 128, 200}) {
        INFO("queries=" << queries << " keys=" << keys << " columns=" << columns);
        CHECK(long_values_are_right<queries, Real, Tv>(keys, columns, 0, random));
        CHECK(long_values_are_right<queries, Real, Tv>(keys, columns, 3, random));
      }
    }
  });
}

}  // namespace

TEST_CASE("row_kernel: scores for every number of queries, keys and columns", "[row_kernel]") {
  SECTION("float") { check_scores<float, float>(); }
  SECTION("double") { check_scores<double, double>(); }
  SECTION("bfloat16 keys") { check_scores<float, bfloat16>(); }
  SECTION("half keys") { check_scores<float, half>(); }
  SECTION("float keys, double queries") { check_scores<double, float>(); }
}

TEST_CASE("row_kernel: weighted sums of values for every number of queries, keys and columns",
          "[row_kernel]") {
  SECTION("float") { check_values<float, float>(); }
  SECTION("double") { check_values<double, double>(); }
  SECTION("bfloat16 values") { check_values<float, bfloat16>(); }
  SECTION("half values") { check_values<float, half>(); }
}

TEST_CASE("row_kernel: weighted sums of long rows have the bits of those of short rows", "[row_kernel]") {
  SECTION("float") { check_long_values<float, float>(); }
  SECTION("double") { check_long_values<double, double>(); }
  SECTION("bfloat16 values") { check_long_values<float, bfloat16>(); }
  SECTION("half values") { check_long_values<float, half>(); }
  SECTION("int8 values") { check_long_values<float, std::int8_t>(); }
}
