// Masks that are tensors: one byte or one bit for each pair of a query and a key.
#pragma once

#include <algorithm>
#include <bit>
#include <concepts>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>

#include "longspan/call_sizes.hpp"
#include "longspan/detail/simd/byte_bits.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/error.hpp"
#include "longspan/key_ranges.hpp"
#include "longspan/mask.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

template <class T>
concept MaskByte = std::integral<T> && sizeof(T) == 1;

/// The common part of mask tensors: [batch or 1, heads or 1, queries or 1] rows of keys, the first of which belongs to
/// the query at position `first_query`.
template <class Word>
struct MaskRows {
  TensorView<const Word> words;
  Index keys = 0;
  Index first_query = 0;

  MaskRows(TensorView<const Word> tensor, Index keys_of_row, Index first)
      : words(tensor), keys(keys_of_row), first_query(first) {
    if (words.batch == 1) words.batch_stride = 0;
    if (words.heads == 1) words.head_stride = 0;
    if (words.rows == 1) words.row_stride = 0;
  }

  /// The row of a query, or null if the tensor has none.
  const Word* row(Index b, Index h, Index i) const noexcept {
    const auto has = [](Index size, Index n) { return size == 1 || (0 <= n && n < size); };
    const Index row = i - first_query;
    const bool found = has(words.batch, b) && has(words.heads, h) && has(words.rows, row);
    return found ? words.row(b, h, row) : nullptr;
  }

  /// Bit n is for key first + n. read(row, key, count) returns the bits of the keys [key, key + count).
  template <class Read>
  std::uint64_t bits(Index b, Index h, Index i, Index first, std::uint64_t asked, const Read& read) const {
    const Word* of_query = row(b, h, i);
    const Index from = std::max<Index>(first, 0);
    const Index end = (std::min)(keys, first + (64 - std::countl_zero(asked)));
    if (of_query == nullptr || end <= from) return 0;
    return read(of_query, from, end - from) << (from - first);
  }

  /// Reads the tile's rows until it has found both a visible and a hidden key.
  template <class M>
  Coverage classify(const M& mask, const Tile& tile) const {
    const Index heads = words.heads == 1 ? 1 : tile.heads, queries = words.rows == 1 ? 1 : tile.queries;
    bool any = false, all = true;
    for (Index h = tile.first_head; h < tile.first_head + heads; ++h) {
      for (Index i = tile.first_query; i < tile.first_query + queries; ++i) {
        for (Index at = 0; at < tile.keys; at += 64) {
          const std::uint64_t asked = low_bits(tile.keys - at);
          const std::uint64_t seen = detail::seen_bits(mask, tile.batch, h, i, tile.first_key + at, asked);
          any |= seen != 0;
          all &= seen == asked;
          if (any && !all) return Coverage::some;
        }
      }
    }
    return any ? Coverage::all : Coverage::none;
  }

  void check(const char* name, const CallSizes& call) const {
    const auto size_or_1 = [](Index got, Index wanted) { return got == 1 || got == wanted; };
    const std::string argument = std::string("the ") + name;
    const bool fits = size_or_1(words.batch, call.batch) && size_or_1(words.heads, call.heads) &&
                      (words.rows == 1 || words.rows >= call.q_len) && keys >= call.kv_len;
    if (!fits) {
      const auto text = [](Index size) { return size == 1 ? "1" : "1 or " + std::to_string(size); };
      std::string wanted = "[" + text(call.batch);
      wanted += ", " + text(call.heads);
      wanted += ", " + text(call.q_len);
      wanted += ", " + std::to_string(call.kv_len);
      refuse(call.function, argument, shape_text(words.batch, words.heads, words.rows, keys),
             wanted + "] or with more queries and keys");
    }
    if (words.rows != 1 && call.q_len > 0 &&
        (call.first_query < first_query || call.first_query - first_query > words.rows - call.q_len)) {
      const auto positions = [](Index first, Index count) {
        return "positions " + std::to_string(first) + " to " + std::to_string(first + count - 1);
      };
      refuse(call.function, argument, "for queries at " + positions(first_query, words.rows),
             "rows for " + positions(call.first_query, call.q_len));
    }
  }
};

}  // namespace detail

