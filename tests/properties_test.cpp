// The laws that every softmax attention obeys, over a list of variants.
//
// A law compares results of one variant with each other. The definition is used only to compute how far apart two
// correct results may be.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "longspan/partial.hpp"
#include "longspan/softmax_attention.hpp"
#include "support/catch.hpp"
#include "support/oracle.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using longspan::Pairing;

// The members of a variant:
//
//   Element                         the element type of its tensors
//   attend(first_query, scale)      the functor
//   definition(first_query, scale)  what the functor has to compute
//   keys_commute                    true if the order of keys does not matter, and repeating all keys changes only lse
//   keys_split                      true if attention over the first keys and over the others, merged, is the whole
//   shifts                          true if adding a constant to the scores of a row changes only its lse

template <class T>
struct Plain {
  using Element = T;
  static constexpr bool keys_commute = true, keys_split = true, shifts = true;

  static auto attend(Index first_query, double scale) {
    longspan::softmax_attention attend;
    attend.first_query = first_query;
    attend.scale = scale;
    return attend;
  }
  static Definition definition(Index first_query, double scale) {
    Definition what{.scale = scale};
    what.first_query = first_query;
    return what;
  }
};

template <class T>
struct Causal : Plain<T> {
  static constexpr bool keys_commute = false;

  static auto attend(Index first_query, double scale) {
    longspan::softmax_attention attend{longspan::causal{}};
    attend.first_query = first_query;
    attend.scale = scale;
    return attend;
  }
  static Definition definition(Index first_query, double scale) {
    Definition what = Plain<T>::definition(first_query, scale);
    what.sees = [](Index, Index, Index i, Index j) { return j <= i; };
    return what;
  }
};

struct Streaming : Plain<float> {
  static constexpr bool keys_commute = false, keys_split = false;

  static auto attend(Index first_query, double scale) {
    longspan::softmax_attention attend{longspan::causal{} &
                                       (longspan::window{.left = 30} | longspan::sinks{2})};
    attend.first_query = first_query;
    attend.scale = scale;
    return attend;
  }
  static Definition definition(Index first_query, double scale) {
    Definition what = Plain<float>::definition(first_query, scale);
    what.sees = [](Index, Index, Index i, Index j) { return j <= i && (j >= i - 30 || j < 2); };
    return what;
  }
};

struct Capped : Plain<float> {
  static constexpr bool shifts = false;

  static auto attend(Index first_query, double scale) {
    longspan::softmax_attention attend{longspan::softcap{8}};
    attend.first_query = first_query;
    attend.scale = scale;
    return attend;
  }
  static Definition definition(Index first_query, double scale) {
    Definition what = Plain<float>::definition(first_query, scale);
    what.score = [](double s, Index, Index, Index, Index) { return 8 * std::tanh(s / 8); };
    return what;
  }
};

using Variants = std::tuple<Plain<float>, Plain<double>, Causal<float>, Causal<double>, Streaming, Capped>;

#define LAW(text) TEMPLATE_LIST_TEST_CASE("every softmax attention: " text, "[law]", Variants)

/// Sizes just below, at and above those of a key block and of a tile of queries.
const std::vector<Index> sizes{0, 1, 2, 3, 7, 8, 9, 47, 48, 49, 127, 128, 129, 259};

/// A random call of a variant with its results and their error bounds.
template <class Variant>
struct Drawn {
  using T = typename Variant::Element;

  Shape shape;
  Index first_query;
  double scale;
  Call<T> call;
  Exact exact;
  std::string text;

  explicit Drawn(Random& random, Index least_keys = 0, Index least_queries = 0)
      : Drawn(random, draw_shape(random, least_keys, least_queries)) {}
  Drawn(Random& random, const Shape& of_shape)
      : shape(of_shape),
        first_query(random.chance(0.7) ? shape.kv_len - shape.q_len : random.between(-2, shape.kv_len + 2)),
        scale(random.pick({0.25, 1.0, 0.05})),
        call(shape, random.pick({Values::normal, Values::flat, Values::peaked, Values::rising}), random),
        exact(),
        text(shape.text() + " first_query=" + std::to_string(first_query) +
             " scale=" + std::to_string(scale)) {
    round_to_grid();
    run();
  }

  auto attend() const { return Variant::attend(first_query, scale); }
  Definition definition() const { return Variant::definition(first_query, scale); }
  void run() {
    call.run(attend(), longspan::openmp{2});
    exact = exact_attention(definition(), call);
  }
  bool sees(Index b, Index h, Index i, Index j) const {
    const Definition what = definition();
    return !what.sees || what.sees(b, h, first_query + i, j);
  }

