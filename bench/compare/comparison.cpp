// The comparison: at each length every contender is checked against double; then those with right results are
// timed in turns, with a sample of the machine's roof after each.
#include <cmath>
#include <limits>
#include <optional>

#include "compare/results.hpp"
#include "compare/source.hpp"
#include "support/progress.hpp"
#include "support/roof.hpp"

namespace bench {
namespace {

/// Time limits. The preset's run must end within three minutes on two cores: cells that would
/// exceed this are skipped, and one length cannot use up the time of the others.
struct Budget {
  double total_seconds;
  double seconds_per_length;
  double seconds_per_call;

  static Budget of(const Options& options) {
    constexpr double unlimited = std::numeric_limits<double>::infinity();
    if (options.smoke) return {20, 0.1, unlimited};
    if (options.full) return {unlimited, 30, 60};
    return {120, 10, unlimited};
  }
};

class Comparison {
 public:
  Comparison(const Options& options, const Source& source, std::vector<Contender> contenders)
      : source_(source), budget_(Budget::of(options)) {
    results_.options = options;
    results_.machine = this_machine();
    results_.input = source.description;
    results_.shape = source.shape;
    results_.contenders = std::move(contenders);
    results_.lengths = lengths_to_run(options, source.available);
  }

  Results run() {
    probe();
    progress_.emplace("cells", static_cast<Index>(results_.lengths.size() * results_.contenders.size()),
                      planned_seconds(0));
    std::vector<double> roofs;
    for (std::size_t n = 0; n < results_.lengths.size(); ++n) {
      run_length(n);
      roofs.push_back(results_.cells.back().roof);
    }
    results_.roof = median(roofs);
    return std::move(results_);
  }

 private:
  Index threads() const { return results_.options.threads; }

  Shape shape_at(Index length) const {
    Shape shape = results_.shape;
    shape.length = length;
    return shape;
  }

  /// Calls with a short input, from which the time of longer ones is estimated.
  void probe() {
    const Index length = std::min<Index>(source_.available, 256);
    const Inputs<float> in = source_.first(length);
    OwnedTensor<float> out = in.empty_output();
    for (std::size_t n = 0; n < results_.contenders.size(); ++n) {
      const Contender& contender = results_.contenders[n];
      double best = std::numeric_limits<double>::infinity();
      if (obstacle(n, length).empty()) {
        if (contender.prepare) contender.prepare(in);
        for (int call = 0; call < 3; ++call)
          best = std::min(best, seconds_of([&] { contender.run(in, out.view()); }));
      }
      seconds_per_flop_.push_back(best / contender.flop(shape_at(length)));
    }
  }

  double expected_seconds(std::size_t contender, Index length) const {
    return seconds_per_flop_[contender] * results_.contenders[contender].flop(shape_at(length));
  }

  std::string obstacle(std::size_t n, Index length) const {
    const Contender& contender = results_.contenders[n];
    return contender.obstacle ? contender.obstacle(shape_at(length)) : std::string();
  }

  /// The estimated time of the lengths from number `first` on: a checked call, then rounds up to their limit.
  double planned_seconds(std::size_t first) const {
    double total = 0;
    for (std::size_t l = first; l < results_.lengths.size(); ++l) {
      double round = 0;
      for (std::size_t n = 0; n < results_.contenders.size(); ++n) {
        if (obstacle(n, results_.lengths[l]).empty()) round += expected_seconds(n, results_.lengths[l]);
      }
      const double rounds = static_cast<double>(results_.options.rounds) * std::max(round, 0.02);
      total += round + std::max(round, std::min(rounds, budget_.seconds_per_length));
    }
    return total;
  }

  void run_length(std::size_t l) {
    const Index length = results_.lengths[l];
    progress_->show("input of " + std::to_string(length) + " tokens");
    Inputs<float> in = source_.first(length);
    OwnedTensor<float> out = in.empty_output();
    const std::vector<RowId> rows = sampled_rows(in.batch(), in.heads(), length, 8);
    progress_->show("double oracle");
    const std::vector<ExactRow> exact =
        exact_rows<float>(in.q.view(), in.k.view(), in.v.view(), Visible::causal, rows, threads());
    results_.keys_in_effect.push_back(middle_keys(exact, length));

    std::vector<Cell> cells;
    std::vector<std::function<void()>> jobs;
    std::vector<std::size_t> timed;
    for (std::size_t n = 0; n < results_.contenders.size(); ++n) {
      cells.push_back(checked_cell(n, in, out, rows, exact));
      if (!cells.back().is_timed()) continue;
      timed.push_back(n);
      jobs.emplace_back([&, n] { results_.contenders[n].run(in, out.view()); });
    }
    std::vector<double> roofs;
    const auto sample_roof = [&] {
      roofs.push_back(fma_peak(threads()));
      progress_->show("timing at " + std::to_string(length));
    };
    for (int i = 0; i < 3; ++i) sample_roof();
    const auto seconds =
        interleaved(jobs, {results_.options.rounds, 0.02, budget_.seconds_per_length}, sample_roof);
    for (std::size_t i = 0; i < timed.size(); ++i) {
      Cell& cell = cells[timed[i]];
      cell.seconds = summary(seconds[i]);
      saw(cell, cell.seconds.min);
    }
    const auto obstacle_to_decoding = [&](std::size_t n) {
      return results_.contenders[n].prompt_is_attended && cells[n].verdict == Verdict::skipped
                 ? cells[n].note
                 : over_budget(0);
    };
    for (DecodeCell& cell : decoded(results_, in, out, obstacle_to_decoding, *progress_))
      results_.decoding.push_back(std::move(cell));
    for (Cell& cell : cells) {
      cell.roof = median(roofs);
      progress_->step(planned_seconds(l + 1));
      results_.cells.push_back(std::move(cell));
    }
  }

