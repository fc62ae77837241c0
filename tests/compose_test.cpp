#include "longspan/compose.hpp"

#include <array>
#include <cmath>
#include <limits>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "longspan/dilated_attention.hpp"
#include "longspan/infini_attention.hpp"
#include "longspan/landmark_attention.hpp"
#include "longspan/reference/dilated_attention.hpp"
#include "longspan/reference/landmark_attention.hpp"
#include "longspan/reference/partial.hpp"
#include "longspan/reference/softmax_attention.hpp"
#include "longspan/softmax_attention.hpp"
#include "support/catch.hpp"
#include "support/count_allocations.hpp"
#include "support/oracle.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/tensor.hpp"
#include "support/thread_pool.hpp"

namespace {

using namespace test;
using Eigen::bfloat16;
using longspan::causal;
using longspan::dilated_attention;
using longspan::for_heads;
using longspan::gated;
using longspan::landmark_attention;
using longspan::merged;
using longspan::openmp;
using longspan::per_head;
using longspan::serial;
using longspan::softmax_attention;
using Branches = std::vector<longspan::Branch>;
using Beta = longspan::MatrixView<const float>;

static_assert(longspan::LseFunctor<softmax_attention<>>);
static_assert(longspan::LseFunctor<dilated_attention<causal>>);
static_assert(longspan::LseFunctor<landmark_attention<>>);
static_assert(longspan::LseFunctor<merged<softmax_attention<>, dilated_attention<>>>);
static_assert(longspan::AttentionFunctor<longspan::infini_attention<>>);
static_assert(!longspan::LseFunctor<longspan::infini_attention<>>);
static_assert(longspan::AttentionFunctor<gated<softmax_attention<>, softmax_attention<>>>);
static_assert(!longspan::LseFunctor<gated<softmax_attention<>, softmax_attention<>>>);
static_assert(longspan::LseFunctor<per_head<softmax_attention<>, dilated_attention<>>>);
static_assert(!longspan::LseFunctor<per_head<softmax_attention<>, longspan::infini_attention<>>>);
static_assert(longspan::AttentionFunctor<per_head<softmax_attention<>, longspan::infini_attention<>>>);
// Parts without a default constructor make a composition without one; clang failed to compile this trait.
static_assert(!std::is_default_constructible_v<per_head<softmax_attention<>, dilated_attention<>>>);
static_assert(!std::is_default_constructible_v<merged<softmax_attention<>, dilated_attention<>>>);

const std::vector<Shape> shapes{{1, 4, 2, 130, 130, 32, 20},
                                {2, 3, 1, 17, 80, 16, 33},
                                {1, 6, 6, 3, 90, 8, 8},
                                {2, 2, 2, 0, 5, 4, 4},
                                {1, 5, 1, 70, 0, 16, 16}};

/// The keys from `nearest` to `farthest` tokens back: one type for all parts, so that their kernels are compiled only
/// once.
struct tokens_back {
  Index nearest = 0, farthest = 0;

  longspan::KeyRange keys(Index, Index i) const { return {i - farthest, i - nearest + 1}; }
};
const tokens_back near_keys{0, 9}, middle_keys{10, 40}, far_keys{41, 1000};

auto whole_context() {
  return merged{softmax_attention{near_keys}, softmax_attention{middle_keys}, softmax_attention{far_keys}};
}

Definition causal_definition() {
  return {.sees = [](Index, Index, Index i, Index j) { return j <= i; }};
}

/// The result of a reference for a call, in double.
struct Known {
  Tensor<double> out;
  Rows<double> lse;

  template <class C, class Reference>
  Known(const C& call, const Reference& reference)
      : out(call.out.batch, call.out.heads, call.out.rows, call.out.cols),
        lse(call.lse.batch, call.lse.heads, call.lse.rows) {
    reference(call.q.view(), call.k.view(), call.v.view(), out.view(), lse.view());
  }
  longspan::Partial<const double> partial() const { return {out.view(), lse.view()}; }
};

/// The largest difference of two tensors.
template <class A, class B>
double distance(const std::vector<A>& a, const std::vector<B>& b) {
  REQUIRE(a.size() == b.size());
  double worst = 0;
  for (std::size_t n = 0; n < a.size(); ++n) {
    const double x = static_cast<double>(a[n]), y = static_cast<double>(b[n]);
    if (x != y) worst = std::max(worst, std::abs(x - y));
    if (std::isnan(x) != std::isnan(y)) return std::numeric_limits<double>::infinity();
  }
  return worst;
}

}  // namespace