 private:
  static Shape draw_shape(Random& random, Index least_keys, Index least_queries) {
    Shape shape;
    shape.batch = random.between(1, 2);
    shape.kv_heads = random.between(1, 2);
    shape.heads = shape.kv_heads * random.between(1, 3);
    shape.q_len = std::max(least_queries, random.pick(sizes));
    shape.kv_len = std::max(least_keys, random.pick(sizes));
    shape.head_dim = random.pick<Index>({1, 4, 8, 17});
    shape.value_dim = random.pick<Index>({1, 8, 11, 16});
    return shape;
  }
  /// Rounds the inputs to numbers that can be added without rounding errors.
  void round_to_grid() {
    for (auto* x : {&call.q, &call.k, &call.v}) {
      for (T& value : x->values) value = std::round(value * 64) / 64;
    }
  }
};

/// True if a result equals (out, lse), with rows in the order of `bound`, within twice the error of one result.
template <class T>
void check_same(const Exact& bound, const std::vector<double>& out, const std::vector<double>& lse,
                const Call<T>& got) {
  Exact around = bound;
  around.out = out;
  around.lse = lse;
  const Errors errors = errors_of<T, T>(around, got.out.view(), got.lse.view());
  INFO("out: " << errors.worst_out);
  INFO("lse: " << errors.worst_lse);
  CHECK(errors.out <= 2 * most_error);
  CHECK(errors.lse <= 2 * most_error);
}

template <class T>
std::vector<double> in_double(const std::vector<T>& values) {
  return {values.begin(), values.end()};
}

template <class T>
void check_same(const Exact& bound, const Call<T>& wanted, const Call<T>& got) {
  check_same(bound, in_double(wanted.out.values), in_double(wanted.lse.values), got);
}

}  // namespace

LAW("attention over two parts of the keys, merged, is attention over all keys") {
  if constexpr (TestType::keys_split) {
    for_each_case(30, [](Random& random) {
      Drawn<TestType> drawn(random);
      using T = typename TestType::Element;
      const Index cut = random.between(0, drawn.shape.kv_len);
      INFO(drawn.text << " cut=" << cut);
      Call<T> first = drawn.call.unrun(), second = first, merged = first;
      const auto attend_part = [&](Call<T>& part, Index begin, Index count) {
        const auto k = std::as_const(part.k).view().slice_rows(begin, count);
        const auto v = std::as_const(part.v).view().slice_rows(begin, count);
        TestType::attend(drawn.first_query - begin, drawn.scale)(part.q.view(), k, v, part.out.view(),
                                                                 part.lse.view());
      };
      attend_part(first, 0, cut);
      attend_part(second, cut, drawn.shape.kv_len - cut);
      const auto partial = [](auto& x) { return longspan::partial(x.out.view(), x.lse.view()); };
      longspan::merge<T>({partial(first), partial(second)}, partial(merged));
      check_same(drawn.exact, drawn.call, merged);
    });
  } else {
    SUCCEED("this variant depends on the positions of keys");
  }
}

LAW("bits do not depend on the number of threads") {
  for_each_case(15, [](Random& random) {
    Drawn<TestType> drawn(random);
    INFO(drawn.text);
    for (const Index threads : {1, 3, 7}) {
      auto again = drawn.call.unrun();
      again.run(drawn.attend(), longspan::openmp{threads});
      CHECK(drawn.call.same_outputs(again));
    }
  });
}

LAW("a head has the same bits alone and in a batch") {
  for_each_case(30, [](Random& random) {
    // Calls with up to 8 queries per KV head use another kernel, with other bits.
    Drawn<TestType> drawn(random, 0, 9);
    using T = typename TestType::Element;
    INFO(drawn.text);
    const auto& call = drawn.call;
    for (Index b = 0; b < drawn.shape.batch; ++b) {
      for (Index h = 0; h < drawn.shape.heads; ++h) {
        const Index kv = h / (drawn.shape.heads / drawn.shape.kv_heads);
        Tensor<T> out(1, 1, call.q.rows, call.v.cols);
        Rows<T> lse(1, 1, call.q.rows);
        drawn.attend()(call.q.head(b, h), call.k.head(b, kv), call.v.head(b, kv), out.view(), lse.view());
        CHECK(std::equal(out.values.begin(), out.values.end(), call.out.row(b, h, 0)));
        CHECK(std::equal(lse.values.begin(), lse.values.end(), &call.lse.view()(b, h, 0)));
      }
    }
  });
}

