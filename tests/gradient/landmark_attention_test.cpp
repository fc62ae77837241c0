// The gradient of landmark_attention compared with its definition and with its reference.
#include "longspan/gradient/landmark_attention.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "longspan/gradient/softmax_attention.hpp"
#include "longspan/reference/gradient/landmark_attention.hpp"
#include "support/catch.hpp"
#include "support/gauge.hpp"
#include "support/landmark_gradient.hpp"
#include "support/refusal.hpp"

namespace {

using namespace test;
using Eigen::bfloat16;
using Eigen::half;
using longspan::causal;
using longspan::everything;
using longspan::landmark_attention;
using longspan::landmarks;
using longspan::LandmarkSoftmax;

/// A size that is a multiple of nothing, blocks of every size around those of packets and of groups of key tiles.
const std::vector<Index> block_means{1, 2, 3, 8, 16, 17, 40, 64, 100, 200};

Shape draw_landmark_shape(Random& random) {
  Shape shape = draw_shape(random);
  shape.heads = shape.kv_heads * std::min<Index>(shape.heads / shape.kv_heads, 3);
  if (random.chance(0.3)) shape.kv_len = random.between(129, 700);
  shape.q_len = std::min<Index>(shape.q_len, 130);
  while (shape.work() > 800'000 && shape.q_len > 3) shape.q_len /= 2;
  while (shape.work() > 800'000 && shape.head_dim + shape.value_dim > 8) {
    shape.head_dim = shape.head_dim / 2 + 1;
    shape.value_dim = shape.value_dim / 2 + 1;
  }
  return shape;
}

/// One random call with regular or random landmarks. The parts are those of the functor, `what` describes them.
template <class C, class... Parts>
void check_random_call(Random& random, const Definition& what, const Parts&... parts) {
  const Shape shape = draw_landmark_shape(random);
  const Values values = random.pick(all_values);
  const bool regular = random.chance(0.4);
  const Index mean = random.pick(block_means);
  const Landmarks at = regular ? every(mean, shape.batch, shape.kv_len)
                               : drawn_landmarks(mean, shape.batch, shape.kv_len, random);
  const LandmarkLists lists(at);
  landmark_attention attend{regular ? landmarks::every(mean) : lists.at(), parts...};
  attend.bf16_products = false;
  C call(shape, values, random);
  call.has_dlse = random.chance(0.5);
  INFO(shape.text() << " values=" << text_of(values) << (regular ? " every " : " mean ") << mean
                    << " first_query=" << what.first_query << " dlse=" << call.has_dlse);
  call.run(with_options(attend, what), longspan::openmp{random.between(1, 3)});
  check_landmark_gradient(what, at, call);
}

const Definition causally{.sees = [](Index, Index, Index i, Index j) { return j <= i; }};

/// A score function that a user writes.
struct falling {
  float operator()(float s, Index, Index, Index i, Index j) const {
    return s - 0.25f * static_cast<float>(i - j);
  }
  float derivative(float, Index, Index, Index, Index) const { return 1; }
};

struct odd_pairs {
  bool sees(Index i, Index j) const { return (i * 7 + j * 3) % 5 != 0; }
};

}  // namespace

TEST_CASE("gradient of landmark_attention: within the bound under a causal mask", "[gauge]") {
  for_each_case(40, [](Random& random) {
    Definition what = causally;
    if (random.chance(0.3)) what.first_query = random.between(-5, 300);
    check_random_call<GradientCall<float>>(random, what, causal{});
  });
}

TEST_CASE("gradient of landmark_attention: within the bound where all blocks are visible", "[gauge]") {
  for_each_case(25, [](Random& random) { check_random_call<GradientCall<float>>(random, {}, everything{}); });
}

TEST_CASE("gradient of landmark_attention: within the bound with windows and masks of users",
          "[gauge][mask]") {
  for_each_case(15, [](Random& random) {
    const Index left = random.between(0, 200);
    check_random_call<GradientCall<float>>(
        random, {.sees = [left](Index, Index, Index i, Index j) { return j <= i && i - j <= left; }},
        causal{} & longspan::window{.left = left});
    Definition what{.sees = [](Index, Index, Index i, Index j) { return odd_pairs{}.sees(i, j); }};
    what.scale = -0.3;
    what.first_query = random.between(-5, 40);
    check_random_call<GradientCall<float>>(random, what, odd_pairs{});
  });
}

TEST_CASE("gradient of landmark_attention: within the bound for every element type", "[gauge][types]") {
  for_each_case(8, [](Random& random) {
    check_random_call<GradientCall<double>>(random, causally, causal{});
    check_random_call<GradientCall<bfloat16>>(random, causally, causal{});
    check_random_call<GradientCall<half>>(random, causally, causal{});
    check_random_call<GradientCall<float, bfloat16, half, float, half, float, bfloat16>>(random, causally,
                                                                                         causal{});
  });
}

TEST_CASE("gradient of landmark_attention: within the bound with scores", "[gauge][score]") {
  for_each_case(10, [](Random& random) {
    Definition what = causally;
    what.score = [](double s, Index, Index, Index, Index) { return 5 * std::tanh(s / 5); };
    what.derivative = [](double s, Index, Index, Index, Index) { return 1 - std::pow(std::tanh(s / 5), 2); };
    check_random_call<GradientCall<float>>(random, what, causal{}, longspan::softcap{5});
    what.score = [](double s, Index, Index, Index i, Index j) { return s - 0.25 * double(i - j); };
    what.derivative = {};
    check_random_call<GradientCall<float>>(random, what, causal{}, falling{});
  });
}

TEST_CASE("gradient of landmark_attention: as the reference for all options", "[law][reference]") {
  for_each_case(25, [](Random& random) {
    const Index kv_len = random.between(1, 230), q_len = random.between(1, std::min<Index>(110, kv_len));
    GradientCall<double> call(Shape{2, 6, 2, q_len, kv_len, 6, 9},
                              random.pick({Values::normal, Values::peaked, Values::flat}), random);
    call.has_dlse = random.chance(0.5);
    const Landmarks at = drawn_landmarks(random.pick({1, 4, 30, 90, 150}), 2, kv_len, random);
    const LandmarkLists lists(at);
    const auto blocks = static_cast<Index>(std::max(at.of_row[0].size(), at.of_row[1].size()));
    std::vector<float> keep(static_cast<std::size_t>(2 * 6 * q_len * std::max<Index>(1, blocks)));
    for (float& x : keep) x = random.chance(0.3) ? 0.0f : 1.5f;
    Rows<float> cmt(2, 6, q_len), dcmt(2, 6, q_len, NAN), exact_dcmt = dcmt;
    for (float& x : cmt.values) x = static_cast<float>(3 * random.normal());
    if (random.chance(0.5)) cmt.values[0] = -std::numeric_limits<float>::infinity();
    std::vector<unsigned char> kinds(static_cast<std::size_t>(2 * std::max<Index>(1, blocks)));
    for (auto& kind : kinds) kind = random.chance(0.5);

    GradientCall<double> exact = call;
    const auto check = [&](auto attend) {
      attend.leak = random.chance(0.3);
      attend.softmax =
          random.pick({LandmarkSoftmax::grouped, LandmarkSoftmax::grouped, LandmarkSoftmax::grouped,
                       LandmarkSoftmax::plain, LandmarkSoftmax::ignored});
      if (attend.softmax == LandmarkSoftmax::grouped) {
        if (random.chance(0.5))
          attend.gate_keep = longspan::compact_view(std::as_const(keep).data(), 2, 6, q_len, blocks);
        if (random.chance(0.5)) {
          attend.control.cmt = std::as_const(cmt).view();
          attend.control.blocks = {kinds.data(), 2, blocks, blocks};
          attend.control.cutoff = random.pick({0.0, 0.2});
        }
      }
      call.forward.run(attend);
      auto backward = gradient(attend), backward_exactly = backward;
      if (attend.control.cmt.data != nullptr) {
        backward.dcmt = dcmt.view();
        backward_exactly.dcmt = exact_dcmt.view();
      }
      const auto& in = std::as_const(call.forward);
      const longspan::reference::exact reference{backward_exactly};
      if (call.has_dlse) {
        backward(in.q.view(), in.k.view(), in.v.view(), in.out.view(), in.lse.view(), call.dout.view(),
                 call.dlse.view(), call.dq.view(), call.dk.view(), call.dv.view(), longspan::openmp{2});
        reference(in.q.view(), in.k.view(), in.v.view(), call.dout.view(), call.dlse.view(), exact.dq.view(),
                  exact.dk.view(), exact.dv.view());
      } else {
        backward(in.q.view(), in.k.view(), in.v.view(), in.out.view(), in.lse.view(), call.dout.view(),
                 call.dq.view(), call.dk.view(), call.dv.view(), longspan::openmp{2});
        reference(in.q.view(), in.k.view(), in.v.view(), call.dout.view(), exact.dq.view(), exact.dk.view(),
                  exact.dv.view());
      }
      for (std::size_t n = 0; n < dcmt.values.size() && attend.control.cmt.data != nullptr; ++n)
        REQUIRE(std::abs(dcmt.values[n] - exact_dcmt.values[n]) <
                1e-6f * (1 + std::abs(exact_dcmt.values[n])));
    };
    INFO("kv_len " << kv_len << " q_len " << q_len << " blocks " << blocks);
    switch (random.between(0, 2)) {
      case 0:
        check(landmark_attention{lists.at()});
        break;
      case 1:
        check(landmark_attention{lists.at(), odd_pairs{}});
        break;
      default:
        check(landmark_attention{lists.at(), everything{},
                                 longspan::rotary(longspan::Pairing::half_split, 100, 4),
                                 longspan::softcap{3}});
    }
    const auto same = [](const Tensor<double>& got, const Tensor<double>& wanted) {
      for (std::size_t n = 0; n < got.values.size(); ++n)
        REQUIRE(std::abs(got.values[n] - wanted.values[n]) < 1e-10 * (1 + std::abs(wanted.values[n])));
    };
    same(call.dq, exact.dq);
    same(call.dk, exact.dk);
    same(call.dv, exact.dv);
  });
}

TEST_CASE("gradient of landmark_attention: without landmarks it is that of softmax attention", "[law]") {
  Random random(1);
  for (const Index kv_len : {60, 200, 500}) {
    GradientCall<float> call(Shape{1, 4, 2, 50, kv_len, 16, 8}, Values::peaked, random);
    call.has_dlse = true;
    call.run(landmark_attention{landmarks::none()});
    check_gradient(causally, call);
    landmark_attention plain{landmarks::every(7)};
    plain.softmax = LandmarkSoftmax::plain;
    call.run(plain);
    check_gradient(causally, call);
    landmark_attention ignored{landmarks::every(7)};
    ignored.softmax = LandmarkSoftmax::ignored;
    call.run(ignored);
    check_gradient({.sees = [](Index, Index, Index i, Index j) { return j <= i && j % 7 != 6; }}, call);
  }
}

TEST_CASE("gradient of landmark_attention: sums of float stay within the bound in a long context",
          "[gauge]") {
  Random random(2);
  for (const Shape& shape : {Shape{1, 1, 1, 60, 3000, 8, 8}, Shape{1, 1, 1, 2500, 70, 8, 8}}) {
    for (const Index length : {64, 1000}) {
      GradientCall<float> call(shape, Values::log_normal, random);
      call.run(landmark_attention{landmarks::every(length), everything{}});
      check_landmark_gradient({}, every(length, 1, shape.kv_len), call);
    }
  }
}

TEST_CASE("gradient of landmark_attention: NaN in what is hidden reaches no gradient", "[masked]") {
  for (const Index length : {5, 64, 250}) {
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
      Random random(static_cast<std::uint64_t>(length));
      const Shape shape{1, 2, 1, 40, 600, 12, 8};
      GradientCall<float> call(shape, Values::normal, random);
      landmark_attention attend{landmarks::every(length)};
      attend.first_query = 500;
      call.forward.run(attend);
      GradientCall<float> spoiled = call;
      call.differentiate(attend, longspan::serial{});
      for (Index j = length - 1; j < 600; j += length) {  // values of landmarks
        for (Index c = 0; c < 8; ++c) spoiled.forward.v.row(0, 0, j)[c] = bad;
      }
      for (Index j = 540; j < 600; ++j) {  // keys after the last query
        for (Index c = 0; c < 12; ++c) spoiled.forward.k.row(0, 0, j)[c] = bad;
        for (Index c = 0; c < 8; ++c) spoiled.forward.v.row(0, 0, j)[c] = bad;
      }
      spoiled.differentiate(attend, longspan::serial{});
      CHECK(spoiled.same_gradients(call));

      // A query that is NaN spoils its dq and the keys that it sees; not the values of landmarks, nor later keys.
      spoiled = call;
      for (Index c = 0; c < 8; ++c) spoiled.dout.row(0, 1, 7)[c] = bad;
      spoiled.differentiate(attend, longspan::serial{});
      const Index own_block = 507 / length;
      for (Index j = 0; j < 600; ++j) {
        const bool is_landmark = j % length == length - 1;
        const bool has_value = j <= 507 && !is_landmark;
        const bool has_key = has_value || (is_landmark && j / length < own_block);
        REQUIRE(std::isfinite(spoiled.dv.row(0, 0, j)[0]) == !has_value);
        REQUIRE(std::isfinite(spoiled.dk.row(0, 0, j)[0]) == !has_key);
      }
      for (Index i = 0; i < 40; ++i) REQUIRE(std::isfinite(spoiled.dq.row(0, 1, i)[0]) == (i != 7));
    }
  }
}

