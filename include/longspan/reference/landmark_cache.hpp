// A naive landmark cache in double, which keeps every key and encodes it again for each query.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "longspan/options.hpp"
#include "longspan/reference/position.hpp"
#include "longspan/stream/landmark_cache.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace reference {

template <Position P = no_position, PositionMap Map = stingy_positions>
class landmark_cache {
 public:
  explicit landmark_cache(const StreamShape& shape, const landmark_cache_options& options = {},
                          const P& position = P{}, const Map& map = Map{})
      : shape_(shape),
        options_(options),
        position_(position),
        map_(map),
        lanes_(at(shape.batch * shape.kv_heads)) {}

  template <class Tq, class Tk, class Tv, class To, class Tl>
  void extend(TensorView<const Tq> q, TensorView<const Tk> k, TensorView<const Tv> v, TensorView<To> out,
              RowsView<Tl> lse) {
    Index first = 0;
    do {
      const Index left = k.rows - first, to_landmark = options_.block_size - size_ % options_.block_size,
                  count = options_.split_at_blocks ? (std::min)(to_landmark, left) : left;
      const Index queries = q.rows == 0 ? 0 : count;  // tokens may come without queries
      RowsView<Tl> piece = lse;
      if (lse.data != nullptr) piece.data += first * lse.row_stride;
      extend_piece(q.slice_rows(first, queries), k.slice_rows(first, count), v.slice_rows(first, count),
                   out.slice_rows(first, queries), piece);
      first += count;
    } while (first < k.rows);
  }

  /// Removes all tokens except the first `tokens`. The cache never drops a key, so any number can be removed.
  void truncate(Index tokens) {
    for (Lane& rows : lanes_) {
      rows.k.resize(at(tokens));
      rows.v.resize(at(tokens));
    }
    size_ = tokens;
    seal();
  }

  /// The mass of query i of the last call, estimated from options.mass_sample tokens of each block that was not
  /// retrieved.
  const LandmarkMass& mass(Index b, Index h, Index i) const {
    return masses_[at((b * shape_.heads + h) * chunk_ + i)];
  }
  const std::vector<Index>& retrieved(Index b, Index h, Index i) const {
    return chosen_[at((b * shape_.heads + h) * chunk_ + i)];
  }

 private:
  using Row = std::vector<double>;
  struct Lane {
    std::vector<Row> k, v;
  };

  template <class Tq, class Tk, class Tv, class To, class Tl>
  void extend_piece(TensorView<const Tq> q, TensorView<const Tk> k, TensorView<const Tv> v,
                    TensorView<To> out, RowsView<Tl> lse) {
    held_ = {sealed_, dropped_, (std::min)(options_.top_k, sealed_), options_.top_k, options_.block_size};
    chunk_ = q.rows;
    first_ = size_ - (dropped_ + sealed_) * options_.block_size;
    for (Index b = 0; b < k.batch; ++b) {
      for (Index h = 0; h < k.heads; ++h) {
        for (Index i = 0; i < k.rows; ++i) {
          lane(b, h).k.emplace_back(k.row(b, h, i), k.row(b, h, i) + k.cols);
          lane(b, h).v.emplace_back(v.row(b, h, i), v.row(b, h, i) + v.cols);
        }
      }
    }
    size_ += k.rows;
    masses_.assign(at(q.batch * q.heads * q.rows), LandmarkMass{});
    for (Index b = 0; b < q.batch; ++b) {
      choose(q, b);
      for (Index h = 0; h < q.heads; ++h) {
        for (Index i = 0; i < q.rows; ++i) {
          attend(q, b, h, i, out, lse);
          weigh(q, b, h, i);
        }
      }
    }
    seal();
  }

  /// Computes the numbers of sealed and of dropped blocks from the size.
  void seal() {
    const Index sealed = std::max<Index>(0, size_ / options_.block_size - options_.window_blocks);
    dropped_ = options_.capacity > 0 ? std::max<Index>(0, sealed - options_.capacity) : 0;
    sealed_ = sealed - dropped_;
  }

  static std::size_t at(Index i) { return static_cast<std::size_t>(i); }
  Lane& lane(Index b, Index h) { return lanes_[at(b * shape_.kv_heads + h)]; }

