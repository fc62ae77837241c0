#include "longspan/detail/tile/key_block.hpp"

#include <cmath>
#include <type_traits>
#include <vector>

#include "support/catch.hpp"
#include "support/guarded_memory.hpp"
#include "support/random.hpp"

namespace {

using namespace longspan::detail;
using Eigen::bfloat16;
using Eigen::half;
using longspan::Index;
using longspan::MatrixView;
using longspan::no_position;
using test::Guard;
using test::GuardedArray;
using test::Random;

template <class T>
void fill(MatrixView<T> x, Random& random) {
  for (Index i = 0; i < x.rows; ++i) {
    for (Index c = 0; c < x.cols; ++c) x.row(i)[c] = static_cast<T>(static_cast<float>(random.normal()));
  }
}

/// Scratch memory for key blocks.
struct Memory {
  std::vector<std::byte> bytes = std::vector<std::byte>(std::size_t{1} << 20);
  Arena arena{bytes.data() + (64 - reinterpret_cast<std::uintptr_t>(bytes.data()) % 64) % 64};
};

template <class Real, class T>
void check_convert() {
  Random random(1);
  for (const Index cols : {0, 1, 2, 7, 8, 15, 16, 17, 33, 64}) {
    for (const Index pad : {0, 1, 5}) {
      const Index rows = 5, stride = cols + 3, to_cols = cols + pad;
      const GuardedArray<T> from(rows * stride - 3,
                                 Guard::behind);  // nothing after the last column of the last row
      const GuardedArray<Real> to(rows * to_cols, Guard::behind);
      const MatrixView<T> x{from.data(), rows, cols, stride};
      fill(x, random);
      convert_rows<Real, T>(from.data(), stride, rows, cols, to.data(), to_cols);
      bool right = true;
      for (Index i = 0; i < rows; ++i) {
        for (Index c = 0; c < to_cols; ++c) {
          right =
              right && to.data()[i * to_cols + c] == (c < cols ? static_cast<Real>(x.row(i)[c]) : Real(0));
        }
      }
      INFO("cols=" << cols << " to_cols=" << to_cols);
      CHECK(right);
    }
  }
}

}  // namespace

TEST_CASE("key_block: rows of any type are converted, and padded with 0", "[key_block]") {
  check_convert<float, float>();
  check_convert<float, double>();
  check_convert<float, bfloat16>();
  check_convert<float, half>();
  check_convert<double, float>();
  check_convert<double, double>();
  check_convert<double, bfloat16>();
  check_convert<double, half>();
}

namespace {

/// Compares key blocks with the rows of k and v that they represent.
template <class Real, class Tk, class Tv>
void check_blocks(Index head_dim, Index value_dim) {
  using Policy = FloatArithmetic<Real>;
  using Blocks = KeyBlocks<Policy, Tk, Tv, no_position>;
  Random random(2);
  const Index kv_len = 300;
  std::vector<Tk> k_memory(static_cast<std::size_t>(kv_len * (head_dim + 2)));
  std::vector<Tv> v_memory(static_cast<std::size_t>(kv_len * (value_dim + 1)));
  const MatrixView<Tk> k{k_memory.data(), kv_len, head_dim, head_dim + 2};
  const MatrixView<Tv> v{v_memory.data(), kv_len, value_dim, value_dim + 1};
  fill(k, random);
  fill(v, random);
  Memory memory;
  const Blocks blocks = Blocks::take(memory.arena, head_dim, value_dim);
  for (const Index first : {0, 128, 256}) {
    const Index keys = std::min(Policy::keys_in_block, kv_len - first);
    const auto block = blocks.block(slice_rows(KeyRun<Tk, Tv>{k, v}, first, keys), no_position{}, first);
    INFO("first=" << first << " head_dim=" << head_dim << " value_dim=" << value_dim);
    CHECK(block.first_key == first);
    CHECK(block.keys == keys);
    bool right = true;
    for (Index j = 0; j < keys; ++j) {
      for (Index c = 0; c < head_dim; ++c) {
        right = right && block.k[j * block.k_stride + c] == static_cast<Real>(k.row(first + j)[c]);
      }
      for (Index c = 0; c < round_up(value_dim, tile_rows); ++c) {
        const Real x = block.v[j * block.v_stride + c];
        right = right && x == (c < value_dim ? static_cast<Real>(v.row(first + j)[c]) : Real(0));
      }
    }
    CHECK(right);
    // Rows that need no conversion are read in place.
    if (std::is_same_v<Tk, Real>) CHECK(static_cast<const void*>(block.k) == k.row(first));
    if (std::is_same_v<Tv, Real> && value_dim % tile_rows == 0) {
      CHECK(static_cast<const void*>(block.v) == v.row(first));
    }
  }
}

}  // namespace

TEST_CASE(
    "key_block: blocks contain the keys and values of their rows, values padded to whole register tiles",
    "[key_block]") {
  for (const Index head_dim : {1, 8, 33}) {
    for (const Index value_dim : {1, 8, 16, 19}) {
      check_blocks<float, float, float>(head_dim, value_dim);
      check_blocks<float, bfloat16, half>(head_dim, value_dim);
      check_blocks<float, float, double>(head_dim, value_dim);
      check_blocks<double, double, double>(head_dim, value_dim);
      check_blocks<double, half, float>(head_dim, value_dim);
    }
  }
}

TEST_CASE("key_block: keys are encoded at their own positions", "[key_block][position]") {
  Random random(3);
  std::vector<float> k_memory(300 * 8), v_memory(300 * 8);
  const MatrixView<float> k{k_memory.data(), 300, 8, 8}, v{v_memory.data(), 300, 8, 8};
  fill(k, random);
  const longspan::rotary position(longspan::Pairing::half_split);
  Memory memory;
  const auto blocks =
      KeyBlocks<FloatArithmetic<float>, float, float, longspan::rotary>::take(memory.arena, 8, 8);
  const auto block = blocks.block(slice_rows(KeyRun<float, float>{k, v}, 128, 128), position, 128);
  std::vector<float> wanted(k_memory.begin() + 128 * 8, k_memory.begin() + 256 * 8);
  position.encode(MatrixView<float>{wanted.data(), 128, 8, 8}, 128, longspan::Role::key);
  CHECK(std::equal(wanted.begin(), wanted.end(), block.k));
}
