// Score functions in the decode kernel: blocks of scores, and whole calls.
#include "longspan/detail/decode/change_scores.hpp"

#include <cmath>
#include <limits>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include "longspan/softmax_attention.hpp"
#include "longspan/stream/kv_cache.hpp"
#include "support/catch.hpp"
#include "support/gauge.hpp"
#include "support/int8_rows.hpp"
#include "support/stream_calls.hpp"
#include "support/ulp.hpp"

namespace {

using namespace test;
using longspan::additive_bias;
using longspan::alibi;
using longspan::causal;
using longspan::softcap;
using longspan::softmax_attention;
using longspan::detail::FloatArithmetic;
using longspan::detail::lanes;
using longspan::detail::Packet;
using longspan::detail::QueryLanes;
using longspan::detail::ScoreBlock;

constexpr float infinite = std::numeric_limits<float>::infinity();

/// A user-defined packet score that accepts one head for all lanes.
struct plus_head {
  template <class Real>
  Real operator()(Real s, Index, Index h, Index i, Index j) const {
    return s + static_cast<Real>(h) - static_cast<Real>(i - j) / 8;
  }
  template <class Real>
  Packet<Real> on_packet(Packet<Real> s, Index h, Packet<Real> distance) const {
    using longspan::detail::broadcast;
    return s + broadcast(static_cast<Real>(h)) - distance * broadcast(Real(0.125));
  }
};

/// Compares each score of a block with the scalar score function: the worst error, in ulp of the scores' size.
template <class Real, class S>
double worst_change(const S& score, const QueryLanes& queries, Index first, Index count,
                    longspan::KeyRange keys, Random& random) {
  constexpr Real unit = longspan::detail::score_unit<Real>;
  const Index used = (keys.end - keys.begin) * count;
  std::vector<Real> s(static_cast<std::size_t>(longspan::detail::round_up(used, Index(lanes<Real>))));
  for (Real& x : s) x = static_cast<Real>(4 * random.normal());
  const std::vector<Real> raw = s;
  longspan::detail::change_scores(ScoreBlock<Real>{s.data(), nullptr, queries, first, count, keys}, score);
  double worst = 0;
  for (Index at = 0; at < used; ++at) {
    const Index query = first + at % count;
    if (query >= queries.count) continue;
    const Real of_score = score(raw[std::size_t(at)], queries.batch, queries.head(query),
                                queries.position(query), keys.begin + at / count);
    const Real wanted = of_score * unit,
               size = std::max({std::abs(raw[std::size_t(at)]), std::abs(wanted), Real(1)});
    worst = std::max(worst, double(std::abs(s[std::size_t(at)] - wanted) / test::ulp<Real>(size)));
  }
  return worst;
}

}  // namespace

TEMPLATE_TEST_CASE("change_scores: every score is that of its own query, head and key", "[decode][score]",
                   float, double) {
  const std::vector<float> slopes = longspan::alibi_slopes(40);
  const auto striped = [](auto s, Index b, Index h, Index i, Index j) {
    return s + static_cast<decltype(s)>((b + 3 * h + i + 2 * j) % 7);
  };
  for_each_case(10, [&](Random& random) {
    for (Index count = 1; count <= std::min<Index>(8, lanes<TestType>); count *= 2) {
      // Also positions beyond 2^24, where a float distance has no unit steps.
      const Index position = random.pick<Index>({0, 300, (Index{1} << 24) + 3, Index{1} << 40});
      const Index heads = random.between(1, 8), queries = random.between(1, 8);
      const QueryLanes of_call{1, 3, heads, 0, queries, position};
      const Index first = queries > count ? queries / count * count - count : 0;
      const Index begin = random.pick<Index>({0, 1, 256});
      const longspan::KeyRange keys{begin, begin + random.pick<Index>({1, 7, 16, 100, 256})};
      INFO("count=" << count << " heads=" << heads << " queries=" << queries << " position=" << position);
      const auto worst = [&](const auto& score) {
        return worst_change<TestType>(score, of_call, first, count, keys, random);
      };
      CHECK(worst(softcap{3}) <= 16);
      CHECK(worst(alibi{slopes}) <= 4);
      CHECK(worst(softcap{3} | alibi{slopes}) <= 16);
      CHECK(worst(plus_head{}) <= 4);
      CHECK(worst(plus_head{} | alibi{slopes}) <= 4);
      CHECK(worst(striped) <= 1);
      CHECK(worst((softcap{5} | striped) | softcap{9}) <= 32);
    }
  });
}

