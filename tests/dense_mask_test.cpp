#include "longspan/dense_mask.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"

using longspan::bit_mask;
using longspan::CallSizes;
using longspan::causal;
using longspan::classify;
using longspan::compact_view;
using longspan::Coverage;
using longspan::dense_mask;
using longspan::Index;
using longspan::key_ranges;
using longspan::KeyRange;
using longspan::sees;
using longspan::sinks;
using longspan::TensorView;
using longspan::Tile;
using longspan::window;
using longspan::operator&;
using longspan::operator|;
using longspan::operator!;
namespace detail = longspan::detail;

namespace {

using Picture = std::vector<std::string>;

/// A picture of a mask: one text for each query of [0, queries), with # for a visible key and . for a hidden one.
template <longspan::Mask M>
Picture picture(const M& mask, Index queries, Index keys, Index b = 0, Index h = 0) {
  Picture rows;
  for (Index i = 0; i < queries; ++i) {
    std::string& row = rows.emplace_back();
    for (Index j = 0; j < keys; ++j) row += sees(mask, b, h, i, j) ? '#' : '.';
  }
  return rows;
}

/// A picture as bytes: `shown` for #, 0 for .
std::vector<std::uint8_t> bytes_of(const Picture& rows, std::uint8_t shown = 1) {
  std::vector<std::uint8_t> bytes;
  for (const std::string& row : rows) {
    for (const char c : row) bytes.push_back(c == '#' ? shown : std::uint8_t{0});
  }
  return bytes;
}

const Picture triangle{"#....", "##...", "#.#..", "#..##"};

/// Random pairs [batch, heads, rows, keys], as bytes and as words of bits, with gaps between rows.
template <class Word>
struct Drawn {
  static constexpr Index bits = std::numeric_limits<Word>::digits;
  Index batch, heads, rows, keys, words;
  std::vector<std::uint8_t> bytes;
  std::vector<Word> packed;

  Drawn(test::Random& random, Index of_batch, Index of_heads, Index of_rows, Index of_keys, double share)
      : batch(of_batch),
        heads(of_heads),
        rows(of_rows),
        keys(of_keys),
        words((of_keys + bits - 1) / bits + 1) {
    bytes.resize(std::size_t(batch * heads * rows * keys));
    packed.assign(std::size_t(batch * heads * rows * words), static_cast<Word>(~Word{0}));
    for (Index n = 0; n < batch * heads * rows; ++n) {
      for (Index j = 0; j < keys; ++j) {
        const bool seen = random.chance(share);
        bytes[std::size_t(n * keys + j)] = static_cast<std::uint8_t>(seen ? random.between(1, 255) : 0);
        Word& word = packed[std::size_t(n * words + j / bits)];
        const auto bit = static_cast<Word>(Word{1} << (j % bits));
        word = static_cast<Word>(seen ? word | bit : word & ~bit);
      }
    }
  }
  dense_mask dense(Index first) const {
    return dense_mask(compact_view(bytes.data(), batch, heads, rows, keys), first);
  }
  bit_mask<Word> packed_bits(Index first) const {
    return bit_mask<Word>(compact_view(packed.data(), batch, heads, rows, words), keys, first);
  }
  bool shown(Index b, Index h, Index row, Index j) const {
    const auto in = [](Index size, Index n) { return size == 1 || (n >= 0 && n < size); };
    if (!in(batch, b) || !in(heads, h) || !in(rows, row) || j < 0 || j >= keys) return false;
    const auto one = [](Index size, Index n) { return size == 1 ? 0 : n; };
    return bytes[std::size_t(((one(batch, b) * heads + one(heads, h)) * rows + one(rows, row)) * keys + j)] !=
           0;
  }
};

/// True if `classify` and `seen_bits` agree with `sees` for every pair of a tile.
template <class M, class Shown>
bool answers_truly(const M& mask, const Tile& tile, const Shown& shown, std::uint64_t asked) {
  Index seen = 0;
  for (Index h = tile.first_head; h < tile.first_head + tile.heads; ++h) {
    for (Index i = tile.first_query; i < tile.first_query + tile.queries; ++i) {
      for (Index j = tile.first_key; j < tile.first_key + tile.keys; ++j) {
        if (sees(mask, tile.batch, h, i, j) != shown(tile.batch, h, i, j)) return false;
        seen += shown(tile.batch, h, i, j);
      }
      const std::uint64_t bits = detail::seen_bits(mask, tile.batch, h, i, tile.first_key, asked);
      for (Index n = 0; n < 64; ++n) {
        const bool wanted = (asked >> n & 1) != 0 && shown(tile.batch, h, i, tile.first_key + n);
        if ((bits >> n & 1) != std::uint64_t{wanted}) return false;
      }
    }
  }
  const Index pairs = tile.heads * tile.queries * tile.keys;
  return classify(mask, tile) == (seen == 0       ? Coverage::none
                                  : seen == pairs ? Coverage::all
                                                  : Coverage::some);
}

template <class Word>
void check_random_tensors() {
  test::for_each_case(300, [](test::Random& random) {
    const Drawn<Word> drawn(
        random, random.pick<Index>({1, 3}), random.pick<Index>({1, 4}), random.pick<Index>({1, 2, 9}),
        random.pick<Index>({1, 7, 8, 63, 64, 65, 130, 200}), random.pick<double>({0, 0.02, 0.5, 0.98, 1}));
    const Index first = random.between(-3, 5);
    const auto shown = [&](Index b, Index h, Index i, Index j) { return drawn.shown(b, h, i - first, j); };
    for (int n = 0; n < 20; ++n) {
      const Tile tile{random.between(0, 2),   random.between(0, 2), random.between(1, 2),
                      random.between(-4, 14), random.between(1, 4), random.between(-70, 200),
                      random.between(1, 140)};
      const std::uint64_t asked = random.chance(0.5)
                                      ? detail::low_bits(random.between(0, 64))
                                      : static_cast<std::uint64_t>(random.between(0, Index{1} << 62)) << 1;
      const bool dense = answers_truly(drawn.dense(first), tile, shown, asked);
      const bool bits = answers_truly(drawn.packed_bits(first), tile, shown, asked);
      if (!dense || !bits) CHECK((dense && bits));
    }
  });
  SUCCEED();
}

}  // namespace

