// Saving and loading the state of an infini_memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <istream>
#include <iterator>
#include <limits>
#include <ostream>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "longspan/detail/infini/local.hpp"
#include "longspan/detail/storage/state_fields.hpp"
#include "longspan/detail/storage/state_file.hpp"
#include "longspan/error.hpp"
#include "longspan/infini_options.hpp"
#include "longspan/options.hpp"
#include "longspan/stream/infini_memory.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

inline constexpr StateKind infini_state{"infini", 2, "infini_memory::save", "infini_memory::load"};

/// The options of the local functor that determine how the open rows are read. A list of branches may have any length.
template <class Local>
std::vector<StateField> options_of_local(const Local& local) {
  std::vector<StateField> fields;
  if constexpr (requires { local.branches, local.phase, local.overlap; }) {
    fields = {{"phase of the local attention", static_cast<std::int64_t>(local.phase)},
              {"overlap of the local attention", static_cast<std::int64_t>(local.overlap)}};
    for (const auto& branch : local.branches) {
      fields.push_back({"a segment of the local attention", branch.segment});
      fields.push_back({"a dilation of the local attention", branch.dilation});
    }
  } else if constexpr (requires { local.landmarks, local.softmax, local.leak; }) {
    fields = {{"softmax of the local attention", static_cast<std::int64_t>(local.softmax)},
              {"leak of the local attention", local.leak}};
  }
  return fields;
}

template <class Local>
inline constexpr bool is_softmax_attention = false;
template <class M, class S, class P>
inline constexpr bool is_softmax_attention<softmax_attention<M, S, P>> = true;

/// The properties that an infini_memory and a file must share: those that determine M, z and the rows, and how they are
/// read.
template <class T, class Attend>
std::vector<StateField> infini_fields(const Attend& attend, const StreamShape& shape) {
  const auto yes_or_no = [](std::int64_t x) { return std::string(x == 0 ? "false" : "true"); };
  const auto& local = attend.local;
  std::int64_t kind = 99;
  if (is_softmax_attention<std::remove_cvref_t<decltype(local)>>) kind = 1;
  if constexpr (requires { local.branches, local.phase; }) kind = 2;
  if constexpr (requires { local.landmarks, local.leak; }) kind = 3;
  std::vector<StateField> fields{
      element_field<T>(),
      {"batch", shape.batch},
      {"heads", shape.heads},
      {"kv_heads", shape.kv_heads},
      {"head_dim", shape.head_dim},
      {"value_dim", shape.value_dim},
      {"segment", attend.segment},
      {"rule", static_cast<std::int64_t>(attend.rule),
       [](std::int64_t x) { return std::string(x == 0 ? "linear" : "delta"); }},
      {"empty_memory", static_cast<std::int64_t>(attend.empty_memory),
       [](std::int64_t x) { return std::string(x == 0 ? "gate" : "bypass"); }},
      {"memory_uses_positions", attend.memory_uses_positions, yes_or_no},
      {"absolute_positions", attend.absolute_positions, yes_or_no},
      {"the feature map",
       std::is_same_v<std::remove_cvref_t<decltype(attend.feature)>, elu_plus_one> ? 1 : 99,
       [](std::int64_t x) { return std::string(x == 1 ? "elu_plus_one" : "user-defined"); }},
      {"the local attention", kind,
       [](std::int64_t x) {
         return std::string(x == 1   ? "softmax_attention"
                            : x == 2 ? "dilated_attention"
                            : x == 3 ? "landmark_attention"
                                     : "another");
       }},
      {"the number of options of the local attention", std::ssize(options_of_local(local))}};
  if constexpr (requires { local.scale; }) {
    fields.push_back(real_field("scale", resolved_scale(infini_state.load, local.scale, shape.head_dim)));
  } else {
    fields.push_back(real_field("scale", 0));
  }
  const auto position = position_fields(position_of(local));
  fields.insert(fields.end(), position.begin(), position.end());
  return fields;
}

}  // namespace detail

/// The payload of a state whose batch rows have `stored` rows, in `closed` closed segments and an open one. The numbers
/// may come from a file, which can claim more bytes than an Index can count.
template <Element T, class Local, FeatureMap F>
Index infini_memory<T, Local, F>::payload_bytes(Index options_of_local, bool has_base,
                                                const std::vector<std::int64_t>& stored,
                                                const std::vector<std::int64_t>& closed) const {
  const Index of_row = shape_.kv_heads * (shape_.head_dim + shape_.value_dim) * static_cast<Index>(sizeof(T));
  double claimed = 0;
  for (std::size_t b = 0; b < stored.size(); ++b)
    claimed +=
        static_cast<double>(stored[b]) * static_cast<double>(of_row) + 8 * static_cast<double>(closed[b]);
  if (claimed > 1e18)
    detail::refuse<FileError>(detail::infini_state.load, "the number of rows",
                              std::to_string(claimed) + " bytes", "rows that fit into memory");
  Index bytes = 0;
  for (std::size_t b = 0; b < stored.size(); ++b) bytes += stored[b] * of_row + 8 * closed[b];
  const Index memory = shape_.batch * shape_.kv_heads * shape_.head_dim * (shape_.value_dim + 1) *
                       static_cast<Index>(sizeof(Real));
  return 8 * (options_of_local + 4 * shape_.batch) + (has_base ? 2 : 1) * memory + bytes;
}