  Row encoded_at(Row row, Index position, Role role) const {
    encode_row(row.data(), shape_.head_dim, position_, position, role);
    return row;
  }
  template <class Tq>
  Row query(TensorView<const Tq> q, Index b, Index h, Index i) const {
    const Tq* row = q.row(b, h, i);
    return encoded_at(Row(row, row + q.cols), map_.local(held_) + first_ + i, Role::query);
  }
  double score(const Row& q, const Row& key, Index position) const {
    const Row k = encoded_at(key, position, Role::key);
    const double scale = detail::resolved_scale("reference::landmark_cache", options_.scale, shape_.head_dim);
    return scale * std::inner_product(q.begin(), q.end(), k.begin(), 0.0);
  }

  /// Chooses the top_k blocks for every query of a batch row; of equal scores the first block is chosen.
  template <class Tq>
  void choose(TensorView<const Tq> q, Index b) {
    const Index heads = shape_.heads, group = heads / shape_.kv_heads;
    chosen_.resize(at(shape_.batch * heads * chunk_));
    std::vector<Row> weights;
    for (Index h = 0; h < heads; ++h) {
      for (Index i = 0; i < chunk_; ++i) {
        Row row;
        for (Index n = 0; n < held_.blocks; ++n) {
          const Index landmark = (dropped_ + n + 1) * options_.block_size - 1;
          row.push_back(score(query(q, b, h, i), lane(b, h / group).k[at(landmark)],
                              map_.scored(held_, n) + options_.block_size - 1));
        }
        if (options_.select != LandmarkSelect::per_token_and_head) {
          const double top = row.empty() ? 0 : *std::max_element(row.begin(), row.end());
          double sum = 0;
          for (double& s : row) sum += s = std::exp(s - top);
          for (double& s : row) s /= sum;
        }
        weights.push_back(row);
      }
    }
    const auto together = [&](Index h, Index i, Index other_h, Index other_i) {
      switch (options_.select) {
        case LandmarkSelect::per_token_and_head:
          return h == other_h && i == other_i;
        case LandmarkSelect::max_over_heads:
          return i == other_i;
        case LandmarkSelect::max_over_tokens:
          return h == other_h;
        case LandmarkSelect::max_over_both:
          return true;
        case LandmarkSelect::per_kv_group:
          break;
      }
      return i == other_i && h / group == other_h / group;
    };
    for (Index h = 0; h < heads; ++h) {
      for (Index i = 0; i < chunk_; ++i) {
        Row highest(at(held_.blocks), -std::numeric_limits<double>::infinity());
        for (Index other_h = 0; other_h < heads; ++other_h) {
          for (Index other_i = 0; other_i < chunk_; ++other_i) {
            if (!together(h, i, other_h, other_i)) continue;
            const Row& row = weights[at(other_h * chunk_ + other_i)];
            for (std::size_t n = 0; n < row.size(); ++n) highest[n] = (std::max)(highest[n], row[n]);
          }
        }
        std::vector<Index> order(highest.size());
        std::iota(order.begin(), order.end(), Index{0});
        std::stable_sort(order.begin(), order.end(),
                         [&](Index x, Index y) { return highest[at(x)] > highest[at(y)]; });
        order.resize(at(held_.top_k));
        std::sort(order.begin(), order.end());
        for (Index& n : order) n += dropped_;
        chosen_[at((b * heads + h) * chunk_ + i)] = order;
      }
    }
  }