TEST_CASE("change_scores: a score of -infinity becomes the finite masked score, NaN stays NaN",
          "[decode][score]") {
  const Index keys = 3, count = std::min<Index>(2, lanes<float>);
  const QueryLanes queries{0, 0, 1, 0, 2, 5};
  const auto changed = [&](const auto& score) {
    std::vector<float> s(
        static_cast<std::size_t>(longspan::detail::round_up(keys * count, Index(lanes<float>))), 1.0f);
    const bool hides = longspan::detail::change_scores(
        ScoreBlock<float>{s.data(), nullptr, queries, 0, count, {0, keys}}, score);
    return std::pair{s, hides};
  };
  const auto hide_second = [](float s, Index, Index, Index, Index j) { return j == 1 ? -infinite : s; };
  const auto [s, hides] = changed(hide_second);
  CHECK(hides);
  CHECK(s[std::size_t(count)] == FloatArithmetic<float>::masked_score);
  CHECK(s[0] > 1);
  CHECK_FALSE(changed(softcap{2}).second);
  CHECK_FALSE(changed([](float x, Index, Index, Index, Index) { return x; }).second);
  const auto of_nan = changed([](float, Index, Index, Index, Index) { return NAN; });
  CHECK(std::isnan(of_nan.first[0]));
  CHECK_FALSE(of_nan.second);
  const std::vector<float> endless{infinite};
  CHECK(changed(alibi{endless}).second);
}

namespace {

/// Every number of queries of this kernel, in one head and in groups, for sizes around its blocks and chunks.
template <class Real, class S>
void check_few_queries(const S& score, const decltype(Definition::score)& function, int rounds) {
  const auto past = [](Index, Index, Index i, Index j) { return j <= i; };
  for_each_case(rounds, [&](Random& random) {
    for (Index queries = 1; queries <= 8; ++queries) {
      for (Index q_len = 1; q_len <= queries; ++q_len) {
        if (queries % q_len != 0) continue;
        const Index kv_len = q_len + random.pick<Index>({0, 7, 127, 129, 256, 300, 2100});
        const Shape shape{2,
                          2 * queries / q_len,
                          2,
                          q_len,
                          kv_len,
                          random.pick<Index>({1, 16, 33}),
                          random.pick<Index>({1, 16, 70})};
        check_call<Real>(shape, random.pick(all_values), random, softmax_attention{causal{}, score},
                         {.sees = past, .score = function});
      }
    }
  });
}

/// ALiBi that accepts slopes for more heads than a call has.
struct spare_slopes : longspan::alibi {
  explicit spare_slopes(std::span<const float> of_heads) : longspan::alibi{of_heads} {}
  void check(const longspan::CallSizes&) const {}
};

const std::vector<float>& sixteen_slopes() {
  static const std::vector<float> slopes = longspan::alibi_slopes(16);
  return slopes;
}

double capped(double s, double cap) { return cap * std::tanh(s / cap); }
double sloped(double s, Index h, Index i, Index j) {
  return s - double(sixteen_slopes()[std::size_t(h)]) * std::abs(double(i - j));
}

}  // namespace

TEST_CASE("decode: within the bound with packet scores", "[decode][gauge][score]") {
  check_few_queries<float>(
      softcap{5}, [](double s, Index, Index, Index, Index) { return capped(s, 5); }, 2);
  check_few_queries<float>(
      spare_slopes{sixteen_slopes()},
      [](double s, Index, Index h, Index i, Index j) { return sloped(s, h, i, j); }, 2);
  check_few_queries<float>(
      softcap{20} | spare_slopes{sixteen_slopes()},
      [](double s, Index, Index h, Index i, Index j) { return sloped(capped(s, 20), h, i, j); }, 1);
  check_few_queries<float>(
      plus_head{},
      [](double s, Index, Index h, Index i, Index j) { return s + double(h) - double(i - j) / 8; }, 1);
}

