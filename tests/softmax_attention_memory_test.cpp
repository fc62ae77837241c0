// Which memory softmax_attention reads, writes and allocates.
#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "longspan/softmax_attention.hpp"
#include "support/catch.hpp"
#include "support/count_allocations.hpp"
#include "support/guarded_memory.hpp"
#include "support/oracle.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using Eigen::bfloat16;
using Eigen::half;
using longspan::causal;
using longspan::openmp;
using longspan::softmax_attention;

/// A copy of x in a buffer with other strides.
template <class T>
void copy_rows(TensorView<const T> from, TensorView<T> to) {
  for (Index b = 0; b < from.batch; ++b) {
    for (Index h = 0; h < from.heads; ++h) {
      for (Index i = 0; i < from.rows; ++i) std::copy_n(from.row(b, h, i), from.cols, to.row(b, h, i));
    }
  }
}

template <class T>
bool same_rows(TensorView<const T> a, TensorView<const T> b) {
  for (Index n = 0; n < a.batch; ++n) {
    for (Index h = 0; h < a.heads; ++h) {
      for (Index i = 0; i < a.rows; ++i) {
        if (!std::equal(a.row(n, h, i), a.row(n, h, i) + a.cols, b.row(n, h, i))) return false;
      }
    }
  }
  return true;
}

/// A [batch, heads, rows, cols] view with `gap` elements after each row, and the heads of a row adjacent
/// ([batch, rows, heads, cols] in memory) or not.
template <class T>
TensorView<T> strided_view(T* data, const TensorView<const T>& like, Index gap, bool heads_inside) {
  const Index row = like.cols + gap;
  TensorView<T> view{data, like.batch, like.heads, like.rows, like.cols, like.heads * like.rows * row, 0, 0};
  view.head_stride = heads_inside ? row : like.rows * row;
  view.row_stride = heads_inside ? like.heads * row : row;
  return view;
}

/// q, k and v in buffers of NaN, out and lse in Sentinels.
template <class T>
struct Strided {
  using Real = Arithmetic<T>;
  Sentinels<T> q_memory, k_memory, v_memory, out_memory;
  Sentinels<Real> lse_memory;
  TensorView<T> q, k, v, out;
  RowsView<Real> lse;

  Strided(const Call<T>& call, Index gap, bool heads_inside, std::size_t misalignment)
      : q_memory(elements(call.q, gap), misalignment),
        k_memory(elements(call.k, gap), misalignment),
        v_memory(elements(call.v, gap), misalignment),
        out_memory(elements(call.out, gap), misalignment),
        lse_memory(call.lse.batch * call.lse.heads * call.lse.rows * 3,
                   misalignment / sizeof(Real) * sizeof(Real)),
        q(strided_view<T>(q_memory.data(), call.q.view(), gap, heads_inside)),
        k(strided_view<T>(k_memory.data(), call.k.view(), gap, heads_inside)),
        v(strided_view<T>(v_memory.data(), call.v.view(), gap, heads_inside)),
        out(strided_view<T>(out_memory.data(), call.out.view(), gap, heads_inside)),
        lse{lse_memory.data(),
            call.lse.batch,
            call.lse.heads,
            call.lse.rows,
            call.lse.heads * call.lse.rows * 3,
            call.lse.rows * 3,
            3} {
    copy_rows<T>(call.q.view(), q);
    copy_rows<T>(call.k.view(), k);
    copy_rows<T>(call.v.view(), v);
  }

  bool only_outputs_written() const {
    const TensorView<Real> lse_rows{lse.data, lse.batch,        lse.heads,       lse.rows,
                                    1,        lse.batch_stride, lse.head_stride, lse.row_stride};
    return out_memory.only_rows_written(out) && lse_memory.only_rows_written(lse_rows);
  }

 private:
  static Index elements(const Tensor<T>& x, Index gap) { return x.batch * x.heads * x.rows * (x.cols + gap); }
};

const std::vector<Shape> shapes{{2, 4, 2, 60, 70, 16, 8}, {1, 3, 1, 50, 130, 17, 19},
                                {2, 2, 2, 3, 70, 16, 8},  {1, 3, 1, 1, 130, 17, 19},
                                {1, 1, 1, 1, 1, 1, 1},    {1, 1, 1, 9, 3, 2, 3}};

}  // namespace

