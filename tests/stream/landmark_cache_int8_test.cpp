// Sealed blocks of int8 in a landmark_cache.
#include <algorithm>
#include <cmath>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "examples/temporary_folder.hpp"
#include "longspan/reference/landmark_cache.hpp"
#include "longspan/stream/landmark_cache.hpp"
#include "support/catch.hpp"
#include "support/int8_rows.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/stream_calls.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using namespace longspan;

using Options = landmark_cache_options;
using Cache = landmark_cache<std::int8_t, rotary>;
const rotary turned(Pairing::half_split, 100);

bool near(double x, double y) { return x == y || std::abs(x - y) < 4e-6; }

/// The keys as int8 blocks store them, without their position encoding, and the values.
std::pair<Tensor<double>, Tensor<double>> sealed_rows(const Call<float>& call, Index block) {
  Tensor<float> k = call.k;
  const auto rows_at = [&](auto& x, const auto& work) {
    for (Index n = 0; n < x.batch * x.heads; ++n) {
      for (Index i = 0; i < x.rows; ++i) work(x.row(0, n, i), i % block);
    }
  };
  rows_at(k, [&](float* row, Index place) {
    turned.encode(MatrixView<float>{row, 1, k.cols, k.cols}, place, Role::key);
  });
  Tensor<double> kept = kept_as_int8(k);
  rows_at(kept, [&](double* row, Index place) {
    longspan::reference::encode_row(row, k.cols, turned, -place, Role::key);
  });
  return {kept, kept_as_int8(call.v)};
}

/// The reference in double for the chunk [first, first + count), with the first `sealed` tokens as int8 stores them.
longspan::reference::landmark_cache<rotary> exact_chunk(const Call<float>& call, const Options& options,
                                                        const Tensor<double>& k, const Tensor<double>& v,
                                                        Index sealed, Index first, Index count,
                                                        Call<double>& exact) {
  longspan::reference::landmark_cache<rotary> reference(
      stream_shape({call.q.batch, call.q.heads, call.k.heads, 0, 0, call.q.cols, call.v.cols}), options,
      turned);
  const auto take = [&](auto keys, auto values, Index from, Index end) {
    auto lse = exact.lse.view();
    lse.data += from;
    lse.rows = end - from;
    reference.extend(call.q.view().slice_rows(from, end - from), keys.slice_rows(from, end - from),
                     values.slice_rows(from, end - from), exact.out.view().slice_rows(from, end - from), lse);
  };
  take(k.view(), v.view(), 0, sealed);
  take(call.k.view(), call.v.view(), sealed, first);
  take(call.k.view(), call.v.view(), first, first + count);
  return reference;
}

}  // namespace

TEST_CASE("landmark_cache: matches the reference over the rows as int8 blocks store them", "[stream][law]") {
  Index compared = 0, queries = 0;
  for_each_case(12, [&](Random& random) {
    const Options options{.block_size = random.between(2, 9),
                          .top_k = random.pick({1, 3, 100}),
                          .mass_sample = random.between(1, 3)};
    const Index kv_heads = random.between(1, 2), length = random.between(30, 70);
    Call<float> call(Shape{random.between(1, 2), kv_heads * random.pick({1, 3}), kv_heads, length, length,
                           random.pick({2, 6, 34}), random.pick({1, 5, 20})},
                     Values::normal, random);
    INFO("block " << options.block_size << " top_k " << options.top_k);
    const auto [k, v] = sealed_rows(call, options.block_size);
    Call<double> exact(Shape{call.q.batch, call.q.heads, kv_heads, length, length, 1, call.v.cols});
    Cache cache(stream_shape({call.q.batch, call.q.heads, kv_heads, 0, 0, call.q.cols, call.v.cols}), options,
                turned);
    for (Index first = 0, count = 0; first < length; first += count) {
      count = std::min(length - first, random.chance(0.5) ? 1 : random.between(1, 25));
      const Index sealed = cache.blocks() * options.block_size;
      extend(cache, call, first, count);
      const auto reference = exact_chunk(call, options, k, v, sealed, first, count, exact);
      for (Index n = 0; n < call.q.batch * call.q.heads * count; ++n) {
        const Index b = n / count / call.q.heads, h = n / count % call.q.heads, i = n % count;
        const auto chosen = cache.retrieved(b, h, i);
        // The cache chooses by landmarks in float, which occasionally differs from a choice by rounded landmarks.
        ++queries;
        if (!std::equal(chosen.begin(), chosen.end(), reference.retrieved(b, h, i).begin())) continue;
        ++compared;
        for (Index c = 0; c < call.v.cols; ++c)
          REQUIRE(near(double(call.out.row(b, h, first + i)[c]), exact.out.row(b, h, first + i)[c]));
        REQUIRE(near(double(call.lse(b, h, first + i)), exact.lse(b, h, first + i)));
        const LandmarkMass &got = cache.mass(b, h, i), &wanted = reference.mass(b, h, i);
        REQUIRE(near(got.attended, wanted.attended));
        REQUIRE(near(got.dropped, wanted.dropped));
      }
    }
  });
  CHECK(compared * 10 > queries * 9);
}