TEST_CASE("decode: within the bound with scores that are called key by key", "[decode][gauge][score]") {
  const auto striped = [](auto s, Index b, Index h, Index i, Index j) {
    return s + static_cast<decltype(s)>((b + h + i + 2 * j) % 5);
  };
  const auto of_double = [&](double s, Index b, Index h, Index i, Index j) { return striped(s, b, h, i, j); };
  check_few_queries<float>(striped, of_double, 1);
  check_few_queries<double>(striped, of_double, 1);
  check_few_queries<float>(
      striped | softcap{9},
      [&](double s, Index b, Index h, Index i, Index j) { return capped(striped(s, b, h, i, j), 9); }, 1);
}

TEST_CASE("decode: within the bound with a bias for each head or for all heads", "[decode][gauge][score]") {
  for_each_case(20, [](Random& random) {
    const Index q_len = random.between(1, 4), kv_len = q_len + random.pick<Index>({0, 100, 300, 2100});
    const Shape shape{2, 2 * random.between(1, 8 / q_len), 2, q_len, kv_len, 16, 20};
    const bool repeats = random.chance(0.5);
    Tensor<float> bias(repeats ? 1 : shape.batch, repeats ? 1 : shape.heads, q_len, kv_len);
    fill_normal(bias, random, 2);
    check_call<float>(shape, random.pick(all_values), random, softmax_attention{additive_bias(bias.view())},
                      {.score = [&](double s, Index b, Index h, Index i, Index j) {
                        return s + double(bias.row(repeats ? 0 : b, repeats ? 0 : h, i - kv_len + q_len)[j]);
                      }});
  });
}

TEST_CASE(
    "decode: a key hidden by a score of -infinity has no effect, even if its values are NaN or infinite",
    "[decode][masked][nan]") {
  // Depends on the head, so that the queries of one pass hide different keys; all heads hide the second block.
  const auto sees = [](Index h, Index j) { return (j + h) % 3 != 0 && (j < 256 || j >= 512); };
  const auto score = [&](float s, Index, Index h, Index, Index j) { return sees(h, j) ? s : -infinite; };
  for (const Index heads : {1, 2, 3, 8}) {
    for (const Index kv_len : {5, 256, 700, 5000}) {
      Random random(1);
      const Shape shape{1, heads, 1, 1, kv_len, 16, 20};
      INFO(shape.text());
      Call<float> clean(shape, Values::normal, random), poisoned = clean;
      clean.run(softmax_attention{causal{}, score});
      check_against(
          exact_attention({.sees = [&](Index, Index h, Index, Index j) { return sees(h, j); }}, clean),
          clean);
      Index poisons = 0;
      for (Index j = 0; j < kv_len; ++j) {
        bool seen = false;
        for (Index h = 0; h < heads; ++h) seen = seen || sees(h, j);
        if (seen) continue;
        std::fill_n(poisoned.v.row(0, 0, j), 20, j % 2 == 0 ? NAN : infinite);
        ++poisons;
      }
      poisoned.run(softmax_attention{causal{}, score});
      CHECK(clean.same_outputs(poisoned));
      CHECK((poisons > 0) == (heads == 1 || kv_len > 256));
      if (heads == 1) continue;
      // A key that head 0 hides and head 1 sees: NaN reaches only head 1.
      Call<float> seen_by_one = clean.unrun();
      std::fill_n(seen_by_one.v.row(0, 0, 3), 20, NAN);
      seen_by_one.run(softmax_attention{causal{}, score});
      CHECK(std::isnan(seen_by_one.out.row(0, 1, 0)[0]));
      CHECK(Tensor<float>::same_bits({seen_by_one.out.row(0, 0, 0), seen_by_one.out.row(0, 0, 0) + 20},
                                     {clean.out.row(0, 0, 0), clean.out.row(0, 0, 0) + 20}));
    }
  }
}

