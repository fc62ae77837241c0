// Dilated attention over a billion tokens on one machine, with the memory of a few thousand tokens.
//
// One head, with segments from 2048 tokens to the whole sequence, each with twice the length and twice the dilation
// of the one before. Tokens are hashes of their positions, so that any row of the output can be checked against
// double.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "billion/hashed_tokens.hpp"
#include "longspan/softmax_attention.hpp"
#include "longspan/stream/blocks.hpp"
#include "longspan/stream/dilated_cache.hpp"
#include "support/arguments.hpp"
#include "support/format.hpp"
#include "support/memory.hpp"
#include "support/progress.hpp"
#include "support/roof.hpp"
#include "support/whole_file.hpp"

namespace bench {
namespace {

constexpr const char* usage =
    "billion: causal dilated attention over a very long sequence, one head, in bounded memory\n"
    "\n"
    "  --tokens N          length of the sequence; default 2^24, the billion is 1000000000\n"
    "  --head-dim 16       columns of queries, keys and values\n"
    "  --segment 2048      tokens of the dense segments\n"
    "  --checks 128        output rows that are checked against double, at least 100\n"
    "  --checkpoint FILE   state to continue the run: written every minute, read at the start, removed at "
    "the "
    "end\n"
    "  --seconds S         stop after S seconds with a checkpoint\n"
    "  --threads N         default: OpenMP's own number\n";

struct Options {
  Index tokens, head_dim, segment, checks, seconds, threads;
  std::string checkpoint;
};

Options parsed(std::span<const std::string> words) {
  static constexpr std::string_view valued[] = {"--tokens",  "--head-dim",   "--segment", "--checks",
                                                "--seconds", "--checkpoint", "--threads"};
  static constexpr std::string_view flags[] = {"--help"};
  const Arguments given(words, valued, flags);
  if (given.has("--help")) {
    std::fputs(usage, stdout);
    std::exit(0);
  }
  Options options{given.number("--tokens", Index{1} << 24, 2, Index{1} << 40),
                  given.number("--head-dim", 16, 1, 1024),
                  given.number("--segment", 2048, 1, Index{1} << 20),
                  given.number("--checks", 128, 100, 100000),
                  given.number("--seconds", 0, 1, Index{1} << 30),
                  given.number("--threads", default_threads(), 1, most_threads),
                  given.value("--checkpoint").value_or("")};
  if (options.seconds > 0 && options.checkpoint.empty())
    throw UsageError("the option --seconds needs --checkpoint, otherwise the work would be lost");
  if (!options.checkpoint.empty()) require_writable("--checkpoint", options.checkpoint);
  return options;
}

/// The findings for the tokens so far.
struct Findings {
  std::int64_t checked = 0;
  double worst_ratio = 0;     ///< error in units of u (1 + a) sum p |v|: right up to 16
  double sum = 0;             ///< sum of all outputs, to compare two runs
  double seconds = 0;         ///< time of all runs together
  double attend_seconds = 0;  ///< time without the tokens and the checks
};

class Run {
 public:
  explicit Run(const Options& options)
      : options_(options),
        branches_(longspan::geometric_branches_to({options.segment, 1}, 2, options.tokens)),
        stream_(longspan::dilated_attention{branches_, longspan::causal{}},
                {.heads = 1, .kv_heads = 1, .head_dim = options.head_dim, .value_dim = options.head_dim}),
        rows_(checked_rows(options.tokens, options.checks)),
        block_(1, 4, std::min(block_rows, options.tokens), options.head_dim) {}

