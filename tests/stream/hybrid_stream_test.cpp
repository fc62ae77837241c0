#include "longspan/stream/hybrid_stream.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "longspan/stream/stream.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using longspan::EmptyMemory;
using longspan::hybrid_options;
using longspan::hybrid_stream;
using longspan::InfiniRule;
using longspan::landmark_cache;
using longspan::StreamShape;

static_assert(longspan::Stream<hybrid_stream<>>);
static_assert(longspan::Stream<hybrid_stream<double>, double>);
static_assert(longspan::Stream<hybrid_stream<std::int8_t>>);

constexpr StreamShape shape{2, 4, 2, 16, 12};
constexpr Index length = 700;
const std::vector<float> logits{-1, 0.5f, 2, 0};

hybrid_options small_options() {
  hybrid_options options{
      .block_size = 10, .top_k = 2, .window_blocks = 2, .capacity = 5, .evicted_at_once = 3};
  options.beta = longspan::per_head_gate(logits);
  return options;
}

double phi(double x) { return x > 0 ? x + 1 : std::exp(x); }

/// hybrid_stream by its definition: a landmark cache in double that drops blocks on request, and the memory
/// summed token by token over all dropped blocks.
Tensor<double> composed(const Call<double>& call, const hybrid_options& options) {
  landmark_cache<double> cache(shape, {.block_size = options.block_size,
                                       .top_k = options.top_k,
                                       .window_blocks = options.window_blocks,
                                       .exact_window = true});
  Tensor<double> out = call.out;
  Index evicted = 0;
  for (Index i = 0; i < length; ++i) {
    const auto token = [&](const Tensor<double>& x) { return x.view().slice_rows(i, 1); };
    cache.extend(token(call.q), token(call.k), token(call.v), out.view().slice_rows(i, 1));
    for (Index b = 0; b < shape.batch; ++b) {
      for (Index h = 0; h < shape.heads && (evicted > 0 || options.empty_memory == EmptyMemory::gate); ++h) {
        const double g = 1 / (1 + std::exp(-static_cast<double>(logits[static_cast<std::size_t>(h)])));
        double norm = 0;
        std::vector<double> read(static_cast<std::size_t>(shape.value_dim));
        for (Index j = 0; j < evicted * options.block_size; ++j) {
          if (j % options.block_size == options.block_size - 1) continue;
          double weight = 0;
          for (Index c = 0; c < shape.head_dim; ++c)
            weight += phi(call.q.row(b, h, i)[c]) * phi(call.k.row(b, h / 2, j)[c]);
          norm += weight;
          for (std::size_t c = 0; c < read.size(); ++c) read[c] += weight * call.v.row(b, h / 2, j)[c];
        }
        for (std::size_t c = 0; c < read.size(); ++c) {
          double& x = out.row(b, h, i)[c];
          x = (norm > 0 ? g * read[c] / norm : 0) + (1 - g) * x;
        }
      }
    }
    if (cache.blocks() == options.capacity + options.evicted_at_once) {
      cache.drop(options.evicted_at_once);
      evicted += options.evicted_at_once;
    }
  }
  CHECK(evicted > 10 * options.evicted_at_once);
  return out;
}

template <class T>
Call<T> rounded(const Call<double>& call) {
  Call<T> to({shape.batch, shape.heads, shape.kv_heads, length, length, shape.head_dim, shape.value_dim});
  const auto copy = [](const auto& from, auto& into) {
    std::transform(from.values.begin(), from.values.end(), into.values.begin(),
                   [](double x) { return static_cast<T>(x); });
  };
  copy(call.q, to.q);
  copy(call.k, to.k);
  copy(call.v, to.v);
  return to;
}

Call<double> drawn_call(Random& random) {
  Call<float> call(
      {shape.batch, shape.heads, shape.kv_heads, length, length, shape.head_dim, shape.value_dim},
      Values::normal, random);
  Call<double> wide(
      {shape.batch, shape.heads, shape.kv_heads, length, length, shape.head_dim, shape.value_dim});
  std::copy(call.q.values.begin(), call.q.values.end(), wide.q.values.begin());
  std::copy(call.k.values.begin(), call.k.values.end(), wide.k.values.begin());
  std::copy(call.v.values.begin(), call.v.values.end(), wide.v.values.begin());
  return wide;
}

