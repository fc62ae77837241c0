// The state of an infini_memory, written and read.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <istream>
#include <limits>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "longspan/detail/storage/state_file.hpp"
#include "longspan/error.hpp"
#include "longspan/stream/infini_memory.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_BEGIN

template <Element T, class Local, FeatureMap F>
void infini_memory<T, Local, F>::save(std::ostream& to) const {
  auto& self = const_cast<infini_memory&>(*this);  // views are of mutable memory
  detail::StateWriter writer(to, kind, numbers(), payload_bytes(filled_));
  writer.array(filled_.data(), shape_.batch);
  writer.array(written_.data(), shape_.batch);
  const auto memory = self.view_of(0, shape_.batch);
  for (Index head = 0; head < memory.heads(); ++head) {
    for (Index c = 0; c < shape_.head_dim; ++c)
      writer.array(memory.matrix(head) + c * memory.stride(), shape_.value_dim);
    writer.array(memory.norm(head), shape_.head_dim);
  }
  for (Index b = 0; b < shape_.batch; ++b) {
    const auto k = self.open_.keys(b, 1, filled_[at(b)]), v = self.open_.values(b, 1, filled_[at(b)]);
    for (Index h = 0; h < shape_.kv_heads; ++h) {
      writer.array(k.row(0, h, 0), k.rows * k.cols);
      writer.array(v.row(0, h, 0), v.rows * v.cols);
    }
  }
  writer.finish();
}

template <Element T, class Local, FeatureMap F>
void infini_memory<T, Local, F>::load(std::istream& from) {
  Numbers found{};
  detail::StateReader reader(from, kind, found);
  if (found != numbers())
    detail::refuse(kind.load, "the file", "a state of other shapes or options", "one of this stream's");
  infini_memory loaded(attend_, shape_);
  loaded.filled_ = reader.template array<std::int64_t>(shape_.batch);
  loaded.written_ = reader.template array<std::int64_t>(shape_.batch);
  for (Index b = 0; b < shape_.batch; ++b) {
    if (loaded.filled_[at(b)] < 0 || loaded.filled_[at(b)] >= attend_.segment || loaded.written_[at(b)] < 0)
      detail::refuse(kind.load, "the number of open rows", std::to_string(loaded.filled_[at(b)]),
                     "0.." + std::to_string(attend_.segment - 1));
  }
  reader.expect_payload(payload_bytes(loaded.filled_));
  const auto memory = loaded.view_of(0, shape_.batch);
  for (Index head = 0; head < memory.heads(); ++head) {
    for (Index c = 0; c < shape_.head_dim; ++c) {
      const auto row = reader.template array<Real>(shape_.value_dim);
      std::copy(row.begin(), row.end(), memory.matrix(head) + c * memory.stride());
    }
    const auto norm = reader.template array<Real>(shape_.head_dim);
    for (const Real x : norm) {
      if (!(x >= 0 && x <= std::numeric_limits<Real>::max()))
        detail::refuse(kind.load, "a norm", std::to_string(x), "a finite number of at least 0");
    }
    std::copy(norm.begin(), norm.end(), memory.norm(head));
  }
  std::vector<std::vector<T>> rows;
  for (Index b = 0; b < shape_.batch; ++b) {
    for (Index h = 0; h < shape_.kv_heads; ++h) {
      rows.push_back(reader.template array<T>(loaded.filled_[at(b)] * shape_.head_dim));
      rows.push_back(reader.template array<T>(loaded.filled_[at(b)] * shape_.value_dim));
    }
  }
  reader.finish();
  const Index most =
      loaded.filled_.empty() ? 0 : *std::max_element(loaded.filled_.begin(), loaded.filled_.end());
  if (most > 0) loaded.open_.resize(most, std::vector<std::int64_t>(loaded.filled_.size(), 0));
  for (Index b = 0; b < shape_.batch; ++b) {
    for (Index h = 0; h < shape_.kv_heads; ++h) {
      const auto n = static_cast<std::size_t>(2 * (b * shape_.kv_heads + h));
      std::copy(rows[n].begin(), rows[n].end(), loaded.open_.keys(b, 1, most).row(0, h, 0));
      std::copy(rows[n + 1].begin(), rows[n + 1].end(), loaded.open_.values(b, 1, most).row(0, h, 0));
    }
  }
  *this = std::move(loaded);
}

LONGSPAN_END
