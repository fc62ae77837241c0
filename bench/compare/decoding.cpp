// Decoding: each stream gets a text without its last tokens and is then timed with these tokens one by one.
#include <cmath>
#include <limits>

#include "compare/results.hpp"
#include "support/needles.hpp"

namespace bench {
namespace {

Index steps_at(Index length) { return std::clamp<Index>(length / 8, 1, 32); }

/// The checked rows: the first, the last and two other decoded tokens, for every head.
std::vector<RowId> decoded_rows(const Inputs<float>& in) {
  std::vector<RowId> rows = sampled_rows(in.batch(), in.heads(), steps_at(in.q_len()), 4);
  for (RowId& row : rows) row.i += in.q_len() - steps_at(in.q_len());
  return rows;
}

void time_steps(DecodeCell& cell, const Decoder& decoder, Index length) {
  std::vector<double> seconds;
  for (Index i = length - steps_at(length); i < length; ++i)
    seconds.push_back(seconds_of([&] { decoder.step(i); }));
  cell.seconds = summary(seconds);
  cell.state_bytes = decoder.state_bytes();
}

void check(DecodeCell& cell, const Contender& contender, const Inputs<float>& in,
           const OwnedTensor<float>& out, std::span<const RowId> rows, std::span<const ExactRow> exact) {
  const Oracle& oracle = contender.decode_oracle ? contender.decode_oracle : contender.oracle;
  cell.distance = relative_distance(out.view(), exact);
  cell.error_ratio =
      worst_ratio(out.view(), oracle ? oracle(in, rows) : std::vector(exact.begin(), exact.end()));
  const bool right = cell.error_ratio <= highest_ratio;
  cell.verdict = right ? Verdict::timed : Verdict::wrong;
  if (!right)
    cell.note =
        "WRONG: the error is " + printed("%.3g", cell.error_ratio) + " times the error that float allows";
}

/// The share of heads that find each fact.
std::vector<double> found(const Contender& contender, const Needles& needles, const Inputs<float>& in,
                          OwnedTensor<float>& out) {
  const Decoder decoder = contender.decode(in, needles.question(0), out.view());
  std::vector<double> shares;
  for (Index n = 0; n < Needles::count; ++n) {
    decoder.step(needles.question(n));
    const Index hits = needles.found(out.view(), in.v.view(), n);
    shares.push_back(static_cast<double>(hits) / static_cast<double>(in.batch() * in.heads()));
  }
  return shares;
}

}  // namespace

std::vector<DecodeCell> decoded(const Results& so_far, Inputs<float>& in, OwnedTensor<float>& out,
                                const std::function<std::string(std::size_t)>& obstacle, Progress& progress) {
  const Index length = in.q_len(), prompt = length - steps_at(length);
  const std::vector<RowId> rows = decoded_rows(in);
  const std::vector<ExactRow> exact =
      exact_rows<float>(in.q.view(), in.k.view(), in.v.view(), Visible::causal, rows, so_far.options.threads);
  std::vector<DecodeCell> cells;
  for (std::size_t n = 0; n < so_far.contenders.size(); ++n) {
    const Contender& contender = so_far.contenders[n];
    if (!contender.decode) continue;
    DecodeCell& cell = cells.emplace_back();
    cell.contender = n;
    cell.length = length;
    cell.note = obstacle(n);
    if (!cell.note.empty()) continue;
    progress.show(contender.stream + ", decoding at " + std::to_string(length));
    std::fill(out.values().begin(), out.values().end(), std::numeric_limits<float>::quiet_NaN());
    time_steps(cell, contender.decode(in, prompt, out.view()), length);
    check(cell, contender, in, std::as_const(out), rows, exact);
  }
  if (length < Needles::shortest) return cells;

  const Needles needles(in);
  for (DecodeCell& cell : cells) {
    if (!cell.is_timed()) continue;
    progress.show(so_far.contenders[cell.contender].stream + ", facts in " + std::to_string(length));
    cell.found = found(so_far.contenders[cell.contender], needles, in, out);
  }
  return cells;
}

}  // namespace bench
