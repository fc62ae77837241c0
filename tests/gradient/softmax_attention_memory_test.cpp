// Which memory the gradient of softmax_attention reads, writes and allocates.
#include <algorithm>
#include <utility>
#include <vector>

#include "longspan/gradient/softmax_attention.hpp"
#include "support/catch.hpp"
#include "support/count_allocations.hpp"
#include "support/gradient.hpp"
#include "support/guarded_memory.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using Eigen::bfloat16;
using Eigen::half;
using longspan::causal;
using longspan::openmp;
using longspan::softmax_attention;

/// A view of `like` with `gap` elements after each row, and the heads of a row adjacent ([batch, rows, heads, cols] in
/// memory) or not.
template <class T>
TensorView<T> strided_view(T* data, const Tensor<T>& like, Index gap, bool heads_inside) {
  const Index row = like.cols + gap;
  TensorView<T> view{data, like.batch, like.heads, like.rows, like.cols, like.heads * like.rows * row, 0, 0};
  view.head_stride = heads_inside ? row : like.rows * row;
  view.row_stride = heads_inside ? like.heads * row : row;
  return view;
}

/// A tensor in a buffer of NaN with other strides; an input is copied into it.
template <class T>
struct Strided {
  Sentinels<T> memory;
  TensorView<T> view;

  Strided(const Tensor<T>& like, Index gap, bool heads_inside, std::size_t misalignment, bool is_input)
      : memory(like.batch * like.heads * like.rows * (like.cols + gap), misalignment),
        view(strided_view<T>(memory.data(), like, gap, heads_inside)) {
    if (!is_input) return;
    for_each_row(like, [&](const T* from, T* to) { std::copy_n(from, like.cols, to); });
  }
  /// True if the rows have these numbers and nothing else was written.
  bool has(const Tensor<T>& wanted) const {
    bool same = memory.only_rows_written(view);
    for_each_row(wanted, [&](const T* row, T* got) { same &= std::equal(row, row + wanted.cols, got); });
    return same;
  }

 private:
  template <class Visit>
  void for_each_row(const Tensor<T>& like, const Visit& visit) const {
    for (Index b = 0; b < like.batch; ++b) {
      for (Index h = 0; h < like.heads; ++h) {
        for (Index i = 0; i < like.rows; ++i) visit(like.row(b, h, i), view.row(b, h, i));
      }
    }
  }
};

const std::vector<Shape> shapes{
    {2, 4, 2, 100, 70, 16, 16}, {1, 3, 1, 50, 130, 17, 19}, {2, 2, 2, 3, 70, 32, 8}, {1, 1, 1, 1, 1, 1, 1}};

/// A copy of a tensor next to forbidden pages: a read or a write of one element too many ends the program.
template <class X>
struct Guarded : GuardedArray<typename decltype(X::values)::value_type> {
  Guarded(const X& x, Guard where)
      : GuardedArray<typename decltype(X::values)::value_type>(Index(x.values.size()), where) {
    std::copy(x.values.begin(), x.values.end(), this->data());
  }
};

template <class C, class Attend>
bool guarded_call_agrees(const C& call, const Attend& attend, Guard where) {
  const auto at = [](const auto& array, const auto& x) {
    return longspan::compact_view(array.data(), x.batch, x.heads, x.rows, x.cols);
  };
  const auto rows_at = [](const auto& array, const auto& x) {
    return longspan::compact_rows_view(array.data(), x.batch, x.heads, x.rows);
  };
  const auto& in = call.forward;
  const Guarded q(in.q, where);
  const Guarded k(in.k, where);
  const Guarded v(in.v, where);
  const Guarded out(in.out, where);
  const Guarded lse(in.lse, where);
  const Guarded dout(call.dout, where);
  const Guarded dlse(call.dlse, where);
  const Guarded dq(call.dq, where);
  const Guarded dk(call.dk, where);
  const Guarded dv(call.dv, where);
  gradient(attend)(at(q, in.q), at(k, in.k), at(v, in.v), at(out, in.out), rows_at(lse, in.lse),
                   at(dout, call.dout), rows_at(dlse, call.dlse), at(dq, call.dq), at(dk, call.dk),
                   at(dv, call.dv), openmp{2});
  return std::equal(call.dq.values.begin(), call.dq.values.end(), dq.data()) &&
         std::equal(call.dk.values.begin(), call.dk.values.end(), dk.data()) &&
         std::equal(call.dv.values.begin(), call.dv.values.end(), dv.data());
}

template <class C, class Attend>
void check_guarded(const Attend& attend, const std::vector<Index>& head_dims = {1, 7, 16, 33}) {
  Random random(3);
  for (const Index q_len : {1, 9, 100}) {
    for (const Index head_dim : head_dims) {
      const Index value_dim = random.pick<Index>({1, 3, 8, 15, 16, 31, 63});
      for (const Index kv_len : {1, 5, 129}) {
        const Shape shape{1, 2, 1, q_len, kv_len, head_dim, value_dim};
        INFO(shape.text());
        C call(shape, Values::normal, random);
        call.has_dlse = true;
        call.run(attend);
        CHECK(guarded_call_agrees(call, attend, Guard::behind));
        CHECK(guarded_call_agrees(call, attend, Guard::before));
      }
    }
  }
}

}  // namespace

