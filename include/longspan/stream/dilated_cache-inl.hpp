// Appending to a dilated_cache without queries, truncating and reordering it, and saving and loading its state.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <istream>
#include <iterator>
#include <ostream>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "longspan/detail/call/functor_calls.hpp"
#include "longspan/detail/storage/state_fields.hpp"
#include "longspan/detail/storage/state_file.hpp"
#include "longspan/dilation.hpp"
#include "longspan/eigen.hpp"
#include "longspan/error.hpp"
#include "longspan/execution.hpp"
#include "longspan/mask.hpp"
#include "longspan/options.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/stream/dilated_cache.hpp"
#include "longspan/stream_shape.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

inline constexpr StateKind dilated_state{"dilated", 2, "dilated_cache::save", "dilated_cache::load"};

/// The properties that a dilated_cache and a file must share: those that determine the rows, and how they are read.
template <class T, class Attend>
std::vector<StateField> dilated_fields(const Attend& attend, const StreamShape& shape) {
  std::vector<StateField> fields{
      element_field<T>(),
      {"batch", shape.batch},
      {"heads", shape.heads},
      {"kv_heads", shape.kv_heads},
      {"head_dim", shape.head_dim},
      {"value_dim", shape.value_dim},
      {"phase", static_cast<std::int64_t>(attend.phase),
       [](std::int64_t x) { return std::string(x == 0 ? "modulo" : "blocked"); }},
      {"overlap", static_cast<std::int64_t>(attend.overlap),
       [](std::int64_t x) { return std::string(x == 0 ? "multiset" : "set"); }},
      real_field("scale", resolved_scale(dilated_state.load, attend.scale, shape.head_dim)),
      {"the number of branches", std::ssize(attend.branches)}};
  const auto position = position_fields(attend.position);
  fields.insert(fields.end(), position.begin(), position.end());
  return fields;
}

/// The segment and the dilation of each branch in turn.
inline std::vector<std::int64_t> numbers_of(std::span<const Branch> branches) {
  std::vector<std::int64_t> numbers;
  for (const Branch& branch : branches) numbers.insert(numbers.end(), {branch.segment, branch.dilation});
  return numbers;
}

/// Throws FileError and names the first branch in which a file differs from the stream that loads it.
inline void check_numbers_of(std::span<const Branch> branches, std::span<const std::int64_t> in_file) {
  const std::vector<std::int64_t> wanted = numbers_of(branches);
  for (std::size_t n = 0; n < wanted.size(); ++n) {
    const std::string name =
        (n % 2 == 0 ? "the segment of branch " : "the dilation of branch ") + std::to_string(n / 2);
    const StateField field{name, wanted[n]};
    check_fields(dilated_state.load, in_file.subspan(n, 1), std::span(&field, 1));
  }
}

}  // namespace detail

/// `least` and `size` may come from a file, which can claim more rows than an Index counts bytes.
template <StoredElement T, Mask M, Score S, Position P>
Index dilated_cache<T, M, S, P>::payload_bytes(Index least, Index size) const {
  const Index batch = shape_.batch, of_row = batch == 0 ? 0 : row_bytes();
  double claimed = 0;
  for (const detail::Strand& strand : strands_)
    claimed += static_cast<double>(rows_between(strand, least, size)) * static_cast<double>(of_row);
  if (claimed * static_cast<double>(batch) > 1e18) {
    detail::refuse<FileError>(detail::dilated_state.load, "the number of tokens", std::to_string(size),
                              "a number whose rows fit into memory");
  }
  Index bytes = 0;
  for (const detail::Strand& strand : strands_) bytes += rows_between(strand, least, size) * of_row;
  return 2 * std::ssize(attend_.branches) * static_cast<Index>(sizeof(std::int64_t)) + bytes * batch;
}

template <StoredElement T, Mask M, Score S, Position P>
void dilated_cache<T, M, S, P>::truncate(Index tokens) {
  if (!can_truncate(tokens)) {
    Index first = 0;
    for (const Branch& branch : attend_.branches)
      first = (std::max)(first, least_ / branch.segment * branch.segment);
    detail::refuse("dilated_cache::truncate", "the number of tokens", std::to_string(tokens),
                   std::to_string(first) + ".." + std::to_string(size_) +
                       (first == 0 ? "" : ", because rows of earlier segments have been dropped"));
  }
  size_ = tokens;
  least_ = (std::min)(least_, tokens);
}

