// The gradient of softmax_attention: exact cases, laws and errors.
#include "longspan/gradient/softmax_attention.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <unsupported/Eigen/CXX11/Tensor>
#include <vector>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using longspan::causal;
using longspan::softmax_attention;

const std::string function = "longspan: gradient(softmax_attention): ";

/// A call whose tensors a test damages one at a time.
struct Damaged {
  Tensor<float> q{2, 4, 5, 8}, k{2, 2, 7, 8}, v{2, 2, 7, 3}, out{2, 4, 5, 3}, dout{2, 4, 5, 3},
      dq{2, 4, 5, 8}, dk{2, 2, 7, 8}, dv{2, 2, 7, 3};
  Rows<float> lse{2, 4, 5}, dlse{2, 4, 5};

  /// The text of the Error; checks that no gradient was written.
  template <class Attend>
  std::string refused_by(const Attend& attend) {
    for (auto* x : {&dq, &dk, &dv}) std::fill(x->values.begin(), x->values.end(), 9.0f);
    const Tensor<float> before[] = {dq, dk, dv};
    const std::string text = refusal([&] {
      gradient(attend)(q.view(), k.view(), v.view(), out.view(), lse.view(), dout.view(), dlse.view(),
                       dq.view(), dk.view(), dv.view());
    });
    CHECK((text.empty() || (dq == before[0] && dk == before[1] && dv == before[2])));
    return text;
  }
  std::string refused() { return refused_by(softmax_attention{}); }
};

}  // namespace

TEST_CASE("gradient of softmax_attention: equal scores by hand", "[exact]") {
  // Four keys with equal scores: p = 1/4, out = 4, dp - D = (1, 3, 5, 7) - 4.
  Tensor<float> q(1, 1, 1, 2, 1), k(1, 1, 4, 2), v(1, 1, 4, 1), out(1, 1, 1, 1), dout(1, 1, 1, 1, 1),
      dq(1, 1, 1, 2), dk(1, 1, 4, 2), dv(1, 1, 4, 1);
  Rows<float> lse(1, 1, 1);
  v.values = {1, 3, 5, 7};
  for (Index j = 0; j < 4; ++j) {
    k.row(0, 0, j)[0] = static_cast<float>(8 + j);
    k.row(0, 0, j)[1] = static_cast<float>(-8 - j);
  }
  softmax_attention attend;
  attend.scale = 4;
  attend(q.view(), k.view(), v.view(), out.view(), lse.view());
  CHECK(out.values[0] == 4);
  gradient(attend)(q.view(), k.view(), v.view(), out.view(), lse.view(), dout.view(), dq.view(), dk.view(),
                   dv.view());
  // dq = 4 sum_j ds_j k_j with ds = (-3, -1, 1, 3) / 4; the lse is log 4, which is not exact in float.
  for (std::size_t j = 0; j < 4; ++j) {
    const float ds = static_cast<float>(2 * int(j) - 3);
    CHECK(std::abs(dv.values[j] - 0.25f) <= 1e-7f);
    CHECK(std::abs(dk.values[2 * j] - ds) <= 1e-6f);
    CHECK(std::abs(dk.values[2 * j + 1] - ds) <= 1e-6f);
  }
  CHECK(std::abs(dq.values[0] - 10) <= 1e-5f);
  CHECK(std::abs(dq.values[1] + 10) <= 1e-5f);
}

TEST_CASE("gradient of softmax_attention: Eigen tensors, with and without dlse and execution", "[types]") {
  using Tensor4 = Eigen::Tensor<float, 4, Eigen::RowMajor>;
  using Tensor3 = Eigen::Tensor<float, 3, Eigen::RowMajor>;
  Tensor4 q(1, 2, 6, 4), k(1, 1, 9, 4), v(1, 1, 9, 5), out(1, 2, 6, 5), dout(1, 2, 6, 5), dq(1, 2, 6, 4),
      dk(1, 1, 9, 4), dv(1, 1, 9, 5);
  Tensor3 lse(1, 2, 6), no_dlse(1, 2, 6);
  q.setRandom();
  k.setRandom();
  v.setRandom();
  dout.setRandom();
  no_dlse.setZero();
  softmax_attention attend{causal{}};
  attend(q, k, v, out, lse);
  gradient(attend)(q, k, v, out, lse, dout, dq, dk, dv);
  const auto same = [](const Tensor4& a, const Tensor4& b) {
    return std::equal(a.data(), a.data() + a.size(), b.data());
  };
  Tensor4 dq2 = dq, dk2 = dk, dv2 = dv;
  const auto check_again = [&](auto&&... execution) {
    for (auto* x : {&dq2, &dk2, &dv2}) x->setConstant(NAN);
    gradient(attend)(q, k, v, out, lse, dout, dq2, dk2, dv2, execution...);
    CHECK((same(dq, dq2) && same(dk, dk2) && same(dv, dv2)));
    for (auto* x : {&dq2, &dk2, &dv2}) x->setConstant(NAN);
    gradient(attend)(q, k, v, out, lse, dout, no_dlse, dq2, dk2, dv2, execution...);
    CHECK((same(dq, dq2) && same(dk, dk2) && same(dv, dv2)));
  };
  check_again();
  check_again(longspan::serial{});
  longspan::Execution execution(longspan::openmp{2});
  check_again(execution);
}

