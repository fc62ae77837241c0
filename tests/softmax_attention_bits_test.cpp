// Bits of softmax_attention: those of a row depend only on the numbers that enter this row.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <span>
#include <vector>

#include "longspan/softmax_attention.hpp"
#include "support/catch.hpp"
#include "support/oracle.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"
#include "support/thread_pool.hpp"

namespace {

using namespace test;
using Eigen::bfloat16;
using longspan::softmax_attention;

/// Repeats the call with every executor and several numbers of threads.
template <class C, class Attend>
void check_executors(const C& call, const Attend& attend) {
  C serially = call;
  serially.run(attend, longspan::serial{});
  longspan::Execution<longspan::openmp> reused;
  for (const Index threads : {1, 2, 3, 7, 16}) {
    INFO("threads=" << threads);
    C team = call, pool = call, again = call;
    team.run(attend, longspan::openmp{threads});
    CHECK(serially.same_outputs(team));
    pool.run(attend, ThreadPool(threads));
    CHECK(serially.same_outputs(pool));
    reused.executor.threads = threads;
    again.run(attend, reused);
    CHECK(serially.same_outputs(again));
  }
}

/// Many queries, few queries with enough keys to be split among tasks, and calls with at most 8 queries per KV head;
/// with one key chunk, several, and more than a span.
const std::vector<Shape> shapes{
    {2, 4, 2, 200, 300, 16, 16}, {1, 2, 1, 130, 2500, 8, 12}, {1, 1, 1, 12, 5000, 8, 8},
    {1, 2, 1, 20, 40000, 8, 4},  {1, 1, 1, 9, 140000, 4, 4},  {1, 4, 1, 1, 5000, 16, 8},
    {2, 2, 2, 3, 40000, 8, 4},   {1, 1, 1, 8, 140000, 8, 4},  {1, 1, 1, 1, 300000, 8, 8}};

/// Query row i of every head as a separate call.
template <class T>
Call<T> rows_of(const Call<T>& call, Index first, Index count) {
  Call<T> part(Shape{call.q.batch, call.q.heads, call.k.heads, count, call.k.rows, call.q.cols, call.v.cols});
  part.k = call.k;
  part.v = call.v;
  for (Index b = 0; b < call.q.batch; ++b) {
    for (Index h = 0; h < call.q.heads; ++h) {
      std::copy_n(call.q.row(b, h, first), count * call.q.cols, part.q.row(b, h, 0));
    }
  }
  return part;
}

/// True if the outputs of `part` are the rows of `whole` from `first` on.
template <class T>
bool same_rows(const Call<T>& whole, const Call<T>& part, Index first) {
  for (Index b = 0; b < whole.q.batch; ++b) {
    for (Index h = 0; h < whole.q.heads; ++h) {
      const auto rows = static_cast<std::size_t>(part.q.rows),
                 cols = static_cast<std::size_t>(whole.out.cols);
      if (std::memcmp(whole.out.row(b, h, first), part.out.row(b, h, 0), rows * cols * sizeof(T)) != 0 ||
          std::memcmp(&whole.lse.view()(b, h, first), &part.lse.view()(b, h, 0),
                      rows * sizeof(part.lse.values[0])) != 0) {
        return false;
      }
    }
  }
  return true;
}

}  // namespace

TEMPLATE_TEST_CASE("softmax_attention: same bits with every executor and number of threads", "[bits][slow]",
                   float, bfloat16) {
  Random random(1);
  for (const Shape& shape : shapes) {
    INFO(shape.text());
    const Call<TestType> call(shape, Values::normal, random);
    check_executors(call, softmax_attention{});
    check_executors(call, softmax_attention{longspan::causal{}});
  }
}

