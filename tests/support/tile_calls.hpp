// Calls that run on matrix tiles, emulated and on the hardware where there is one.
#pragma once

#include "support/has_tiles.hpp"

#if defined(__AVX512BW__) && defined(__AVX512DQ__)

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "longspan/detail/attend.hpp"
#include "support/catch.hpp"
#include "support/tensor.hpp"

namespace test {

template <class To>
using Bf16Call = Call<Eigen::bfloat16, Eigen::bfloat16, Eigen::bfloat16, To>;

/// 1 / sqrt(head_dim).
template <class To>
double scale_of(const Bf16Call<To>& call) {
  return 1 / std::sqrt(static_cast<double>(std::max<Index>(1, call.q.cols)));
}

/// Calls check.operator()<Unit>() for each tile unit (emulation, hardware) that this machine can run.
template <class Check>
void for_each_unit(const Check& check) {
  SECTION("emulated tiles") { check.template operator()<longspan::detail::EmulatedTiles>(); }
#if defined(LONGSPAN_TARGETS_AMX)
  SECTION("the hardware") {
    if (has_tiles()) check.template operator()<longspan::detail::HardwareTiles>();
  }
#endif
}

/// Calls pass(problem).run(executor, workspace), where tasks of the executor may use the tiles of `Unit`, unless the
/// call has no outputs.
template <class Unit, class To, class E, class MakePass>
void run_on_tiles(Bf16Call<To>& call, double scale, const E& executor, const MakePass& pass) {
  using Eigen::bfloat16;
  const longspan::detail::Problem<bfloat16, bfloat16, bfloat16, To> problem{std::as_const(call.q).view(),
                                                                            std::as_const(call.k).view(),
                                                                            std::as_const(call.v).view(),
                                                                            call.out.view(),
                                                                            call.lse.view(),
                                                                            call.k.rows - call.q.rows,
                                                                            scale};
  if (call.out.values.empty()) return;
  longspan::Workspace workspace;
  longspan::detail::run_without_denormals(executor, [&](const auto& where) {
    using On = std::remove_cvref_t<decltype(where)>;
    const longspan::detail::WithTiles<Unit, On> on(where);
    pass(problem, on.workers()).run(on, workspace);
  });
}

}  // namespace test

#endif