  /// Continues to the end of the sequence or of the time limit. Returns true at the end of the sequence.
  bool run() {
    if (!options_.checkpoint.empty() && std::filesystem::exists(options_.checkpoint)) resume();
    const Index blocks = (options_.tokens - stream_.size() + block_rows - 1) / block_rows;
    Progress progress("blocks of 64K", blocks, 0);
    const double start = seconds_now(), before = findings_.seconds;
    double saved = start;
    for (const Index first = stream_.size(); stream_.size() < options_.tokens;) {
      longspan::extend_by_blocks(stream_, *this, std::min(options_.tokens, stream_.size() + block_rows),
                                 block_rows, execution_);
      const double elapsed = seconds_now() - start, done = static_cast<double>(stream_.size() - first);
      findings_.seconds = before + elapsed;
      progress.step(elapsed / done * static_cast<double>(options_.tokens - stream_.size()));
      progress.show(per_second(done / elapsed) + "tokens/s");
      const bool out_of_time = options_.seconds > 0 && elapsed >= static_cast<double>(options_.seconds);
      if (!options_.checkpoint.empty() && (out_of_time || seconds_now() - saved > 60)) {
        save();
        saved = seconds_now();
      }
      if (out_of_time && stream_.size() < options_.tokens) return false;
    }
    return true;
  }

  const Findings& findings() const { return findings_; }
  const std::vector<longspan::Branch>& branches() const { return branches_; }
  const auto& stream() const { return stream_; }

  // The source of extend_by_blocks.

  struct Block {
    longspan::TensorView<const float> q, k, v;
    longspan::TensorView<float> out;
  };
  Block open(Index first, Index count) {
    const auto part = [&](Index n) {
      auto rows = block_.view().slice_rows(0, count);
      rows.data = block_.view().row(0, n, 0);
      rows.heads = 1;
      return rows;
    };
    hash_rows(Stream::q, first, part(0), options_.threads);
    hash_rows(Stream::k, first, part(1), options_.threads);
    hash_rows(Stream::v, first, part(2), options_.threads);
    opened_ = seconds_now();
    return {part(0), part(1), part(2), part(3)};
  }
  void close(Index first, Index count) {
    findings_.attend_seconds += seconds_now() - opened_;
    const longspan::TensorView<const float> out =
        longspan::compact_view(std::as_const(block_).view().row(0, 3, 0), 1, 1, count, options_.head_dim);
    for (Index i = 0; i < count; ++i) {
      for (Index c = 0; c < out.cols; ++c) findings_.sum += static_cast<double>(out.row(0, 0, i)[c]);
    }
    const auto begin = std::lower_bound(rows_.begin(), rows_.end(), first),
               end = std::lower_bound(begin, rows_.end(), first + count);
    for (auto row = begin; row != end; ++row) {
      const ExactRow exact[] = {hashed_exact_row(branches_, options_.head_dim, *row)};
      findings_.worst_ratio =
          std::max(findings_.worst_ratio, bench::worst_ratio(out.slice_rows(*row - first, 1), exact));
      ++findings_.checked;
    }
  }

 private:
  static constexpr Index block_rows = 65536;
  using Numbers = std::array<double, 6>;

  /// A checkpoint contains the options, the findings and the stream.
  void save() const {
    const std::string part = options_.checkpoint + ".part";
    std::ofstream file(part, std::ios::binary);
    const Numbers numbers{static_cast<double>(options_.tokens),
                          static_cast<double>(findings_.checked),
                          findings_.worst_ratio,
                          findings_.sum,
                          findings_.seconds,
                          findings_.attend_seconds};
    file.write(reinterpret_cast<const char*>(numbers.data()), sizeof numbers);
    stream_.save(file);
    file.close();
    if (!file) throw UsageError("the file " + part + " cannot be written");
    std::filesystem::rename(part, options_.checkpoint);
  }
  void resume() {
    std::ifstream file(options_.checkpoint, std::ios::binary);
    Numbers numbers{};
    file.read(reinterpret_cast<char*>(numbers.data()), sizeof numbers);
    if (!file || numbers[0] != static_cast<double>(options_.tokens))
      throw UsageError("the checkpoint " + options_.checkpoint + " belongs to another run");
    stream_.load(file);
    findings_ = {static_cast<std::int64_t>(numbers[1]), numbers[2], numbers[3], numbers[4], numbers[5]};
    std::printf("resumed at token %td\n", stream_.size());
  }