TEMPLATE_TEST_CASE(
    "gradient of softmax_attention: works with any strides and alignment and writes nothing else", "[memory]",
    float, double, bfloat16) {
  Random random(1);
  const softmax_attention attend{causal{}};
  for (const Shape& shape : shapes) {
    GradientCall<TestType> call(shape, Values::normal, random);
    call.run(attend);
    for (const std::size_t bytes : std::vector<std::size_t>{0, 4, 8, 12, 28, 2, 6}) {
      if (bytes % sizeof(TestType) != 0) continue;
      for (const bool inside : {false, true}) {
        const Index gap = random.between(0, 9);
        INFO(shape.text() << " misalignment=" << bytes << " gap=" << gap << " heads_inside=" << inside);
        const auto& in = call.forward;
        const auto input = [&](const auto& x) { return Strided<TestType>(x, gap, inside, bytes, true); };
        const auto output = [&](const auto& x) { return Strided<TestType>(x, gap, inside, bytes, false); };
        const auto &q = input(in.q), &k = input(in.k), &v = input(in.v), &out = input(in.out),
                   &dout = input(call.dout);
        const auto &dq = output(call.dq), &dk = output(call.dk), &dv = output(call.dv);
        gradient(attend)(q.view, k.view, v.view, out.view, in.lse.view(), dout.view, dq.view, dk.view,
                         dv.view, openmp{2});
        CHECK(dq.has(call.dq));
        CHECK(dk.has(call.dk));
        CHECK(dv.has(call.dv));
      }
    }
  }
}

TEST_CASE("gradient of softmax_attention: reads and writes no element outside its tensors", "[memory]") {
  SECTION("float") { check_guarded<GradientCall<float>>(softmax_attention{causal{}}); }
  SECTION("double") { check_guarded<GradientCall<double>>(softmax_attention{causal{}}); }
  SECTION("half") { check_guarded<GradientCall<half>>(softmax_attention{causal{}}); }
  SECTION("mixed") {
    check_guarded<GradientCall<float, bfloat16, half, float, half, float, bfloat16>>(
        softmax_attention{causal{}});
  }
  SECTION("position encoding") {
    check_guarded<GradientCall<float>>(softmax_attention{longspan::rotary(longspan::Pairing::interleaved)},
                                       {2, 6, 34});
  }
}

TEST_CASE("gradient of softmax_attention: inputs stay unchanged", "[memory]") {
  Random random(4);
  for (const Shape& shape : shapes) {
    GradientCall<float> call(shape, Values::normal, random);
    call.has_dlse = true;
    call.forward.run(softmax_attention{causal{}});
    const GradientCall<float> before = call;
    call.differentiate(softmax_attention{causal{}}, openmp{2});
    CHECK((call.forward.q == before.forward.q && call.forward.k == before.forward.k &&
           call.forward.v == before.forward.v && call.forward.same_outputs(before.forward) &&
           call.dout == before.dout && call.dlse == before.dlse));
  }
}

TEMPLATE_TEST_CASE("gradient of softmax_attention: every size may be 0", "[memory]", float, bfloat16) {
  constexpr Index Shape::*sizes[] = {&Shape::batch,  &Shape::heads,    &Shape::q_len,
                                     &Shape::kv_len, &Shape::head_dim, &Shape::value_dim};
  for (const auto size : sizes) {
    for (const auto also : sizes) {
      Shape shape{2, 2, 2, 20, 20, 8, 8};
      shape.*size = shape.*also = 0;
      shape.kv_heads = shape.heads;
      INFO(shape.text());
      Random random(5);
      GradientCall<TestType> call(shape, Values::normal, random);
      softmax_attention attend;
      attend.bf16_products = false;
      call.run(attend, openmp{2});
      check_gradient({}, call);
    }
  }
}

TEST_CASE("gradient of softmax_attention: nothing is allocated after the first call of a shape", "[memory]") {
  Random random(6);
  const auto check = [&](auto& call, const auto& attend, auto& execution) {
    call.has_dlse = true;
    call.forward.run(attend);
    call.differentiate(attend, execution);
    CHECK(allocations_of([&] { call.differentiate(attend, execution); }) == 0);
    CHECK(allocations_of([&] { call.differentiate(attend, execution); }) == 0);
  };
  longspan::Execution serially(longspan::serial{});
  longspan::Execution team(openmp{3});
  for (const Shape& shape : {Shape{1, 4, 2, 200, 300, 32, 32}, Shape{1, 1, 1, 20, 9000, 17, 8},
                             Shape{1, 2, 1, 2100, 40, 8, 8}, Shape{1, 1, 1, 1, 50, 16, 8}}) {
    INFO(shape.text());
    GradientCall<float> call(shape, Values::normal, random);
    GradientCall<bfloat16> narrow(shape, Values::normal, random);
    check(call, softmax_attention{}, serially);
    check(call, softmax_attention{}, team);
    check(call, softmax_attention{causal{}}, team);
    check(narrow, softmax_attention{}, team);
    check(call, softmax_attention{longspan::softcap{9}}, team);
  }
  SECTION("a smaller call allocates nothing either") {
    GradientCall<float> small(shapes[0], Values::normal, random);
    small.forward.run(softmax_attention{});
    CHECK(allocations_of([&] { small.differentiate(softmax_attention{}, team); }) == 0);
  }
}

TEST_CASE("gradient of softmax_attention: scratch memory does not grow with q_len * kv_len", "[memory]") {
  Random random(7);
  const auto scratch = [&](Index length, Index head_dim) {
    GradientCall<float> call(Shape{1, 2, 1, length, length, head_dim, head_dim}, Values::normal, random);
    call.forward.run(softmax_attention{causal{}}, openmp{2});
    longspan::Execution team(openmp{2});
    return bytes_allocated_by([&] { call.differentiate(softmax_attention{causal{}}, team); });
  };
  const std::size_t of_1000 = scratch(1000, 16), of_4000 = scratch(4000, 16);
  CHECK(of_4000 <= 5 * of_1000);
  // The docstring: up to 8 tensors of the shape of dq.
  const std::size_t dq_bytes = 2 * 4000 * 16 * sizeof(float);
  CHECK(of_4000 <= 9 * dq_bytes + (std::size_t{1} << 20));
}