TEMPLATE_TEST_CASE("softmax_attention: works with any strides and alignment, and writes nothing else",
                   "[memory]", float, double, bfloat16, half) {
  Random random(1);
  for (const Shape& shape : shapes) {
    Call<TestType> call(shape, Values::normal, random);
    call.run(softmax_attention{causal{}});
    for (const std::size_t bytes : std::vector<std::size_t>{0, 4, 8, 12, 20, 28, 2, 6}) {
      if (bytes % sizeof(TestType) != 0) continue;
      for (const bool heads_inside : {false, true}) {
        const Index gap = random.between(0, 9);
        INFO(shape.text() << " misalignment=" << bytes << " gap=" << gap << " heads_inside=" << heads_inside);
        Strided<TestType> strided(call, gap, heads_inside, bytes);
        softmax_attention{causal{}}(strided.q, strided.k, strided.v, strided.out, strided.lse, openmp{2});
        CHECK(same_rows<TestType>(call.out.view(), strided.out));
        const TensorView<const Arithmetic<TestType>> lse{strided.lse.data,
                                                         shape.batch,
                                                         shape.heads,
                                                         shape.q_len,
                                                         1,
                                                         strided.lse.batch_stride,
                                                         strided.lse.head_stride,
                                                         3};
        CHECK(
            same_rows<Arithmetic<TestType>>(longspan::compact_view(std::as_const(call.lse.values).data(),
                                                                   shape.batch, shape.heads, shape.q_len, 1),
                                            lse));
        CHECK(strided.only_outputs_written());
      }
    }
  }
}

TEST_CASE("softmax_attention: a stride of 0 repeats an input", "[memory]") {
  Random random(2);
  for (const Index q_len : {2, 30}) {
    Call<float> call(Shape{3, 2, 1, q_len, 40, 8, 8}, Values::normal, random), repeated = call.unrun();
    for (Index b = 1; b < 3; ++b) {
      std::copy_n(call.k.row(0, 0, 0), 40 * 8, call.k.row(b, 0, 0));
      std::copy_n(call.v.row(0, 0, 0), 40 * 8, call.v.row(b, 0, 0));
    }
    call.run(softmax_attention{});
    TensorView<const float> k = std::as_const(call.k).view(), v = std::as_const(call.v).view();
    k.batch_stride = v.batch_stride = 0;
    softmax_attention{}(repeated.q.view(), k, v, repeated.out.view(), repeated.lse.view());
    CHECK(call.same_outputs(repeated));
  }
}

namespace {

/// Each tensor of the call in turn next to forbidden pages: a read or a write of one element too many ends the
/// program.
template <class Tq, class Tk, class Tv, class To, class Attend>
bool guarded_call_agrees(const Call<Tq, Tk, Tv, To>& call, const Attend& attend, Guard where) {
  using Real = Arithmetic<Tq>;
  const GuardedArray<Tq> q(Index(call.q.values.size()), where);
  const GuardedArray<Tk> k(Index(call.k.values.size()), where);
  const GuardedArray<Tv> v(Index(call.v.values.size()), where);
  const GuardedArray<To> out(Index(call.out.values.size()), where);
  const GuardedArray<Real> lse(Index(call.lse.values.size()), where);
  std::copy(call.q.values.begin(), call.q.values.end(), q.data());
  std::copy(call.k.values.begin(), call.k.values.end(), k.data());
  std::copy(call.v.values.begin(), call.v.values.end(), v.data());
  const auto at = [](auto* data, const auto& x) {
    return longspan::compact_view(data, x.batch, x.heads, x.rows, x.cols);
  };
  attend(at(q.data(), call.q), at(k.data(), call.k), at(v.data(), call.v), at(out.data(), call.out),
         longspan::compact_rows_view(lse.data(), call.lse.batch, call.lse.heads, call.lse.rows), openmp{2});
  return std::equal(call.out.values.begin(), call.out.values.end(), out.data()) &&
         std::equal(call.lse.values.begin(), call.lse.values.end(), lse.data());
}

template <class Tq, class Tk, class Tv, class To, class Attend>
void check_guarded(const Attend& attend, const std::vector<Index>& head_dims = {1, 7, 16, 33, 40}) {
  Random random(3);
  for (const Index q_len : {1, 3, 9, 50}) {
    for (const Index head_dim : head_dims) {
      const Index value_dim = random.pick<Index>({1, 3, 8, 15, 16, 31, 63});
      for (const Index kv_len : {1, 5, 129}) {
        const Shape shape{1, 2, 1, q_len, kv_len, head_dim, value_dim};
        INFO(shape.text());
        Call<Tq, Tk, Tv, To> call(shape, Values::normal, random);
        call.run(attend);
        CHECK(guarded_call_agrees(call, attend, Guard::behind));
        CHECK(guarded_call_agrees(call, attend, Guard::before));
      }
    }
  }
}

}  // namespace

TEST_CASE("softmax_attention: reads and writes no element outside its tensors", "[memory]") {
  SECTION("float") { check_guarded<float, float, float, float>(softmax_attention{causal{}}); }
  SECTION("double") { check_guarded<double, double, double, double>(softmax_attention{causal{}}); }
  SECTION("bfloat16") { check_guarded<bfloat16, bfloat16, bfloat16, bfloat16>(softmax_attention{causal{}}); }
  SECTION("half") { check_guarded<half, half, half, half>(softmax_attention{causal{}}); }
  SECTION("mixed") { check_guarded<float, bfloat16, half, float>(softmax_attention{causal{}}); }
  SECTION("position encoding") {
    check_guarded<float, float, float, float>(
        softmax_attention{longspan::rotary(longspan::Pairing::interleaved)}, {2, 6, 34});
  }
}

