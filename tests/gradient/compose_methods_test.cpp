// Gradients of compositions whose parts are dilated and landmark attention.
#include <algorithm>
#include <cmath>
#include <utility>

#include "longspan/gradient/compose.hpp"
#include "longspan/gradient/dilated_attention.hpp"
#include "longspan/gradient/infini_attention.hpp"
#include "longspan/gradient/landmark_attention.hpp"
#include "longspan/reference/dilated_attention.hpp"
#include "longspan/reference/gradient/compose.hpp"
#include "longspan/reference/gradient/dilated_attention.hpp"
#include "longspan/reference/gradient/infini_attention.hpp"
#include "longspan/reference/gradient/landmark_attention.hpp"
#include "longspan/reference/landmark_attention.hpp"
#include "support/catch.hpp"
#include "support/infini_gradient.hpp"

namespace {

using namespace test;
using longspan::causal;

/// The largest difference from the reference, as a share of the largest number of a gradient.
template <class Attend>
double worst_of(const Attend& attend) {
  Random random(1);
  InfiniGradientCall<float> call(Shape{1, 4, 2, 70, 70, 8, 6}, random);
  InfiniGradientCall<double> wanted(call.shape, random);
  const auto &q = call.q, &k = call.k, &v = call.v, &dout = call.dout;
  const auto backward = gradient(attend);
  if constexpr (longspan::LseFunctor<Attend>) {
    Tensor<float> out = dout;
    Rows<float> lse(1, 4, 70);
    attend(q.view(), k.view(), v.view(), out.view(), lse.view());
    backward(q.view(), k.view(), v.view(), std::as_const(out).view(), std::as_const(lse).view(), dout.view(),
             call.dq.view(), call.dk.view(), call.dv.view());
  } else {
    backward(q.view(), k.view(), v.view(), dout.view(), call.dq.view(), call.dk.view(), call.dv.view());
  }
  longspan::reference::exact{backward}(q.view(), k.view(), v.view(), dout.view(), wanted.dq.view(),
                                       wanted.dk.view(), wanted.dv.view());
  return worst_of_tensors(call, wanted);
}

}  // namespace

TEST_CASE("gradients of compositions of dilated and landmark attention: match their references",
          "[gauge][gradient][compose]") {
  constexpr double allowed = 400 * 0x1p-24;
  const longspan::dilated_attention dilated{{{16, 1}, {64, 4}}, causal{}};
  const longspan::landmark_attention landmark{longspan::landmarks::every(8)};
  CHECK(worst_of(longspan::merged{longspan::softmax_attention{causal{}}, dilated}) <= allowed);
  longspan::infini_attention in_segments{dilated};
  in_segments.segment = 32;
  CHECK(worst_of(in_segments) <= allowed);
  longspan::infini_attention with_landmarks{landmark};
  with_landmarks.segment = 32;
  CHECK(worst_of(with_landmarks) <= allowed);
  CHECK(worst_of(longspan::gated{{}, landmark, in_segments}) <= allowed);
}