template <Element T, class Local, FeatureMap F>
void infini_memory<T, Local, F>::save(std::ostream& to) const {
  auto& self = const_cast<infini_memory&>(*this);  // views refer to mutable memory
  const std::vector<std::int64_t> of_local = detail::values_of(detail::options_of_local(attend_.local));
  std::vector<std::int64_t> numbers = detail::values_of(detail::infini_fields<T>(attend_, shape_));
  numbers.push_back(options_.rollback);
  std::vector<std::int64_t> begins, counts, rows;
  for (Index b = 0; b < shape_.batch; ++b) {
    begins.push_back(closed_[at(b)].begin);
    counts.push_back(std::ssize(closed_[at(b)].lengths));
    rows.push_back(stored(b));
  }
  const bool has_base = options_.rollback > 0;
  detail::StateWriter writer(to, detail::infini_state, numbers,
                             payload_bytes(std::ssize(of_local), has_base, rows, counts));
  writer.array(of_local.data(), std::ssize(of_local));
  for (const auto& array : {std::cref(filled_), std::cref(written_), std::cref(begins), std::cref(counts)})
    writer.array(array.get().data(), shape_.batch);
  for (const detail::ClosedSegments& closed : closed_)
    writer.array(closed.lengths.data(), std::ssize(closed.lengths));
  const auto write_memory = [&](const detail::MemoryView<Real>& memory) {
    for (Index head = 0; head < memory.heads(); ++head) {
      for (Index c = 0; c < shape_.head_dim; ++c)
        writer.array(memory.matrix(head) + c * memory.stride(), shape_.value_dim);
      writer.array(memory.norm(head), shape_.head_dim);
    }
  };
  write_memory(self.view_of(0, shape_.batch));
  if (has_base) write_memory(self.view_of(self.base_m_, self.base_z_, 0, shape_.batch));
  for (Index b = 0; b < shape_.batch; ++b) {
    const auto k = self.open_.keys(b, 1, 0, stored(b)), v = self.open_.values(b, 1, 0, stored(b));
    for (Index h = 0; h < shape_.kv_heads; ++h) {
      writer.array(k.row(0, h, 0), k.rows * k.cols);
      writer.array(v.row(0, h, 0), v.rows * v.cols);
    }
  }
  writer.finish();
}

