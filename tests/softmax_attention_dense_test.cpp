// softmax_attention with masks and biases that are tensors, compared with the definition in double.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "longspan/dense_mask.hpp"
#include "support/gauge.hpp"
#include "support/guarded_memory.hpp"

namespace {

using namespace test;
using Eigen::bfloat16;
using Eigen::half;
using longspan::additive_bias;
using longspan::bit_mask;
using longspan::dense_mask;

/// A random mask tensor, [batch or 1, heads or 1, q_len or 1, kv_len], with gaps of a few bytes between rows.
struct DrawnTensor {
  static constexpr Index gap = 3;

  Index batch, heads, rows, keys, first_query;
  std::vector<std::uint8_t> bytes;
  std::vector<std::uint64_t> words;

  DrawnTensor(const Shape& shape, Index first, Random& random)
      : batch(random.chance(0.5) ? shape.batch : 1),
        heads(random.chance(0.5) ? shape.heads : 1),
        rows(random.chance(0.8) ? shape.q_len : 1),
        keys(shape.kv_len),
        first_query(first) {
    bytes.assign(std::size_t(batch * heads * rows * (keys + gap)), 1);
    words.assign(std::size_t(batch * heads * rows * in_row()), ~std::uint64_t{0});
    const double share = random.pick<double>({0.02, 0.5, 0.95, 1});
    const bool in_squares = random.chance(0.4);
    for (Index n = 0; n < batch * heads * rows; ++n) {
      const bool sees_nothing = random.chance(0.05);
      for (Index j = 0; j < keys; ++j) {
        const bool hidden = sees_nothing || (in_squares && (n % rows / 30 + j / 70) % 2 == 0);
        if (!hidden && random.chance(share)) continue;
        bytes[std::size_t(n * (keys + gap) + j)] = 0;
        words[std::size_t(n * in_row() + j / 64)] &= ~(std::uint64_t{1} << j % 64);
      }
    }
  }
  Index in_row() const { return keys / 64 + 1; }

  dense_mask dense() const {
    const Index row = keys + gap;
    return {TensorView<const std::uint8_t>{bytes.data(), batch, heads, rows, keys, heads * rows * row,
                                           rows * row, row},
            first_query};
  }
  bit_mask<std::uint64_t> bits() const {
    return {longspan::compact_view(words.data(), batch, heads, rows, in_row()), keys, first_query};
  }
  decltype(Definition::sees) meaning() const {
    return [this](Index b, Index h, Index i, Index j) {
      const Index n =
          ((batch == 1 ? 0 : b) * heads + (heads == 1 ? 0 : h)) * rows + (rows == 1 ? 0 : i - first_query);
      return bytes[std::size_t(n * (keys + gap) + j)] != 0;
    };
  }
};

Shape small_shape(Random& random) {
  Shape shape = draw_shape(random);
  shape.head_dim = std::min<Index>(shape.head_dim, 40);
  shape.value_dim = std::min<Index>(shape.value_dim, 40);
  return shape;
}

Index any_first_query(const Shape& shape, Random& random) {
  return random.chance(0.5) ? shape.kv_len - shape.q_len : random.between(-5, shape.kv_len + 5);
}

}  // namespace

TEST_CASE("softmax_attention: within the bound with masks that are tensors", "[gauge][mask]") {
  for_each_case(60, [](Random& random) {
    const Shape shape = small_shape(random);
    const Values values = random.pick(all_values);
    Definition what;
    what.first_query = any_first_query(shape, random);
    const DrawnTensor drawn(shape, what.first_query, random);
    what.sees = drawn.meaning();
    check_call<float>(shape, values, random, longspan::softmax_attention{drawn.dense()}, what);
    check_call<float>(shape, values, random, longspan::softmax_attention{drawn.bits()}, what);
    if (random.chance(0.3))
      check_call<bfloat16>(shape, values, random, longspan::softmax_attention{drawn.dense()}, what);
  });
}