TEST_CASE(
    "landmark_cache: a block of int8 takes a byte for an element, and a float for each row and landmark",
    "[stream][state]") {
  Random random(1);
  const Shape shape{2, 6, 2, 120, 120, 24, 20};
  Call<float> call(shape, Values::normal, random), own = call.unrun();
  const Options options{.block_size = 7, .top_k = 3, .capacity = 9, .rollback = 0};
  landmark_cache<float, rotary> wide(stream_shape(shape), options, turned);
  Cache narrow(stream_shape(shape), options, turned);
  for (Index i = 0; i < 120; i += 15) {
    extend(wide, call, i, 15);
    extend(narrow, own, i, 15);
    for (Index h = 0; h < 6; ++h) {
      const auto x = wide.retrieved(1, h, 14), y = narrow.retrieved(1, h, 14);
      REQUIRE(std::equal(x.begin(), x.end(), y.begin(), y.end()));
    }
  }
  const Index heads = 2 * 2, landmarks = 9 * 24 * 4, of_wide = 9 * (7 * 24 + 6 * 20) * 4,
              of_narrow = 9 * (7 * 24 + 6 * 20 + (7 + 6) * 4);
  CHECK(wide.bytes() - narrow.bytes() == heads * (of_wide - of_narrow));
  CHECK(narrow.bytes() > heads * (landmarks + of_narrow));
}

TEST_CASE("landmark_cache: an int8 row with NaN or infinity is NaN if its block is retrieved",
          "[stream][masked]") {
  Random random(2);
  const Shape shape{1, 2, 1, 40, 40, 8, 8};
  Call<float> call(shape, Values::normal, random), clean = call;
  call.v.row(0, 0, 9)[3] = INFINITY;
  std::fill_n(call.k.row(0, 0, 12), 8, 0.0f);
  std::fill_n(clean.k.row(0, 0, 12), 8, 0.0f);
  Cache cache(stream_shape(shape), {.block_size = 8, .top_k = 1}, turned), of_clean = cache;
  Index retrieved = 0;
  for (Index i = 0; i < 40; ++i) {
    extend(cache, call, i, 1);
    extend(of_clean, clean, i, 1);
    for (Index h = 0; h < 2 && i >= 16; ++h) {
      const bool spoiled = cache.retrieved(0, h, 0)[0] == 1;
      retrieved += spoiled;
      for (Index c = 0; c < 8; ++c) REQUIRE(std::isnan(call.out.row(0, h, i)[c]) == spoiled);
      if (!spoiled)
        REQUIRE(std::equal(call.out.row(0, h, i), call.out.row(0, h, i) + 8, clean.out.row(0, h, i)));
    }
  }
  CHECK(retrieved > 0);
  CHECK(retrieved < 48);
}

TEST_CASE("landmark_cache: bits with int8 blocks do not depend on threads", "[stream][bits]") {
  Random random(3);
  const Shape shape{1, 6, 2, 200, 200, 34, 16};
  Call<float> call(shape, Values::normal, random), own = call.unrun();
  Cache cache(stream_shape(shape), {.block_size = 7, .top_k = 3}, turned), other = cache;
  for (Index i = 0; i < 200; i += 40) {
    extend(cache, call, i, 40, 1);
    extend(other, own, i, 40, 3);
  }
  CHECK(call.same_outputs(own));
}

