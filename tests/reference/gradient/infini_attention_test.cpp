// The reference of the gradient of Infini-attention, compared with differences of the reference of infini_attention.
#include "longspan/reference/gradient/infini_attention.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "support/catch.hpp"
#include "support/infini_gradient.hpp"
#include "support/infini_oracle.hpp"

namespace {

using namespace test;
using longspan::causal;
using longspan::EmptyMemory;
using longspan::infini_attention;
using longspan::InfiniRule;
using longspan::Pairing;
using longspan::rotary;
using longspan::softmax_attention;
using longspan::reference::InfiniMemory;

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (std::size_t n = 0; n < a.size(); ++n) sum += a[n] * b[n];
  return sum;
}

/// dout.out + dM.M + dz.z of the final memory, from a given first one, with causal softmax attention as the local part.
template <class Attend>
double loss_with_states(const Attend& attend, const InfiniGradientCall<double>& call,
                        const OwnedState& initial, const OwnedState& dfinal) {
  const Shape& shape = call.shape;
  Tensor<double> local(shape.batch, shape.heads, shape.q_len, shape.value_dim);
  longspan::reference::exact{softmax_attention{causal{} & longspan::segments{attend.segment}}}(
      call.q.view(), call.k.view(), call.v.view(), local.view());
  double loss = 0;
  for (Index b = 0; b < shape.batch; ++b) {
    for (Index h = 0; h < shape.heads; ++h) {
      const Index kv_head = h / (shape.heads / shape.kv_heads);
      InfiniMemory memory(shape.head_dim, shape.value_dim);
      std::copy_n(initial.m.row(b, kv_head, 0), memory.m.size(), memory.m.begin());
      for (Index c = 0; c < shape.head_dim; ++c)
        memory.z[static_cast<std::size_t>(c)] = initial.z(b, kv_head, c);
      const std::vector<double> beta = beta_of(attend.beta, h, shape.value_dim);
      for (Index begin = 0; begin < shape.q_len; begin += attend.segment) {
        const Index rows = std::min(attend.segment, shape.q_len - begin);
        for (Index i = begin; i < begin + rows; ++i) {
          const auto known = longspan::reference::read(
              memory, longspan::reference::features(call.q.row(b, h, i), shape.head_dim, attend.feature));
          for (Index c = 0; c < shape.value_dim; ++c) {
            const double g = 1 / (1 + std::exp(-beta[static_cast<std::size_t>(c)]));
            loss += call.dout.row(b, h, i)[c] *
                    (g * known[static_cast<std::size_t>(c)] + (1 - g) * local.row(b, h, i)[c]);
          }
        }
        if (rows == attend.segment) {
          longspan::reference::write(memory, call.k.view().slice_rows(begin, rows).matrix(b, kv_head),
                                     call.v.view().slice_rows(begin, rows).matrix(b, kv_head), attend.rule,
                                     attend.feature);
        }
      }
      if (h % (shape.heads / shape.kv_heads) != 0) continue;
      for (Index c = 0; c < shape.head_dim; ++c) {
        for (Index column = 0; column < shape.value_dim; ++column)
          loss += memory.at(c, column) * static_cast<double>(dfinal.m.row(b, kv_head, c)[column]);
        loss += memory.z[static_cast<std::size_t>(c)] * static_cast<double>(dfinal.z(b, kv_head, c));
      }
    }
  }
  return loss;
}

/// The fourth-order difference of loss() with respect to x.
template <class X, class Loss>
double difference(X& x, const Loss& loss) {
  constexpr double step = 0x1p-9;
  const X at = x;
  const auto change = [&](double steps) {
    x = static_cast<X>(static_cast<double>(at) + steps * step);
    const double above = loss();
    x = static_cast<X>(static_cast<double>(at) - steps * step);
    const double below = loss();
    x = at;
    return above - below;
  };
  return (8 * change(1) - change(2)) / (12 * step);
}

template <class X, class Y, class Loss>
double worst_difference(std::vector<X>& x, const std::vector<Y>& gradient, const Loss& loss) {
  std::vector<double> wanted;
  for (X& value : x) wanted.push_back(difference(value, loss));
  return worst_share(gradient, wanted);
}

}  // namespace

TEST_CASE("reference of gradient(infini_attention): equals differences, with states and dbeta",
          "[gradient][infini]") {
  Random random(1);
  for (const InfiniRule rule : {InfiniRule::linear, InfiniRule::delta}) {
    for (const Index length : {12, 14}) {
      const Shape shape{1, 4, 2, length, length, 3, 2};
      InfiniGradientCall<double> call(shape, random);
      infini_attention attend;
      attend.segment = 4;
      attend.rule = rule;
      attend.beta = call.draw_beta(random);
      OwnedState initial(shape), dfinal(shape);
      initial.fill(random);
      dfinal.fill(random);
      auto backward = gradient(attend);
      backward.initial = initial.constant();
      backward.dfinal = dfinal.constant();
      call.run_reference(backward);
      const auto loss = [&] { return loss_with_states(attend, call, initial, dfinal); };
      INFO("rule " << int(rule) << ", length " << length);
      CHECK(worst_difference(call.q.values, call.dq.values, loss) <= 1e-8);
      CHECK(worst_difference(call.k.values, call.dk.values, loss) <= 1e-8);
      CHECK(worst_difference(call.v.values, call.dv.values, loss) <= 1e-8);
      CHECK(worst_difference(call.beta, call.dbeta, loss) <= 1e-6);
      CHECK(worst_difference(initial.m.values, call.dinitial.m.values, loss) <= 1e-6);
      CHECK(worst_difference(initial.z.values, call.dinitial.z.values, loss) <= 1e-6);
    }
  }
}

TEST_CASE("reference of gradient(infini_attention): equals differences for every option",
          "[gradient][infini]") {
  for_each_case(12, [](Random& random) {
    const Shape shape{2, 2, 1, 11, 11, 4, 3};
    InfiniGradientCall<double> call(shape, random);
    infini_attention attend{softmax_attention{causal{}, rotary(Pairing::half_split)}};
    attend.segment = random.pick({3, 4, 20});
    attend.rule = random.pick({InfiniRule::linear, InfiniRule::delta});
    attend.empty_memory = random.pick({EmptyMemory::gate, EmptyMemory::bypass});
    attend.memory_uses_positions = random.chance(0.5);
    attend.absolute_positions = random.chance(0.5);
    attend.beta = call.draw_beta(random);
    const std::vector<Index> lengths{11, random.between(0, 11)};
    attend.lengths = lengths;
    auto backward = gradient(attend);
    call.run_reference(backward);
    Tensor<double> dout = call.dout;
    for (Index h = 0; h < 2; ++h) {
      for (Index i = lengths[1]; i < 11; ++i) std::fill_n(dout.row(1, h, i), 3, 0.0);
    }
    Tensor<double> out = dout;
    const auto loss = [&] {
      longspan::reference::exact{attend}(call.q.view(), call.k.view(), call.v.view(), out.view());
      return dot(out.values, dout.values);
    };
    INFO("segment " << attend.segment << ", rule " << int(attend.rule) << ", lengths " << lengths[1]
                    << ", positions in the memory " << attend.memory_uses_positions);
    CHECK(worst_difference(call.q.values, call.dq.values, loss) <= 1e-6);
    CHECK(worst_difference(call.k.values, call.dk.values, loss) <= 1e-6);
    CHECK(worst_difference(call.v.values, call.dv.values, loss) <= 1e-6);
    CHECK(worst_difference(call.beta, call.dbeta, loss) <= 1e-6);
  });
}