  /// Runs the contender once with an output of NaN and checks the result.
  Cell checked_cell(std::size_t n, const Inputs<float>& in, OwnedTensor<float>& out,
                    std::span<const RowId> rows, std::span<const ExactRow> exact) {
    const Contender& contender = results_.contenders[n];
    const Shape shape = shape_at(in.q_len());
    Cell cell;
    cell.contender = n;
    cell.length = shape.length;
    cell.flop = contender.flop(shape);
    cell.state_bytes = contender.state_bytes(shape);
    cell.note = obstacle(n, shape.length);
    if (cell.note.empty()) cell.note = over_budget(expected_seconds(n, shape.length));
    if (!cell.note.empty()) return cell;

    progress_->show(contender.name + ", checking " + std::to_string(shape.length));
    std::fill(out.values().begin(), out.values().end(), std::numeric_limits<float>::quiet_NaN());
    if (contender.prepare) contender.prepare(in);
    const double taken = seconds_of([&] { contender.run(in, out.view()); });
    if (contender.collect) contender.collect(out.view());
    saw(cell, taken);
    cell.distance = relative_distance(out.view(), exact);
    cell.error_ratio = error_ratio(contender, in, std::as_const(out), rows, exact);
    cell.verdict = cell.error_ratio <= highest_ratio ? Verdict::timed : Verdict::wrong;
    if (cell.verdict == Verdict::wrong) {
      cell.note = std::isfinite(cell.error_ratio)
                      ? "WRONG, not timed: the error is " + printed("%.3g", cell.error_ratio) +
                            " times the error that float allows"
                      : "WRONG, not timed: the output has NaN, or rows that were not written";
    }
    return cell;
  }

  static double error_ratio(const Contender& contender, const Inputs<float>& in,
                            const OwnedTensor<float>& out, std::span<const RowId> rows,
                            std::span<const ExactRow> exact) {
    constexpr double infinite = std::numeric_limits<double>::infinity();
    if (!all_finite(out.values())) return infinite;
    if (!contender.oracle) return worst_ratio(out.view(), exact);
    const std::vector<ExactRow> expected = contender.oracle(in, rows);
    return expected.size() == rows.size() ? worst_ratio(out.view(), expected) : infinite;
  }

  /// Keeps the best rate, so that one disturbed call does not skip all longer ones.
  void saw(const Cell& cell, double seconds) {
    double& rate = seconds_per_flop_[cell.contender];
    rate = std::min(rate, seconds / cell.flop);
  }

  /// Every call runs at least twice, once checked and once timed.
  std::string over_budget(double seconds) const {
    const std::string about = seconds > 0 ? "about " + seconds_text(seconds) + " per call, " : "";
    if (seconds > budget_.seconds_per_call) return "skipped: " + about + "more than the limit of this run";
    if (seconds_now() - start_ + 2 * seconds <= budget_.total_seconds) return {};
    return "skipped: " + about + "the time limit of this run; --full allows more";
  }

  /// The median of the rows in the second half; earlier rows see few keys.
  static double middle_keys(std::span<const ExactRow> exact, Index length) {
    std::vector<double> keys;
    for (const ExactRow& row : exact) {
      if (row.id.i >= length / 2) keys.push_back(row.keys_in_effect);
    }
    return median(keys);
  }

  Results results_;
  const Source& source_;
  Budget budget_;
  double start_ = seconds_now();
  std::vector<double> seconds_per_flop_;  ///< the smallest so far, for each contender
  std::optional<Progress> progress_;
};

}  // namespace

Results compared(const Options& options, const Source& source, std::vector<Contender> contenders) {
  return Comparison(options, source, std::move(contenders)).run();
}

}  // namespace bench
