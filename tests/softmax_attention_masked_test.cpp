// What a query does not see has no effect on it.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "support/drawn_masks.hpp"
#include "support/gauge.hpp"

namespace {

using namespace test;
using Eigen::bfloat16;

constexpr double poisons[] = {std::numeric_limits<double>::quiet_NaN(),
                              std::numeric_limits<double>::infinity(),
                              -std::numeric_limits<double>::infinity()};

template <class T>
void poison(T* row, Index cols, double with) {
  std::fill_n(row, cols, static_cast<T>(static_cast<float>(with)));
}

/// True if any query of the heads that use KV head `kv` sees key j.
bool is_seen(const Shape& shape, Index first_query, const Predicate& sees, Index b, Index kv, Index j) {
  const Index group = shape.heads / shape.kv_heads;
  for (Index h = kv * group; h < (kv + 1) * group; ++h) {
    for (Index i = first_query; i < first_query + shape.q_len; ++i) {
      if (sees(b, h, i, j)) return true;
    }
  }
  return false;
}

/// Writes NaN or infinity to the keys that no query sees; returns their number.
template <class C>
Index poison_unseen(C& call, const Shape& shape, Index first_query, const Predicate& sees, double with) {
  Index count = 0;
  for (Index b = 0; b < shape.batch; ++b) {
    for (Index kv = 0; kv < shape.kv_heads; ++kv) {
      for (Index j = 0; j < shape.kv_len; ++j) {
        if (is_seen(shape, first_query, sees, b, kv, j)) continue;
        poison(call.k.row(b, kv, j), shape.head_dim, with);
        poison(call.v.row(b, kv, j), shape.value_dim, with);
        ++count;
      }
    }
  }
  return count;
}

/// The rows whose bits differ between two results: [batch, heads, q_len].
template <class C>
std::vector<bool> changed_rows(const C& a, const C& b) {
  std::vector<bool> changed;
  for (Index n = 0; n < a.lse.batch * a.lse.heads * a.lse.rows; ++n) {
    const std::size_t bytes = static_cast<std::size_t>(a.out.cols) * sizeof(a.out.values[0]);
    const bool out = bytes > 0 && std::memcmp(a.out.row(0, 0, n), b.out.row(0, 0, n), bytes) != 0;
    changed.push_back(out || std::memcmp(&a.lse.values[std::size_t(n)], &b.lse.values[std::size_t(n)],
                                         sizeof a.lse.values[0]) != 0);
  }
  return changed;
}

/// True if the rows that see key j of this KV head are NaN and all other rows are unchanged.
template <class C>
bool only_seeing_rows_are_nan(const C& clean, const C& poisoned, const Shape& shape, Index first_query,
                              const Predicate& sees, Index b, Index kv, Index j, bool nan_lse) {
  const Index group = shape.heads / shape.kv_heads;
  const auto changed = changed_rows(clean, poisoned);
  std::size_t n = 0;
  for (Index batch = 0; batch < shape.batch; ++batch) {
    for (Index h = 0; h < shape.heads; ++h) {
      for (Index i = 0; i < shape.q_len; ++i, ++n) {
        if (batch != b || h / group != kv || !sees(b, h, first_query + i, j)) {
          if (changed[n]) return false;
          continue;
        }
        if (nan_lse && !std::isnan(poisoned.lse.values[n])) return false;
        for (Index c = 0; c < shape.value_dim; ++c) {
          if (!std::isnan(static_cast<double>(poisoned.out.row(batch, h, i)[c]))) return false;
        }
      }
    }
  }
  return true;
}

Shape small_shape(Random& random, Index q_len) {
  const Index kv_heads = random.between(1, 2);
  return {random.between(1, 2),
          kv_heads * random.between(1, 3),
          kv_heads,
          q_len,
          random.between(1, 200),
          random.pick<Index>({1, 8, 17}),
          random.pick<Index>({1, 8, 19})};
}

}  // namespace

