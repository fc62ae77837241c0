// The edges of the domain of softmax_attention: denormal numbers, huge numbers, dimensions of 0.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

#include "longspan/softmax_attention.hpp"
#include "support/catch.hpp"
#include "support/floating_point_mode.hpp"
#include "support/oracle.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"
#include "support/thread_pool.hpp"

namespace {

using namespace test;
using longspan::causal;
using longspan::softmax_attention;

/// Numbers of queries for the decode kernel and for the prefill kernel.
const std::vector<Index> query_counts{5, 20};

/// Checks that |out - exact| is within the documented bound, whose last term is for numbers that count as 0.
template <class T>
void check_with_denormals(const Call<T>& call, const Definition& what) {
  const Exact exact = exact_attention(what, call);
  const double counts_as_zero =
      2 * static_cast<double>(std::numeric_limits<T>::min()) * static_cast<double>(call.k.rows + 2);
  double worst = 0;
  for (std::size_t n = 0; n < exact.out.size(); ++n) {
    const double allowed =
        16 * unit_roundoff<T> * (1 + exact.condition[n / std::size_t(call.v.cols)]) * exact.gauge[n] +
        counts_as_zero;
    worst = std::max(worst, std::abs(static_cast<double>(call.out.values[n]) - exact.out[n]) / allowed);
  }
  CHECK(worst <= 1);
}

TEST_CASE("denormal values, and products that are denormal, stay within the bound", "[domain]") {
  Random random(GENERATE(1u, 2u));
  for (const Index q_len : query_counts) {
    Call<float> call({1, 2, 1, q_len, 300, 16, 12}, Values::normal, random);
    for (const float factor : {1e-30f, 1e-35f, 1e-37f, 1e-38f, 1e-40f}) {
      Call<float> small = call;
      for (float& x : small.v.values) x *= factor;
      small.run(softmax_attention{});
      check_with_denormals(small, {});
      for (float& x : small.q.values) x *= factor;
      small.run(softmax_attention{});
      check_with_denormals(small, {});
    }
    for (const float above :
         {60.0f, 83.0f, 85.0f, 87.0f, 90.0f}) {  // how much the first key scores above all others
      Call<float> peaked = call;
      for (Index i = 0; i < 2 * q_len; ++i) peaked.q.values[std::size_t(i * 16)] = 4;
      for (Index j = 0; j < 300; ++j) peaked.k.row(0, 0, j)[0] = j == 0 ? above : 0;
      peaked.run(softmax_attention{});
      check_with_denormals(peaked, {});
    }
  }
}

TEST_CASE("denormal values of double stay within the bound", "[domain]") {
  Random random(3);
  for (const Index q_len : query_counts) {
    Call<double> call({1, 2, 1, q_len, 100, 8, 6}, Values::normal, random);
    for (double& x : call.v.values) x *= 1e-308;
    call.run(softmax_attention{});
    check_with_denormals(call, {});
  }
}

TEST_CASE("bits do not depend on the executor if numbers are denormal", "[domain][bits]") {
  Random random(4);
  for (const Index q_len : {1, 5, 20, 200}) {
    Call<float> serially({1, 2, 1, q_len, 5000, 16, 12}, Values::peaked, random);
    for (float& x : serially.v.values) x *= 1e-37f;
    Call<float> team = serially, pool = serially;
    serially.run(softmax_attention{}, longspan::serial{});
    team.run(softmax_attention{}, longspan::openmp{3});
    pool.run(softmax_attention{}, ThreadPool(3));
    CHECK(serially.same_outputs(team));
    CHECK(serially.same_outputs(pool));
  }
}

TEST_CASE("a call restores the floating-point mode when it returns and when a score throws", "[domain]") {
  Random random(5);
  const FloatingPointMode before;
  for (const Index q_len : query_counts) {
    Call<float> call({1, 2, 1, q_len, 3000, 16, 12}, Values::normal, random);
    for (const Index threads : {1, 3}) {
      call.run(softmax_attention{}, longspan::openmp{threads});
      CHECK(before.is_that_of_this_thread());
      longspan::openmp{threads}.for_each(8, [](Index, Index) { CHECK_FALSE(denormals_count_as_zero()); });
      const softmax_attention throws{
          [](float, Index, Index, Index, Index) -> float { throw std::runtime_error("score"); }};
      CHECK_THROWS_AS(call.run(throws, longspan::openmp{threads}), std::runtime_error);
      CHECK(before.is_that_of_this_thread());
      longspan::openmp{threads}.for_each(8, [](Index, Index) { CHECK_FALSE(denormals_count_as_zero()); });
    }
  }
}

/// Out and lse of the first of q_len queries, with one column: queries `q`, keys `k`, values `v`, scale 1.
template <class T>
std::pair<T, T> attend_one(Index q_len, T q, const std::vector<T>& k, const std::vector<T>& v) {
  Call<T> call({1, 1, 1, q_len, Index(k.size()), 1, 1});
  call.q.values.assign(std::size_t(q_len), q);
  call.k.values = k;
  call.v.values = v;
  softmax_attention attend;
  attend.scale = 1;
  call.run(attend);
  return {call.out.values[0], call.lse.values[0]};
}

TEST_CASE("values are averaged if their sum is within 2^127, and otherwise the average is not finite",
          "[domain]") {
  for (const Index q_len : query_counts) {
    for (const std::size_t keys : {std::size_t(1), std::size_t(2), std::size_t(128), std::size_t(4096)}) {
      const float most = 0x1p127f / static_cast<float>(keys);
      const std::vector<float> k(keys, 0.0f);
      CHECK(attend_one(q_len, 1.0f, k, std::vector<float>(keys, most)).first == most);
      CHECK(attend_one(q_len, 1.0f, k, std::vector<float>(keys, -most)).first == -most);
      if (keys > 1)
        CHECK_FALSE(std::isfinite(attend_one(q_len, 1.0f, k, std::vector<float>(keys, 2 * most)).first));
    }
    CHECK(attend_one(q_len, 1.0, {0, 0}, {0x1p1021, 0x1p1021}).first == 0x1p1021);
  }
}

TEST_CASE("scores within 2^125 are computed, lower ones may hide their key, an overflow is NaN", "[domain]") {
  constexpr float q = 0x1p100f, k = 0x1p25f;
  const auto nearly = [](float x) { return Approx(x).epsilon(1e-6); };
  for (const Index q_len : query_counts) {
    for (const float sign : {1.0f, -1.0f}) {
      const auto [out, lse] = attend_one(q_len, q, {sign * k, sign * k}, {1, 3});
      CHECK(out == 2);
      CHECK(lse == nearly(sign * 0x1p125f));
      CHECK(attend_one(q_len, q, {sign * k, 0}, {1, 3}).first == (sign > 0 ? 1 : 3));
    }
    CHECK(attend_one(q_len, q, {-k, k}, {1, 3}).first == 3);
    // Lower scores: hidden next to other keys, and without other keys.
    CHECK(attend_one(q_len, q, {-1e6f * k, 0}, {1, 3}).first == 3);
    const auto [none, of_none] = attend_one(q_len, q, {-1e6f * k, -1e6f * k}, {1, 3});
    CHECK(none == 0);
    CHECK(of_none == -std::numeric_limits<float>::infinity());
    // Higher scores.
    CHECK(std::isnan(attend_one(q_len, q, {1e6f * k, 0}, {1, 3}).first));
    // Queries up to 2^127 with keys of at least 2^-126.
    CHECK(attend_one(q_len, 0x1p127f, {0x1p-126f, 0}, {1, 0}).first == nearly(1 / (1 + std::exp(-2.0f))));
    const auto [mean, of_double] = attend_one(q_len, 0x1p1000, {-0x1p21, -0x1p21}, {1.0, 3.0});
    CHECK(mean == 2);
    CHECK(of_double == Approx(-0x1p1021));
  }
}

/// A view without elements and memory, but with nonzero strides.
template <class T>
TensorView<T> nothing(Index rows, Index cols) {
  return {nullptr, 1, 2, rows, cols, 1000, 100, 10};
}

TEST_CASE("dimensions of 0 need no memory, whatever their strides", "[domain]") {
  for (const Index q_len : query_counts) {
    for (const Index kv_len : {Index(3), Index(300)}) {
      Call<float> call({1, 2, 2, q_len, kv_len, 4, 4});
      call.v.values.assign(call.v.values.size(), 3.0f);
      const auto q = std::as_const(call.q).view(), k = std::as_const(call.k).view(),
                 v = std::as_const(call.v).view();
      softmax_attention{}(nothing<const float>(q_len, 0), nothing<const float>(kv_len, 0), v, call.out.view(),
                          call.lse.view(), longspan::serial{});
      CHECK(call.out.values == std::vector<float>(call.out.values.size(), 3.0f));
      CHECK(call.lse.values[0] == Approx(std::log(static_cast<double>(kv_len))));
      call.lse.values.assign(call.lse.values.size(), 9.0f);
      softmax_attention{}(q, k, nothing<const float>(kv_len, 0), nothing<float>(q_len, 0), call.lse.view(),
                          longspan::serial{});
      CHECK(call.lse.values[0] == Approx(std::log(static_cast<double>(kv_len))));
      softmax_attention{}(q, nothing<const float>(0, 4), nothing<const float>(0, 4), call.out.view(),
                          call.lse.view(), longspan::serial{});
      CHECK(call.out.values == std::vector<float>(call.out.values.size(), 0.0f));
    }
  }
}

}  // namespace