TEST_CASE("softmax_attention: same bits with every executor, with scores, positions and double", "[bits]") {
  Random random(2);
  const Shape many{1, 4, 2, 150, 300, 16, 16}, split{1, 2, 1, 12, 5000, 8, 8}, few{1, 2, 1, 2, 5000, 8, 8};
  for (const Shape& shape : {many, split, few}) {
    INFO(shape.text());
    check_executors(
        Call<float>(shape, Values::normal, random),
        softmax_attention{longspan::softcap{10}, longspan::rotary(longspan::Pairing::half_split)});
    check_executors(Call<double>(shape, Values::normal, random), softmax_attention{longspan::causal{}});
  }
}

TEST_CASE("softmax_attention: 50 repetitions have the same bits", "[bits]") {
  Random random(3);
  for (const Shape& shape :
       {Shape{1, 3, 1, 70, 200, 32, 32}, Shape{1, 1, 1, 12, 9000, 16, 8}, Shape{1, 4, 2, 2, 9000, 16, 8}}) {
    INFO(shape.text());
    Call<float> call(shape, Values::normal, random);
    call.run(softmax_attention{}, longspan::openmp{16});
    int different = 0;
    for (int n = 0; n < 50; ++n) {
      Call<float> again = call.unrun();
      again.run(softmax_attention{}, longspan::openmp{16});
      different += !call.same_outputs(again);
    }
    CHECK(different == 0);
  }
}

namespace {

/// Each head of the call as a separate call.
template <class T, class Attend>
bool heads_alone_agree(const Call<T>& call, const Attend& attend) {
  const Index group = call.q.heads / call.k.heads;
  for (Index b = 0; b < call.q.batch; ++b) {
    for (Index h = 0; h < call.q.heads; ++h) {
      Tensor<T> out(1, 1, call.q.rows, call.v.cols);
      decltype(call.lse) lse(1, 1, call.q.rows);
      attend(call.q.head(b, h), call.k.head(b, h / group), call.v.head(b, h / group), out.view(), lse.view());
      if (!std::equal(out.values.begin(), out.values.end(), call.out.row(b, h, 0))) return false;
      if (!std::equal(lse.values.begin(), lse.values.end(), &call.lse.view()(b, h, 0))) return false;
    }
  }
  return true;
}

/// The call with every KV head repeated for each of its query heads.
template <class T>
Call<T> with_repeated_heads(const Call<T>& call) {
  const Index group = call.q.heads / call.k.heads;
  Call<T> repeated(
      Shape{call.q.batch, call.q.heads, call.q.heads, call.q.rows, call.k.rows, call.q.cols, call.v.cols});
  repeated.q = call.q;
  for (Index b = 0; b < call.q.batch; ++b) {
    for (Index h = 0; h < call.q.heads; ++h) {
      std::copy_n(call.k.row(b, h / group, 0), call.k.rows * call.k.cols, repeated.k.row(b, h, 0));
      std::copy_n(call.v.row(b, h / group, 0), call.v.rows * call.v.cols, repeated.v.row(b, h, 0));
    }
  }
  return repeated;
}

}  // namespace

TEMPLATE_TEST_CASE("softmax_attention: a head has the same bits alone, in a batch and in a group",
                   "[bits][law]", float, bfloat16) {
  for_each_case(10, [](Random& random) {
    for (const Index group : {1, 2, 3, 4, 5, 6, 7, 8}) {
      // More than 8 queries per KV head, even alone; the next test is for fewer, which another kernel computes.
      const Shape shape{
          2, 2 * group, 2, random.between(9, 60), random.between(1, 300), 8, random.between(1, 20)};
      INFO(shape.text());
      Call<TestType> call(shape, Values::normal, random), grouped = call;
      call.run(softmax_attention{longspan::causal{}}, longspan::openmp{2});
      CHECK(heads_alone_agree(call, softmax_attention{longspan::causal{}}));
      Call<TestType> repeated = with_repeated_heads(call);
      repeated.run(softmax_attention{longspan::causal{}});
      CHECK(call.same_outputs(repeated));
      grouped.run(softmax_attention{});
      repeated.run(softmax_attention{});
      CHECK(grouped.same_outputs(repeated));
    }
  });
}

