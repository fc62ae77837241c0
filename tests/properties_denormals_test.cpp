// Every functor and every stream treats denormal numbers as 0 while its tasks run, and restores the mode afterwards.
#include <atomic>
#include <utility>

#include "longspan/compose.hpp"
#include "longspan/dilated_attention.hpp"
#include "longspan/infini_attention.hpp"
#include "longspan/landmark_attention.hpp"
#include "longspan/softmax_attention.hpp"
#include "longspan/stream/kv_cache.hpp"
#include "support/catch.hpp"
#include "support/floating_point_mode.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"
#include "support/thread_pool.hpp"

namespace {

using namespace test;
using namespace longspan;

/// Counts the calls with denormal numbers treated as 0, and the other calls.
struct Seen {
  std::atomic<int> as_zero{0}, as_numbers{0};
  void look() { ++(denormals_count_as_zero() ? as_zero : as_numbers); }
};

struct LookingScore {
  Seen* seen;
  float operator()(float s, Index, Index, Index, Index) const {
    seen->look();
    return s;
  }
};
struct LookingMask {
  Seen* seen;
  bool sees(Index i, Index j) const {
    seen->look();
    return j <= i;
  }
};
struct LookingFeature {
  Seen* seen;
  double operator()(double x) const {
    seen->look();
    return x * x;
  }
};

template <class Attend>
void check_calls(const Attend& attend, Seen& seen, Index length) {
  Random random(1);
  Call<float> call({1, 2, 1, length, length, 8, 8}, Values::normal, random);
  const FloatingPointMode before;
  const auto run = [&](const auto& executor) {
    attend(std::as_const(call.q).view(), std::as_const(call.k).view(), std::as_const(call.v).view(),
           call.out.view(), executor);
    CHECK(before.is_that_of_this_thread());
    executor.for_each(8, [](Index, Index) { CHECK_FALSE(denormals_count_as_zero()); });
  };
  run(serial{});
  run(openmp{2});
  run(ThreadPool(2));
  CHECK((seen.as_zero > 0) == can_ignore_denormals);
  CHECK((seen.as_numbers == 0) == can_ignore_denormals);
}

TEST_CASE("denormals: softmax attention treats them as 0 in both kernels", "[denormals]") {
  Seen score, mask;
  check_calls(softmax_attention{LookingScore{&score}}, score, 40);
  check_calls(softmax_attention{LookingMask{&mask}}, mask, 3);
}

TEST_CASE("denormals: landmark and dilated attention treat them as 0", "[denormals]") {
  Seen landmark, dilated;
  check_calls(landmark_attention{landmarks::every(8), LookingScore{&landmark}}, landmark, 40);
  check_calls(dilated_attention{{{16, 1}, {64, 2}}, LookingScore{&dilated}}, dilated, 64);
}

TEST_CASE("denormals: infini attention treats them as 0 in its memory and in its segments", "[denormals]") {
  Seen memory, local;
  infini_attention remembering{softmax_attention{causal{}}, LookingFeature{&memory}};
  remembering.segment = 8;
  check_calls(remembering, memory, 20);
  infini_attention local_attention{softmax_attention{causal{}, LookingScore{&local}}};
  local_attention.segment = 16;
  check_calls(local_attention, local, 20);
}

TEST_CASE("denormals: compositions treat them as 0 in their parts", "[denormals]") {
  Seen seen;
  check_calls(merged{softmax_attention{LookingScore{&seen}}, softmax_attention{causal{}}}, seen, 40);
}

TEST_CASE("denormals: streams treat them as 0", "[denormals]") {
  Seen seen;
  const auto extend = [&](auto q, auto k, auto v, auto out, const auto& executor) {
    auto stream = softmax_attention{causal{}, LookingScore{&seen}}.stream({1, 2, 1, 8, 8});
    stream.extend(q, k, v, out, executor);
  };
  check_calls(extend, seen, 40);
}

TEST_CASE("infini_attention: a memory of head_dim 0 returns 0", "[infini]") {
  infini_attention attend{softmax_attention{causal{}}};
  attend.segment = 4;
  Call<float> call({1, 1, 1, 12, 12, 0, 4});
  call.v.values.assign(call.v.values.size(), 2.0f);
  attend(std::as_const(call.q).view(), std::as_const(call.k).view(), std::as_const(call.v).view(),
         call.out.view(), serial{});
  CHECK(call.out.values == std::vector<float>(call.out.values.size(), 1.0f));  // half of the local average
}

}  // namespace