LAW("query heads that share a KV head have the bits of query heads with copies of it") {
  for_each_case(30, [](Random& random) {
    Drawn<TestType> drawn(random, 0, 9);
    using T = typename TestType::Element;
    INFO(drawn.text);
    Shape shape = drawn.shape;
    const Index group = shape.heads / std::exchange(shape.kv_heads, shape.heads);
    Call<T> copies(shape);
    copies.q = drawn.call.q;
    for (Index b = 0; b < shape.batch; ++b) {
      for (Index h = 0; h < shape.heads; ++h) {
        std::copy_n(drawn.call.k.row(b, h / group, 0), shape.kv_len * shape.head_dim, copies.k.row(b, h, 0));
        std::copy_n(drawn.call.v.row(b, h / group, 0), shape.kv_len * shape.value_dim, copies.v.row(b, h, 0));
      }
    }
    copies.run(drawn.attend());
    CHECK(drawn.call.same_outputs(copies));
  });
}

LAW("adding a constant to the scores of a row changes only its lse") {
  if constexpr (TestType::shifts) {
    for_each_case(30, [](Random& random) {
      Drawn<TestType> drawn(random);
      using T = typename TestType::Element;
      INFO(drawn.text);
      std::vector<double> lse = in_double(drawn.call.lse.values);
      const Call<T> before = drawn.call;
      // The same vector is added to every key, so all scores of a row rise by scale * q.vector.
      std::vector<double> vector;
      for (Index c = 0; c < drawn.shape.head_dim; ++c)
        vector.push_back(std::round(random.normal() * 64) / 64);
      for (Index n = 0; n < drawn.shape.batch * drawn.shape.kv_heads * drawn.shape.kv_len; ++n) {
        for (std::size_t c = 0; c < vector.size(); ++c)
          drawn.call.k.row(0, 0, n)[c] += static_cast<T>(vector[c]);
      }
      for (std::size_t n = 0; n < lse.size(); ++n) {
        for (std::size_t c = 0; c < vector.size(); ++c) {
          lse[n] += drawn.scale * vector[c] * double(drawn.call.q.row(0, 0, Index(n))[c]);
        }
      }
      drawn.run();
      check_same(drawn.exact, in_double(before.out.values), lse, drawn.call);
    });
  } else {
    SUCCEED("this variant changes scores in another way");
  }
}

LAW("an output is between the smallest and the largest value that its query sees") {
  for_each_case(30, [](Random& random) {
    const Drawn<TestType> drawn(random);
    using T = typename TestType::Element;
    INFO(drawn.text);
    const Shape& shape = drawn.shape;
    Index outside = 0, n = 0;
    for (Index b = 0; b < shape.batch; ++b) {
      for (Index h = 0; h < shape.heads; ++h) {
        for (Index i = 0; i < shape.q_len; ++i, ++n) {
          if (drawn.call.lse.values[std::size_t(n)] == -std::numeric_limits<T>::infinity()) continue;
          for (Index c = 0; c < shape.value_dim; ++c) {
            T least = std::numeric_limits<T>::max(), greatest = -least;
            for (Index j = 0; j < shape.kv_len; ++j) {
              if (!drawn.sees(b, h, i, j)) continue;
              const T x = drawn.call.v.row(b, h / (shape.heads / shape.kv_heads), j)[c];
              least = std::min(least, x);
              greatest = std::max(greatest, x);
            }
            const double slack =
                most_error * unit_roundoff<T> * double(std::max(std::abs(least), std::abs(greatest)));
            const double x = double(drawn.call.out.row(b, h, i)[c]);
            outside += !(x >= double(least) - slack && x <= double(greatest) + slack);
          }
        }
      }
    }
    CHECK(outside == 0);
  });
}

LAW("if all values are the same, the output is this value") {
  for_each_case(30, [](Random& random) {
    Drawn<TestType> drawn(random, 1);
    using T = typename TestType::Element;
    INFO(drawn.text);
    const T value = static_cast<T>(random.normal());
    std::fill(drawn.call.v.values.begin(), drawn.call.v.values.end(), value);
    drawn.call.run(drawn.attend());
    double worst = 0;
    for (std::size_t n = 0; n < drawn.call.out.values.size(); ++n) {
      const std::size_t row = n / static_cast<std::size_t>(drawn.shape.value_dim);
      if (std::isinf(drawn.call.lse.values[row])) continue;
      worst = std::max(worst, std::abs(double(drawn.call.out.values[n]) / double(value) - 1));
    }
    // The weights of out and of its divisor are the same numbers, so errors of scores and exponentials cancel.
    // But if all weights are equal, the rounding errors of a block's 128 terms have the same sign, an ulp for four
    // terms.
    CHECK(worst <= (8 + 32) * unit_roundoff<T>);
  });
}

