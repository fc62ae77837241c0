#include "longspan/gradient/infini_attention.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/infini_gradient.hpp"
#include "support/infini_oracle.hpp"
#include "support/refusal.hpp"
#include "support/thread_pool.hpp"

namespace {

using namespace test;
using Eigen::bfloat16;
using longspan::causal;
using longspan::EmptyMemory;
using longspan::infini_attention;
using longspan::InfiniRule;
using longspan::Pairing;
using longspan::rotary;
using longspan::softmax_attention;

template <class T>
constexpr double u = std::is_same_v<T, double> ? 0x1p-53 : 0x1p-24;

/// A call of doubles with the same numbers.
template <class T>
InfiniGradientCall<double> in_double(const InfiniGradientCall<T>& call, Random& random) {
  InfiniGradientCall<double> same(call.shape, random);
  const auto copy = [](const auto& from, auto& to) {
    std::transform(from.values.begin(), from.values.end(), to.values.begin(),
                   [](T x) { return static_cast<double>(x); });
  };
  copy(call.q, same.q);
  copy(call.k, same.k);
  copy(call.v, same.v);
  copy(call.dout, same.dout);
  return same;
}

}  // namespace

TEMPLATE_TEST_CASE("gradient of infini_attention: matches its reference for all sizes and options",
                   "[gauge][gradient][infini]", float, double) {
  double worst = 0;
  for_each_case(60, [&](Random& random) {
    Shape shape = draw_infini_shape(random);
    InfiniGradientCall<TestType> call(shape, random);
    infini_attention attend{softmax_attention{causal{}, rotary(Pairing::half_split)}};
    if (shape.head_dim % 2 != 0) return;
    attend.segment = random.pick({1, 5, 16, 48, 100, 1000});
    attend.rule = random.pick({InfiniRule::linear, InfiniRule::delta});
    attend.empty_memory = random.pick({EmptyMemory::gate, EmptyMemory::bypass});
    attend.memory_uses_positions = random.chance(0.3);
    attend.absolute_positions = random.chance(0.3);
    attend.beta = call.draw_beta(random);
    std::vector<Index> lengths;
    for (Index b = 0; b < shape.batch; ++b) lengths.push_back(random.between(0, shape.q_len));
    if (random.chance(0.3)) attend.lengths = lengths;
    OwnedState initial(shape), dfinal(shape);
    initial.fill(random);
    dfinal.fill(random);
    auto backward = gradient(attend);
    if (random.chance(0.5)) backward.initial = initial.constant();
    if (random.chance(0.5)) backward.dfinal = dfinal.constant();
    backward.bptt_segments = random.pick<Index>({1, 2, 3, longspan::all_segments});
    backward.checkpoint_segments = random.pick<Index>({1, 2, 5, 1000});
    InfiniGradientCall<double> wanted = in_double(call, random);
    wanted.run_reference(backward);
    call.run(backward, longspan::openmp{2});
    INFO(shape.text() << " segment=" << attend.segment << " rule=" << int(attend.rule)
                      << " bptt=" << backward.bptt_segments << " checkpoints=" << backward.checkpoint_segments
                      << " initial=" << (backward.initial.m.data != nullptr)
                      << " dfinal=" << (backward.dfinal.m.data != nullptr));
    const double error = worst_share(call, wanted) / u<TestType>;
    worst = std::max(worst, error);
    // dbeta and the states of double calls are floats.
    CHECK(error * u<TestType> <= (std::is_same_v<TestType, double> ? 1e-7 : 1000 * u<float>));
  });
  WARN("worst " << worst << " u");
}