TEST_CASE("softmax_attention: within the bound with every mask", "[gauge][mask]") {
  for_each_case(12, [](Random& random) {
    const Shape shape = draw_shape(random);
    Definition what;
    if (random.chance(0.5)) what.first_query = random.between(-5, shape.kv_len + 5);
    const Values values = random.pick(all_values);
    DrawnMasks(shape, random).for_each([&](const char* name, const auto& mask, const Predicate& sees) {
      INFO(name);
      what.sees = sees;
      check_call<float>(shape, values, random, longspan::softmax_attention{mask}, what);
    });
  });
}

TEST_CASE("softmax_attention: within the bound with random combinations of masks", "[gauge][mask]") {
  for_each_case(150, [](Random& random) {
    Shape shape = draw_shape(random);
    shape.head_dim = std::min<Index>(shape.head_dim, 33);
    shape.value_dim = std::min<Index>(shape.value_dim, 33);
    const MaskCase mask = random_mask(random, 3);
    INFO(mask.text);
    Definition what{.sees = mask.meaning};
    if (random.chance(0.5)) what.first_query = random.between(-5, shape.kv_len + 5);
    check_call<float>(shape, random.pick(all_values), random, longspan::softmax_attention{mask.mask}, what);
  });
}

TEST_CASE("softmax_attention: NaN in keys that no query sees changes no bit", "[mask][nan]") {
  Index hidden = 0;
  for_each_case(12, [&](Random& random) {
    const Shape shape = small_shape(random, random.pick<Index>({1, 2, 3, 9, 30, 60}));
    const Index first_query =
        random.chance(0.5) ? shape.kv_len - shape.q_len : random.between(-5, shape.kv_len + 5);
    DrawnMasks(shape, random).for_each([&](const char* name, const auto& mask, const Predicate& sees) {
      INFO(name << " " << shape.text() << " first_query=" << first_query);
      longspan::softmax_attention attend{mask};
      attend.first_query = first_query;
      Call<float> clean(shape, Values::normal, random), poisoned = clean;
      clean.run(attend);
      hidden += poison_unseen(poisoned, shape, first_query, sees, poisons[random.between(0, 2)]);
      poisoned.run(attend, longspan::openmp{2});
      CHECK(clean.same_outputs(poisoned));
    });
  });
  CHECK(hidden > 0);
}

TEST_CASE("softmax_attention: NaN in a key or a value reaches exactly the rows that see it", "[mask][nan]") {
  for_each_case(12, [&](Random& random) {
    const Shape shape = small_shape(random, random.pick<Index>({1, 2, 5, 9, 30, 60}));
    const Index first_query =
        random.chance(0.5) ? shape.kv_len - shape.q_len : random.between(-5, shape.kv_len + 5);
    DrawnMasks(shape, random).for_each([&](const char* name, const auto& mask, const Predicate& sees) {
      const Index b = random.between(0, shape.batch - 1), kv = random.between(0, shape.kv_heads - 1);
      const Index j = random.between(0, shape.kv_len - 1);
      const bool in_key = random.chance(0.5);
      INFO(name << " " << shape.text() << " first_query=" << first_query << " poisoned "
                << (in_key ? "key " : "value ") << b << ' ' << kv << ' ' << j);
      longspan::softmax_attention attend{mask};
      attend.first_query = first_query;
      Call<float> clean(shape, Values::normal, random), poisoned = clean;
      clean.run(attend);
      if (in_key) {
        poison(poisoned.k.row(b, kv, j), shape.head_dim, NAN);
      } else {
        poison(poisoned.v.row(b, kv, j), shape.value_dim, NAN);
      }
      poisoned.run(attend);
      CHECK(only_seeing_rows_are_nan(clean, poisoned, shape, first_query, sees, b, kv, j, in_key));
    });
  });
}