TEST_CASE("softmax_attention: inputs stay unchanged", "[memory]") {
  Random random(4);
  for (const Shape& shape : shapes) {
    Call<float> call(shape, Values::normal, random);
    const Call<float> before = call;
    call.run(softmax_attention{causal{}}, openmp{2});
    CHECK((call.q == before.q && call.k == before.k && call.v == before.v));
  }
}

TEMPLATE_TEST_CASE("softmax_attention: every size may be 0", "[memory]", float, bfloat16) {
  constexpr Index Shape::*sizes[] = {&Shape::batch,  &Shape::heads,    &Shape::q_len,
                                     &Shape::kv_len, &Shape::head_dim, &Shape::value_dim};
  for (const Index q_len : {2, 20}) {
    for (const auto size : sizes) {
      for (const auto also : sizes) {
        Shape shape{2, 2, 2, q_len, 20, 8, 8};
        shape.*size = shape.*also = 0;
        shape.kv_heads = shape.heads;
        INFO(shape.text());
        Random random(5);
        Call<TestType> call(shape, Values::normal, random);
        call.run(softmax_attention{}, openmp{2});
        const bool narrow = std::is_same_v<TestType, bfloat16>;
        check_against(exact_attention({}, call), call, narrow ? Allowance{0x1p-8, 1e-4} : Allowance{});
      }
    }
  }
}

TEST_CASE("softmax_attention: nothing is allocated after the first call of a shape", "[memory]") {
  Random random(6);
  const std::vector<Shape> of_all_paths{{1, 4, 2, 200, 300, 32, 32},
                                        {1, 1, 1, 20, 9000, 16, 8},
                                        {1, 4, 1, 2, 9000, 16, 8},
                                        {1, 1, 1, 1, 50, 16, 8}};
  const auto check = [&](auto& call, const auto& attend, auto& execution) {
    call.run(attend, execution);
    CHECK(allocations_of([&] { call.run(attend, execution); }) == 0);
    CHECK(allocations_of([&] { call.run(attend, execution); }) == 0);
  };
  for (const Shape& shape : of_all_paths) {
    INFO(shape.text());
    Call<float> call(shape, Values::normal, random);
    Call<bfloat16> narrow(shape, Values::normal, random);
    longspan::Execution serially(longspan::serial{});
    longspan::Execution team(openmp{3});
    check(call, softmax_attention{}, serially);
    check(call, softmax_attention{}, team);
    check(call, softmax_attention{causal{}}, team);
    check(narrow, softmax_attention{}, team);
    check(call, softmax_attention{longspan::softcap{9}, longspan::rotary(longspan::Pairing::half_split)},
          team);
  }
  SECTION("a smaller call allocates nothing either") {
    longspan::Execution team(openmp{3});
    Call<float> large(of_all_paths[0], Values::normal, random), small(shapes[0], Values::normal, random);
    large.run(softmax_attention{}, team);
    CHECK(allocations_of([&] { small.run(softmax_attention{}, team); }) == 0);
  }
  SECTION("the counter of allocations works") {
    Call<float> call(of_all_paths[0], Values::normal, random);
    CHECK(allocations_of([&] { call.run(softmax_attention{}, longspan::serial{}); }) == 1);
    CHECK(allocations_of([] { std::vector<int> numbers(3); }) == 1);
  }
}

TEST_CASE("softmax_attention: rows may be more than 2^31 elements apart", "[memory]") {
  constexpr Index far = (Index{1} << 31) + 16, rows = 3;
  const auto apart = [](const Pages& pages, Index heads, Index count, Index cols) {
    auto* data = reinterpret_cast<float*>(pages.begin());
    return TensorView<float>{data, 1, heads, count, cols, 0, rows * far, far};
  };
  Random random(7);
  for (const Index q_len : {rows, Index{1}}) {
    for (const Index heads : {1, 2}) {
      const auto bytes = static_cast<std::size_t>(heads * rows * far) * sizeof(float);
      Call<float> call(Shape{1, heads, 1, q_len, rows, 8, 8}, Values::normal, random);
      call.run(softmax_attention{});
      const Pages q_pages(bytes), k_pages(bytes), v_pages(bytes), out_pages(bytes);
      const auto q = apart(q_pages, heads, q_len, 8), out = apart(out_pages, heads, q_len, 8);
      const auto k = apart(k_pages, 1, rows, 8), v = apart(v_pages, 1, rows, 8);
      copy_rows<float>(call.q.view(), q);
      copy_rows<float>(call.k.view(), k);
      copy_rows<float>(call.v.view(), v);
      softmax_attention{}(q, k, v, out, openmp{2});
      CHECK(same_rows<float>(call.out.view(), out));
    }
  }
}