TEST_CASE("decode: a mask hides keys from packet scores, and a score hides all keys of a row",
          "[decode][masked][nan]") {
  Random random(2);
  const Shape shape{1, 4, 1, 2, 300, 8, 9};
  const std::vector<float> slopes{0.5f, 0.25f, 0.25f, 0.125f};
  Call<float> call(shape, Values::normal, random);
  softmax_attention attend{causal{} & longspan::window{.left = 40}, softcap{5} | alibi{slopes}};
  for (Index j = 0; j < 259; ++j) {  // the first query sees the last of these keys
    std::fill_n(call.k.row(0, 0, j), 8, NAN);
    std::fill_n(call.v.row(0, 0, j), 9, NAN);
  }
  call.run(attend);
  for (Index h = 0; h < 4; ++h) {
    CHECK(std::isfinite(call.out.row(0, h, 1)[0]));
    CHECK(std::isfinite(call.lse(0, h, 1)));
    CHECK(std::isnan(call.out.row(0, h, 0)[0]));
  }
  const auto hide_all = [](float, Index, Index, Index, Index) { return -infinite; };
  call.run(softmax_attention{causal{}, hide_all});
  for (const float x : call.out.values) REQUIRE(x == 0);
  for (const float x : call.lse.values) REQUIRE(x == -infinite);
}

TEST_CASE("decode: a score function is called only for visible keys", "[decode][score]") {
  Random random(3);
  const Shape shape{1, 6, 2, 1, 3000, 8, 8};
  Call<float> call(shape, Values::normal, random);
  const auto seen = [](Index j) { return (j >= 1000 && j % 5 != 0) || j < 3; };
  struct some_keys {
    decltype(seen) predicate;
    bool sees(Index, Index j) const { return predicate(j); }
  };
  std::vector<int> calls(3000);
  const auto count = [&](float s, Index, Index, Index i, Index j) {
    if (i == 2999) ++calls.at(std::size_t(j));
    return s;
  };
  call.run(softmax_attention{some_keys{seen}, count}, longspan::serial{});
  for (Index j = 0; j < 3000; ++j) REQUIRE(calls[std::size_t(j)] == (seen(j) ? 6 : 0));
}

TEST_CASE("decode: an exception of a score function reaches the caller", "[decode][score]") {
  Random random(4);
  for (const Index heads : {1, 8}) {
    Call<float> call(Shape{1, heads, 1, 1, 5000, 64, 64}, Values::normal, random);
    const auto throwing = [](float s, Index, Index, Index, Index j) {
      if (j == 4000) throw std::out_of_range("a table ends");
      return s;
    };
    CHECK_THROWS_WITH(call.run(softmax_attention{causal{}, throwing}, longspan::serial{}), "a table ends");
    CHECK_THROWS_WITH(call.run(softmax_attention{causal{}, throwing}, longspan::openmp{2}), "a table ends");
  }
}

TEST_CASE("decode: within the bound with scores and int8 rows, in pages of any size",
          "[decode][gauge][score]") {
  for_each_case(6, [](Random& random) {
    const Index group = random.pick<Index>({1, 2, 5, 8}), tokens = random.pick<Index>({5, 40, 270});
    const Shape shape{
        1, 2 * group, 2, tokens, tokens, random.pick<Index>({8, 33}), random.pick<Index>({8, 20})};
    const longspan::kv_cache_options options{.page_size = random.pick<Index>({0, 7, 16, 256})};
    INFO(shape.text() << " page=" << options.page_size);
    Call<float> call(shape, random.pick({Values::normal, Values::peaked, Values::log_normal}), random);
    const Tensor<double> k = kept_as_int8(call.k), v = kept_as_int8(call.v);
    const auto check = [&](const auto& attend, const decltype(Definition::score)& function) {
      auto stream = attend.template stream<std::int8_t>(stream_shape(shape), options);
      extend(stream, call, 0, tokens - 5);
      for (Index n = tokens - 5; n < tokens; ++n) extend(stream, call, n, 1);
      const Definition what{.sees = [](Index, Index, Index i, Index j) { return j <= i; }, .score = function};
      check_against(
          exact_attention<float, double, double>(what, std::as_const(call.q).view(), k.view(), v.view()),
          call);
    };
    check(softmax_attention{softcap{2}}, [](double s, Index, Index, Index, Index) { return capped(s, 2); });
    check(softmax_attention{spare_slopes{sixteen_slopes()}},
          [](double s, Index, Index h, Index i, Index j) { return sloped(s, h, i, j); });
  });
}