TEMPLATE_TEST_CASE("softmax_attention: masked NaN and visible NaN in other types", "[mask][nan]", double,
                   bfloat16) {
  const Predicate sees = [](Index, Index, Index i, Index j) { return j <= i && (j >= i - 20 || j < 3); };
  const longspan::softmax_attention attend{longspan::causal{} &
                                           (longspan::window{.left = 20} | longspan::sinks{3})};
  for_each_case(20, [&](Random& random) {
    const Shape shape = small_shape(random, random.pick<Index>({1, 2, 9, 30, 60}));
    const Index first_query = shape.kv_len - shape.q_len;
    INFO(shape.text());
    Call<TestType> clean(shape, Values::normal, random), unseen = clean, seen = clean;
    clean.run(attend);
    poison_unseen(unseen, shape, first_query, sees, poisons[random.between(0, 2)]);
    unseen.run(attend);
    CHECK(clean.same_outputs(unseen));

    const Index j = random.between(0, shape.kv_len - 1);
    const bool in_key = random.chance(0.5);
    INFO("poisoned " << (in_key ? "key " : "value ") << j);
    poison(in_key ? seen.k.row(0, 0, j) : seen.v.row(0, 0, j), in_key ? shape.head_dim : shape.value_dim,
           NAN);
    seen.run(attend);
    CHECK(only_seeing_rows_are_nan(clean, seen, shape, first_query, sees, 0, 0, j, in_key));
  });
}

TEMPLATE_TEST_CASE("softmax_attention: NaN in a query stays in its row", "[nan]", float, double, bfloat16) {
  for_each_case(20, [&](Random& random) {
    const Shape shape = small_shape(random, random.pick<Index>({1, 2, 5, 9, 30, 60}));
    INFO(shape.text());
    Call<TestType> clean(shape, Values::normal, random), poisoned = clean;
    clean.run(longspan::softmax_attention{});
    const Index n = random.between(0, shape.batch * shape.heads * shape.q_len - 1);
    poisoned.q.row(0, 0, n)[random.between(0, shape.head_dim - 1)] = static_cast<TestType>(NAN);
    poisoned.run(longspan::softmax_attention{});
    const auto changed = changed_rows(clean, poisoned);
    CHECK(std::count(changed.begin(), changed.end(), true) == 1);
    CHECK(std::isnan(poisoned.lse.values[std::size_t(n)]));
    const TestType* row = poisoned.out.row(0, 0, n);
    CHECK(std::all_of(row, row + shape.value_dim,
                      [](TestType x) { return std::isnan(static_cast<double>(x)); }));
  });
}

TEST_CASE("softmax_attention: a score of -infinity hides the key", "[mask][nan]") {
  const Predicate sees = [](Index, Index, Index i, Index j) {
    return every_third{}.sees(i, j) && j % 4 != 1;
  };
  for_each_case(15, [&](Random& random) {
    const Shape shape = small_shape(random, random.pick<Index>({1, 2, 9, 30, 60}));
    const Index first_query = shape.kv_len - shape.q_len;
    INFO(shape.text());
    Tensor<float> bias(1, 1, shape.q_len, shape.kv_len);
    for (Index i = 0; i < shape.q_len; ++i) {
      for (Index j = 0; j < shape.kv_len; ++j) {
        bias.row(0, 0, i)[j] = sees(0, 0, first_query + i, j) ? 0 : -std::numeric_limits<float>::infinity();
      }
    }
    // A bias has no rows for negative positions; with fewer keys than queries positions start below 0.
    const longspan::softmax_attention attend{longspan::additive_bias(bias.view(), first_query)};
    Call<float> clean(shape, Values::normal, random), unseen = clean, seen = clean;
    clean.run(attend);
    check_against(exact_attention({.sees = sees}, clean), clean);

    // A bias cannot hide NaN in k, because it is added to the score, which is NaN.
    poison_unseen(unseen, shape, first_query, sees, poisons[random.between(0, 2)]);
    unseen.k = clean.k;
    unseen.run(attend);
    CHECK(clean.same_outputs(unseen));

    const Index j = random.between(0, shape.kv_len - 1);
    INFO("poisoned value " << j);
    poison(seen.v.row(0, 0, j), shape.value_dim, NAN);
    seen.run(attend);
    CHECK(only_seeing_rows_are_nan(clean, seen, shape, first_query, sees, 0, 0, j, false));
  });
}