TEST_CASE("softmax_attention: within the bound with tensors composed with other masks", "[gauge][mask]") {
  using longspan::operator&;
  for_each_case(40, [](Random& random) {
    const Shape shape = small_shape(random);
    Definition what;
    what.first_query = any_first_query(shape, random);
    const DrawnTensor drawn(shape, what.first_query, random);
    const auto shown = drawn.meaning();
    what.sees = [&](Index b, Index h, Index i, Index j) { return j <= i && !shown(b, h, i, j); };
    check_call<float>(shape, Values::normal, random,
                      longspan::softmax_attention{longspan::causal{} & !drawn.dense()}, what);
    what.sees = [&](Index b, Index h, Index i, Index j) { return j < 3 || shown(b, h, i, j); };
    check_call<double>(shape, Values::normal, random,
                       longspan::softmax_attention{longspan::sinks{3} | drawn.bits()}, what);
  });
}

TEST_CASE("softmax_attention: dense_mask, bit_mask and a function give the same bits", "[mask][bits]") {
  for_each_case(40, [](Random& random) {
    const Shape shape = small_shape(random);
    const Index first_query = shape.kv_len - shape.q_len;
    const DrawnTensor drawn(shape, first_query, random);
    struct function {
      decltype(Definition::sees) meaning;
      bool sees(Index b, Index h, Index i, Index j) const { return meaning(b, h, i, j); }
    };
    Call<float> dense(shape, Values::normal, random), bits = dense, of_pairs = dense;
    dense.run(longspan::softmax_attention{drawn.dense()}, longspan::openmp{2});
    bits.run(longspan::softmax_attention{drawn.bits()});
    of_pairs.run(longspan::softmax_attention{function{drawn.meaning()}});
    CHECK(dense.same_outputs(bits));
    CHECK(dense.same_outputs(of_pairs));
  });
}

TEST_CASE("softmax_attention: keys hidden by a tensor may be NaN, and a row that sees nothing is 0",
          "[mask][nan]") {
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  Index blind_rows = 0;
  for_each_case(40, [&](Random& random) {
    const Shape shape = small_shape(random);
    const DrawnTensor drawn(shape, shape.kv_len - shape.q_len, random);
    const auto sees = drawn.meaning();
    Call<float> clean(shape, Values::normal, random), poisoned = clean;
    const Index group = shape.heads / shape.kv_heads;
    const Index key = random.between(0, shape.kv_len), first = shape.kv_len - shape.q_len;
    for (Index n = 0; n < shape.batch * shape.kv_heads && key < shape.kv_len; ++n) {
      std::fill_n(poisoned.k.row(0, 0, n * shape.kv_len + key), shape.head_dim, nan);
      std::fill_n(poisoned.v.row(0, 0, n * shape.kv_len + key), shape.value_dim, nan);
    }
    clean.run(longspan::softmax_attention{drawn.dense()});
    poisoned.run(longspan::softmax_attention{drawn.dense()});
    for (Index b = 0; b < shape.batch; ++b) {
      for (Index h = 0; h < shape.kv_heads * group; ++h) {
        for (Index i = 0; i < shape.q_len; ++i) {
          const bool reached = key < shape.kv_len && sees(b, h, first + i, key);
          bool blind = true;
          for (Index j = 0; j < shape.kv_len; ++j) blind &= !sees(b, h, first + i, j);
          blind_rows += blind;
          bool right = reached || poisoned.lse(b, h, i) == clean.lse(b, h, i);
          if (blind) right &= clean.lse(b, h, i) == -std::numeric_limits<float>::infinity();
          for (Index c = 0; c < shape.value_dim; ++c) {
            const float x = poisoned.out.row(b, h, i)[c], y = clean.out.row(b, h, i)[c];
            right &= reached ? std::isnan(x) : x == y;
            if (blind) right &= y == 0;
          }
          if (!right) CHECK(right);
        }
      }
    }
  });
  CHECK(blind_rows > 0);
}

namespace {

/// A bias of elements of T that ends at a forbidden page.
template <class T>
struct GuardedBias {
  Index batch, heads, rows, keys;
  GuardedArray<T> memory;