TEST_CASE("gradient of softmax_attention: of a merge of two halves is that of the whole, through dlse",
          "[law]") {
  // out = sum_n w_n out_n with w_n = exp(lse_n - lse), so dout_n = w_n dout and dlse_n = w_n (dout.out_n - dout.out).
  for_each_case(10, [](Random& random) {
    const Shape shape{1, 2, 1, random.between(1, 40), random.between(2, 80), 8, 9};
    const Index cut = random.between(1, shape.kv_len - 1);
    GradientCall<double> whole(shape, Values::normal, random);
    whole.run(softmax_attention{});
    const Index firsts[] = {0, cut}, counts[] = {cut, shape.kv_len - cut};
    Tensor<double> dq(1, 2, shape.q_len, 8);
    for (int n = 0; n < 2; ++n) {
      Shape of_half = shape;
      of_half.kv_len = counts[n];
      GradientCall<double> half(of_half, Values::normal, random);
      half.has_dlse = true;
      half.forward.q = whole.forward.q;
      std::copy_n(whole.forward.k.row(0, 0, firsts[n]), counts[n] * 8, half.forward.k.row(0, 0, 0));
      std::copy_n(whole.forward.v.row(0, 0, firsts[n]), counts[n] * 9, half.forward.v.row(0, 0, 0));
      half.forward.run(softmax_attention{});
      for (Index row = 0; row < 2 * shape.q_len; ++row) {
        const double weight =
            std::exp(half.forward.lse.values[std::size_t(row)] - whole.forward.lse.values[std::size_t(row)]);
        double difference = 0;
        for (Index c = 0; c < 9; ++c) {
          const double d = whole.dout.row(0, 0, row)[c];
          half.dout.row(0, 0, row)[c] = weight * d;
          difference += d * (half.forward.out.row(0, 0, row)[c] - whole.forward.out.row(0, 0, row)[c]);
        }
        half.dlse.values[std::size_t(row)] = weight * difference;
      }
      half.differentiate(softmax_attention{}, longspan::serial{});
      double worst = 0;
      for (Index at = 0; at < counts[n] * 8; ++at)
        worst =
            std::max(worst, std::abs(half.dk.values[std::size_t(at)] - whole.dk.row(0, 0, firsts[n])[at]));
      for (Index at = 0; at < counts[n] * 9; ++at)
        worst =
            std::max(worst, std::abs(half.dv.values[std::size_t(at)] - whole.dv.row(0, 0, firsts[n])[at]));
      CHECK(worst < 1e-12);
      for (std::size_t at = 0; at < dq.values.size(); ++at) dq.values[at] += half.dq.values[at];
    }
    double worst = 0;
    for (std::size_t at = 0; at < dq.values.size(); ++at)
      worst = std::max(worst, std::abs(dq.values[at] - whole.dq.values[at]));
    CHECK(worst < 1e-12);
  });
}

TEST_CASE("gradient of softmax_attention: linear in dout and dlse, to the bit for powers of two", "[law]") {
  for_each_case(10, [](Random& random) {
    const Shape shape{2, 2, 1, random.between(1, 120), random.between(1, 300), 8, 9};
    GradientCall<float> call(shape, Values::normal, random), doubled = call;
    call.has_dlse = doubled.has_dlse = true;
    for (float& x : doubled.dout.values) x *= -4;
    for (float& x : doubled.dlse.values) x *= -4;
    call.run(softmax_attention{causal{}});
    doubled.run(softmax_attention{causal{}});
    for (float& x : call.dq.values) x = -4 * x + 0.0f;
    for (float& x : call.dk.values) x = -4 * x + 0.0f;
    for (float& x : call.dv.values) x = -4 * x + 0.0f;
    CHECK(call.same_gradients(doubled));
  });
}