TEMPLATE_TEST_CASE("softmax_attention: a row that sees no key has output 0 and lse -infinity", "[mask]",
                   float, double, bfloat16) {
  const auto is_empty = [](const Call<TestType>& call, Index b, Index h, Index i) {
    const TestType* row = call.out.row(b, h, i);
    return std::all_of(row, row + call.out.cols, [](TestType x) { return static_cast<double>(x) == 0; }) &&
           static_cast<double>(call.lse(b, h, i)) == -std::numeric_limits<double>::infinity();
  };
  Random random(3);
  SECTION("no keys at all") {
    for (const Index q_len : {1, 8, 9, 100}) {
      Call<TestType> call(Shape{2, 3, 1, q_len, 0, 8, 9}, Values::normal, random);
      call.run(longspan::softmax_attention{}, longspan::openmp{3});
      for (Index n = 0; n < 6 * q_len; ++n) REQUIRE(is_empty(call, 0, 0, n));
    }
  }
  SECTION("rows before the first key, next to rows that see keys") {
    const longspan::softmax_attention attend{longspan::causal{} &
                                             (longspan::window{.left = 20} | longspan::sinks{3})};
    for (const Index q_len : {2, 7, 20, 100}) {
      for (const Index kv_len : {1, 50, 3000}) {
        Call<TestType> call(Shape{1, 2, 1, q_len, kv_len, 8, 9}, Values::normal, random);
        auto from_before = attend;
        from_before.first_query = -q_len / 2;
        // Keys that no query sees may contain anything.
        for (Index j = q_len; j < kv_len; ++j) poison(call.v.row(0, 0, j), 9, NAN);
        call.run(from_before, longspan::openmp{3});
        for (Index h = 0; h < 2; ++h) {
          for (Index i = 0; i < q_len; ++i) REQUIRE(is_empty(call, 0, h, i) == (i < q_len / 2));
        }
      }
    }
  }
}

TEST_CASE("softmax_attention: packed documents are within the bound of separate calls", "[mask]") {
  for_each_case(10, [&](Random& random) {
    const Shape shape{1, 2, 1, 150, 150, 8, 9};
    std::vector<Index> starts{0};
    while (starts.back() < 120) starts.push_back(starts.back() + random.between(1, 29));
    Call<float> packed(shape, Values::normal, random);
    packed.run(longspan::softmax_attention{longspan::documents{starts} & longspan::causal{}});
    starts.push_back(150);
    for (std::size_t n = 0; n + 1 < starts.size(); ++n) {
      const Index first = starts[n], count = starts[n + 1] - first;
      Call<float> document(Shape{1, 2, 1, count, count, 8, 9});
      const auto copy_rows = [&](const Tensor<float>& from, Tensor<float>& to) {
        for (Index h = 0; h < to.heads; ++h)
          std::copy_n(from.row(0, h, first), count * to.cols, to.row(0, h, 0));
      };
      copy_rows(packed.q, document.q);
      copy_rows(packed.k, document.k);
      copy_rows(packed.v, document.v);
      const Predicate past = [](Index, Index, Index i, Index j) { return j <= i; };
      const Exact exact = exact_attention({.sees = past}, document);
      copy_rows(packed.out, document.out);
      for (Index h = 0; h < 2; ++h)
        std::copy_n(&packed.lse.view()(0, h, first), count, &document.lse.view()(0, h, 0));
      check_against(exact, document);
    }
  });
}