// The decode kernel: up to 8 queries per KV head, each of which could be a call of its own.
TEMPLATE_TEST_CASE("softmax_attention: each of a few queries has the bits of a call of its own",
                   "[bits][law]", float, double, bfloat16) {
  for_each_case(10, [](Random& random) {
    for (Index queries = 1; queries <= 8; ++queries) {
      for (const Index group : {1, 2, 3, 4, 5, 6, 7, 8}) {
        if (queries % group != 0) continue;
        const Index q_len = queries / group,
                    kv_len = q_len + random.pick<Index>({0, 1, 15, 16, 17, 255, 300, 2100});
        const Shape shape{
            2, 2 * group, 2, q_len, kv_len, random.pick<Index>({8, 33, 64}), random.between(1, 140)};
        INFO(shape.text());
        Call<TestType> call(shape, Values::normal, random);
        softmax_attention attend{longspan::causal{} & longspan::window{.left = random.between(1, 2000)}};
        attend.first_query = kv_len - q_len;
        call.run(attend, longspan::openmp{2});
        CHECK(heads_alone_agree(call, attend));
        for (Index i = 0; i < q_len; ++i) {
          auto token = attend;
          token.first_query = attend.first_query + i;
          Call<TestType> alone = rows_of(call, i, 1);
          alone.run(token);
          CHECK(same_rows(call, alone, i));
        }
      }
    }
  });
}

namespace {

/// ALiBi that accepts slopes for more heads than a call has.
struct spare_slopes : longspan::alibi {
  explicit spare_slopes(std::span<const float> of_heads) : longspan::alibi{of_heads} {}
  void check(const longspan::CallSizes&) const {}
};

}  // namespace

TEST_CASE("softmax_attention: with a score, each of a few queries has the bits of a call of its own",
          "[bits][law][score]") {
  const std::vector<float> slopes = longspan::alibi_slopes(16);
  const auto striped = [&](float s, Index b, Index h, Index i, Index j) {
    return (b + h + i + 2 * j) % 11 == 0 ? -INFINITY
                                         : 0.9f * s - 0.25f * slopes[std::size_t(h)] * float(i - j);
  };
  for_each_case(5, [&](Random& random) {
    for (const Index group : {1, 2, 3, 5, 8}) {
      const Index q_len = random.between(1, 8 / group),
                  kv_len = q_len + random.pick<Index>({1, 17, 300, 2100});
      const Shape shape{2, 2 * group, 2, q_len, kv_len, random.pick<Index>({8, 33}), random.between(1, 70)};
      INFO(shape.text());
      Call<float> call(shape, Values::normal, random);
      Tensor<float> bias(1, 1, q_len, kv_len);
      fill_normal(bias, random, 2);
      const auto check = [&](const auto& score) {
        softmax_attention attend{longspan::causal{} & longspan::window{.left = random.between(1, 2000)},
                                 score};
        attend.first_query = kv_len - q_len;
        call.run(attend, longspan::openmp{2});
        for (Index i = 0; i < q_len; ++i) {
          auto token = attend;
          token.first_query = attend.first_query + i;
          Call<float> alone = rows_of(call, i, 1), by_head = with_repeated_heads(alone);
          alone.run(token);
          CHECK(same_rows(call, alone, i));
          by_head.run(token);
          CHECK(by_head.same_outputs(alone));
        }
      };
      check(longspan::softcap{3});
      check(longspan::softcap{30} | spare_slopes{slopes});
      check(striped);
      check(longspan::additive_bias(bias.view()));
    }
  });
}

