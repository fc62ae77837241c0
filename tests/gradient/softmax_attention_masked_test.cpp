// What a query does not see gets no gradient from it and gives none to it.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "support/drawn_masks.hpp"
#include "support/gauge.hpp"
#include "support/gradient.hpp"

namespace {

using namespace test;
using Eigen::bfloat16;
using longspan::softmax_attention;

constexpr double poisons[] = {std::numeric_limits<double>::quiet_NaN(),
                              std::numeric_limits<double>::infinity(),
                              -std::numeric_limits<double>::infinity()};

template <class T>
void fill_row(T* row, Index cols, double with) {
  std::fill_n(row, cols, static_cast<T>(static_cast<float>(with)));
}

/// Writes `with` to the keys and values that no query sees, and to the rows of q and dout that see no key. Returns the
/// number of these rows.
template <class C>
Index fill_unseen(C& call, Index first_query, const Predicate& sees, double with) {
  auto& in = call.forward;
  const Index group = in.q.heads / in.k.heads;
  Index count = 0;
  for (Index b = 0; b < in.q.batch; ++b) {
    std::vector<bool> is_seen(static_cast<std::size_t>(in.k.heads * in.k.rows));
    for (Index h = 0; h < in.q.heads; ++h) {
      for (Index i = 0; i < in.q.rows; ++i) {
        bool any = false;
        for (Index j = 0; j < in.k.rows; ++j) {
          if (!sees(b, h, first_query + i, j)) continue;
          any = true;
          is_seen[static_cast<std::size_t>(h / group * in.k.rows + j)] = true;
        }
        if (any) continue;
        fill_row(in.q.row(b, h, i), in.q.cols, with);
        fill_row(call.dout.row(b, h, i), in.v.cols, with);
        ++count;
      }
    }
    for (Index n = 0; n < in.k.heads * in.k.rows; ++n) {
      if (is_seen[static_cast<std::size_t>(n)]) continue;
      fill_row(in.k.row(b, 0, n), in.k.cols, with);
      fill_row(in.v.row(b, 0, n), in.v.cols, with);
      ++count;
    }
  }
  return count;
}

Shape small_shape(Random& random) {
  const Index kv_heads = random.between(1, 2);
  return {random.between(1, 2),
          kv_heads * random.between(1, 3),
          kv_heads,
          random.pick<Index>({1, 2, 9, 30, 97, 130}),
          random.between(1, 300),
          random.pick<Index>({1, 8, 17}),
          random.pick<Index>({1, 8, 19})};
}

template <class C, class M>
Index check_unseen(const Shape& shape, Index first_query, const M& mask, const Predicate& sees,
                   Random& random) {
  softmax_attention attend{mask};
  attend.first_query = first_query;
  C zeros(shape, Values::normal, random);
  zeros.has_dlse = random.chance(0.5);
  C poisoned = zeros;
  fill_unseen(zeros, first_query, sees, 0);
  const Index count = fill_unseen(poisoned, first_query, sees, poisons[random.between(0, 2)]);
  zeros.run(attend);
  poisoned.run(attend, longspan::openmp{2});
  CHECK(zeros.same_gradients(poisoned));
  return count;
}

/// The rows of a gradient that contain a number that is not finite, in compact order.
template <class T>
std::vector<bool> not_finite(const Tensor<T>& x) {
  std::vector<bool> rows;
  for (Index n = 0; n < x.batch * x.heads * x.rows; ++n) {
    const T* row = x.row(0, 0, n);
    rows.push_back(
        std::any_of(row, row + x.cols, [](T y) { return !std::isfinite(static_cast<double>(y)); }));
  }
  return rows;
}

}  // namespace

TEST_CASE("gradient of softmax_attention: what is hidden has the effect of zeros, to the bit",
          "[mask][nan]") {
  Index hidden = 0;
  for_each_case(15, [&](Random& random) {
    const Shape shape = small_shape(random);
    const Index first_query =
        random.chance(0.5) ? shape.kv_len - shape.q_len : random.between(-5, shape.kv_len + 5);
    DrawnMasks(shape, random).for_each([&](const char* name, const auto& mask, const Predicate& sees) {
      INFO(name << " " << shape.text() << " first_query=" << first_query);
      hidden += check_unseen<GradientCall<float>>(shape, first_query, AnyMask(mask), sees, random);
    });
  });
  CHECK(hidden > 0);
}

