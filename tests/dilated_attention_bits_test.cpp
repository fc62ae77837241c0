// What changes no bit of dilated_attention: compiled as it is shipped, apart from the tests that compare with a
// tolerance.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "longspan/dilated_attention.hpp"
#include "support/catch.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using longspan::causal;
using longspan::dilated_attention;
using longspan::Overlap;
using Branches = std::vector<longspan::Branch>;

Call<float> outputs_of(const Call<float>& call, const auto& attend) {
  Call<float> own = call.unrun();
  own.run(attend, longspan::openmp{2});
  return own;
}

}  // namespace

TEST_CASE("dilated_attention: future tokens change no bit, and padding equals a shorter sequence", "[law]") {
  const Branches branches{{16, 1}, {48, 3}, {64, 2}, {1000, 7}};
  Random random(5);
  Call<float> call(Shape{1, 4, 2, 150, 150, 16, 8}, Values::normal, random);
  const dilated_attention attend{branches, causal{}};
  const Call<float> before = outputs_of(call, attend);
  constexpr Index changed = 77;
  for (Index h = 0; h < 2; ++h) {
    for (Index n = changed; n < 150; ++n) {
      std::fill_n(call.k.row(0, h, n), 16, NAN);
      std::fill_n(call.v.row(0, h, n), 8, NAN);
    }
  }
  const Call<float> after = outputs_of(call, attend);
  const std::vector<Index> unpadded{changed};
  const Call<float> padded = outputs_of(call, dilated_attention{branches, longspan::padding{unpadded}});
  Call<float> shorter(Shape{1, 4, 2, changed, changed, 16, 8});
  for (Index h = 0; h < 4; ++h) {
    REQUIRE(std::equal(before.out.row(0, h, 0), before.out.row(0, h, changed), after.out.row(0, h, 0)));
    std::copy_n(call.q.row(0, h, 0), changed * 16, shorter.q.row(0, h, 0));
    std::copy_n(call.k.row(0, h / 2, 0), changed * 16, shorter.k.row(0, h / 2, 0));
    std::copy_n(call.v.row(0, h / 2, 0), changed * 8, shorter.v.row(0, h / 2, 0));
  }
  shorter.run(dilated_attention{branches});
  for (Index h = 0; h < 4; ++h) {
    for (Index c = 0; c < changed * 8; ++c)
      REQUIRE(std::abs(padded.out.row(0, h, 0)[c] - shorter.out.row(0, h, 0)[c]) < 1e-6f);
  }
}

TEST_CASE("dilated_attention: bits do not depend on threads or on other queries, heads and batch rows",
          "[bits]") {
  const Branches branches{{32, 2}, {300, 1}, {1000, 3}, {4096, 5}};
  Random random(6);
  Call<float> call(Shape{2, 6, 2, 2500, 2500, 8, 8}, Values::normal, random);
  for (const Overlap overlap : {Overlap::multiset, Overlap::set}) {
    dilated_attention attend{branches, causal{}};
    attend.overlap = overlap;
    call.run(attend);
    for (const Index threads : {2, 3, 40}) {
      Call<float> own = call.unrun();
      own.run(attend, longspan::openmp{threads});
      CHECK(own.same_outputs(call));
    }
    // Rows 700 .. 999 of one batch row alone.
    Tensor<float> out(1, 6, 300, 8, NAN);
    attend.first_query = 700;
    auto q = std::as_const(call.q).view().slice_rows(700, 300), k = std::as_const(call.k).view(),
         v = std::as_const(call.v).view();
    q.batch = k.batch = v.batch = 1;
    attend(q, k, v, out.view());
    for (Index h = 0; h < 6; ++h)
      CHECK(std::equal(out.row(0, h, 0), out.row(0, h, 300), call.out.row(0, h, 700)));
  }
}
