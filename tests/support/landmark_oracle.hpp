// Landmark attention by its definition in log-space form, and the error bounds of results.
//
// Shares no code with longspan/reference: blocks are lists of keys, and every token has one score in a single softmax,
// a' = a - lse(its block) + a(its landmark).
#pragma once

#include <cmath>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "longspan/landmark_attention.hpp"
#include "support/oracle.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"

namespace test {

using longspan::landmarks;

/// The landmarks of each batch row.
struct Landmarks {
  std::vector<std::vector<Index>> of_row;

  bool is(Index b, Index j) const {
    const auto& keys = of_row[static_cast<std::size_t>(b)];
    return std::find(keys.begin(), keys.end(), j) != keys.end();
  }
};

inline Landmarks every(Index length, Index batch, Index kv_len) {
  std::vector<Index> keys;
  for (Index j = length - 1; j < kv_len; j += length) keys.push_back(j);
  return {std::vector<std::vector<Index>>(static_cast<std::size_t>(batch), keys)};
}

/// Random blocks of 1 to 2 * mean - 1 keys, sometimes much longer.
inline Landmarks drawn_landmarks(Index mean, Index batch, Index kv_len, Random& random) {
  Landmarks drawn;
  for (Index b = 0; b < batch; ++b) {
    std::vector<Index> keys;
    for (Index j = -1;;) {
      j += random.chance(0.1) ? random.between(1, 5 * mean) : random.between(1, 2 * mean - 1);
      if (j >= kv_len) break;
      keys.push_back(j);
    }
    drawn.of_row.push_back(keys);
  }
  return drawn;
}

/// The lists in the form that the functor takes; valid as long as `of` and this object.
struct LandmarkLists {
  std::vector<std::span<const Index>> lists;

  explicit LandmarkLists(const Landmarks& of) {
    for (const auto& keys : of.of_row) lists.emplace_back(keys);
  }
  landmarks at() const { return landmarks::at(std::span<const std::span<const Index>>(lists)); }
};

template <class Tq, class Tk, class Tv, class To>
Exact exact_landmark_attention(const Definition& what, const Landmarks& at,
                               const Call<Tq, Tk, Tv, To>& call) {
  using Real = Wide<Tq>;
  constexpr Real nothing = -std::numeric_limits<Real>::infinity();
  const auto q = call.q.view();
  const auto k = call.k.view();
  const auto v = call.v.view();
  Exact exact = exact_attention(what, call);
  const double scale = what.scale.value_or(1 / std::sqrt(static_cast<double>(std::max<Index>(1, q.cols))));
  const Index first =
      what.first_query != std::numeric_limits<Index>::min() ? what.first_query : k.rows - q.rows;
  const Index group = k.heads == 0 ? 1 : q.heads / k.heads;
  std::vector<WeighedPair<Real>> pairs(static_cast<std::size_t>(k.rows));
  std::fill(exact.out.begin(), exact.out.end(), 0.0);
  std::fill(exact.gauge.begin(), exact.gauge.end(), 0.0);
  std::fill(exact.condition.begin(), exact.condition.end(), 0.0);
  std::fill(exact.lse.begin(), exact.lse.end(), -std::numeric_limits<double>::infinity());
  std::size_t n = 0;
  for (Index b = 0; b < q.batch; ++b) {
    const auto& keys = at.of_row[static_cast<std::size_t>(b)];
    for (Index h = 0; h < q.heads; ++h) {
      const auto q_rows = encoded_rows(what, q, b, h, first, true);
      const auto k_rows = encoded_rows(what, k, b, h / group, 0, false);
      for (Index i = first; i < first + q.rows; ++i, ++n) {
        for (Index j = 0; j < k.rows; ++j) {
          auto& pair = pairs[static_cast<std::size_t>(j)];
          pair = {};
          if (what.sees && !what.sees(b, h, i, j)) continue;
          pair = weigh<Real>(what, q_rows.data() + (i - first) * q.cols, k_rows.data() + j * q.cols, q.cols,
                             scale, b, h, i, j);
        }
        Index begin = 0;
        for (std::size_t m = 0; m <= keys.size(); ++m) {
          const bool closed = m < keys.size();
          const Index end = closed ? keys[m] : k.rows;
          const bool own = begin <= i && (i <= end || !closed);
          const WeighedPair<Real> landmark =
              closed ? pairs[static_cast<std::size_t>(end)] : WeighedPair<Real>{};
          Real sum = 0, top = nothing, mean = 0;
          for (Index j = begin; j < end; ++j) top = std::max(top, pairs[static_cast<std::size_t>(j)].s);
          for (Index j = begin; j < end && top != nothing; ++j) {
            const auto& pair = pairs[static_cast<std::size_t>(j)];
            sum += std::exp(pair.s - top);
            mean += std::exp(pair.s - top) * pair.a;
          }
          for (Index j = begin; j < end && !own; ++j) {
            auto& pair = pairs[static_cast<std::size_t>(j)];
            if (pair.s == nothing) continue;
            pair.s = landmark.s == nothing ? nothing : pair.s - (top + std::log(sum)) + landmark.s;
            pair.a += landmark.a + mean / sum;
          }
          if (closed) pairs[static_cast<std::size_t>(end)] = {};
          begin = end + 1;
        }
        average(pairs, v.matrix(b, h / group), n, exact);
      }
    }
  }
  return exact;
}

}  // namespace test