TEST_CASE("gradient of landmark_attention: a block whose landmark is masked gets nothing, even from NaN",
          "[masked]") {
  // Landmark 9 is hidden from all; the tokens before it are visible.
  struct without_nine {
    bool sees(Index i, Index j) const { return j <= i && j != 9; }
  };
  Random random(3);
  GradientCall<float> call(Shape{1, 1, 1, 20, 60, 8, 8}, Values::normal, random);
  for (Index j = 5; j < 10; ++j) {
    call.forward.k.row(0, 0, j)[3] = NAN;
    call.forward.v.row(0, 0, j)[3] = NAN;
  }
  call.run(landmark_attention{landmarks::every(5), without_nine{}});
  for (const auto* x : {&call.dq, &call.dk, &call.dv}) {
    CHECK(std::all_of(x->values.begin(), x->values.end(), [](float n) { return std::isfinite(n); }));
  }
  for (Index j = 5; j < 10; ++j) {
    for (Index c = 0; c < 8; ++c) {
      CHECK(call.dk.row(0, 0, j)[c] == 0);
      CHECK(call.dv.row(0, 0, j)[c] == 0);
    }
  }
}

TEST_CASE("gradient of landmark_attention: queries that see nothing have gradient 0", "[masked]") {
  Random random(4);
  GradientCall<float> call(Shape{1, 2, 2, 6, 40, 8, 8}, Values::normal, random);
  for (Index i = 0; i < 3; ++i) call.forward.q.row(0, 1, i)[2] = call.dout.row(0, 1, i)[1] = NAN;
  landmark_attention attend{landmarks::every(4)};
  attend.first_query = -3;
  call.run(attend);
  for (const auto* x : {&call.dk, &call.dv}) {
    CHECK(std::all_of(x->values.begin(), x->values.end(), [](float n) { return std::isfinite(n); }));
  }
  for (Index i = 0; i < 3; ++i) {
    for (Index c = 0; c < 8; ++c) CHECK(call.dq.row(0, 1, i)[c] == 0);
  }
  for (Index j = 3; j < 40; ++j) {
    for (Index c = 0; c < 8; ++c) CHECK(call.dk.row(0, 0, j)[c] == 0);
  }
}

