// The options of `compare`.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "support/arguments.hpp"
#include "support/roof.hpp"
#include "support/whole_file.hpp"

namespace bench {

inline constexpr std::string_view usage =
    R"(compare: attention over growing context, float32: causal prefill, decoding, and facts found again

  --text FILE              the bytes of a text, one token each; default: this repository's own sources
  --q F --k F --v F        or tensors dumped from a model, .npy [batch, heads, tokens, head_dim], 2-D to 4-D
  --lengths 512,1024,...   context lengths; default 512 to 32768, with --full to 1048576
  --heads 8 --kv-heads 8   query heads and KV heads; these divide those; default as many
  --head-dim 64
  --threads N              default: OpenMP's own number
  --rounds 7               times each contender is timed at a length, in turns; the table shows the median
  --full                   calls of up to a minute; without it the whole run takes about two
  --smoke                  a run of a second that shows only that everything works
  --json FILE              every figure and the machine, for programs
  --against FILE           the times of this run beside those of an earlier one, whose --json wrote FILE
  --html FILE              one page with the table and plots, for people
  --svg FILE               the plot of time against length alone
  --list                   the contenders
)";

struct Options {
  std::string text;            ///< empty: the sources of this repository
  std::string q, k, v;         ///< all of them empty, or none
  std::vector<Index> lengths;  ///< in rising order; empty: the default lengths
  Index heads = 8;
  Index kv_heads = 8;
  Index head_dim = 64;
  Index threads = 1;
  Index rounds = 7;
  bool full = false;
  bool smoke = false;
  std::string json, html, svg;  ///< empty: not requested
  std::string against;          ///< empty: not requested

  bool has_tensors() const { return !q.empty(); }
};

inline void refuse_contradictions(const Arguments& given, const Options& options) {
  const bool any = given.has("--q") || given.has("--k") || given.has("--v");
  if (any && (options.q.empty() || options.k.empty() || options.v.empty())) {
    throw UsageError("the options --q, --k and --v are not all given, wanted three files or none");
  }
  for (const char* name : {"--text", "--heads", "--kv-heads", "--head-dim"}) {
    if (any && given.has(name)) {
      throw UsageError(std::string("the option ") + name +
                       " conflicts with --q, --k and --v, which determine it");
    }
  }
  if (given.has("--text") && options.text.empty())
    throw UsageError("the option --text is empty, wanted a file");
  if (options.full && options.smoke)
    throw UsageError("--full and --smoke are both given, wanted one of them");
  if (options.heads % options.kv_heads != 0) {
    throw UsageError("the option --kv-heads is " + std::to_string(options.kv_heads) +
                     ", wanted a divisor of --heads = " + std::to_string(options.heads));
  }
  if (!options.json.empty()) require_writable("--json", options.json);
  if (!options.html.empty()) require_writable("--html", options.html);
  if (!options.svg.empty()) require_writable("--svg", options.svg);
}

inline Options parsed_options(const Arguments& given) {
  constexpr Index longest = Index{1} << 24;
  Options options;
  options.full = given.has("--full");
  options.smoke = given.has("--smoke");
  options.text = given.value("--text").value_or("");
  options.q = given.value("--q").value_or("");
  options.k = given.value("--k").value_or("");
  options.v = given.value("--v").value_or("");
  options.lengths = given.numbers("--lengths", {}, 1, longest);
  std::sort(options.lengths.begin(), options.lengths.end());
  options.lengths.erase(std::unique(options.lengths.begin(), options.lengths.end()), options.lengths.end());
  options.heads = given.number("--heads", options.smoke ? 2 : 8, 1, 1024);
  options.kv_heads = given.number("--kv-heads", options.heads, 1, 1024);
  options.head_dim = given.number("--head-dim", 64, 1, 1024);
  options.threads = given.number("--threads", default_threads(), 1, most_threads);
  options.rounds = given.number("--rounds", options.smoke ? 1 : 7, 1, 1000);
  options.json = given.value("--json").value_or("");
  options.against = given.value("--against").value_or("");
  options.html = given.value("--html").value_or("");
  options.svg = given.value("--svg").value_or("");
  refuse_contradictions(given, options);
  return options;
}

inline constexpr Index longest_full = Index{1} << 20;

/// 512, 1024, ... up to the available tokens; with tensors also their full length.
inline std::vector<Index> lengths_to_run(const Options& options, Index available) {
  if (!options.lengths.empty()) {
    if (options.lengths.back() > available) {
      throw UsageError("the option --lengths has " + std::to_string(options.lengths.back()) +
                       ", wanted at most " + std::to_string(available) + ", the tokens in --q");
    }
    return options.lengths;
  }
  if (options.smoke) return available >= 256 ? std::vector<Index>{64, 256} : std::vector<Index>{available};
  std::vector<Index> lengths;
  for (Index n = 512; n <= (options.full ? longest_full : 32768) && n <= available; n *= 2)
    lengths.push_back(n);
  if (options.has_tensors() &&
      (lengths.empty() || (lengths.back() < available && available <= longest_full))) {
    lengths.push_back(available);
  }
  return lengths;
}

}  // namespace bench