TEST_CASE("landmark_cache: int8 blocks continue from a state, from a file and in a copy",
          "[stream][state][errors]") {
  Random random(4);
  const Shape shape{2, 4, 2, 60, 60, 6, 5};
  Call<float> call(shape, Values::normal, random), loaded_call = call.unrun(), file_call = call.unrun(),
                                                   copy_call = call.unrun();
  const TemporaryFolder folder;
  Options options{.block_size = 5, .top_k = 2, .capacity = 6}, with_file = options;
  with_file.rollback = 0;
  with_file.path = folder.file("blocks");
  Cache cache(stream_shape(shape), options, turned), loaded = cache;
  extend(cache, call, 0, 43);
  std::stringstream file;
  cache.save(file);
  const std::string bytes = file.str();
  check_damage_is_refused(loaded, bytes, 7, "landmark_cache::load");
  for (std::size_t n = 0; n < bytes.size(); n += 7)
    REQUIRE_FALSE(refused(loaded, bytes.substr(0, n)).empty());
  CHECK(loaded.size() == 0);
  landmark_cache<float, rotary> of_float(stream_shape(shape), options, turned);
  CHECK(refused(of_float, bytes).find("the element type is int8 in the file, wanted float") !=
        std::string::npos);
  loaded.load(file);
  CHECK(loaded.size() == 43);
  auto copy = loaded;
  extend(cache, call, 43, 17);
  extend(loaded, loaded_call, 43, 17);
  extend(copy, copy_call, 43, 17);
  CHECK(same_rows(call, loaded_call, 43, 60));
  CHECK(same_rows(call, copy_call, 43, 60));

  {
    Cache in_file(stream_shape(shape), with_file, turned);
    extend(in_file, file_call, 0, 43);
    CHECK(in_file.bytes() < cache.bytes());
  }
  CHECK(file_refusal([&] {
          landmark_cache<float, rotary>(stream_shape(shape), with_file, turned);
        }).find("the element type is int8 in the file, wanted float") != std::string::npos);
  Cache reopened(stream_shape(shape), with_file, turned);
  CHECK(reopened.size() == 40);
  reopened.append(std::as_const(call.k).view().slice_rows(40, 3),
                  std::as_const(call.v).view().slice_rows(40, 3));
  extend(reopened, file_call, 43, 17);
  CHECK(same_rows(call, file_call, 43, 60));
}

TEST_CASE("landmark_cache: decode_block returns the stored rows", "[int8]") {
  Random random(9);
  Call<float> call({2, 4, 2, 40, 40, 12, 9}, Values::normal, random);
  landmark_cache<std::int8_t> cache(stream_shape({2, 4, 2, 40, 40, 12, 9}), {.block_size = 8});
  landmark_cache<float> whole(stream_shape({2, 4, 2, 40, 40, 12, 9}), {.block_size = 8});
  extend(cache, call, 0, 40);
  extend(whole, call, 0, 40);
  const Tensor<double> k = kept_as_int8(call.k), v = kept_as_int8(call.v);
  Tensor<float> keys(1, 2, 7, 12), values(1, 2, 7, 9);
  for (Index n = 0; n < 4; ++n) {
    cache.decode_block(1, n, keys.view(), values.view());
    for (Index h = 0; h < 2; ++h) {
      for (Index j = 0; j < 7; ++j) {
        for (Index c = 0; c < 12; ++c)
          REQUIRE(std::abs(keys.row(0, h, j)[c] - k.row(1, h, 8 * n + j)[c]) < 1e-6);
        for (Index c = 0; c < 9; ++c)
          REQUIRE(std::abs(values.row(0, h, j)[c] - v.row(1, h, 8 * n + j)[c]) < 1e-6);
      }
    }
    whole.decode_block(1, n, keys.view(), values.view());
    REQUIRE(std::equal(keys.row(0, 1, 0), keys.row(0, 1, 7), call.k.row(1, 1, 8 * n)));
  }
  CHECK(refusal([&] {
          cache.decode_block(1, 99, keys.view(), values.view());
        }).starts_with("longspan: landmark_cache::decode_block: block 99 of batch row 1 does not exist"));
  CHECK(refusal([&] {
          cache.decode_block(0, 0, values.view(), values.view());
        }).starts_with("longspan: landmark_cache::decode_block: k is"));
}
