// The only dispatch: few queries go to the decode kernel, more to tiles; the element types and the processor determine
// the arithmetic; small calls stay on the calling thread.
#pragma once

#include <cstdint>
#include <type_traits>

#include "longspan/amx.hpp"
#include "longspan/detail/call/denormals.hpp"
#include "longspan/detail/call/problem.hpp"
#include "longspan/detail/decode/decode.hpp"
#include "longspan/detail/tile/amx_tile.hpp"
#include "longspan/detail/tile/bf16_arithmetic.hpp"
#include "longspan/detail/tile/float_arithmetic.hpp"
#include "longspan/detail/tile/forward.hpp"
#include "longspan/detail/tile/key_run.hpp"
#include "longspan/detail/tuning.hpp"
#include "longspan/execution.hpp"
#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

template <class T, class... Types>
inline constexpr bool is_all = (std::is_same_v<T, Types> && ...);
template <class T, class... Types>
inline constexpr bool is_one_of = (std::is_same_v<T, Types> || ...);

/// Below so much work, waking a team of threads costs more than it saves: about 5 us of one core, in small tiles or for
/// reading.
inline constexpr double least_parallel_tile_flop = 4e5;
inline constexpr double least_parallel_decode_flop = 1e5;

/// Calls task(executor), or task(serial) if there is little work. Results have the same bits.
template <class Task>
void run_where_it_pays(double flop, double least_parallel, const WithoutDenormals& executor,
                       const Task& task) {
  const serial alone;
  task(flop < least_parallel ? WithoutDenormals(alone) : executor);
}

/// An executor whose tasks may use the tiles of `Unit`.
template <class Unit, class E>
class WithTiles {
 public:
  explicit WithTiles(const E& executor) noexcept : executor_(executor) {}

  Index workers() const { return executor_.workers(); }

  template <class Task>
  void for_each(Index tasks, Task&& task) const {
    executor_.for_each(tasks, [&task](Index t, Index worker) {
      const typename Unit::Scope configured;
      task(t, worker);
    });
  }

 private:
  const E& executor_;
};

#if defined(LONGSPAN_HAS_AMX_ARITHMETIC) && defined(LONGSPAN_EMULATE_AMX)
#define LONGSPAN_USES_AMX 1
using TileUnit = EmulatedTiles;
#elif defined(LONGSPAN_HAS_AMX_ARITHMETIC) && defined(LONGSPAN_TARGETS_AMX)
#define LONGSPAN_USES_AMX 1
using TileUnit = HardwareTiles;
#endif

/// True if matrix tiles are used.
inline bool uses_tiles() {
#if defined(LONGSPAN_USES_AMX)
  return amx_is_permitted();
#else
  return false;
#endif
}

/// The scores of bfloat16 products are unscaled when their maximum is found, so the scale must be positive.
inline constexpr float least_scale = 1e-30f;

/// The types for which there is code that uses matrix tiles. A half is a sum of two bfloat16, but half stays with
/// float: its weights are not rounded to bfloat16, and need three of them to be as exact as float. Then there are 4
/// products for scores and 5 for values, which take 1.07 times as long as float (Intel AMX, from the times of the
/// parts at 2048 tokens, d = 64 and 128; 0.63 times with rounded weights).
#if defined(LONGSPAN_USES_AMX)
template <class Tq, class Tk, class Tv, class To>
inline constexpr bool suits_tiles =
    is_all<Eigen::bfloat16, Tq> && is_all<Tk, Tv> && is_one_of<Tk, Eigen::bfloat16, std::int8_t> &&
    is_one_of<To, float, Eigen::bfloat16>;
/// Their arithmetic.
template <class Tk>
using TileArithmetic =
    AmxArithmetic<std::conditional_t<std::is_same_v<Tk, std::int8_t>, RowScales<TileUnit>, TileUnit>>;
#else
template <class Tq, class Tk, class Tv, class To>
inline constexpr bool suits_tiles = false;
#endif

/// True if a call for the tile kernel multiplies by matrix tiles.
template <class Tq, class Tk, class Tv, class To>
bool multiplies_by_tiles(const Problem<Tq, Tk, Tv, To>& call, bool bf16_products) {
  return suits_tiles<Tq, Tk, Tv, To> && bf16_products && static_cast<float>(call.scale) > least_scale &&
         uses_tiles();
}

/// Whether calls on these types multiply in bfloat16 where they may (see softmax_attention::bf16_products), which
/// rounds their weights.
template <class Tq, class Tk, class Tv, class To>
bool rounds_weights() {
  if (suits_tiles<Tq, Tk, Tv, To> && uses_tiles()) return true;
#if defined(LONGSPAN_HAS_BF16_ARITHMETIC)
  if (tuning::bf16_pairs && is_all<Eigen::bfloat16, Tq, Tk, Tv> && is_all<Eigen::bfloat16, To>) return true;
#endif
  return false;
}