TEMPLATE_TEST_CASE("merged: parts with disjoint keys give attention over all keys", "[law]", float, double,
                   bfloat16) {
  Random random(1);
  for (const Shape& shape : shapes) {
    INFO(shape.text());
    Call<TestType> call(shape, Values::normal, random);
    call.run(whole_context(), openmp{2});
    check_against(exact_attention(causal_definition(), call), call);
  }
}

TEST_CASE("merged: nesting does not change the result", "[law]") {
  Random random(2);
  Call<float> call(shapes[0], Values::normal, random);
  const merged inner{softmax_attention{near_keys}, softmax_attention{middle_keys}};
  call.run(merged{inner, softmax_attention{far_keys}});
  check_against(exact_attention(causal_definition(), call), call);
}

TEST_CASE("merged: two parts give the same bits in either order", "[law]") {
  Random random(3);
  for (const Shape& shape : shapes) {
    Call<float> call(shape, Values::normal, random), other = call.unrun();
    const softmax_attention near{near_keys}, far{far_keys};
    call.run(merged{near, far});
    other.run(merged{far, near});
    CHECK(call.same_outputs(other));
  }
}

TEST_CASE("merged: a part that sees no key changes no bit", "[law]") {
  Random random(4);
  Call<float> call(shapes[0], Values::normal, random), other = call.unrun();
  const softmax_attention attend{near_keys}, nothing{tokens_back{1, 0}};
  call.run(attend);
  other.run(merged{attend, nothing});
  CHECK(call.same_outputs(other));
  other = call.unrun();
  other.run(merged{nothing, attend});
  CHECK(call.same_outputs(other));
  other = call.unrun();
  other.run(merged{attend});
  CHECK(call.same_outputs(other));
  other.run(merged{nothing, nothing});
  for (const float x : other.out.values) CHECK(x == 0);
  for (const float x : other.lse.values) CHECK(x == -std::numeric_limits<float>::infinity());
}

TEST_CASE("merged: functors of all kinds match the references merged in double", "[gauge]") {
  Random random(5);
  const Shape shape{1, 4, 2, 150, 150, 32, 24};
  Call<float> call(shape, Values::normal, random);
  const Branches branches{{16, 1}, {64, 4}};
  const landmark_attention landmark{longspan::landmarks::every(10), causal{}};
  const longspan::reference::exact landmark_reference{landmark};
  call.run(merged{softmax_attention{near_keys}, dilated_attention{branches, causal{}}, landmark}, openmp{3});

  const Known softmax(call, longspan::reference::exact{longspan::softmax_attention{near_keys}}),
      dilated(call, longspan::reference::exact{longspan::dilated_attention{branches, causal{}}}),
      grouped(call, landmark_reference);
  Known all = softmax;
  const std::array parts{softmax.partial(), dilated.partial(), grouped.partial()};
  longspan::reference::merge(std::span<const longspan::Partial<const double>>(parts),
                             {all.out.view(), all.lse.view()});
  CHECK(distance(call.out.values, all.out.values) < 4e-6);
  CHECK(distance(call.lse.values, all.lse.values) < 4e-6);
  CHECK(distance(softmax.out.values, all.out.values) > 0.1);
}

