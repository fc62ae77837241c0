// The files of a landmark cache: its state, and the store of its blocks.
#pragma once

#include <array>
#include <cstdint>
#include <istream>
#include <iterator>
#include <limits>
#include <ostream>
#include <string>

#include "longspan/detail/landmark/store.hpp"
#include "longspan/detail/storage/state_file.hpp"
#include "longspan/error.hpp"
#include "longspan/landmark_retrieval.hpp"
#include "longspan/stream_shape.hpp"
#include "longspan/version.hpp"

LONGSPAN_BEGIN
namespace detail {

inline constexpr StateKind landmark_state{"landmark", 1, "landmark_cache::save", "landmark_cache::load"};

/// What a file must agree in, and then the sizes of its own.
template <StoredElement T>
std::array<std::int64_t, 14> landmark_numbers(const StreamShape& shape, const landmark_cache_options& options,
                                              const LandmarkStore<T>& store) {
  return {std::numeric_limits<T>::digits,
          shape.batch,
          shape.heads,
          shape.kv_heads,
          shape.head_dim,
          shape.value_dim,
          options.block,
          options.top_k,
          static_cast<Index>(options.select),
          options.local_blocks,
          options.capacity,
          store.blocks(),
          store.dropped(),
          store.open_keys()};
}

template <StoredElement T>
void save_landmark_store(std::ostream& to, const StreamShape& shape, const landmark_cache_options& options,
                         const LandmarkStore<T>& store) {
  const auto numbers = landmark_numbers(shape, options, store);
  StateWriter writer(to, landmark_state, numbers,
                     store.payload_bytes(landmark_state.save, store.blocks(), store.open_keys()));
  store.save(writer);
  writer.finish();
}

template <StoredElement T>
LandmarkStore<T> loaded_landmark_store(std::istream& from, const StreamShape& shape,
                                       const landmark_cache_options& options) {
  static constexpr const char* names[] = {"the significand of a number, in bits,",
                                          "batch",
                                          "heads",
                                          "kv_heads",
                                          "head_dim",
                                          "value_dim",
                                          "block",
                                          "top_k",
                                          "select",
                                          "local_blocks",
                                          "capacity"};
  LandmarkStore<T> store(shape.batch, shape.kv_heads, shape.head_dim, shape.value_dim, options.block);
  const auto wanted = landmark_numbers(shape, options, store);
  std::array<std::int64_t, 14> numbers{};
  StateReader reader(from, landmark_state, numbers);
  for (std::size_t n = 0; n < std::size(names); ++n) {
    if (numbers[n] != wanted[n])
      refuse(landmark_state.load, names[n], std::to_string(numbers[n]), std::to_string(wanted[n]));
  }
  const Index blocks = numbers[11], dropped = numbers[12], open = numbers[13];
  const Index most = (Index{1} << 48) / options.block;
  if (blocks < 0 || blocks > most || dropped < 0 || dropped > most || open < 0 ||
      open / options.block > options.local_blocks || (options.capacity > 0 && blocks > options.capacity)) {
    refuse(landmark_state.load, "the number of blocks", std::to_string(blocks), "what its options allow");
  }
  reader.expect_payload(store.payload_bytes(landmark_state.load, blocks, open));
  store.load(reader, blocks, dropped, open);
  reader.finish();
  return store;
}

/// Opens the file of the options for an empty store.
template <StoredElement T>
void open_landmark_blocks(const StreamShape& shape, const landmark_cache_options& options, bool as_in_text,
                          LandmarkStore<T>& store) {
  static constexpr const char* names[] = {
      "the significand of a number, in bits,", "batch", "kv_heads", "head_dim", "value_dim", "block",
      "whether landmarks stand as in the text"};
  const std::array<std::int64_t, 7> numbers{std::numeric_limits<T>::digits,
                                            shape.batch,
                                            shape.kv_heads,
                                            shape.head_dim,
                                            shape.value_dim,
                                            options.block,
                                            as_in_text};
  const StateKind kind{"blocks", 1, "landmark_cache", "landmark_cache"};
  store.open(options.file, {kind, numbers, names, store.file_bytes()}, options.resident);
}

}  // namespace detail
LONGSPAN_END
