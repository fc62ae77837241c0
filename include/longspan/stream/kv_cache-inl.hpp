// Checks of a kv_cache's shape and options, and saving and loading its state.
#pragma once

#include <cstdint>
#include <istream>
#include <ostream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "longspan/detail/call/stream_mask.hpp"
#include "longspan/detail/storage/key_pages.hpp"
#include "longspan/detail/storage/state_fields.hpp"
#include "longspan/detail/storage/state_file.hpp"
#include "longspan/error.hpp"
#include "longspan/options.hpp"
#include "longspan/stream/kv_cache.hpp"
#include "longspan/stream_shape.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

template <StoredElement T, Mask M, Score S, Position P>
const StreamShape& kv_cache<T, M, S, P>::checked(const StreamShape& shape, const kv_cache_options& options,
                                                 const softmax_attention<M, S, P>& attend) {
  constexpr std::string_view name = "kv_cache";
  detail::check_stream_shape(name, shape);
  const Index most = detail::KeyPages<T>::most_tokens(shape);
  if (most == 0) {
    detail::refuse(name, "the shape [batch, heads, head_dim, value_dim]",
                   detail::shape_text(shape.batch, shape.heads, shape.head_dim, shape.value_dim),
                   "a shape whose tokens fit into memory");
  }
  detail::check_stream_parts(name, attend, shape);
  if (options.page_size < 0 || options.page_size > most)
    detail::refuse(name, "page_size", std::to_string(options.page_size),
                   "at least 0 and at most " + std::to_string(most) + " tokens");
  if (options.rollback < 0)
    detail::refuse(name, "rollback", std::to_string(options.rollback), "at least 0 tokens");
  if (attend.first_query != queries_end_at_keys) {
    detail::refuse(name, "first_query", std::to_string(attend.first_query),
                   "no value, because queries are at the positions of their tokens");
  }
  return shape;
}

template <StoredElement T, Mask M, Score S, Position P>
std::vector<detail::StateField> kv_cache<T, M, S, P>::fields() const {
  const auto shape = detail::shape_fields(shape_);
  const auto positions = detail::position_fields(attend_.position);
  std::vector<detail::StateField> fields(shape.begin(), shape.end());
  fields.push_back(detail::element_field<T>());
  fields.push_back({"page_size", options_.page_size});
  // Not `insert`: g++ then warns of an overflow that cannot be.
  for (const detail::StateField& position : positions) fields.push_back(position);
  const double scale = detail::resolved_scale(kind.load, attend_.scale, shape_.head_dim);
  fields.push_back(detail::real_field("scale", scale));
  return fields;
}

template <StoredElement T, Mask M, Score S, Position P>
void kv_cache<T, M, S, P>::save(std::ostream& to) const {
  auto numbers = detail::values_of(fields());
  numbers.push_back(size());
  detail::StateWriter writer(to, kind, numbers, pages_.payload_bytes());
  pages_.save(writer);
  writer.finish();
}

template <StoredElement T, Mask M, Score S, Position P>
void kv_cache<T, M, S, P>::load(std::istream& from) {
  const auto wanted = fields();
  std::vector<std::int64_t> found(wanted.size() + 1);
  detail::StateReader reader(from, kind, found);
  detail::check_fields(kind.load, found, wanted);
  const Index size = found.back(), most = detail::KeyPages<T>::most_tokens(shape_);
  if (size < 0 || size > most)
    reader.reject("the number of tokens", std::to_string(size), "0.." + std::to_string(most));
  detail::KeyPages<T> loaded(shape_, options_.page_size);
  loaded.load(reader, size);
  reader.finish();
  for (Index b = 0; b < shape_.batch; ++b) {
    if (!loaded.keeps(b, detail::later_keys(mask_, b, size), size))
      reader.reject("the file", "a state without some keys that later queries may see", "a state with them");
  }
  pages_ = std::move(loaded);
  full_pages_ = 0;
}

LONGSPAN_NAMESPACE_END