TEST_CASE("gradient of landmark_attention: errors", "[errors]") {
  Random random(5);
  GradientCall<float> call(Shape{1, 2, 1, 6, 12, 4, 4}, Values::normal, random);
  const GradientCall<float> before = call;
  landmark_attention attend{landmarks::every(4)};
  const auto text = [&](const auto& backward) {
    const auto& in = std::as_const(call.forward);
    return refusal([&] {
      backward(in.q.view(), in.k.view(), in.v.view(), in.out.view(), in.lse.view(), call.dout.view(),
               call.dq.view(), call.dk.view(), call.dv.view());
    });
  };
  const std::vector<Index> unsorted{5, 3};
  CHECK(text(gradient(landmark_attention{landmarks::at(unsorted)})).find("a landmark of batch row 0") !=
        std::string::npos);
  Rows<float> dcmt(1, 2, 6), short_dcmt(1, 2, 5);
  auto backward = gradient(attend);
  backward.dcmt = dcmt.view();
  CHECK(text(backward).find("gradient(landmark_attention): dcmt is a tensor, wanted none") !=
        std::string::npos);
  std::vector<unsigned char> kinds(3);
  attend.control = {std::as_const(dcmt).view(), {kinds.data(), 1, 3, 3}, 0};
  backward = gradient(attend);
  backward.dcmt = short_dcmt.view();
  CHECK(text(backward).find("gradient(landmark_attention): dcmt is [1, 2, 5]") != std::string::npos);
  attend.softmax = LandmarkSoftmax::plain;
  CHECK(text(gradient(attend)).find("gradient(landmark_attention): softmax is not grouped") !=
        std::string::npos);
  CHECK(call.same_gradients(before));
}