/// Extends with the rows [first, end) in chunks of at most `longest`.
template <class S, class T>
void extend(S& stream, Call<T>& call, Index first, Index end, Index longest, Index threads = 2) {
  for (Index count = 0; first < end; first += count) {
    count = std::min(longest, end - first);
    stream.extend(std::as_const(call.q).view().slice_rows(first, count),
                  std::as_const(call.k).view().slice_rows(first, count),
                  std::as_const(call.v).view().slice_rows(first, count),
                  call.out.view().slice_rows(first, count), longspan::openmp{threads});
  }
}

template <class T, class U>
double worst_difference(const Tensor<T>& a, const Tensor<U>& b) {
  double worst = 0;
  for (std::size_t n = 0; n < a.values.size(); ++n)
    worst = std::max(worst, std::abs(static_cast<double>(a.values[n]) - static_cast<double>(b.values[n])));
  return worst;
}

}  // namespace

TEST_CASE("hybrid_stream: matches the definitions of window, retrieval and memory for any chunks", "[law]") {
  Random random(1);
  const Call<double> call = drawn_call(random);
  hybrid_options options = small_options();
  for (const EmptyMemory empty_memory : {EmptyMemory::bypass, EmptyMemory::gate}) {
    options.empty_memory = empty_memory;
    const Tensor<double> wanted = composed(call, options);
    for (const Index longest : {Index{1}, Index{7}, Index{64}, length}) {
      INFO("chunks of " << longest);
      auto narrow = rounded<float>(call);
      auto wide = rounded<double>(call);
      hybrid_stream<float> stream(shape, options);
      hybrid_stream<double> wide_stream(shape, options);
      extend(stream, narrow, 0, length, longest);
      extend(wide_stream, wide, 0, length, longest);
      CHECK(stream.size() == length);
      CHECK(worst_difference(narrow.out, wanted) < 4e-6);
      CHECK(worst_difference(wide.out, wanted) < 1e-13);
    }
  }
}

TEST_CASE("hybrid_stream: rows that int8 represents exactly give the results of float rows", "[law]") {
  Random random(7);
  auto call = rounded<float>(drawn_call(random));
  for (auto* x : {&call.k, &call.v}) {  // multiples of 1 / 64, the largest is 127 / 64
    for (Index n = 0; n < x->batch * x->heads * x->rows; ++n) {
      float* row = x->row(0, 0, n);
      for (Index c = 0; c < x->cols; ++c) row[c] = static_cast<float>(random.between(-127, 127)) / 64;
      row[random.between(0, x->cols - 1)] = 127.0f / 64;
    }
  }
  auto of_int8 = call.unrun(), one_by_one = call.unrun();
  hybrid_stream<float> stream(shape, small_options());
  hybrid_stream<std::int8_t> narrow(shape, small_options()), again(shape, small_options());
  extend(stream, call, 0, length, 50);
  extend(narrow, of_int8, 0, length, 50);
  extend(again, one_by_one, 0, 433, 1);
  std::stringstream file;
  again.save(file);
  hybrid_stream<std::int8_t> loaded(shape, small_options());
  loaded.load(file);
  extend(loaded, one_by_one, 433, length, 1);
  CHECK(worst_difference(of_int8.out, call.out) < 1e-5);
  CHECK(worst_difference(one_by_one.out, call.out) < 1e-5);
  // Blocks of int8 take a quarter of the memory; the window and the compressive memory are float.
  CHECK(narrow.bytes() < stream.bytes());
}

TEST_CASE("hybrid_stream: before the first eviction it has the bits of its landmark cache", "[law]") {
  Random random(2);
  auto call = rounded<float>(drawn_call(random)), other = call.unrun();
  const hybrid_options options = small_options();
  hybrid_stream<float> stream(shape, options);
  landmark_cache<float> cache(shape, {.block_size = options.block_size,
                                      .top_k = options.top_k,
                                      .window_blocks = options.window_blocks,
                                      .exact_window = true});
  extend(stream, call, 0, 99, 1);
  extend(cache, other, 0, 99, 1);
  CHECK(call.out == other.out);
}

