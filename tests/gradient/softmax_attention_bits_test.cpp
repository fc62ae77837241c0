// Bits of the gradient of softmax_attention: they depend on the numbers and shapes of one KV head alone.
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "longspan/gradient/softmax_attention.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"
#include "support/thread_pool.hpp"

namespace {

using namespace test;
using Eigen::bfloat16;
using longspan::softmax_attention;

template <class C>
C unrun(const C& call) {
  C copy = call;
  for (auto& x : copy.dq.values) x = static_cast<std::remove_reference_t<decltype(x)>>(NAN);
  for (auto& x : copy.dk.values) x = static_cast<std::remove_reference_t<decltype(x)>>(NAN);
  for (auto& x : copy.dv.values) x = static_cast<std::remove_reference_t<decltype(x)>>(NAN);
  return copy;
}

/// Repeats the backward call with every executor and several numbers of threads.
template <class C, class Attend>
void check_executors(C call, const Attend& attend) {
  call.has_dlse = true;
  call.run(attend);
  longspan::Execution<longspan::openmp> reused;
  for (const Index threads : {1, 2, 3, 7, 16}) {
    INFO("threads=" << threads);
    C team = unrun(call), pool = unrun(call), again = unrun(call);
    team.differentiate(attend, longspan::openmp{threads});
    CHECK(call.same_gradients(team));
    pool.differentiate(attend, ThreadPool(threads));
    CHECK(call.same_gradients(pool));
    reused.executor.threads = threads;
    again.differentiate(attend, reused);
    CHECK(call.same_gradients(again));
  }
}

/// Many heads and few; one span of keys, several, and more than are held at a time; chunks of queries.
const std::vector<Shape> shapes{{2, 4, 2, 200, 300, 16, 16}, {1, 2, 1, 130, 2500, 8, 12},
                                {3, 12, 6, 60, 70, 17, 9},   {1, 2, 1, 2100, 130, 8, 8},
                                {1, 2, 1, 5, 70000, 4, 4},   {1, 4, 1, 1, 5000, 16, 8}};

/// KV head `kv` of batch row b, with its query heads, as a call of its own.
template <class T>
GradientCall<T> head_of(const GradientCall<T>& call, Index b, Index kv) {
  const auto& all = call.forward;
  const Index group = all.q.heads / all.k.heads;
  Random random(0);
  GradientCall<T> alone(Shape{1, group, 1, all.q.rows, all.k.rows, all.q.cols, all.v.cols}, Values::normal,
                        random);
  alone.has_dlse = call.has_dlse;
  const auto copy = [](const auto& from, auto& to, Index row, Index first_head) {
    std::copy_n(from.row(row, first_head, 0), to.heads * to.rows * to.cols, to.row(0, 0, 0));
  };
  copy(all.q, alone.forward.q, b, kv * group);
  copy(all.k, alone.forward.k, b, kv);
  copy(all.v, alone.forward.v, b, kv);
  copy(call.dout, alone.dout, b, kv * group);
  std::copy_n(&call.dlse.view()(b, kv * group, 0), group * all.q.rows, alone.dlse.values.begin());
  return alone;
}

template <class T>
bool same_numbers(const T* a, const T* b, Index count) {
  return count == 0 || std::memcmp(a, b, static_cast<std::size_t>(count) * sizeof(T)) == 0;
}

/// Each KV head of the call as a separate call.
template <class T, class Attend>
void check_heads_alone(GradientCall<T> call, const Attend& attend) {
  call.has_dlse = true;
  call.run(attend, longspan::openmp{3});
  const auto& all = call.forward;
  const Index group = all.q.heads / all.k.heads;
  for (Index b = 0; b < all.k.batch; ++b) {
    for (Index kv = 0; kv < all.k.heads; ++kv) {
      GradientCall<T> alone = head_of(call, b, kv);
      alone.run(attend);
      CHECK(same_numbers(alone.dq.row(0, 0, 0), call.dq.row(b, kv * group, 0),
                         static_cast<Index>(alone.dq.values.size())));
      CHECK(same_numbers(alone.dk.row(0, 0, 0), call.dk.row(b, kv, 0),
                         static_cast<Index>(alone.dk.values.size())));
      CHECK(same_numbers(alone.dv.row(0, 0, 0), call.dv.row(b, kv, 0),
                         static_cast<Index>(alone.dv.values.size())));
    }
  }
}

}  // namespace