LAW("outputs are linear in the values") {
  for_each_case(30, [](Random& random) {
    Drawn<TestType> one(random);
    INFO(one.text);
    auto other = one.call, sum = one.call;
    for (std::size_t n = 0; n < sum.v.values.size(); ++n) {
      const auto x = static_cast<typename TestType::Element>(std::round(random.normal() * 64) / 64);
      other.v.values[n] = x;
      sum.v.values[n] = one.call.v.values[n] + 2 * x;
      // For the bound: both terms are rounded before they are added.
      one.call.v.values[n] = std::abs(one.call.v.values[n]) + 2 * std::abs(x);
    }
    other.run(one.attend());
    sum.run(one.attend());
    std::vector<double> out = in_double(one.call.out.values);
    for (std::size_t n = 0; n < out.size(); ++n) out[n] += 2 * double(other.out.values[n]);
    check_same(exact_attention(one.definition(), one.call), out, in_double(sum.lse.values), sum);
  });
}

LAW("permuting keys together with their values changes nothing") {
  if constexpr (TestType::keys_commute) {
    for_each_case(30, [](Random& random) {
      const Drawn<TestType> drawn(random);
      INFO(drawn.text);
      auto shuffled = drawn.call.unrun();
      const Shape& shape = drawn.shape;
      for (Index head = 0; head < shape.batch * shape.kv_heads; ++head) {
        const auto swap_rows = [&](auto& x, Index a, Index b) {
          auto* rows = x.row(0, 0, head * shape.kv_len);
          std::swap_ranges(rows + a * x.cols, rows + (a + 1) * x.cols, rows + b * x.cols);
        };
        for (Index j = 1; j < shape.kv_len; ++j) {
          const Index with = random.between(0, j - 1);
          swap_rows(shuffled.k, j, with);
          swap_rows(shuffled.v, j, with);
        }
      }
      shuffled.run(drawn.attend());
      check_same(drawn.exact, drawn.call, shuffled);
    });
  } else {
    SUCCEED("this variant depends on the positions of keys");
  }
}

LAW("repeating every key raises each lse by log 2 and changes no output") {
  if constexpr (TestType::keys_commute) {
    for_each_case(30, [](Random& random) {
      const Drawn<TestType> drawn(random);
      INFO(drawn.text);
      Shape shape = drawn.shape;
      shape.kv_len *= 2;
      Call<typename TestType::Element> twice(shape);
      twice.q = drawn.call.q;
      for (Index head = 0; head < shape.batch * shape.kv_heads; ++head) {
        for (Index j = 0; j < shape.kv_len; ++j) {
          const Index from = head * drawn.shape.kv_len + j / 2, to = head * shape.kv_len + j;
          std::copy_n(drawn.call.k.row(0, 0, from), shape.head_dim, twice.k.row(0, 0, to));
          std::copy_n(drawn.call.v.row(0, 0, from), shape.value_dim, twice.v.row(0, 0, to));
        }
      }
      twice.run(drawn.attend());
      std::vector<double> lse = in_double(drawn.call.lse.values);
      for (double& x : lse) x += std::log(2.0);
      check_same(drawn.exact, in_double(drawn.call.out.values), lse, twice);
    });
  } else {
    SUCCEED("this variant depends on the positions of keys");
  }
}

