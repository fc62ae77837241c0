// The rows of the KV heads that the backward pass takes at a time.
#pragma once

#include <algorithm>
#include <type_traits>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/gradient/products.hpp"
#include "longspan/detail/gradient/rows.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/detail/tile/microkernel.hpp"
#include "longspan/position.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// A few KV heads, counted through all batch rows, and the query heads that share them: their rows as `Tiles` reads
/// them, and the shift and the D of each query. In the members n counts the heads of the wave.
template <class Call, class Tiles, Position P>
class Wave {
 public:
  using Real = typename Call::Real;
  using Row = typename Tiles::Row;

  static Wave take(Arena& arena, const Call& call, const P& position, Index heads) {
    Wave w;
    w.call_ = &call;
    w.position_ = &position;
    w.heads_ = heads;
    const Index queries = heads * w.group();
    w.q_ = KernelRows<Row, Tq>::take(arena, call.forward.q, Tiles::query_columns, encodes, queries);
    w.dout_ = KernelRows<Row, Td>::take(arena, call.dout, Tiles::query_columns, false, queries);
    w.k_ = KernelRows<Row, Tk>::take(arena, call.forward.k, Tiles::key_columns, encodes, heads);
    w.v_ = KernelRows<Row, Tv>::take(arena, call.forward.v, 1, false, heads);
    w.shift_ = arena.take<Real>(queries * w.padded_rows());
    w.delta_ = arena.take<Real>(queries * w.padded_rows());
    return w;
  }

  Index group() const { return call_->forward.group(); }
  Index all_heads() const { return call_->forward.k.batch * call_->forward.k.heads; }
  Index heads() const { return held_; }  ///< KV heads
  Index queries() const { return held_ * group(); }
  Index blocks() const { return divide_up(call_->forward.q_len(), Tiles::rows_in_block); }
  Index padded_rows() const { return blocks() * Tiles::rows_in_block; }
  Index padded_head_dim() const { return round_up(call_->forward.head_dim(), Index{lanes<Real>}); }
  Index rows_of_block(Index block) const {
    return (std::min)(Tiles::rows_in_block, call_->forward.q_len() - block * Tiles::rows_in_block);
  }

  /// A head of the call.
  struct Head {
    Index batch = 0, head = 0;
  };
  Head query_head(Index n) const { return head_of(first_ * group() + n, call_->forward.q.heads); }
  Head kv_head(Index n) const { return head_of(first_ + n, call_->forward.k.heads); }

  /// The rows of a head of the wave.
  MatrixView<const Row> q(Index n) const { return q_.matrix(n, first_ * group() + n); }
  MatrixView<const Row> dout(Index n) const { return dout_.matrix(n, first_ * group() + n); }
  MatrixView<const Row> k(Index n) const { return k_.matrix(n, first_ + n); }
  MatrixView<const Row> v(Index n) const { return v_.matrix(n, first_ + n); }
  const Real* shift(Index n) const { return shift_ + n * padded_rows(); }
  const Real* delta(Index n) const { return delta_ + n * padded_rows(); }

  /// Moves to the KV heads from `first` on and prepares their rows; false if there are none.
  template <class E>
  bool enter(const E& executor, Index first) {
    first_ = first;
    held_ = (std::min)(heads_, all_heads() - first);
    if (held_ <= 0) return false;
    const Index of_queries = queries() * blocks();
    const Index key_blocks = divide_up(call_->forward.kv_len(), Tiles::rows_in_block);
    executor.for_each(of_queries + held_ * key_blocks, [&](Index task, Index) {
      if (task < of_queries) {
        prepare_queries(task / blocks(), task % blocks());
      } else {
        prepare_keys((task - of_queries) / key_blocks,
                     (task - of_queries) % key_blocks * Tiles::rows_in_block);
      }
    });
    return true;
  }

 private:
  using Tq = std::remove_const_t<typename decltype(Call::Forward::q)::Element>;
  using Tk = typename Call::Forward::Key;
  using Tv = typename Call::Forward::Value;
  using Td = std::remove_const_t<typename decltype(Call::dout)::Element>;
  static constexpr bool encodes = !std::is_same_v<P, no_position>;

  static Head head_of(Index n, Index heads) { return {n / heads, n % heads}; }

  void prepare_queries(Index n, Index block) const {
    const Head of = query_head(n);
    const Index head = first_ * group() + n, first = block * Tiles::rows_in_block,
                count = rows_of_block(block);
    q_.prepare(n, head, first, count, *position_, call_->forward.first_query, Role::query);
    dout_.prepare(n, head, first, count, no_position{}, 0, Role::query);
    for (Index i = first; i < first + count; ++i) {
      const Real dlse = call_->dlse.data == nullptr ? Real(0) : call_->dlse(of.batch, of.head, i);
      shift_[n * padded_rows() + i] = shift_of(call_->forward.lse(of.batch, of.head, i));
      delta_[n * padded_rows() + i] =
          delta_of(call_->dout.row(of.batch, of.head, i), call_->forward.out.row(of.batch, of.head, i),
                   call_->forward.value_dim(), dlse);
    }
  }

  void prepare_keys(Index n, Index first) const {
    const Index count = (std::min)(Tiles::rows_in_block, call_->forward.kv_len() - first);
    k_.prepare(n, first_ + n, first, count, *position_, 0, Role::key);
    v_.prepare(n, first_ + n, first, count, no_position{}, 0, Role::key);
  }

  const Call* call_ = nullptr;
  const P* position_ = nullptr;
  Index heads_ = 1, first_ = 0, held_ = 0;
  KernelRows<Row, Tq> q_;
  KernelRows<Row, Td> dout_;
  KernelRows<Row, Tk> k_;
  KernelRows<Row, Tv> v_;
  Real *shift_ = nullptr, *delta_ = nullptr;  ///< [query heads][padded rows]
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