  GuardedBias(const Shape& shape, Random& random)
      : batch(random.chance(0.5) ? shape.batch : 1),
        heads(random.chance(0.5) ? shape.heads : 1),
        rows(random.chance(0.8) ? shape.q_len : 1),
        keys(shape.kv_len),
        memory(std::max<Index>(1, batch * heads * rows * keys), Guard::behind) {
    for (Index n = 0; n < batch * heads * rows * keys; ++n) {
      memory.data()[n] = static_cast<T>(random.chance(0.1) ? -std::numeric_limits<float>::infinity()
                                                           : static_cast<float>(2 * random.normal()));
    }
  }
  TensorView<const T> view() const {
    const Index count = batch * heads * rows * keys, room = std::max<Index>(1, count);
    return longspan::compact_view<const T>(memory.data() + (room - count), batch, heads, rows, keys);
  }
  decltype(Definition::score) meaning(Index first) const {
    return [this, first](double s, Index b, Index h, Index i, Index j) {
      const TensorView<const T> x = view();
      return s +
             static_cast<double>(x.row(batch == 1 ? 0 : b, heads == 1 ? 0 : h, rows == 1 ? 0 : i - first)[j]);
    };
  }
};

}  // namespace

TEMPLATE_TEST_CASE("softmax_attention: within the bound with a bias of any element type", "[gauge][score]",
                   float, double, bfloat16, half) {
  for_each_case(25, [](Random& random) {
    const Shape shape = small_shape(random);
    const Index first = any_first_query(shape, random);
    const GuardedBias<TestType> bias(shape, random);
    const Definition what{.score = bias.meaning(first), .first_query = first};
    const longspan::softmax_attention attend{additive_bias(bias.view(), first)};
    check_call<float>(shape, Values::normal, random, attend, what);
    if constexpr (!std::is_same_v<TestType, half>)
      check_call<double>(shape, Values::normal, random, attend, what);
  });
}

TEST_CASE("softmax_attention: a bias tensor has the bits of the same bias as a function", "[score][bits]") {
  for_each_case(40, [](Random& random) {
    const Shape shape = small_shape(random);
    const Index first = shape.kv_len - shape.q_len;
    const GuardedBias<float> bias(shape, random);
    const auto by_pairs = [of = additive_bias(bias.view(), first)](float s, Index b, Index h, Index i,
                                                                   Index j) { return of(s, b, h, i, j); };
    Call<float> whole(shape, Values::normal, random), in_pairs = whole;
    whole.run(longspan::softmax_attention{longspan::causal{}, additive_bias(bias.view(), first)});
    in_pairs.run(longspan::softmax_attention{longspan::causal{}, by_pairs});
    CHECK(whole.same_outputs(in_pairs));
    using longspan::operator|;
    const auto twice = [](float s, Index, Index, Index, Index) { return 2 * s; };
    whole.run(longspan::softmax_attention{additive_bias(bias.view(), first) | twice});
    in_pairs.run(longspan::softmax_attention{by_pairs | twice});
    CHECK(whole.same_outputs(in_pairs));
  });
}

TEST_CASE("softmax_attention: NaN in a bias stays in its row", "[score][nan]") {
  for_each_case(20, [](Random& random) {
    Shape shape = small_shape(random);
    shape.batch = shape.heads = shape.kv_heads = 1;
    if (shape.q_len == 0 || shape.kv_len == 0) return;
    Tensor<float> bias(1, 1, shape.q_len, shape.kv_len);
    fill_normal(bias, random);
    Call<float> clean(shape, Values::normal, random), poisoned = clean;
    clean.run(longspan::softmax_attention{additive_bias(bias.view())});
    const Index row = random.between(0, shape.q_len - 1);
    bias.row(0, 0, row)[random.between(0, shape.kv_len - 1)] = std::numeric_limits<float>::quiet_NaN();
    poisoned.run(longspan::softmax_attention{additive_bias(bias.view())});
    for (Index i = 0; i < shape.q_len; ++i) {
      for (Index c = 0; c < shape.value_dim; ++c) {
        const float x = poisoned.out.row(0, 0, i)[c];
        if (i == row) {
          CHECK(std::isnan(x));
        } else {
          CHECK(x == clean.out.row(0, 0, i)[c]);
        }
      }
    }
  });
}