TEMPLATE_TEST_CASE("gradient of softmax_attention: hidden NaN in other types", "[mask][nan]", double,
                   bfloat16) {
  const Predicate sees = [](Index, Index, Index i, Index j) { return j <= i && (j >= i - 20 || j < 3); };
  const auto mask = longspan::causal{} & (longspan::window{.left = 20} | longspan::sinks{3});
  for_each_case(15, [&](Random& random) {
    const Shape shape = small_shape(random);
    INFO(shape.text());
    check_unseen<GradientCall<TestType>>(shape, random.between(-5, shape.kv_len + 5), mask, sees, random);
  });
}

TEST_CASE("gradient of softmax_attention: NaN in one query or in its dout reaches only keys that it sees",
          "[mask][nan]") {
  for_each_case(15, [&](Random& random) {
    const Shape shape = small_shape(random);
    const Index first_query = shape.kv_len - shape.q_len, group = shape.heads / shape.kv_heads;
    DrawnMasks(shape, random).for_each([&](const char* name, const auto& mask, const Predicate& sees) {
      const Index b = random.between(0, shape.batch - 1), h = random.between(0, shape.heads - 1),
                  i = random.between(0, shape.q_len - 1);
      const bool in_query = random.chance(0.5);
      INFO(name << " " << shape.text() << (in_query ? " query " : " dout ") << b << ' ' << h << ' ' << i);
      const softmax_attention attend{AnyMask(mask)};
      GradientCall<float> clean(shape, Values::normal, random), poisoned = clean;
      clean.run(attend);
      fill_row(in_query ? poisoned.forward.q.row(b, h, i) : poisoned.dout.row(b, h, i),
               in_query ? shape.head_dim : shape.value_dim, NAN);
      poisoned.run(attend);
      std::vector<bool> wanted_dq(static_cast<std::size_t>(shape.batch * shape.heads * shape.q_len)),
          wanted_dk(static_cast<std::size_t>(shape.batch * shape.kv_heads * shape.kv_len));
      for (Index j = 0; j < shape.kv_len; ++j) {
        if (!sees(b, h, first_query + i, j)) continue;
        wanted_dq[static_cast<std::size_t>((b * shape.heads + h) * shape.q_len + i)] = true;
        wanted_dk[static_cast<std::size_t>((b * shape.kv_heads + h / group) * shape.kv_len + j)] = true;
      }
      CHECK(not_finite(poisoned.dq) == wanted_dq);
      CHECK(not_finite(poisoned.dk) == wanted_dk);
      CHECK(not_finite(poisoned.dv) == wanted_dk);
      bool others_unchanged = true;
      for (std::size_t n = 0; n < wanted_dk.size(); ++n) {
        for (Index c = 0; c < shape.head_dim && !wanted_dk[n]; ++c)
          others_unchanged &= clean.dk.row(0, 0, Index(n))[c] == poisoned.dk.row(0, 0, Index(n))[c];
      }
      for (std::size_t n = 0; n < wanted_dq.size(); ++n) {
        for (Index c = 0; c < shape.head_dim && !wanted_dq[n]; ++c)
          others_unchanged &= clean.dq.row(0, 0, Index(n))[c] == poisoned.dq.row(0, 0, Index(n))[c];
      }
      CHECK(others_unchanged);
    });
  });
}

