// The dispatch of the backward pass.
#pragma once

#include "longspan/detail/attend.hpp"
#include "longspan/detail/call/denormals.hpp"
#include "longspan/detail/gradient/backward.hpp"
#include "longspan/detail/gradient/products_of.hpp"
#include "longspan/execution.hpp"
#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Writes dq, dk and dv of softmax attention. Small calls stay on the calling thread.
template <class Call, Mask M, Score S, Position P, class E>
void differentiate(const Call& call, const M& mask, const S& score, const P& position, const E& executor,
                   Workspace& workspace, bool bf16_products) {
  run_where_it_pays(2.5 * call.forward.flop(), least_parallel_tile_flop, executor, [&](const auto& where) {
    with_products<P>(call, bf16_products, where, [&]<class Products>(const auto& on) {
      using Tiles = typename Products::template Tiles<M, S>;
      Backward<Tiles, Call, M, S, P>(call, mask, score, position, on.workers()).run(on, workspace);
    });
  });
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