  template <class Tq, class To, class Tl>
  void attend(TensorView<const Tq> q, Index b, Index h, Index i, TensorView<To> out, RowsView<Tl> lse) {
    const Index block = options_.block_size, local = (dropped_ + sealed_) * block, own = first_ + i;
    const Row row = query(q, b, h, i);
    const Lane& rows = lane(b, h / (shape_.heads / shape_.kv_heads));
    std::vector<std::pair<double, Row>> parts;              // log-weight and output
    const auto add_block = [&](Index begin, Index place) {  // a closed block at position `place`
      std::vector<std::pair<double, Row>> tokens;
      for (Index t = 0; t < block - 1; ++t)
        tokens.emplace_back(score(row, rows.k[at(begin + t)], place + t), rows.v[at(begin + t)]);
      parts.emplace_back(score(row, rows.k[at(begin + block - 1)], place + block - 1), mean(tokens).second);
    };
    const std::vector<Index>& chosen = retrieved(b, h, i);
    for (std::size_t rank = 0; rank < chosen.size(); ++rank)
      add_block(chosen[rank] * block,
                map_.attended(held_, chosen[rank] - dropped_, static_cast<Index>(rank)));
    const Index own_group = options_.exact_window ? 0 : own / block * block;
    for (Index begin = 0; begin < own_group; begin += block)
      add_block(local + begin, map_.local(held_) + begin);
    for (Index j = own_group; j <= own; ++j) {
      if ((j + 1) % block == 0) continue;
      parts.emplace_back(score(row, rows.k[at(local + j)], map_.local(held_) + j), rows.v[at(local + j)]);
    }
    const auto [log_sum, o] = mean(parts);
    for (Index c = 0; c < shape_.value_dim; ++c) out.row(b, h, i)[c] = static_cast<To>(o[at(c)]);
    if (lse.data != nullptr) lse(b, h, i) = static_cast<Tl>(log_sum);
  }

  /// Computes the sums of exp(score) over tokens; for a block that was not retrieved, estimated from the sample.
  template <class Tq>
  void weigh(TensorView<const Tq> q, Index b, Index h, Index i) {
    const Index block = options_.block_size, local = (dropped_ + sealed_) * block;
    const Row row = query(q, b, h, i);
    const Lane& rows = lane(b, h / (shape_.heads / shape_.kv_heads));
    double attended = 0, dropped = 0;
    for (Index j = 0; j <= first_ + i; ++j) {
      if ((j + 1) % block != 0)
        attended += std::exp(score(row, rows.k[at(local + j)], map_.local(held_) + j));
    }
    const std::vector<Index>& chosen = retrieved(b, h, i);
    const TokenSample sample = TokenSample::of(block - 1, options_.mass_sample);
    for (Index n = 0; n < held_.blocks; ++n) {
      const Index first = (dropped_ + n) * block;
      const auto found = std::find(chosen.begin(), chosen.end(), dropped_ + n);
      if (found != chosen.end()) {
        const Index place = map_.attended(held_, n, found - chosen.begin());
        for (Index t = 0; t < block - 1; ++t)
          attended += std::exp(score(row, rows.k[at(first + t)], place + t));
      } else if (sample.count > 0) {
        double sum = 0;
        for (Index s = 0, t = sample.first; s < sample.count; ++s, t += sample.stride)
          sum += std::exp(score(row, rows.k[at(first + t)], map_.scored(held_, n) + t));
        dropped += sum * double(block - 1) / double(sample.count);
      }
    }
    masses_[at((b * shape_.heads + h) * chunk_ + i)] = {std::log(attended), std::log(dropped)};
  }

  /// The log-sum-exp of log-weights, and the mean with these weights.
  std::pair<double, Row> mean(const std::vector<std::pair<double, Row>>& parts) const {
    double top = -std::numeric_limits<double>::infinity(), sum = 0;
    for (const auto& part : parts) top = (std::max)(top, part.first);
    Row o(at(shape_.value_dim));
    for (const auto& part : parts) {
      const double p = std::exp(part.first - top);
      sum += p;
      for (std::size_t c = 0; c < o.size(); ++c) o[c] += p * part.second[c];
    }
    for (double& x : o) x = sum == 0 ? 0 : x / sum;
    return {sum == 0 ? top : top + std::log(sum), o};
  }

  StreamShape shape_;
  landmark_cache_options options_;
  P position_;
  Map map_;
  std::vector<Lane> lanes_;
  std::vector<std::vector<Index>> chosen_;
  std::vector<LandmarkMass> masses_;
  Retrieval held_;
  Index size_ = 0, sealed_ = 0, dropped_ = 0, first_ = 0, chunk_ = 0;
};

}  // namespace reference
LONGSPAN_NAMESPACE_END