TEMPLATE_TEST_CASE("gradient of softmax_attention: same bits with every executor and number of threads",
                   "[bits][slow]", float, bfloat16) {
  Random random(1);
  for (const Shape& shape : shapes) {
    INFO(shape.text());
    const GradientCall<TestType> call(shape, Values::normal, random);
    check_executors(call, softmax_attention{});
    check_executors(call, softmax_attention{longspan::causal{}});
  }
}

TEST_CASE("gradient of softmax_attention: same bits with every executor, with scores, positions and double",
          "[bits]") {
  Random random(2);
  for (const Shape& shape : {Shape{1, 4, 2, 150, 300, 16, 16}, Shape{1, 2, 1, 12, 5000, 8, 8}}) {
    INFO(shape.text());
    check_executors(
        GradientCall<float>(shape, Values::normal, random),
        softmax_attention{longspan::softcap{10}, longspan::rotary(longspan::Pairing::half_split)});
    check_executors(GradientCall<double>(shape, Values::normal, random),
                    softmax_attention{longspan::causal{}});
  }
}

TEST_CASE("gradient of softmax_attention: 30 repetitions have the same bits", "[bits]") {
  Random random(3);
  for (const Shape& shape : {Shape{1, 3, 1, 70, 200, 32, 32}, Shape{1, 1, 1, 12, 9000, 16, 8}}) {
    INFO(shape.text());
    GradientCall<float> call(shape, Values::normal, random);
    call.run(softmax_attention{}, longspan::openmp{16});
    int different = 0;
    for (int n = 0; n < 30; ++n) {
      GradientCall<float> again = unrun(call);
      again.differentiate(softmax_attention{}, longspan::openmp{16});
      different += !call.same_gradients(again);
    }
    CHECK(different == 0);
  }
}

TEMPLATE_TEST_CASE("gradient of softmax_attention: a KV head has the same bits alone and in a batch",
                   "[bits][law][slow]", float, bfloat16) {
  Random random(4);
  for (Shape shape : shapes) {
    shape.batch = 2;
    shape.heads *= 2;
    shape.kv_heads *= 2;
    if (shape.kv_len > 5000) shape.batch = 1;
    INFO(shape.text());
    const GradientCall<TestType> call(shape, Values::normal, random);
    check_heads_alone(call, softmax_attention{});
    check_heads_alone(call, softmax_attention{longspan::causal{}});
  }
}

TEST_CASE("gradient of softmax_attention: later queries and keys change no bit of a causal dq",
          "[bits][law][slow]") {
  for_each_case(20, [](Random& random) {
    const Index length = random.between(2, 300), row = random.between(0, length - 2);
    GradientCall<float> call(Shape{1, 2, 1, length, length, 8, 9}, Values::normal, random), changed = call;
    for (Index j = row + 1; j < length; ++j) {
      std::fill_n(changed.forward.k.row(0, 0, j), 8, 9.0f);
      std::fill_n(changed.forward.v.row(0, 0, j), 9, -1000.0f);
      for (Index h = 0; h < 2; ++h) std::fill_n(changed.dout.row(0, h, j), 9, 50.0f);
    }
    call.run(softmax_attention{longspan::causal{}});
    changed.run(softmax_attention{longspan::causal{}});
    for (Index h = 0; h < 2; ++h) {
      CHECK(same_numbers(call.dq.row(0, h, 0), changed.dq.row(0, h, 0), (row + 1) * 8));
      CHECK_FALSE(same_numbers(call.dq.row(0, h, row + 1), changed.dq.row(0, h, row + 1), 8));
    }
  });
}
