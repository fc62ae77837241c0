// The bfloat16 inner loops compared with scalar loops, if the processor supports them.
#include "longspan/detail/tile/bf16_arithmetic.hpp"

#include "longspan/softmax_attention.hpp"
#include "support/catch.hpp"
#include "support/gauge.hpp"

#if defined(LONGSPAN_HAS_BF16_ARITHMETIC)

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

namespace {

using namespace longspan::detail;
using namespace test;
using Eigen::bfloat16;
using Policy = Bf16Arithmetic;

bfloat16 low(Policy::Pair pair) { return std::bit_cast<bfloat16>(static_cast<std::uint16_t>(pair & 0xffff)); }
bfloat16 high(Policy::Pair pair) { return std::bit_cast<bfloat16>(static_cast<std::uint16_t>(pair >> 16)); }

std::vector<bfloat16> normals(Index count, Random& random) {
  std::vector<bfloat16> x(static_cast<std::size_t>(count));
  for (bfloat16& value : x) value = static_cast<bfloat16>(static_cast<float>(random.normal()));
  return x;
}

template <class Check>
void for_each_packets(const Check& check) {
  check.template operator()<1>();
  check.template operator()<2>();
  check.template operator()<3>();
}

}  // namespace

TEST_CASE("bf16_products: values of two keys are paired, missing values are 0", "[bf16]") {
  Random random(1);
  for (const Index keys : {1, 2, 3, 8}) {
    for (const Index cols : {1, 7, 31, 32, 33, 64}) {
      const Index stride = cols + 3, to_cols = cols + 5;
      const auto v = normals(keys * stride, random);
      std::vector<Policy::Value> pairs(static_cast<std::size_t>((keys + 1) / 2 * to_cols), 0x12345678u);
      Policy::pair_values(v.data(), stride, keys, cols, pairs.data(), to_cols);
      Index wrong = 0;
      for (Index j = 0; j < keys + keys % 2; ++j) {
        for (Index c = 0; c < to_cols; ++c) {
          const Policy::Pair pair = pairs[static_cast<std::size_t>(j / 2 * to_cols + c)];
          const float got = static_cast<float>(j % 2 == 0 ? low(pair) : high(pair));
          const bool exists = j < keys && c < cols;
          wrong += got != (exists ? static_cast<float>(v[static_cast<std::size_t>(j * stride + c)]) : 0.0f);
          wrong += Policy::value_of(pairs.data(), to_cols, j, c) != got;
        }
      }
      INFO("keys=" << keys << " cols=" << cols);
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("bf16_products: scores of packed queries match scalar sums", "[bf16]") {
  Random random(2);
  for_each_packets([&]<int packets>() {
    constexpr Index used = packets * 16, stride = used;
    for (const Index head_dim : {2, 30, 32, 34, 64, 66}) {
      for (Index rows = 1; rows <= tile_rows + 1; ++rows) {
        const Index written = round_up(rows, tile_rows);
        const auto q = normals(used * head_dim, random), k = normals(rows * (head_dim + 1), random);
        std::vector<Policy::Query> packed(static_cast<std::size_t>(Policy::query_rows(head_dim) * stride));
        for (Index c = 0; c < packets; ++c) {
          Policy::pack([&](Index i) { return q.data() + (c * 16 + i) * head_dim; }, head_dim, 1,
                       packed.data() + c * 16, stride);
        }
        std::vector<float> s(static_cast<std::size_t>(written * stride)),
            highest(static_cast<std::size_t>(used), -1.0f);
        Policy::score_rows<packets>(k.data(), head_dim + 1, rows, packed.data(), head_dim, s.data(),
                                    highest.data(), stride);
        Index wrong = 0;
        for (Index lane = 0; lane < used; ++lane) {
          float row_max = -1;
          for (Index r = 0; r < written; ++r) {
            double wanted = 0, size = 0;
            for (Index c = 0; c < head_dim; ++c) {
              const double x = double(static_cast<float>(q[static_cast<std::size_t>(lane * head_dim + c)])) *
                               double(static_cast<float>(
                                   k[static_cast<std::size_t>(std::min(r, rows - 1) * (head_dim + 1) + c)]));
              wanted += x;
              size += std::abs(x);
            }
            const float got = s[static_cast<std::size_t>(r * stride + lane)];
            wrong += !(std::abs(double(got) - wanted) <= double(head_dim + 2) * 0x1p-24 * size);
            row_max = std::max(row_max, got);
          }
          wrong += highest[static_cast<std::size_t>(lane)] != row_max;
        }
        INFO("packets=" << packets << " head_dim=" << head_dim << " rows=" << rows);
        CHECK(wrong == 0);
      }
    }
  });
}

TEST_CASE("bf16_products: exp scores are rounded, their sum is not", "[bf16]") {
  Random random(3);
  for_each_packets([&]<int packets>() {
    constexpr Index used = packets * 16, stride = used;
    for (const Index keys : {1, 2, 5, 16, 31}) {
      std::vector<float> s(static_cast<std::size_t>((keys + 1) * stride)),
          total(static_cast<std::size_t>(used), 2.0f);
      for (float& x : s) x = -std::abs(static_cast<float>(8 * random.normal()));
      s[0] = Policy::masked_score;
      const std::vector<float> scores = s, shift(static_cast<std::size_t>(used), 1.5f);
      std::vector<Policy::Weight> pairs(static_cast<std::size_t>((keys + 1) / 2 * stride));
      Policy::exp_rows<packets>(s.data(), keys, 0.5f, shift.data(), total.data(), pairs.data(), stride);
      Index wrong = 0;
      for (Index lane = 0; lane < used; ++lane) {
        double sum = 2;
        for (Index j = 0; j < keys; ++j) {
          const double p = std::exp2(0.5 * double(scores[static_cast<std::size_t>(j * stride + lane)]) - 1.5);
          const Policy::Weight pair = pairs[static_cast<std::size_t>(j / 2 * stride + lane)];
          const double got = double(static_cast<float>(j % 2 == 0 ? low(pair) : high(pair)));
          wrong += !(std::abs(got - p) <= (0x1p-8 + 8e-5) * p);
          alignas(64) float of_lane[16];
          store<float>(of_lane, Policy::weight_of(pairs.data() + lane / 16 * 16, j, stride));
          wrong += double(of_lane[lane % 16]) != got;
          sum += p;
        }
        if (keys % 2 == 1)
          wrong += static_cast<float>(high(pairs[static_cast<std::size_t>(keys / 2 * stride + lane)])) != 0;
        wrong += !(std::abs(double(total[static_cast<std::size_t>(lane)]) - sum) <= 8e-5 * sum);
      }
      INFO("packets=" << packets << " keys=" << keys);
      CHECK(wrong == 0);
    }
  });
}

TEST_CASE("bf16_products: weighted sums of the values of pairs of keys", "[bf16]") {
  Random random(4);
  for_each_packets([&]<int packets>() {
    constexpr Index used = packets * 16, stride = used;
    for (const Index rows : {0, 1, 5, 64}) {
      for (const Accumulate into : {Accumulate::overwrite, Accumulate::add, Accumulate::rescale}) {
        const auto pack = [](const std::vector<bfloat16>& x, std::size_t n) {
          return std::bit_cast<std::uint16_t>(x[2 * n]) |
                 Policy::Pair{std::bit_cast<std::uint16_t>(x[2 * n + 1])} << 16;
        };
        const auto v = normals(2 * (rows + 1) * tile_rows, random),
                   p = normals(2 * (rows + 1) * stride, random);
        std::vector<Policy::Pair> v_pairs(v.size() / 2), p_pairs(p.size() / 2);
        for (std::size_t n = 0; n < v_pairs.size(); ++n) v_pairs[n] = pack(v, n);
        for (std::size_t n = 0; n < p_pairs.size(); ++n) p_pairs[n] = pack(p, n);
        std::vector<float> before(static_cast<std::size_t>(tile_rows * stride)),
            scale(static_cast<std::size_t>(used));
        for (float& x : before) x = static_cast<float>(random.normal());
        for (float& x : scale) x = static_cast<float>(random.normal());
        std::vector<float> o = before;
        const longspan::detail::RowRun all{rows, 0, packets};
        Policy::value_rows<packets>(v_pairs.data(), tile_rows, tile_rows, p_pairs.data(), {&all, 1}, o.data(),
                                    into, scale.data(), stride);
        Index wrong = 0;
        for (Index r = 0; r < tile_rows; ++r) {
          for (Index lane = 0; lane < used; ++lane) {
            const double old = double(before[static_cast<std::size_t>(r * stride + lane)]);
            double wanted = into == Accumulate::overwrite ? 0
                            : into == Accumulate::add     ? old
                                                      : old * double(scale[static_cast<std::size_t>(lane)]);
            double size = std::abs(wanted);
            for (Index j = 0; j < rows; ++j) {
              for (Index half = 0; half < 2; ++half) {
                const double x =
                    double(static_cast<float>(v[static_cast<std::size_t>(2 * (j * tile_rows + r) + half)])) *
                    double(static_cast<float>(p[static_cast<std::size_t>(2 * (j * stride + lane) + half)]));
                wanted += x;
                size += std::abs(x);
              }
            }
            wrong += !(std::abs(double(o[static_cast<std::size_t>(r * stride + lane)]) - wanted) <=
                       double(2 * rows + 3) * 0x1p-23 * size);
          }
        }
        INFO("packets=" << packets << " rows=" << rows << " into=" << int(into));
        CHECK(wrong == 0);
      }
    }
  });
}

#endif

TEST_CASE("bf16_products: the option turns them off, and has no effect if they do not apply", "[bf16]") {
  using Eigen::bfloat16;
  test::Random random(5);
  longspan::softmax_attention plain;
  plain.bf16_products = false;
  test::Call<bfloat16> call(test::Shape{1, 2, 1, 30, 300, 32, 16}, test::Values::normal, random);
  call.run(plain);
  test::check_against(test::exact_attention({}, call), call);
  // They do not apply if q, k or v is float. Pairs apply neither to an odd head_dim nor to an output in float; matrix
  // tiles apply to both.
  const bool by_pairs = !longspan::detail::uses_tiles();
  test::Call<bfloat16> odd(test::Shape{1, 2, 1, 30, 300, 33, 16}, test::Values::normal, random),
      odd_plain = odd;
  odd.run(longspan::softmax_attention{});
  odd_plain.run(plain);
  CHECK(odd.same_outputs(odd_plain) == by_pairs);
  test::Call<bfloat16, bfloat16, bfloat16, float> to_float(test::Shape{1, 2, 1, 30, 300, 32, 16},
                                                           test::Values::normal, random),
      to_float_plain = to_float;
  to_float.run(longspan::softmax_attention{});
  to_float_plain.run(plain);
  CHECK(to_float.same_outputs(to_float_plain) == by_pairs);
  test::Call<bfloat16, float, bfloat16, bfloat16> mixed(test::Shape{1, 2, 1, 30, 300, 32, 16},
                                                        test::Values::normal, random),
      mixed_plain = mixed;
  mixed.run(longspan::softmax_attention{});
  mixed_plain.run(plain);
  CHECK(mixed.same_outputs(mixed_plain));
}

TEST_CASE("bf16_products: the highest score has its weight however large it is", "[bf16]") {
  using Eigen::bfloat16;
  // With scores of 1e9 and more the softmax is one-hot: each row is the value of its best key, here key i % keys.
  constexpr test::Index queries = 40, keys = 32, dim = 32;
  for (const float size : {1e4f, 1e8f, 1e9f, 1e12f, 1e17f}) {
    test::Random random(6);
    test::Call<bfloat16> call(test::Shape{1, 1, 1, queries, keys, dim, dim}, test::Values::normal, random);
    for (test::Index i = 0; i < queries; ++i) {
      for (test::Index c = 0; c < dim; ++c)
        call.q.view().row(0, 0, i)[c] = bfloat16(c == i % keys ? size : 0.0f);
    }
    for (test::Index j = 0; j < keys; ++j) {
      for (test::Index c = 0; c < dim; ++c) call.k.view().row(0, 0, j)[c] = bfloat16(c == j ? 3.0f : 1.0f);
    }
    call.run(longspan::softmax_attention{});
    for (test::Index i = 0; i < queries; ++i) {
      for (test::Index c = 0; c < dim; ++c) {
        CHECK(float(call.out.view().row(0, 0, i)[c]) == float(call.v.view().row(0, 0, i % keys)[c]));
      }
    }
  }
}
