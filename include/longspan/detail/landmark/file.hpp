// The files of a landmark cache: its state, and the store of its blocks.
#pragma once

#include <array>
#include <cstdint>
#include <istream>
#include <iterator>
#include <ostream>
#include <string>
#include <vector>

#include "longspan/detail/landmark/block_counts.hpp"
#include "longspan/detail/landmark/store.hpp"
#include "longspan/detail/storage/state_fields.hpp"
#include "longspan/detail/storage/state_file.hpp"
#include "longspan/error.hpp"
#include "longspan/landmark_retrieval.hpp"
#include "longspan/options.hpp"
#include "longspan/position.hpp"
#include "longspan/stream_shape.hpp"
#include "longspan/version.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

inline constexpr StateKind landmark_state{"landmark", 2, "landmark_cache::save", "landmark_cache::load"};

inline StateField yes_or_no(std::string_view name, bool value) {
  return {name, value, [](std::int64_t x) { return std::string(x == 0 ? "no" : "yes"); }};
}

/// The properties of a stream that determine the rows of sealed blocks.
template <StoredElement T, Position P>
std::vector<StateField> landmark_row_fields(const StreamShape& shape, Index block_size, const P& position,
                                            bool as_in_text) {
  std::vector<StateField> fields{
      element_field<T>(),           {"batch", shape.batch},         {"kv_heads", shape.kv_heads},
      {"head_dim", shape.head_dim}, {"value_dim", shape.value_dim}, {"block_size", block_size}};
  for (const StateField& field : position_fields(position)) fields.push_back(field);
  fields.push_back(yes_or_no("whether landmarks have their positions in the text", as_in_text));
  return fields;
}

/// These properties, and those that determine how the blocks are retrieved.
template <StoredElement T, Position P>
std::vector<StateField> landmark_fields(const StreamShape& shape, const landmark_cache_options& options,
                                        const BlockCounts& counts, const P& position, bool as_in_text) {
  auto fields = landmark_row_fields<T>(shape, options.block_size, position, as_in_text);
  const auto select_text = [](std::int64_t x) {
    static constexpr const char* names[] = {"per_token_and_head", "max_over_heads", "max_over_tokens",
                                            "max_over_both", "per_kv_group"};
    return x >= 0 && x < std::ssize(names) ? std::string(names[x]) : "unknown (" + std::to_string(x) + ")";
  };
  const StateField more[] = {
      {"heads", shape.heads},
      {"top_k", options.top_k},
      {"select", static_cast<std::int64_t>(options.select), select_text},
      {"window_blocks", options.window_blocks},
      yes_or_no("exact_window", options.exact_window),
      yes_or_no("split_at_blocks", options.split_at_blocks),
      {"capacity", counts.capacity},
      {"the number of blocks that are dropped together", counts.drop_at_once},
      real_field("scale", resolved_scale("landmark_cache", options.scale, shape.head_dim))};
  fields.insert(fields.end(), std::begin(more), std::end(more));
  return fields;
}

/// Writes the fields, the state of the counts, and the store.
template <StoredElement T>
void save_landmark_store(std::ostream& to, const std::vector<StateField>& fields,
                         const LandmarkStore<T>& store) {
  const BlockCounts& counts = store.counts();
  std::vector<std::int64_t> numbers = values_of(fields);
  numbers.insert(numbers.end(), {counts.tokens, counts.sealed, counts.settled, counts.opened, counts.let_go});
  StateWriter writer(to, landmark_state, numbers, store.payload_bytes(landmark_state.save));
  store.save(writer);
  writer.finish();
}

/// The counts of a file. Throws Error if a stream with the options of `wanted` cannot have reached them.
inline BlockCounts checked_counts(const BlockCounts& wanted, std::span<const std::int64_t> numbers) {
  BlockCounts counts = wanted;
  counts.tokens = numbers[0];
  counts.sealed = numbers[1];
  counts.settled = numbers[2];
  counts.opened = numbers[3];
  counts.let_go = numbers[4];
  const auto wants = [](bool is_right, const char* what, Index got, const std::string& text) {
    if (!is_right) refuse<FileError>(landmark_state.load, what, std::to_string(got) + " in the file", text);
  };
  constexpr Index most = Index{1} << 48;
  wants(counts.tokens >= 0 && counts.tokens <= most, "the number of tokens", counts.tokens,
        "0.." + std::to_string(most));
  wants(counts.opened >= 0 && counts.opened <= counts.tokens / counts.block,
        "the number of blocks from a file", counts.opened,
        "0.." + std::to_string(counts.tokens / counts.block) + " for its number of tokens");
  wants(counts.sealed == counts.sealed_at(counts.tokens), "the number of sealed blocks", counts.sealed,
        std::to_string(counts.sealed_at(counts.tokens)) + " for its number of tokens");
  wants(counts.settled >= counts.opened && counts.settled <= counts.sealed, "the number of final blocks",
        counts.settled, std::to_string(counts.opened) + ".." + std::to_string(counts.sealed));
  wants(counts.let_go >= 0 && counts.let_go <= counts.settled, "the number of blocks dropped by hand",
        counts.let_go, "0.." + std::to_string(counts.settled));
  counts.dropped = counts.dropped_at(counts.sealed);
  return counts;
}

/// Reads a store from a state. `empty` is an empty store of the stream to which the fields belong.
template <StoredElement T>
LandmarkStore<T> loaded_landmark_store(std::istream& from, const std::vector<StateField>& fields,
                                       LandmarkStore<T> empty) {
  std::vector<std::int64_t> numbers(fields.size() + 5);
  StateReader reader(from, landmark_state, numbers);
  check_fields(landmark_state.load, numbers, fields);
  empty.load(reader, checked_counts(empty.counts(), std::span(numbers).subspan(fields.size())));
  reader.finish();
  return empty;
}

/// Opens a file of blocks, or creates one, for an empty store.
template <StoredElement T>
void open_landmark_blocks(const std::string& path, Index resident, const std::vector<StateField>& fields,
                          LandmarkStore<T>& store) {
  const StateKind kind{"blocks", 2, "landmark_cache", "landmark_cache"};
  store.open(path, {kind, fields, store.file_bytes()}, resident);
}

/// Creates an empty file of blocks under a temporary name and then renames it: a file of that name is replaced only
/// when the new one is complete.
template <StoredElement T>
void replace_landmark_blocks(const std::string& path, Index resident, const std::vector<StateField>& fields,
                             LandmarkStore<T>& store) {
  struct TemporaryName {
    std::string name;
    explicit TemporaryName(const std::string& of) : name(of + ".new") { MappedFile::remove(name); }
    TemporaryName(const TemporaryName&) = delete;
    TemporaryName& operator=(const TemporaryName&) = delete;
    ~TemporaryName() { MappedFile::remove(name); }
  };
  const TemporaryName temporary(path);
  open_landmark_blocks(temporary.name, resident, fields, store);
  store.rename_file(path);
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