/// Calls work.operator()<Policy>(executor) with the arithmetic of matrix tiles or, if they are not used, of float.
template <class Tq, class Tk, class Tv, class To, class E, class Work>
void with_tile_or_float_arithmetic([[maybe_unused]] const Problem<Tq, Tk, Tv, To>& call,
                                   [[maybe_unused]] bool bf16_products, const E& executor, const Work& work) {
#if defined(LONGSPAN_USES_AMX)
  if constexpr (suits_tiles<Tq, Tk, Tv, To>) {
    if (multiplies_by_tiles(call, bf16_products))
      return work.template operator()<TileArithmetic<Tk>>(WithTiles<TileUnit, E>(executor));
  }
#endif
  work.template operator()<FloatArithmetic<Arithmetic<Tq>>>(executor);
}

/// The same, with bfloat16 pairs between the two.
template <Score S, Position P, class Tq, class Tk, class Tv, class To, class E, class Work>
void with_arithmetic(const Problem<Tq, Tk, Tv, To>& call, bool bf16_products, const E& executor,
                     const Work& work) {
#if defined(LONGSPAN_HAS_BF16_ARITHMETIC)
  constexpr bool in_pairs = tuning::bf16_pairs && is_all<Eigen::bfloat16, Tq, Tk, Tv, To> &&
                            std::is_same_v<S, unchanged> && std::is_same_v<P, no_position>;
  if constexpr (in_pairs) {
    if (bf16_products && static_cast<float>(call.scale) > least_scale && call.head_dim() % 2 == 0 &&
        !uses_tiles()) {
      work.template operator()<Bf16Arithmetic>(executor);
      return;
    }
  }
#endif
  with_tile_or_float_arithmetic(call, bf16_products, executor, work);
}

/// Attention over the keys and values of `keys` (pages, strands), not of call.k and call.v.
template <class Tq, class Tk, class Tv, class To, class Keys, Mask M, Score S, Position P, class E>
void attend(const Problem<Tq, Tk, Tv, To>& call, const Keys& keys, const M& mask, const S& score,
            const P& position, const E& executor, Workspace& workspace, bool bf16_products) {
  if (call.out.batch == 0 || call.out.heads == 0 || call.out.rows == 0) return;
  if constexpr (std::is_same_v<P, no_position>) {
    if (call.q_len() * call.group() <= most_decode_queries) {
      return run_where_it_pays(call.flop(), least_parallel_decode_flop, executor, [&](const auto& where) {
        Decode(call, keys, mask, score).run(where, workspace);
      });
    }
  }
  run_where_it_pays(call.flop(), least_parallel_tile_flop, executor, [&](const auto& where) {
    with_arithmetic<S, P>(call, bf16_products, where, [&]<class Policy>(const auto& on) {
      using Pass = Forward<Policy, Tq, Tk, Tv, To, Keys, M, S, P>;
      Pass(call, keys, mask, score, position, on.workers()).run(on, workspace);
    });
  });
}

/// True if `attend` without a position multiplies by matrix tiles.
template <class Tq, class Tk, class Tv, class To>
bool attends_by_tiles(const Problem<Tq, Tk, Tv, To>& call, bool bf16_products) {
  return multiplies_by_tiles(call, bf16_products) && call.q_len() * call.group() > most_decode_queries;
}

/// `attend` for calls for which attends_by_tiles is true; the other kernels are not compiled for their types.
template <class Tq, class Tk, class Tv, class To, class Keys, Mask M, Score S, class E>
void attend_by_tiles([[maybe_unused]] const Problem<Tq, Tk, Tv, To>& call, [[maybe_unused]] const Keys& keys,
                     [[maybe_unused]] const M& mask, [[maybe_unused]] const S& score,
                     [[maybe_unused]] const E& executor, [[maybe_unused]] Workspace& workspace) {
#if defined(LONGSPAN_USES_AMX)
  const no_position position;
  run_where_it_pays(call.flop(), least_parallel_tile_flop, executor, [&](const auto& where) {
    using Pass = Forward<TileArithmetic<Tk>, Tq, Tk, Tv, To, Keys, M, S, no_position>;
    const WithTiles<TileUnit, std::remove_cvref_t<decltype(where)>> on(where);
    Pass(call, keys, mask, score, position, on.workers()).run(on, workspace);
  });
#endif
}

/// Attention over the keys and values of the call.
template <class Tq, class Tk, class Tv, class To, Mask M, Score S, Position P, class E>
void attend(const Problem<Tq, Tk, Tv, To>& call, const M& mask, const S& score, const P& position,
            const E& executor, Workspace& workspace, bool bf16_products) {
  attend(call, TensorKeys<Tk, Tv>{call.k, call.v}, mask, score, position, executor, workspace, bf16_products);
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