TEST_CASE("gradient of softmax_attention: wrong shapes are refused before anything is written", "[errors]") {
  Damaged call;
  CHECK(call.refused().empty());
  SECTION("dout") {
    call.dout = Tensor<float>(2, 4, 5, 4);
    CHECK(call.refused() == function + "dout is [2, 4, 5, 4], wanted [2, 4, 5, 3]");
  }
  SECTION("dlse") {
    call.dlse = Rows<float>(2, 2, 5);
    CHECK(call.refused() == function + "dlse is [2, 2, 5], wanted [2, 4, 5]");
  }
  SECTION("lse") {
    call.lse = Rows<float>(2, 4, 6);
    CHECK(call.refused() == function + "lse is [2, 4, 6], wanted [2, 4, 5]");
  }
  SECTION("out") {
    call.out = Tensor<float>(2, 4, 4, 3);
    CHECK(call.refused() == function + "out is [2, 4, 4, 3], wanted [2, 4, 5, 3]");
  }
  SECTION("dq") {
    call.dq = Tensor<float>(1, 4, 5, 8);
    CHECK(call.refused() == function + "dq is [1, 4, 5, 8], wanted [2, 4, 5, 8]");
  }
  SECTION("dk") {
    call.dk = Tensor<float>(2, 4, 7, 8);
    CHECK(call.refused() == function + "dk is [2, 4, 7, 8], wanted [2, 2, 7, 8]");
  }
  SECTION("dv") {
    call.dv = Tensor<float>(2, 2, 7, 8);
    CHECK(call.refused() == function + "dv is [2, 2, 7, 8], wanted [2, 2, 7, 3]");
  }
}

TEST_CASE("gradient of softmax_attention: shared memory is refused", "[errors]") {
  Damaged call;
  const auto refused = [&](TensorView<float> dq, TensorView<float> dk, TensorView<float> dv) {
    return refusal([&] {
      gradient(softmax_attention{})(call.q.view(), call.k.view(), call.v.view(), call.out.view(),
                                    call.lse.view(), call.dout.view(), dq, dk, dv);
    });
  };
  const auto dq = call.dq.view(), dk = call.dk.view(), dv = call.dv.view();
  CHECK(refused(dq, dk, dv).empty());
  const std::string of_input = " is the memory of an input, wanted memory of its own",
                    of_gradient = " is the memory of another gradient, wanted memory of its own";
  CHECK(refused(call.q.view(), dk, dv) == function + "dq" + of_input);
  CHECK(refused(dq, call.k.view(), dv) == function + "dk" + of_input);
  CHECK(refused(dq, dk, call.v.view()) == function + "dv" + of_input);
  Damaged square;
  square.k = square.v = square.dk = square.dv = Tensor<float>(2, 2, 7, 8);
  square.out = square.dout = Tensor<float>(2, 4, 5, 8);
  const auto refused_square = [&](TensorView<float> to_q, TensorView<float> to_k, TensorView<float> to_v) {
    return refusal([&] {
      gradient(softmax_attention{})(square.q.view(), square.k.view(), square.v.view(), square.out.view(),
                                    square.lse.view(), square.dout.view(), to_q, to_k, to_v);
    });
  };
  CHECK(refused_square(square.dout.view(), square.dk.view(), square.dv.view()) == function + "dq" + of_input);
  CHECK(refused_square(square.out.view(), square.dk.view(), square.dv.view()) == function + "dq" + of_input);
  CHECK(refused_square(square.dq.view(), square.dk.view(), square.dk.view()) ==
        function + "dk" + of_gradient);
}

TEST_CASE("gradient of softmax_attention: options that do not fit are refused", "[errors]") {
  Damaged call;
  const std::vector<float> slopes(3, 0.5f);
  CHECK(call.refused_by(softmax_attention{longspan::alibi{slopes}}) ==
        function + "the number of alibi.slopes is 3, wanted 4, one for each query head");
  CHECK(call.refused_by(softmax_attention{longspan::softcap{-1}}).find(function + "softcap.cap is -1") == 0);
  CHECK(call.refused_by(softmax_attention{longspan::rotary(longspan::Pairing::half_split, 10000, 10)})
            .find("rotary: the number of rotated dimensions is 10") != std::string::npos);
  softmax_attention attend;
  attend.scale = NAN;
  CHECK(call.refused_by(attend).find(function + "scale is nan") == 0);
}