LAW("a tiny scale gives the mean of the visible values, a huge one the value of the best key") {
  for_each_case(20, [](Random& random) {
    Drawn<TestType> drawn(random, 1);
    INFO(drawn.text);
    const Shape& shape = drawn.shape;
    const Index group = shape.heads / shape.kv_heads;
    // Scores that differ by at least 1: the first column of key j is j.
    for (auto& x : drawn.call.q.values) x = 0;
    for (Index n = 0; n < shape.batch * shape.heads * shape.q_len; ++n) drawn.call.q.row(0, 0, n)[0] = 1;
    for (Index n = 0; n < shape.batch * shape.kv_heads * shape.kv_len; ++n) {
      drawn.call.k.row(0, 0, n)[0] = static_cast<typename TestType::Element>(n * 7 % shape.kv_len);
      if (shape.kv_len % 7 == 0)
        drawn.call.k.row(0, 0, n)[0] = static_cast<typename TestType::Element>(n % shape.kv_len);
    }
    auto mean = drawn.call.unrun();
    mean.run(TestType::attend(drawn.first_query, 1e-50));
    const Exact exact_mean = exact_attention(TestType::definition(drawn.first_query, 1e-50), mean);
    check_against(exact_mean, mean);
    // Softcap maps all large scores to nearly the same number, so there is no best key.
    if (!TestType::shifts) return;
    drawn.call.run(TestType::attend(drawn.first_query, 1e4));
    Index wrong = 0, n = 0;
    for (Index b = 0; b < shape.batch; ++b) {
      for (Index h = 0; h < shape.heads; ++h) {
        for (Index i = 0; i < shape.q_len; ++i, ++n) {
          Index best = -1;
          for (Index j = 0; j < shape.kv_len; ++j) {
            if (!drawn.sees(b, h, i, j)) continue;
            if (best < 0 || drawn.call.k.row(b, h / group, j)[0] > drawn.call.k.row(b, h / group, best)[0])
              best = j;
          }
          for (Index c = 0; c < shape.value_dim; ++c) {
            wrong +=
                drawn.call.out.row(b, h, i)[c] != (best < 0 ? 0 : drawn.call.v.row(b, h / group, best)[c]);
          }
        }
      }
    }
    CHECK(wrong == 0);
  });
}

LAW("a key changes no bit of rows that do not see it") {
  for_each_case(40, [](Random& random) {
    const Drawn<TestType> drawn(random, 1);
    using T = typename TestType::Element;
    const Shape& shape = drawn.shape;
    const Index key = random.between(0, shape.kv_len - 1);
    const bool nan = random.chance(0.5);
    INFO(drawn.text << " key=" << key << " nan=" << nan);
    auto changed = drawn.call.unrun();
    for (Index head = 0; head < shape.batch * shape.kv_heads; ++head) {
      T* k = changed.k.row(0, 0, head * shape.kv_len + key);
      T* v = changed.v.row(0, 0, head * shape.kv_len + key);
      for (Index c = 0; c < shape.head_dim; ++c) k[c] = nan ? std::numeric_limits<T>::quiet_NaN() : k[c] + 1;
      for (Index c = 0; c < shape.value_dim; ++c)
        v[c] = nan ? std::numeric_limits<T>::quiet_NaN() : v[c] + 100;
    }
    changed.run(drawn.attend());
    Index wrong = 0, n = 0;
    for (Index b = 0; b < shape.batch; ++b) {
      for (Index h = 0; h < shape.heads; ++h) {
        for (Index i = 0; i < shape.q_len; ++i, ++n) {
          const T *before = drawn.call.out.row(b, h, i), *after = changed.out.row(b, h, i);
          const bool same = std::equal(before, before + shape.value_dim, after) &&
                            drawn.call.lse(b, h, i) == changed.lse(b, h, i);
          // Rows that see the key may keep their bits if its weight is 0, but NaN must reach them.
          wrong += drawn.sees(b, h, i, key) ? nan && !std::isnan(changed.lse(b, h, i)) : !same;
        }
      }
    }
    CHECK(wrong == 0);
  });
}

LAW("a row that sees no key has output 0 and lse -infinity") {
  for_each_case(20, [](Random& random) {
    const Drawn<TestType> drawn(random);
    using T = typename TestType::Element;
    INFO(drawn.text);
    const Shape& shape = drawn.shape;
    Index wrong = 0;
    for (Index b = 0; b < shape.batch; ++b) {
      for (Index h = 0; h < shape.heads; ++h) {
        for (Index i = 0; i < shape.q_len; ++i) {
          bool sees_one = false;
          for (Index j = 0; j < shape.kv_len; ++j) sees_one = sees_one || drawn.sees(b, h, i, j);
          const T* row = drawn.call.out.row(b, h, i);
          const bool empty = drawn.call.lse(b, h, i) == -std::numeric_limits<T>::infinity() &&
                             std::all_of(row, row + shape.value_dim, [](T x) { return x == 0; });
          const bool finite = std::isfinite(drawn.call.lse(b, h, i));
          wrong += sees_one ? !finite : !empty;
        }
      }
    }
    CHECK(wrong == 0);
  });
}