template <Element T, class Local, FeatureMap F>
void infini_memory<T, Local, F>::load(std::istream& from) {
  // With this limit sums of two positions never overflow.
  constexpr Index most_tokens = Index{1} << 53;
  const std::string_view name = detail::infini_state.load;
  const auto fields = detail::infini_fields<T>(attend_, shape_);
  std::vector<std::int64_t> found(fields.size() + 1);
  detail::StateReader reader(from, detail::infini_state, found);
  detail::check_fields(name, found, fields);
  const Index rollback = found.back();
  if (rollback < options_.rollback) {
    detail::refuse<FileError>(name, "rollback", std::to_string(rollback) + " in the file",
                              "at least " + std::to_string(options_.rollback) + " as in this stream");
  }
  const auto of_local = detail::options_of_local(attend_.local);
  detail::check_fields(name, reader.template array<std::int64_t>(std::ssize(of_local)), of_local);

  infini_memory loaded(attend_, shape_, {.rollback = rollback});
  const auto numbers = [&] { return reader.template array<std::int64_t>(shape_.batch); };
  const auto check = [&](const char* what, Index got, Index least, Index most) {
    if (got < least || got > most)
      detail::refuse<FileError>(name, what, std::to_string(got),
                                std::to_string(least) + ".." + std::to_string(most));
  };
  loaded.filled_ = numbers();
  loaded.written_ = numbers();
  const std::vector<std::int64_t> begins = numbers(), counts = numbers();
  std::vector<std::int64_t> rows;
  for (Index b = 0; b < shape_.batch; ++b) {
    const Index written = loaded.written_[at(b)], begin = begins[at(b)];
    check("the number of open rows", loaded.filled_[at(b)], 0, attend_.segment - 1);
    check("the number of tokens", written, 0, most_tokens);
    check("the number of tokens in the second memory", begin, rollback == 0 ? written : 0, written);
    check("the number of closed segments", counts[at(b)], begin < written ? 1 : 0, written - begin);
    if (loaded.filled_[at(b)] > most_tokens)
      check("the number of open rows", loaded.filled_[at(b)], 0, most_tokens);
    rows.push_back(written - begin + loaded.filled_[at(b)]);
  }
  reader.expect_payload(payload_bytes(std::ssize(of_local), rollback > 0, rows, counts));
  for (Index b = 0; b < shape_.batch; ++b) {
    detail::ClosedSegments& closed = loaded.closed_[at(b)];
    closed.lengths = reader.template array<Index>(counts[at(b)]);
    closed.begin = begins[at(b)];
    closed.rows = loaded.written_[at(b)] - closed.begin;
    Index left = closed.rows;
    for (const Index length : closed.lengths) {
      check("the length of a closed segment", length, 1, (std::min)(left, attend_.segment));
      left -= length;
    }
    check("the rows of the last closed segment", left, 0, 0);
  }
  const auto read_memory = [&](const detail::MemoryView<Real>& memory) {
    for (Index head = 0; head < memory.heads(); ++head) {
      for (Index c = 0; c < shape_.head_dim; ++c) {
        const auto row = reader.template array<Real>(shape_.value_dim);
        std::copy(row.begin(), row.end(), memory.matrix(head) + c * memory.stride());
      }
      const auto norm = reader.template array<Real>(shape_.head_dim);
      for (const Real x : norm) {
        if (!(x >= 0 && x <= (std::numeric_limits<Real>::max)()))
          detail::refuse<FileError>(name, "a norm", std::to_string(x), "a finite number of at least 0");
      }
      std::copy(norm.begin(), norm.end(), memory.norm(head));
    }
  };
  read_memory(loaded.view_of(0, shape_.batch));
  if (rollback > 0) read_memory(loaded.view_of(loaded.base_m_, loaded.base_z_, 0, shape_.batch));
  std::vector<std::vector<T>> arrays;
  for (Index b = 0; b < shape_.batch; ++b) {
    for (Index h = 0; h < shape_.kv_heads; ++h) {
      arrays.push_back(reader.template array<T>(rows[at(b)] * shape_.head_dim));
      arrays.push_back(reader.template array<T>(rows[at(b)] * shape_.value_dim));
    }
  }
  reader.finish();
  const Index most = rows.empty() ? 0 : *std::max_element(rows.begin(), rows.end());
  if (most > 0) loaded.open_.resize(most, std::vector<std::int64_t>(rows.size(), 0));
  for (Index b = 0; b < shape_.batch; ++b) {
    for (Index h = 0; h < shape_.kv_heads; ++h) {
      const auto n = static_cast<std::size_t>(2 * (b * shape_.kv_heads + h));
      std::copy(arrays[n].begin(), arrays[n].end(), loaded.open_.keys(b, 1, 0, most).row(0, h, 0));
      std::copy(arrays[n + 1].begin(), arrays[n + 1].end(), loaded.open_.values(b, 1, 0, most).row(0, h, 0));
    }
  }
  if (options_.rollback == 0) loaded.keep_no_closed();
  take_state(std::move(loaded));
}

template <Element T, class Local, FeatureMap F>
void infini_memory<T, Local, F>::take_state(infini_memory&& other) noexcept {
  m_ = std::move(other.m_);
  z_ = std::move(other.z_);
  base_m_ = std::move(other.base_m_);
  base_z_ = std::move(other.base_z_);
  open_ = std::move(other.open_);
  filled_ = std::move(other.filled_);
  written_ = std::move(other.written_);
  closed_ = std::move(other.closed_);
}

template <Element T, class Local, FeatureMap F>
void infini_memory<T, Local, F>::reorder(std::span<const Index> rows) {
  detail::check_reorder("infini_memory::reorder", rows, shape_.batch);
  infini_memory next = *this;
  for (Index b = 0; b < shape_.batch; ++b) {
    const Index from = rows[at(b)];
    next.view_of(b, 1).copy(view_of(from, 1));
    if (options_.rollback > 0)
      next.view_of(next.base_m_, next.base_z_, b, 1).copy(view_of(base_m_, base_z_, from, 1));
    next.open_.write(open_.keys(from, 1, 0, stored(from)), open_.values(from, 1, 0, stored(from)), b, 1, 0);
    next.filled_[at(b)] = filled_[at(from)];
    next.written_[at(b)] = written_[at(from)];
    next.closed_[at(b)] = closed_[at(from)];
  }
  take_state(std::move(next));
}

template <Element T, class Local, FeatureMap F>
void infini_memory<T, Local, F>::keep_no_closed() {
  for (Index b = 0; b < shape_.batch; ++b) {
    open_.drop(b, closed_[at(b)].rows, filled_[at(b)]);
    closed_[at(b)] = {written_[at(b)], 0, {}};
  }
  base_m_ = {};
  base_z_ = {};
}

LONGSPAN_NAMESPACE_END