template <StoredElement T, Mask M, Score S, Position P>
template <TensorLike K, TensorLike V, ExecutionLike E>
void dilated_cache<T, M, S, P>::append(const K& k, const V& v, E&& execution) {
  const auto keys = view(k);
  const auto values = view(v);
  detail::check_tokens("dilated_cache::append", keys, values, shape_.batch, shape_);
  const Index most = tokens_at_once();
  detail::with_executor(execution, [&](const auto& executor) {
    for (Index first = 0; first < keys.rows; first += most) {
      const Index count = (std::min)(most, keys.rows - first);
      keep(keys.slice_rows(first, count), values.slice_rows(first, count), executor);
      count_rows(size_ + count);
    }
  });
}

template <StoredElement T, Mask M, Score S, Position P>
void dilated_cache<T, M, S, P>::reorder(std::span<const Index> rows) {
  detail::check_reorder("dilated_cache::reorder", rows, shape_.batch);
  const auto strands = std::ssize(strands_);
  std::vector<Rows> reordered;
  reordered.reserve(rows_.size());
  for (const Index row : rows)
    reordered.insert(reordered.end(), rows_.begin() + row * strands, rows_.begin() + (row + 1) * strands);
  rows_ = std::move(reordered);
}

template <StoredElement T, Mask M, Score S, Position P>
void dilated_cache<T, M, S, P>::save(std::ostream& to) const {
  std::vector<std::int64_t> numbers = detail::values_of(detail::dilated_fields<T>(attend_, shape_));
  numbers.insert(numbers.end(), {options_.rollback, least_, size_});
  const std::vector<std::int64_t> branches = detail::numbers_of(attend_.branches);
  detail::StateWriter writer(to, detail::dilated_state, numbers, payload_bytes(least_, size_));
  writer.array(branches.data(), std::ssize(branches));
  for (std::size_t n = 0; n < rows_.size(); ++n) {
    const Index count = rows_between(strands_[n % strands_.size()], least_, size_);
    for_arrays(rows_[n], [&](const auto& array, Index cols) { writer.array(array.data(), count * cols); });
  }
  writer.finish();
}

template <StoredElement T, Mask M, Score S, Position P>
void dilated_cache<T, M, S, P>::load(std::istream& from) {
  // With this limit sums of two positions never overflow.
  constexpr Index most = Index{1} << 53;
  const std::string_view name = detail::dilated_state.load;
  const auto fields = detail::dilated_fields<T>(attend_, shape_);
  std::vector<std::int64_t> found(fields.size() + 3);
  detail::StateReader reader(from, detail::dilated_state, found);
  detail::check_fields(name, found, fields);
  const Index rollback = found[fields.size()], least = found[fields.size() + 1],
              size = found[fields.size() + 2];
  if (rollback < options_.rollback) {
    detail::refuse<FileError>(name, "rollback", std::to_string(rollback) + " in the file",
                              "at least " + std::to_string(options_.rollback) + " as in this stream");
  }
  if (size < 0 || size > most)
    detail::refuse<FileError>(name, "the number of tokens", std::to_string(size),
                              "0.." + std::to_string(most));
  if (least < 0 || least > size)
    detail::refuse<FileError>(name, "the least number of tokens", std::to_string(least),
                              "0.." + std::to_string(size));
  detail::check_numbers_of(attend_.branches,
                           reader.template array<std::int64_t>(2 * std::ssize(attend_.branches)));
  reader.expect_payload(payload_bytes(least, size));
  std::vector<Rows> loaded(rows_.size());
  for (std::size_t n = 0; n < loaded.size(); ++n) {
    const Index count = rows_between(strands_[n % strands_.size()], least, size);
    for_arrays(loaded[n], [&](auto& array, Index cols) {
      array = reader.template array<typename std::decay_t<decltype(array)>::value_type>(count * cols);
    });
  }
  reader.finish();
  rows_ = std::move(loaded);
  size_ = size;
  least_ = least;
}

LONGSPAN_NAMESPACE_END