TEST_CASE("hybrid_stream: its memory is bounded", "[state]") {
  const hybrid_options options = small_options();
  hybrid_stream<float> stream(shape, options);
  Random random(3);
  auto call = rounded<float>(drawn_call(random));
  extend(stream, call, 0, length, 64);
  const Index full = stream.bytes();
  for (int again = 0; again < 5; ++again) {
    extend(stream, call, 0, length, 64);
    CHECK(stream.bytes() <= full + options.evicted_at_once * options.block_size * 2 * 2 * (16 + 12) * 4);
    CHECK(stream.cache().blocks() < options.capacity + options.evicted_at_once);
  }
  CHECK(stream.size() == 6 * length);
}

TEST_CASE("hybrid_stream: bits do not depend on threads, and copies are independent", "[bits]") {
  Random random(4);
  auto call = rounded<float>(drawn_call(random)), other = call.unrun();
  hybrid_stream<float> stream(shape, small_options());
  extend(stream, call, 0, 300, 50, 1);
  auto copy = stream;
  extend(copy, other, 0, 300, 31, 3);  // other tokens for the copy
  extend(stream, call, 300, length, 50, 3);

  hybrid_stream<float> again(shape, small_options());
  extend(again, other, 0, 300, 50, 3);
  extend(again, other, 300, length, 50, 1);
  CHECK(call.out == other.out);
  again.clear();
  other = other.unrun();
  extend(again, other, 0, length, 50, 2);
  CHECK(call.out == other.out);
}

TEST_CASE("hybrid_stream: a loaded state continues the stream, and a damaged file changes nothing",
          "[state]") {
  Random random(5);
  auto call = rounded<float>(drawn_call(random)), other = call.unrun();
  hybrid_stream<float> stream(shape, small_options());
  extend(stream, call, 0, 437, 50);
  std::stringstream file;
  stream.save(file);
  extend(stream, call, 437, length, 50);

  hybrid_stream<float> loaded(shape, small_options());
  loaded.load(file);
  CHECK(loaded.size() == 437);
  extend(loaded, other, 437, length, 50);
  const auto end = [](const auto& c) {
    const auto rows = c.out.view().slice_rows(437, length - 437);
    return std::vector<float>(rows.row(1, 3, 0), rows.row(1, 3, 0) + (length - 437) * 12);
  };
  CHECK(end(call) == end(other));

  const std::string whole = file.str();
  for (std::size_t at = 0; at < whole.size(); at += 1 + whole.size() / 97) {
    std::stringstream cut(whole.substr(0, at));
    CHECK(file_refusal([&] { loaded.load(cut); }) != "");
    std::string flipped = whole;
    flipped[at] = static_cast<char>(flipped[at] ^ 4);
    std::stringstream damaged(flipped);
    CHECK(file_refusal([&] { loaded.load(damaged); }) != "");
  }
  CHECK(loaded.size() == length);
}

TEST_CASE("hybrid_stream: invalid options and shapes are refused", "[errors]") {
  hybrid_options options = small_options();
  const auto error = [&] { return refusal([&] { hybrid_stream<float>(shape, options); }); };
  options.evicted_at_once = 0;
  CHECK(error() == "longspan: hybrid_stream: evicted_at_once is 0, wanted at least 1");
  options = small_options();
  options.block_size = 1;
  CHECK(error() == "longspan: hybrid_stream: block_size is 1, wanted at least 2");
  options = small_options();
  options.beta = longspan::per_head_gate(std::span(logits).first(3));
  CHECK(error().find("beta is [3, 1]") != std::string::npos);

  hybrid_stream<float> stream(shape, small_options());
  Random random(6);
  auto call = rounded<float>(drawn_call(random));
  CHECK(refusal([&] {
          stream.extend(call.q.view(), call.k.view(), call.v.view().slice_rows(0, 9), call.out.view());
        }).starts_with("longspan: hybrid_stream::extend: v is"));
  extend(stream, call, 0, 205, 50);
  CHECK(refusal([&] { stream.truncate(100); }) != "");
  stream.truncate(201);
  CHECK(stream.size() == 201);
}