/// A tensor of bytes, [batch or 1, heads or 1, queries or 1, keys], not owned: a query sees the keys whose byte is
/// not 0, as in a boolean `attn_mask` of PyTorch. A dimension of 1 is repeated. Row 0 belongs to the query at
/// position `first_query`; the default keys - queries aligns the last row with the last key.
///
///   dense_mask{TensorView<const bool>{data, 1, 1, queries, keys, 0, 0, row_stride}}
///
/// A block of keys that no query of a tile sees is read from the mask and then skipped; with `causal{} &
/// dense_mask{...}` it is not even read if causal hides it. A pair for which the tensor has no byte is hidden.
class dense_mask {
 public:
  template <detail::MaskByte T>
  explicit dense_mask(TensorView<T> seen) : dense_mask(seen, seen.cols - seen.rows) {}
  template <detail::MaskByte T>
  dense_mask(TensorView<T> seen, Index first_query)
      : rows_({reinterpret_cast<const unsigned char*>(seen.data), seen.batch, seen.heads, seen.rows,
               seen.cols, seen.batch_stride, seen.head_stride, seen.row_stride},
              seen.cols, first_query) {}

  bool sees(Index b, Index h, Index i, Index j) const noexcept {
    const unsigned char* row = rows_.row(b, h, i);
    return row != nullptr && 0 <= j && j < rows_.keys && row[j] != 0;
  }
  std::uint64_t seen_bits(Index b, Index h, Index i, Index first, std::uint64_t asked) const noexcept {
    return rows_.bits(b, h, i, first, asked, [](const unsigned char* row, Index key, Index count) {
      // Rows are too far apart for the hardware prefetcher to predict the read of the next block of keys.
      detail::prefetch_line(reinterpret_cast<std::uintptr_t>(row + key) + keys_ahead);
      return detail::bits_of_bytes(row + key, count);
    });
  }
  Coverage classify(const Tile& tile) const noexcept { return rows_.classify(*this, tile); }
  KeyRanges key_ranges(const Tile&) const noexcept { return KeyRanges({0, rows_.keys}); }
  void check(const CallSizes& call) const { rows_.check("dense_mask", call); }

 private:
  static constexpr std::uintptr_t keys_ahead = 128;

  detail::MaskRows<unsigned char> rows_;
};

/// The same with one bit for each pair: key j is bit j % B of word j / B in the row of its query, for words of B bits
/// whose bit 0 is the lowest. Words may be any unsigned integers; for bytes this is the order of numpy's
/// packbits(..., bitorder="little"). `words` is [batch or 1, heads or 1, queries or 1, at least keys / B].
///
///   bit_mask{TensorView<const std::uint64_t>{words, 1, 1, queries, 32, 0, 0, 32}, 2048}
template <std::unsigned_integral Word>
class bit_mask {
 public:
  bit_mask(TensorView<const Word> words, Index keys) : bit_mask(words, keys, keys - words.rows) {}
  bit_mask(TensorView<const Word> words, Index keys, Index first_query) : rows_(words, keys, first_query) {}

  bool sees(Index b, Index h, Index i, Index j) const noexcept {
    const Word* row = rows_.row(b, h, i);
    return row != nullptr && 0 <= j && j < rows_.keys && (row[j / word_bits] >> (j % word_bits) & 1u) != 0;
  }
  std::uint64_t seen_bits(Index b, Index h, Index i, Index first, std::uint64_t asked) const noexcept {
    return rows_.bits(b, h, i, first, asked, [](const Word* row, Index key, Index count) {
      const Word* word = row + key / word_bits;
      const Index inside = key % word_bits;
      std::uint64_t bits = std::uint64_t{*word} >> inside;
      for (Index got = word_bits - inside; got < count; got += word_bits)
        bits |= std::uint64_t{*++word} << got;
      return bits & detail::low_bits(count);
    });
  }
  Coverage classify(const Tile& tile) const noexcept { return rows_.classify(*this, tile); }
  KeyRanges key_ranges(const Tile&) const noexcept { return KeyRanges({0, rows_.keys}); }
  void check(const CallSizes& call) const {
    if (rows_.keys > 0 && (rows_.keys - 1) / word_bits >= rows_.words.cols) {
      detail::refuse(call.function, "a row of the bit_mask",
                     std::to_string(rows_.words.cols) + " words of " + std::to_string(word_bits) + " bits",
                     "one bit for each of its " + std::to_string(rows_.keys) + " keys");
    }
    rows_.check("bit_mask", call);
  }

 private:
  static constexpr Index word_bits = std::numeric_limits<Word>::digits;

  detail::MaskRows<Word> rows_;
};
template <class Word, class... Sizes>
bit_mask(TensorView<Word>, Sizes...) -> bit_mask<std::remove_const_t<Word>>;

LONGSPAN_NAMESPACE_END
