// Where the kernels find keys and values: in runs of rows that are contiguous or equally strided.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "longspan/key_ranges.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Consecutive keys of one KV head and their values.
template <class Tk, class Tv>
struct KeyRun {
  MatrixView<const Tk> k;
  MatrixView<const Tv> v;
  bool is_kept = true;  ///< false: k and v have sizes but no memory, and no query sees these keys
};

/// Rows of int8: the key of row j is k_scale[j] * k[j], its value v_scale[j] * v[j].
template <>
struct KeyRun<std::int8_t, std::int8_t> {
  MatrixView<const std::int8_t> k;
  MatrixView<const std::int8_t> v;
  bool is_kept = true;
  const float* k_scale = nullptr;
  const float* v_scale = nullptr;
};

/// Keys [first, first + count) of a run, counted from its first key.
template <class Tk, class Tv>
KeyRun<Tk, Tv> slice_rows(KeyRun<Tk, Tv> run, Index first, Index count) {
  run.k = {run.k.row(first), count, run.k.cols, run.k.row_stride};
  run.v = {run.v.row(first), count, run.v.cols, run.v.row_stride};
  if constexpr (std::is_same_v<Tk, std::int8_t>) {
    run.k_scale += first;
    run.v_scale += first;
  }
  return run;
}

/// The keys of tensors: all keys of a KV head are one run.
template <class Tk, class Tv>
struct TensorKeys {
  TensorView<const Tk> k;
  TensorView<const Tv> v;

  /// The longest run that begins with the first of `keys` and contains no others.
  KeyRun<Tk, Tv> run(Index batch, Index kv_head, KeyRange keys) const {
    const Index count = keys.end - keys.begin;
    return {{k.row(batch, kv_head, keys.begin), count, k.cols, k.row_stride},
            {v.row(batch, kv_head, keys.begin), count, v.cols, v.row_stride},
            true};
  }
};

/// Calls visit(run, keys) with each run of the rows that `source` keeps of `keys`, in rising order.
template <class Source, class Visit>
void for_each_run(const Source& source, Index batch, Index kv_head, KeyRange keys, const Visit& visit) {
  while (!keys.empty()) {
    const auto run = source.run(batch, kv_head, keys);
    const Index begin = std::exchange(keys.begin, keys.begin + run.k.rows);
    if (run.is_kept) visit(run, KeyRange{begin, keys.begin});
  }
}

/// Calls visit(keys) with each key block that overlaps one of `ranges`, once and in rising order, as far as it lies in
/// `limits`. Blocks begin at multiples of their length.
template <class Visit>
void for_each_block(const KeyRanges& ranges, KeyRange limits, Index keys_in_block, const Visit& visit) {
  Index done = limits.begin;  // a block that two ranges overlap is visited once
  for (const KeyRange& range : ranges) {
    const Index begin = (std::max)(range.begin, done), end = (std::min)(range.end, limits.end);
    if (begin >= end) continue;
    Index first = begin / keys_in_block * keys_in_block;
    for (; first < end; first += keys_in_block)
      visit(KeyRange{(std::max)(first, limits.begin), (std::min)(first + keys_in_block, limits.end)});
    done = first;
  }
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
