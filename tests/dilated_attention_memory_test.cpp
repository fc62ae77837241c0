// Which memory dilated_attention and its stream read, write and allocate.
#include <algorithm>
#include <utility>
#include <vector>

#include "longspan/dilated_attention.hpp"
#include "longspan/stream/dilated_cache.hpp"
#include "support/catch.hpp"
#include "support/count_allocations.hpp"
#include "support/guarded_memory.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using Eigen::bfloat16;
using longspan::causal;
using longspan::dilated_attention;
using longspan::openmp;
using Branches = std::vector<longspan::Branch>;

const Branches branches{{16, 1}, {50, 3}, {64, 2}, {1000, 40}};

template <class T>
TensorView<T> guarded(const GuardedArray<T>& memory, TensorView<const T> like) {
  const auto rows = longspan::compact_view(memory.data(), like.batch, like.heads, like.rows, like.cols);
  std::copy_n(like.data, like.batch * like.batch_stride, rows.data);
  return rows;
}

}  // namespace

TEMPLATE_TEST_CASE("dilated_attention: reads and writes nothing outside its tensors", "[memory]", float,
                   double, bfloat16) {
  Random random(1);
  for (const Shape& shape : {Shape{2, 3, 1, 130, 130, 17, 19}, Shape{1, 4, 2, 99, 99, 16, 8}}) {
    Call<TestType> call(shape, Values::normal, random);
    for (const bool is_causal : {false, true}) {
      const dilated_attention attend{branches,
                                     longspan::window{.right = is_causal ? 0 : longspan::window::unlimited}};
      call.run(attend);
      for (const Guard where : {Guard::before, Guard::behind}) {
        const auto array = [&](const auto& x) {
          return GuardedArray<TestType>(static_cast<Index>(x.values.size()), where);
        };
        const auto q = array(call.q), k = array(call.k), v = array(call.v), out = array(call.out);
        const auto outputs = guarded<TestType>(out, call.out.view());
        attend(guarded<TestType>(q, call.q.view()), guarded<TestType>(k, call.k.view()),
               guarded<TestType>(v, call.v.view()), outputs, openmp{2});
        CHECK(std::equal(call.out.values.begin(), call.out.values.end(), outputs.data));
      }
    }
  }
}

TEST_CASE("dilated_attention: nothing is allocated after the first call of a shape", "[memory]") {
  Random random(2);
  const Shape shape{1, 4, 2, 500, 500, 32, 32};
  Call<float> call(shape, Values::normal, random);
  Call<bfloat16> narrow(shape, Values::normal, random);
  longspan::Execution team(openmp{3});
  const auto check = [&](auto& of_type, auto attend) {
    for (const longspan::Overlap overlap : {longspan::Overlap::multiset, longspan::Overlap::set}) {
      attend.overlap = overlap;
      of_type.run(attend, team);
      CHECK(allocations_of([&] { of_type.run(attend, team); }) == 0);
    }
  };
  check(call, dilated_attention{branches, causal{}});
  check(call, dilated_attention{branches, longspan::rotary(longspan::Pairing::half_split)});
  check(narrow, dilated_attention{branches, causal{}});
}

TEST_CASE("dilated_cache: after every segment has been full once, tokens allocate nothing", "[memory]") {
  Random random(3);
  const Shape shape{1, 4, 2, 400, 400, 16, 8};
  Call<float> call(shape, Values::normal, random);
  longspan::Execution team(openmp{2});
  const dilated_attention attend{Branches{{16, 1}, {50, 3}, {128, 2}}, causal{},
                                 longspan::rotary(longspan::Pairing::half_split)};
  auto stream = attend.stream({1, 4, 2, 16, 8});
  const auto step = [&](Index n) {
    stream.extend(std::as_const(call.q).view().slice_rows(n, 1),
                  std::as_const(call.k).view().slice_rows(n, 1),
                  std::as_const(call.v).view().slice_rows(n, 1), call.out.view().slice_rows(n, 1), team);
  };
  for (Index n = 0; n < 129; ++n) step(n);
  CHECK(allocations_of([&] {
          for (Index n = 129; n < 400; ++n) step(n);
        }) == 0);
}