TEST_CASE("gated: matches the gated references, and a closed gate returns the other side", "[gauge]") {
  Random random(6);
  const Shape shape{2, 4, 2, 60, 60, 16, 12};
  Call<float> call(shape, Values::normal, random);
  const softmax_attention near{near_keys};
  const dilated_attention far{Branches{{64, 3}}, causal{}};
  const auto run = [&](const auto& attend) {
    attend(std::as_const(call.q).view(), std::as_const(call.k).view(), std::as_const(call.v).view(),
           call.out.view());
    return call.out;
  };
  const std::vector<float> beta{-3, 0, 0.5, 9};
  const std::vector<double> wide(beta.begin(), beta.end());
  const Known of_near(call, longspan::reference::exact{longspan::softmax_attention{near_keys}}),
      of_far(call, longspan::reference::exact{longspan::dilated_attention{far.branches, causal{}}});
  Tensor<double> wanted = of_near.out;
  longspan::reference::gate({wide.data(), 4, 1, 1}, of_near.out.view(), of_far.out.view(), wanted.view());
  CHECK(distance(run(gated{longspan::per_head_gate(beta), near, far}).values, wanted.values) < 2e-6);

  constexpr float infinite = std::numeric_limits<float>::infinity();
  for (const float logit : {infinite, -infinite}) {
    const auto shut = run(gated{longspan::scalar_gate(logit), near, far});
    CHECK(shut == (logit > 0 ? run(near) : run(far)));
  }
  // Without beta the gate is 1/2.
  const float even = 0;
  CHECK(run(gated{Beta{}, near, far}) == run(gated{longspan::scalar_gate(even), near, far}));
}

TEMPLATE_TEST_CASE("gated: bfloat16 and double outputs are within one more rounding", "[gauge]", bfloat16,
                   double) {
  Random random(7);
  Call<TestType> call({1, 2, 1, 40, 40, 16, 12}, Values::normal, random);
  const gated attend{Beta{}, softmax_attention{near_keys}, softmax_attention{far_keys}};
  attend(std::as_const(call.q).view(), std::as_const(call.k).view(), std::as_const(call.v).view(),
         call.out.view());
  const Known a(call, longspan::reference::exact{longspan::softmax_attention{near_keys}}),
      b(call, longspan::reference::exact{longspan::softmax_attention{far_keys}});
  double worst = 0;
  for (std::size_t n = 0; n < call.out.values.size(); ++n) {
    const double wanted = (a.out.values[n] + b.out.values[n]) / 2;
    const double off = std::abs(static_cast<double>(call.out.values[n]) - wanted);
    worst = std::max(worst, off / (0.01 + std::abs(wanted)));
  }
  CHECK(worst < (std::is_same_v<TestType, double> ? 1e-13 : 0x1p-8));
}

TEST_CASE("per_head: each range has the bits of its functor called for these heads", "[law]") {
  Random random(8);
  const Shape shape{2, 6, 3, 90, 90, 16, 12};
  Call<float> call(shape, Values::normal, random), alone = call.unrun();
  const softmax_attention near{near_keys};
  const dilated_attention far{Branches{{64, 3}}, causal{}};
  call.run(per_head{for_heads{0, 2, near}, for_heads{2, 2, near}, for_heads{2, 6, far}}, openmp{2});

  const auto q = std::as_const(alone.q).view();
  const auto k = std::as_const(alone.k).view(), v = std::as_const(alone.v).view();
  using longspan::detail::slice_heads;
  near(slice_heads(q, 0, 2), slice_heads(k, 0, 1), slice_heads(v, 0, 1), slice_heads(alone.out.view(), 0, 2),
       slice_heads(alone.lse.view(), 0, 2));
  far(slice_heads(q, 2, 4), slice_heads(k, 1, 2), slice_heads(v, 1, 2), slice_heads(alone.out.view(), 2, 4),
      slice_heads(alone.lse.view(), 2, 4));
  CHECK(call.same_outputs(alone));
}