TEST_CASE("gradient of softmax_attention: NaN in a value reaches only the queries that see it",
          "[mask][nan]") {
  for_each_case(10, [&](Random& random) {
    const Shape shape = small_shape(random);
    const Index first_query = shape.kv_len - shape.q_len, group = shape.heads / shape.kv_heads;
    DrawnMasks(shape, random).for_each([&](const char* name, const auto& mask, const Predicate& sees) {
      const Index b = random.between(0, shape.batch - 1), kv = random.between(0, shape.kv_heads - 1),
                  j = random.between(0, shape.kv_len - 1);
      INFO(name << " " << shape.text() << " value " << b << ' ' << kv << ' ' << j);
      GradientCall<float> poisoned(shape, Values::normal, random);
      fill_row(poisoned.forward.v.row(b, kv, j), shape.value_dim, NAN);
      poisoned.run(softmax_attention{AnyMask(mask)});
      std::vector<bool> wanted(static_cast<std::size_t>(shape.batch * shape.heads * shape.q_len));
      for (Index h = kv * group; h < (kv + 1) * group; ++h) {
        for (Index i = 0; i < shape.q_len; ++i)
          wanted[static_cast<std::size_t>((b * shape.heads + h) * shape.q_len + i)] =
              sees(b, h, first_query + i, j);
      }
      CHECK(not_finite(poisoned.dq) == wanted);
    });
  });
}

namespace {

/// A score function that hides keys by -infinity, as a user may write it.
struct hides_some {
  float operator()(float s, Index, Index, Index i, Index j) const {
    return shows(i, j) ? s : -std::numeric_limits<float>::infinity();
  }
  float derivative(float, Index, Index, Index, Index) const { return 1; }
  static bool shows(Index i, Index j) { return every_third{}.sees(i, j) && j % 4 != 1; }
};

}  // namespace

TEST_CASE("gradient of softmax_attention: a score of -infinity hides the key", "[mask][nan]") {
  for_each_case(15, [](Random& random) {
    const Shape shape = small_shape(random);
    INFO(shape.text());
    // Values of hidden keys, and dout of rows without keys, may hold anything. A score cannot hide NaN in k.
    GradientCall<float> zeros(shape, Values::normal, random), poisoned = zeros;
    const Predicate sees = [](Index, Index, Index i, Index j) { return hides_some::shows(i, j); };
    const Index first_query = shape.kv_len - shape.q_len;
    fill_unseen(zeros, first_query, sees, 0);
    fill_unseen(poisoned, first_query, sees, poisons[random.between(0, 2)]);
    poisoned.forward.k = zeros.forward.k;
    poisoned.forward.q = zeros.forward.q;
    zeros.run(softmax_attention{hides_some{}});
    poisoned.run(softmax_attention{hides_some{}});
    CHECK(zeros.same_gradients(poisoned));
    check_gradient({.sees = sees}, zeros);
  });
}

TEMPLATE_TEST_CASE(
    "gradient of softmax_attention: rows without keys and keys without queries have gradient 0", "[mask]",
    float, double, bfloat16) {
  const auto all_zero = [](const auto& x) {
    return std::all_of(x.values.begin(), x.values.end(), [](auto n) {
      return static_cast<double>(n) == 0 && !std::signbit(static_cast<double>(n));
    });
  };
  Random random(3);
  SECTION("no keys, no queries") {
    for (const Index length : {1, 8, 9, 100}) {
      GradientCall<TestType> no_keys(Shape{2, 3, 1, length, 0, 8, 9}, Values::normal, random);
      no_keys.run(softmax_attention{}, longspan::openmp{3});
      CHECK(all_zero(no_keys.dq));
      GradientCall<TestType> no_queries(Shape{2, 3, 1, 0, length, 8, 9}, Values::normal, random);
      no_queries.run(softmax_attention{}, longspan::openmp{3});
      CHECK(all_zero(no_queries.dk));
      CHECK(all_zero(no_queries.dv));
    }
  }
  SECTION("all keys after all queries, with a position encoding") {
    softmax_attention attend{longspan::causal{}, longspan::rotary(longspan::Pairing::half_split)};
    attend.first_query = -200;
    GradientCall<TestType> call(Shape{2, 2, 1, 150, 140, 8, 9}, Values::normal, random);
    call.has_dlse = true;
    call.run(attend, longspan::openmp{3});
    CHECK(all_zero(call.dq));
    CHECK(all_zero(call.dk));
    CHECK(all_zero(call.dv));
  }
}
