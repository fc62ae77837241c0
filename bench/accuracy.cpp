// The error over the context length, 1K to 1M keys, of a prefill and a decode call, for every storage type.
//
// One head, normal keys and values, values of mean 1, scores of variance about 1/4: attention is spread over
// thousands of keys, so that a sum with too few bits would stop growing.
#include <cstdio>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "longspan/longspan.hpp"
#include "support/arguments.hpp"
#include "support/exact_rows.hpp"
#include "support/format.hpp"
#include "support/hashed_values.hpp"
#include "support/owned_tensor.hpp"
#include "support/progress.hpp"
#include "support/text_table.hpp"

namespace bench {
namespace {

/// The time of one key, mostly for the oracle. Only the progress line uses it.
constexpr double seconds_a_key = 1e-6;

struct Errors {
  double distance = 0;  ///< |out - exact| / |exact|
  double ratio = 0;     ///< error in units of the documented bound; more than 16 is a failure
};

/// `rows` sampled rows of a call of q_len queries.
template <class T>
Errors errors_of(Index q_len, Index kv_len, Index rows, Index threads) {
  Inputs<T> inputs = hashed_inputs<T>(1, 1, q_len, kv_len, 64);
  for (T& q : inputs.q.values()) q = static_cast<T>(0.5f * static_cast<float>(q));
  for (T& v : inputs.v.values()) v = static_cast<T>(1.0f + static_cast<float>(v));
  const auto q = std::as_const(inputs.q).view(), k = std::as_const(inputs.k).view(),
             v = std::as_const(inputs.v).view();
  const std::vector<ExactRow> exact =
      exact_rows(q, k, v, Visible::all, sampled_rows(1, 1, q_len, rows), threads);

  OwnedTensor<float> out(1, 1, q_len, 64);
  longspan::softmax_attention{}(q, k, v, out.view(), longspan::openmp{threads});
  const longspan::TensorView<const float> answer = out.view();
  return {relative_distance(answer, exact), worst_ratio(answer, exact)};
}

int run(std::span<const std::string> words) {
  static constexpr std::string_view valued[] = {"--threads", "--longest"}, flags[] = {"--help"};
  const Arguments given(words, valued, flags);
  if (given.has("--help")) {
    std::puts("accuracy [--threads N] [--longest KEYS]: error of attention over 1024 and more keys");
    return 0;
  }
  const Index threads = given.number("--threads", longspan::openmp{}.workers(), 1, 1024);
  const Index longest = given.number("--longest", Index{1} << 20, 1024, Index{1} << 30);
  std::vector<Index> lengths;
  for (Index kv_len = 1024; kv_len <= longest; kv_len *= 4) lengths.push_back(kv_len);

  using Align = TextTable::Align;
  TextTable table;
  for (const char* title : {"keys", "call"}) table.add_column(title, Align::left);
  for (const char* title : {"float", "bfloat16", "half", "float", "bfloat16", "half"}) {
    table.add_column(title, Align::right);
  }
  const auto steps = static_cast<Index>(6 * lengths.size());
  double seconds_left = 0;
  for (const Index kv_len : lengths) seconds_left += 6 * seconds_a_key * static_cast<double>(kv_len);
  Progress progress("cells", steps, seconds_left);
  bool kept = true;
  for (const Index kv_len : lengths) {
    for (const Index q_len : {Index{64}, Index{1}}) {
      const Index rows = q_len == 1 ? 1 : 8;
      std::vector<Errors> of_type;
      const auto add = [&](const Errors& errors) {
        of_type.push_back(errors);
        kept = kept && errors.ratio <= highest_ratio;
        progress.step(seconds_left -= seconds_a_key * static_cast<double>(kv_len));
      };
      add(errors_of<float>(q_len, kv_len, rows, threads));
      add(errors_of<Eigen::bfloat16>(q_len, kv_len, rows, threads));
      add(errors_of<Eigen::half>(q_len, kv_len, rows, threads));
      std::vector<std::string> cells{length_text(kv_len), q_len == 1 ? "decode" : "prefill"};
      for (const Errors& errors : of_type) cells.push_back(printed("%.1e", errors.distance));
      for (const Errors& errors : of_type) cells.push_back(printed("%.2f", errors.ratio));
      table.add_row(std::move(cells));
    }
  }
  std::printf(
      "Stored as float, bfloat16, half: first |out - exact| / |exact|, then the largest error in units\n"
      "of u (1 + a) sum p |v|, of which 16 are allowed; exact is double, with the same stored numbers.\n\n%s",
      table.text().c_str());
  return kept ? 0 : 1;
}

}  // namespace
}  // namespace bench

int main(int count, char** words) {
  try {
    return bench::run(std::vector<std::string>(words + 1, words + count));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "accuracy: %s\n", error.what());
    return 2;
  }
}