TEST_CASE("per_head: works without an lse, and as the local functor of infini_attention", "[law]") {
  Random random(9);
  const Shape shape{1, 4, 4, 100, 100, 16, 12};
  Call<float> call(shape, Values::normal, random);
  const auto run = [&](const auto& attend, auto execution) {
    attend(std::as_const(call.q).view(), std::as_const(call.k).view(), std::as_const(call.v).view(),
           call.out.view(), execution);
    return call.out;
  };
  longspan::infini_attention compressed{softmax_attention{causal{}}};
  compressed.segment = 32;
  const auto mixed =
      run(per_head{for_heads{0, 1, softmax_attention{causal{}}}, for_heads{1, 4, compressed}}, openmp{});
  const auto exact = run(softmax_attention{causal{}}, openmp{}), whole = run(compressed, openmp{});
  for (Index h = 0; h < 4; ++h) {
    for (Index i = 0; i < shape.q_len; ++i) {
      const float* wanted = (h == 0 ? exact : whole).row(0, h, i);
      CHECK(std::equal(wanted, wanted + 12, mixed.row(0, h, i)));
    }
  }
  longspan::infini_attention outer{per_head{for_heads{0, 4, softmax_attention{causal{}}}}};
  outer.segment = 32;
  CHECK(run(outer, openmp{}) == whole);
  const std::vector<Index> lengths{70};
  compressed.lengths = outer.lengths = lengths;
  CHECK(run(outer, openmp{}) == run(compressed, openmp{}));
  longspan::infini_attention parts{whole_context()};
  parts.segment = 32;
  CHECK(distance(run(parts, openmp{2}).values, whole.values) < 4e-6);
}

TEST_CASE("compose: bits do not depend on the executor, and a second call allocates nothing", "[bits]") {
  Random random(10);
  const Shape shape{1, 4, 2, 300, 300, 32, 32};
  Call<float> call(shape, Values::normal, random), other = call.unrun();
  const per_head attend{for_heads{0, 2, whole_context()}, for_heads{2, 4, softmax_attention{causal{}}}};
  call.run(attend, serial{});
  for (const Index threads : {2, 3, 7}) {
    other = call.unrun();
    other.run(attend, openmp{threads});
    CHECK(call.same_outputs(other));
  }
  other = call.unrun();
  other.run(attend, ThreadPool{3});
  CHECK(call.same_outputs(other));

  longspan::Execution team(openmp{2});
  call.run(attend, team);
  CHECK(allocations_of([&] { call.run(attend, team); }) == 0);
}

TEST_CASE("compose: invalid arguments are refused before anything is written", "[refusal]") {
  Random random(11);
  Call<float> call({1, 4, 2, 20, 20, 16, 12}, Values::normal, random);
  const auto unwritten = call.unrun();
  const softmax_attention attend{causal{}};
  const auto error = [&](const auto& functor) {
    const std::string text = refusal([&] { call.run(functor); });
    CHECK(call.same_outputs(unwritten));
    return text;
  };
  CHECK(error(per_head{for_heads{0, 3, attend}, for_heads{3, 4, attend}}) ==
        "longspan: per_head: a range of heads is [0, 3), wanted [0, at most 4), a multiple of the 2 query "
        "heads of "
        "a KV head");
  CHECK(error(per_head{for_heads{0, 2, attend}, for_heads{0, 4, attend}}) != "");
  CHECK(error(per_head{for_heads{0, 2, attend}, for_heads{2, 6, attend}}) != "");
  CHECK(error(per_head{for_heads{0, 2, attend}}) ==
        "longspan: per_head: the end of the last range of heads is 2, wanted the 4 heads of q");
  CHECK(error(merged{attend, dilated_attention{Branches{{0, 1}}, causal{}}}) != "");
  CHECK(error(merged{dilated_attention{Branches{{0, 1}}, causal{}}, attend}) != "");

  const std::vector<float> beta(3);
  const gated gate{Beta{beta.data(), 3, 1, 1}, attend, attend};
  const auto run = [&] {
    gate(std::as_const(call.q).view(), std::as_const(call.k).view(), std::as_const(call.v).view(),
         call.out.view());
  };
  CHECK(refusal(run) == "longspan: gated: beta is [3, 1], wanted [1 or 4, 1 or 12]");
  CHECK(call.same_outputs(unwritten));
  CHECK(refusal([&] {
          merged{attend}(std::as_const(call.q).view(), std::as_const(call.v).view(),
                         std::as_const(call.v).view(), call.out.view());
        }).starts_with("longspan: merged: k is [1, 2, 20, 12]"));
}
