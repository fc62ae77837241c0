// The results of a comparison, from which the reports are made.
#pragma once

#include <numeric>
#include <string>
#include <vector>

#include "compare/contender.hpp"
#include "compare/options.hpp"
#include "support/machine.hpp"
#include "support/progress.hpp"
#include "support/timing.hpp"

namespace bench {

enum class Verdict : unsigned char { timed, skipped, wrong };

/// The result of a contender at a length.
struct Cell {
  std::size_t contender = 0;
  Index length = 0;
  Verdict verdict = Verdict::skipped;
  std::string note;  ///< why there is no time
  Times seconds;
  double flop = 0;  ///< useful operations, see Contender::flop
  double roof = 0;  ///< FLOP/s of multiply-adds, the middle sample between the rounds of this length
  double state_bytes = 0;
  double distance = 0;  ///< from exact attention, relative, Euclidean norm, on the sampled rows
  double error_ratio =
      0;  ///< error relative to its own oracle, in units of the allowed error of a float kernel

  bool is_timed() const { return verdict == Verdict::timed; }
  double flop_rate() const { return flop / seconds.median; }
  double percent_of_roof() const { return 100 * flop_rate() / roof; }
  double tokens_per_second(const Shape& shape) const {
    return static_cast<double>(shape.batch * length) / seconds.median;
  }
};

/// The result of a contender's stream at the end of a text of some length.
struct DecodeCell {
  std::size_t contender = 0;
  Index length = 0;
  Verdict verdict = Verdict::skipped;
  std::string note;  ///< why there is no time
  Times seconds;     ///< of one token
  double state_bytes = 0;
  double distance = 0;     ///< as in Cell, for sampled rows of the decoded tokens
  double error_ratio = 0;  ///< as in Cell
  std::vector<double>
      found;  ///< share of the heads that find the fact at each depth; empty: no facts were hidden

  bool is_timed() const { return verdict == Verdict::timed; }
  double found_share() const {
    return std::accumulate(found.begin(), found.end(), 0.0) / static_cast<double>(found.size());
  }
};

struct Results {
  Options options;
  Machine machine;
  std::string input;
  Shape shape;
  std::vector<Contender> contenders;
  std::vector<Index> lengths;
  std::vector<double> keys_in_effect;  ///< of the median sampled row, for each length
  std::vector<Cell> cells;             ///< sorted by length, then by contender
  std::vector<DecodeCell> decoding;    ///< for the contenders that have a stream, in the same order
  double roof = 0;                     ///< the median of the roofs of the lengths

  bool any_wrong() const {
    return std::any_of(cells.begin(), cells.end(), [](const Cell& c) { return c.verdict == Verdict::wrong; });
  }
  /// The speed-up over the baseline at the same length; 0 if the baseline was not timed.
  double speed_up(const Cell& cell) const {
    for (const Cell& other : cells) {
      if (other.length == cell.length && other.is_timed() && contenders[other.contender].baseline) {
        return other.seconds.median / cell.seconds.median;
      }
    }
    return 0;
  }
  /// The speed-up over the exact stream.
  double decode_speed_up(const DecodeCell& cell) const {
    for (const DecodeCell& other : decoding) {
      if (other.length == cell.length && other.is_timed() && contenders[other.contender].exact) {
        return other.seconds.median / cell.seconds.median;
      }
    }
    return 0;
  }
};

inline std::string problem_text(const Results& r) {
  const Shape& s = r.shape;
  return "causal prefill, float32, " + (s.batch > 1 ? "batch of " + std::to_string(s.batch) + ", " : "") +
         counted(s.heads, "head") + " over " + counted(s.kv_heads, "KV head") + ", head_dim " +
         std::to_string(s.head_dim) +
         (s.value_dim != s.head_dim ? ", value_dim " + std::to_string(s.value_dim) : "") + ", " +
         counted(r.options.threads, "thread");
}

inline std::string machine_text(const Machine& m) {
  return m.cpu + ", " + counted(m.cores, "core") + ", " + m.compiler + ", Eigen " + m.eigen + ", longspan " +
         m.longspan;
}

/// The reports.
std::string text_report(const Results& results);
std::string json_report(const Results& results);
std::string html_report(const Results& results);
/// Only the plot of time over length.
std::string svg_report(const Results& results);

/// Decodes the last tokens of the inputs with every contender that has a stream and no obstacle. Then
/// hides facts in the inputs and queries them.
std::vector<DecodeCell> decoded(const Results& so_far, Inputs<float>& in, OwnedTensor<float>& out,
                                const std::function<std::string(std::size_t)>& obstacle, Progress& progress);

/// Runs the comparison; comparison.cpp describes its order.
struct Source;
Results compared(const Options& options, const Source& source, std::vector<Contender> contenders);

}  // namespace bench