TEST_CASE("dense_mask: a query sees the keys whose byte is not 0", "[dense_mask]") {
  const std::vector<std::uint8_t> bytes = bytes_of(triangle, 7);
  CHECK(picture(dense_mask(compact_view(bytes.data(), 1, 1, 4, 5), 0), 4, 5) == triangle);
  const std::unique_ptr<bool[]> flags(new bool[20]);
  std::transform(bytes.begin(), bytes.end(), flags.get(), [](std::uint8_t x) { return x != 0; });
  CHECK(picture(dense_mask(compact_view(flags.get(), 1, 1, 4, 5), 0), 4, 5) == triangle);
  CHECK(picture(!dense_mask(compact_view(bytes.data(), 1, 1, 4, 5), 0), 2, 5) == Picture{".####", "..###"});
}

TEST_CASE("dense_mask: by default the last row belongs to the query at the last key", "[dense_mask]") {
  const std::vector<std::uint8_t> bytes = bytes_of(triangle);
  const TensorView<const std::uint8_t> tensor = compact_view(bytes.data(), 1, 1, 4, 5);
  CHECK(picture(dense_mask(tensor), 3, 5) == Picture{".....", "#....", "##..."});
  CHECK(picture(dense_mask(tensor, 2), 4, 5) == Picture{".....", ".....", "#....", "##..."});
}

TEST_CASE("dense_mask: a dimension of 1 is repeated, and strides are used", "[dense_mask]") {
  const std::vector<std::uint8_t> bytes = bytes_of(triangle);
  const auto of = [&](Index batch, Index heads, Index rows) {
    return dense_mask(compact_view(bytes.data(), batch, heads, rows, 5), 0);
  };
  CHECK(picture(of(1, 1, 1), 2, 5, 3, 7) == Picture{"#....", "#...."});
  CHECK(picture(of(1, 4, 1), 2, 5, 9, 2) == Picture{"#.#..", "#.#.."});
  CHECK(picture(of(2, 1, 2), 2, 5, 1, 6) == Picture{"#.#..", "#..##"});
  // Columns 1 to 3 of every second row.
  const TensorView<const std::uint8_t> part{bytes.data() + 1, 1, 1, 2, 3, 0, 0, 10};
  CHECK(picture(dense_mask(part, 0), 2, 4) == Picture{"....", ".#.."});
}

TEST_CASE("bit_mask: key j is bit j % B of word j / B", "[dense_mask]") {
  const std::vector<std::uint64_t> words{5, 2, 0, 1};
  const bit_mask mask(compact_view(words.data(), 1, 1, 2, 2), 67, 0);
  STATIC_REQUIRE(std::is_same_v<decltype(mask), const bit_mask<std::uint64_t>>);
  for (Index j = -2; j < 140; ++j) {
    CHECK(sees(mask, 0, 0, 0, j) == (j == 0 || j == 2 || j == 65));
    CHECK(sees(mask, 0, 0, 1, j) == (j == 64));
  }
  const std::vector<std::uint8_t> bytes{0b10010110, 0b00000011};
  CHECK(picture(bit_mask(compact_view(bytes.data(), 1, 1, 1, 2), 10), 1, 12) == Picture{".##.#..###.."});
}