  Options options_;
  std::vector<longspan::Branch> branches_;
  longspan::dilated_cache<float, longspan::causal, longspan::unchanged, longspan::no_position> stream_;
  std::vector<Index> rows_;   ///< rows to check, in rising order
  OwnedTensor<float> block_;  ///< q, k, v and out of one block
  longspan::Execution<longspan::openmp> execution_{longspan::openmp{options_.threads}};
  Findings findings_;
  double opened_ = 0;
};

/// The time of exact causal attention over `tokens`, estimated from its rate over 16384 tokens.
double exact_seconds(const Options& options) {
  constexpr Index length = 16384;
  const Inputs<float> in = hashed_inputs<float>(1, 1, length, length, options.head_dim);
  OwnedTensor<float> out = in.empty_output();
  const longspan::softmax_attention attend{longspan::causal{}};
  longspan::Execution execution(longspan::openmp{options.threads});
  double best = 1e300;
  for (int n = 0; n < 3; ++n) {
    best = std::min(
        best, seconds_of([&] { attend(in.q.view(), in.k.view(), in.v.view(), out.view(), execution); }));
  }
  const double ratio = static_cast<double>(options.tokens) / static_cast<double>(length);
  return best * ratio * ratio;
}

std::string long_time(double seconds) {
  constexpr double day = 86400, year = 365.25 * day;
  if (seconds < 3600) return seconds_text(seconds);
  if (seconds < 2 * day) return readable(seconds / 3600) + " hours";
  return seconds < 2 * year ? readable(seconds / day) + " days" : readable(seconds / year) + " years";
}

bool report(const Options& options, const Run& run) {
  const Findings& found = run.findings();
  const auto tokens = static_cast<double>(options.tokens);
  const double flop =
      longspan::dilated_flop(run.branches(), 1, options.tokens, options.head_dim, options.head_dim, true);
  const bool right = found.checked >= options.checks && found.worst_ratio <= highest_ratio;
  std::printf("%td tokens, head_dim %td, %zu branches from (%td, 1) to (%td, %td), %td threads\n",
              options.tokens, options.head_dim, run.branches().size(), options.segment,
              run.branches().back().segment, run.branches().back().dilation, options.threads);
  std::printf("time           %s: %stokens/s; attention alone %s, %.0f ns per token, %.1f GFLOP/s\n",
              long_time(found.seconds).c_str(), per_second(tokens / found.seconds).c_str(),
              long_time(found.attend_seconds).c_str(), 1e9 * found.attend_seconds / tokens,
              flop / found.attend_seconds / 1e9);
  std::printf("memory         %s at most, of which the stream %s\n", bytes_text(peak_memory()).c_str(),
              bytes_text(static_cast<double>(run.stream().bytes())).c_str());
  std::printf("checked        %td rows checked against double: error %.2f of 16, %s\n",
              static_cast<Index>(found.checked), found.worst_ratio, right ? "right" : "WRONG");
  std::printf("outputs        sum %.9e\n", found.sum);
  std::printf("exact attention would take %s\n", long_time(exact_seconds(options)).c_str());
  return right;
}

int run(std::span<const std::string> words) {
  const Options options = parsed(words);
  Run all(options);
  if (!all.run()) {
    std::printf("stopped at token %td of %td; the same command continues\n", all.stream().size(),
                options.tokens);
    return 0;
  }
  const bool right = report(options, all);
  if (!options.checkpoint.empty()) std::filesystem::remove(options.checkpoint);
  return right ? 0 : 1;
}

}  // namespace
}  // namespace bench

int main(int count, char** words) {
  try {
    return bench::run(std::vector<std::string>(words + 1, words + count));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "billion: %s\n", error.what());
    return 2;
  }
}