TEMPLATE_TEST_CASE("softmax_attention: queries in one call or in several have the same bits", "[bits][law]",
                   float, bfloat16) {
  for_each_case(30, [](Random& random) {
    const Index heads = random.between(1, 3), kv_len = random.between(1, 300);
    const Index cuts[] = {0, random.between(9, 70), random.between(90, 130), 150};
    Call<TestType> call(Shape{1, heads, 1, 150, kv_len, 8, 9}, Values::normal, random);
    softmax_attention attend{longspan::causal{} & longspan::window{.left = random.between(1, 200)}};
    attend.first_query = random.between(-10, 200);
    call.run(attend, longspan::openmp{2});
    for (int n = 0; n < 3; ++n) {
      auto later = attend;
      later.first_query = attend.first_query + cuts[n];
      Call<TestType> part = rows_of(call, cuts[n], cuts[n + 1] - cuts[n]);
      part.run(later);
      INFO("queries " << cuts[n] << " .. " << cuts[n + 1] << " of " << call.q.rows << ", kv_len " << kv_len);
      CHECK(same_rows(call, part, cuts[n]));
    }
  });
}

TEMPLATE_TEST_CASE("softmax_attention: later keys change no bit of causal rows", "[bits][law]", float, double,
                   bfloat16) {
  for_each_case(25, [](Random& random) {
    const Shape shape{1, 2, 1, random.pick<Index>({3, 8, 9, 48, 60, 150}), 0, 8, 9};
    Shape longer = shape;
    longer.kv_len = shape.q_len + random.between(0, 100);
    INFO(longer.text());
    Call<TestType> call(longer, Values::normal, random), changed = call;
    const Index row = random.between(0, shape.q_len - 1), key = longer.kv_len - shape.q_len + row;
    for (Index j = key + 1; j < longer.kv_len; ++j) {
      for (Index c = 0; c < 8; ++c) changed.k.row(0, 0, j)[c] = static_cast<TestType>(9.0f);
      for (Index c = 0; c < 9; ++c) changed.v.row(0, 0, j)[c] = static_cast<TestType>(-1000.0f);
    }
    call.run(softmax_attention{longspan::causal{}});
    changed.run(softmax_attention{longspan::causal{}});
    for (Index h = 0; h < 2; ++h) {
      const auto count = static_cast<std::size_t>(row + 1);
      CHECK(std::memcmp(call.out.row(0, h, 0), changed.out.row(0, h, 0), count * 9 * sizeof(TestType)) == 0);
      CHECK(std::memcmp(&call.lse.view()(0, h, 0), &changed.lse.view()(0, h, 0),
                        count * sizeof(call.lse.values[0])) == 0);
      if (row + 1 == shape.q_len) continue;
      CHECK(call.lse(0, h, row + 1) != changed.lse(0, h, row + 1));
    }
  });
}

TEST_CASE("softmax_attention: padded keys have the bits of absent keys", "[mask][bits]") {
  for_each_case(15, [&](Random& random) {
    Shape shape{1,
                6,
                2,
                random.pick<Index>({1, 9, 30, 60}),
                random.between(1, 200),
                random.pick<Index>({1, 8, 17}),
                random.pick<Index>({1, 8, 19})};
    if (random.chance(0.2)) shape.kv_len += 2300;
    const std::vector<Index> length{random.between(0, shape.kv_len)};
    INFO(shape.text() << " length=" << length[0]);
    Call<float> padded(shape, Values::normal, random), cut = padded;
    for (Index kv = 0; kv < shape.kv_heads; ++kv) {
      for (Index j = length[0]; j < shape.kv_len; ++j) {
        std::fill_n(padded.k.row(0, kv, j), shape.head_dim, NAN);
        std::fill_n(padded.v.row(0, kv, j), shape.value_dim, NAN);
      }
    }
    padded.run(longspan::softmax_attention{longspan::padding{length}});
    // The same buffer with NaN after the last key of each head.
    const auto first_keys = [&](TensorView<float> x) {
      return TensorView<const float>(x.slice_rows(0, length[0]));
    };
    longspan::softmax_attention{}(cut.q.view(), first_keys(padded.k.view()), first_keys(padded.v.view()),
                                  cut.out.view(), cut.lse.view(), longspan::openmp{2});
    CHECK(cut.same_outputs(padded));
  });
}