TEST_CASE("dense_mask, bit_mask: seen_bits and classify agree with sees", "[dense_mask]") {
  check_random_tensors<std::uint8_t>();
  check_random_tensors<std::uint32_t>();
  check_random_tensors<std::uint64_t>();
}

TEST_CASE("dense_mask: composes with other masks", "[dense_mask]") {
  const std::vector<std::uint8_t> bytes = bytes_of({"####", ".###", "##.#", "...#"});
  const dense_mask mask(compact_view(bytes.data(), 1, 1, 4, 4));
  CHECK(picture(causal{} & mask, 4, 4) == Picture{"#...", ".#..", "##..", "...#"});
  CHECK(picture(sinks{1} | !mask, 4, 4) == Picture{"#...", "#...", "#.#.", "###."});
  const Tile tile{0, 0, 1, 0, 4, 0, 0};
  CHECK(*key_ranges(mask, tile).begin() == KeyRange{0, 4});
  CHECK(*key_ranges(causal{} & window{.left = 1} & mask, {0, 0, 1, 2, 1, 0, 0}).begin() == KeyRange{1, 3});
}

TEST_CASE("dense_mask: check names the shape of the tensor and the shape that the call needs",
          "[dense_mask]") {
  const std::vector<std::uint8_t> bytes(2 * 8 * 4 * 16, 1);
  const CallSizes call{"softmax_attention", 2, 8, 12, 4, 16};
  const auto says = [&](Index batch, Index heads, Index rows, Index keys) {
    return test::refusal(
        [&] { dense_mask(compact_view(bytes.data(), batch, heads, rows, keys)).check(call); });
  };
  CHECK(says(2, 8, 4, 16) == "");
  CHECK(says(1, 1, 4, 16) == "");
  CHECK(says(1, 8, 1, 17) == "");
  CHECK(says(1, 1, 5, 17) == "");
  CHECK(says(1, 1, 3, 4) ==
        "longspan: softmax_attention: the dense_mask is [1, 1, 3, 4], wanted [1 or 2, 1 or 8, 1 or 4, 16] or "
        "with more queries and keys");
  CHECK(says(3, 1, 4, 16) != "");
  CHECK(says(1, 2, 4, 16) != "");
  CHECK(says(1, 1, 3, 16) != "");
  CHECK(says(1, 1, 4, 15) != "");
  CHECK(says(0, 1, 4, 16) != "");
  const TensorView<const std::uint8_t> tensor = compact_view(bytes.data(), 1, 1, 4, 16);
  CHECK(test::refusal([&] { dense_mask(tensor, 3).check(call); }) ==
        "longspan: softmax_attention: the dense_mask is for queries at positions 3 to 6, wanted rows for "
        "positions 12 to 15");
  CHECK(test::refusal([&] { dense_mask(tensor, 13).check(call); }) != "");
}

TEST_CASE("bit_mask: check counts the words of a row", "[dense_mask]") {
  const std::vector<std::uint64_t> words(64, 1);
  const CallSizes call{"softmax_attention", 1, 1, 0, 4, 130};
  const TensorView<const std::uint64_t> three = compact_view(words.data(), 1, 1, 4, 3);
  CHECK(test::refusal([&] { bit_mask(three, 130, 0).check(call); }) == "");
  CHECK(test::refusal([&] { bit_mask(three, 192, 0).check(call); }) == "");
  CHECK(
      test::refusal([&] { bit_mask(three, 193, 0).check(call); }) ==
      "longspan: softmax_attention: a row of the bit_mask is 3 words of 64 bits, wanted one bit for each of "
      "its 193 keys");
  CHECK(test::refusal([&] { bit_mask(three, 129, 0).check(call); }).find("the bit_mask is [1, 1, 4, 129]") !=
        std::string::npos);
}

TEST_CASE("dense_mask, bit_mask: satisfy the concepts of a mask with seen_bits", "[dense_mask]") {
  STATIC_REQUIRE(longspan::Mask<dense_mask>);
  STATIC_REQUIRE(longspan::Mask<bit_mask<std::uint8_t>>);
  STATIC_REQUIRE_FALSE(longspan::RangeMask<dense_mask>);
  STATIC_REQUIRE_FALSE(std::is_constructible_v<dense_mask, TensorView<const float>>);
  STATIC_REQUIRE(std::is_trivially_copyable_v<dense_mask>);
  STATIC_REQUIRE(detail::has_cheap_bits<decltype(causal{} & !dense_mask{TensorView<const bool>{}})>);
}
