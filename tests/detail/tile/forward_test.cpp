// How a call is cut into tasks, observed by an executor that runs only one of them.
#include "longspan/detail/tile/forward.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "longspan/softmax_attention.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using longspan::causal;
using longspan::softmax_attention;

/// Runs only the task `only`, and records the number of tasks in each round.
struct OneTask {
  Index only;
  Index claims;
  std::vector<Index>* rounds;

  Index workers() const { return claims; }
  template <class Task>
  void for_each(Index tasks, Task&& task) const {
    rounds->push_back(tasks);
    if (only < tasks) task(only, claims - 1);
  }
};

/// Runs tasks in falling order, each with another worker: results must not depend on the order or the worker.
struct Backwards {
  Index claims;

  Index workers() const { return claims; }
  template <class Task>
  void for_each(Index tasks, Task&& task) const {
    for (Index t = tasks; t-- > 0;) task(t, t % claims);
  }
};

}  // namespace

TEST_CASE("forward: every query row belongs to exactly one task", "[forward]") {
  Random random(1);
  // More than least_parallel_tile_flop each, so that the executor is used.
  for (const Shape& shape : {Shape{2, 2, 1, 200, 60, 16, 16}, Shape{1, 3, 1, 67, 150, 32, 24},
                             Shape{3, 8, 4, 333, 20, 16, 9}, Shape{1, 1, 1, 1000, 40, 16, 16}}) {
    INFO(shape.text());
    const Call<float> call(shape, Values::normal, random);
    std::vector<int> writers(call.lse.values.size());
    std::vector<Index> rounds;
    Index tasks = 1, halves = 0;
    for (Index only = 0; only < tasks; ++only) {
      Call<float> own = call;
      rounds.clear();
      own.run(softmax_attention{causal{}}, OneTask{only, 1, &rounds});
      REQUIRE(rounds.size() == 1);
      tasks = rounds[0];
      for (std::size_t row = 0; row < writers.size(); ++row) {
        const float* out = own.out.row(0, 0, static_cast<Index>(row));
        const auto written =
            std::count_if(out, out + shape.value_dim, [](float x) { return !std::isnan(x); });
        halves += written != 0 && written != shape.value_dim;
        halves += (written != 0) == std::isnan(own.lse.values[row]);
        writers[row] += written != 0;
      }
    }
    CHECK(tasks > 1);
    CHECK(halves == 0);
    CHECK(std::count(writers.begin(), writers.end(), 1) == static_cast<std::ptrdiff_t>(writers.size()));
  }
}

TEST_CASE("forward: with few queries and several workers, keys are split and the parts merged", "[forward]") {
  Random random(2);
  for (const Shape& shape : {Shape{1, 1, 1, 12, 9000, 16, 8}, Shape{1, 2, 1, 2, 9000, 16, 8}}) {
    INFO(shape.text());
    Call<float> call(shape, Values::normal, random), alone = call;
    std::vector<Index> rounds;
    alone.run(softmax_attention{}, OneTask{0, 4, &rounds});
    REQUIRE(rounds.size() == 2);
    CHECK(rounds[0] >= 9000 / longspan::detail::keys_in_chunk);
    CHECK(rounds[1] < rounds[0]);
  }
}

TEST_CASE("forward: bits do not depend on the order of tasks and on their workers", "[forward][bits]") {
  Random random(3);
  for (const Shape& shape : {Shape{2, 2, 1, 200, 60, 16, 16}, Shape{1, 1, 1, 12, 9000, 16, 8},
                             Shape{1, 2, 1, 2, 9000, 16, 8}, Shape{1, 1, 1, 20, 140000, 4, 4}}) {
    INFO(shape.text());
    Call<float> call(shape, Values::normal, random);
    call.run(softmax_attention{causal{}}, longspan::serial{});
    for (const Index claims : {1, 2, 5, 64}) {
      Call<float> own = call.unrun();
      own.run(softmax_attention{causal{}}, Backwards{claims});
      CHECK(call.same_outputs(own));
    }
  }
}

TEST_CASE("forward: a small call stays on the calling thread", "[forward]") {
  Random random(4);
  std::vector<Index> rounds;
  Call<float> small(Shape{1, 1, 1, 12, 20, 8, 8}, Values::normal, random),
      large(Shape{1, 1, 1, 300, 300, 64, 64});
  small.run(softmax_attention{}, OneTask{0, 4, &rounds});
  CHECK(rounds.empty());
  large.run(softmax_attention{}, OneTask{0, 4, &rounds});
  CHECK(!rounds.empty());
}
