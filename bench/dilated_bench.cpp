// dilated_attention for several lengths and branches, and the same composed of softmax_attention and merge.
//
// Before it is timed, each result is checked against double; a wrong result is an error and has no time.
#include <algorithm>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "longspan/dilated_attention.hpp"
#include "longspan/partial.hpp"
#include "longspan/softmax_attention.hpp"
#include "support/benchmark_program.hpp"
#include "support/dilated_rows.hpp"
#include "support/hashed_values.hpp"

namespace bench {
namespace {

using longspan::Branch;

struct Case {
  std::vector<Branch> branches;
  Index length = 0;
  Index head_dim = 64;
  Index heads = 8;

  std::string text() const {
    std::string text =
        "/heads:" + std::to_string(heads) + "/n:" + std::to_string(length) + "/d:" + std::to_string(head_dim);
    return text + "/w:" + std::to_string(branches.front().segment) +
           "/branches:" + std::to_string(branches.size());
  }
};

struct Data {
  Inputs<float> in;
  OwnedTensor<float> out;
  std::vector<ExactRow> exact;
};

/// Keeps only the data of the last case, as in softmax_bench.
class LastData {
 public:
  Data& get(const Case& c) {
    if (c.text() == name_) return data_;
    data_ = {};
    data_.in = hashed_inputs<float>(c.heads, c.heads, c.length, c.length, c.head_dim);
    data_.out = data_.in.empty_output();
    const std::vector<RowId> rows = sampled_rows(1, c.heads, c.length, 4);
    data_.exact =
        exact_dilated_rows<float>(std::as_const(data_.in.q).view(), std::as_const(data_.in.k).view(),
                                  std::as_const(data_.in.v).view(), c.branches, rows, default_threads());
    name_ = c.text();
    return data_;
  }

 private:
  std::string name_;
  Data data_;
};

/// The textbook form: each branch writes its own buffer, segment by segment; then one merge.
class Composed {
 public:
  Composed(const Case& c, Index threads) : case_(c), execution_(longspan::openmp{threads}) {
    for (std::size_t n = 0; n < c.branches.size(); ++n) {
      out_.emplace_back(1, c.heads, c.length, c.head_dim);
      lse_.emplace_back(1, 1, c.heads, c.length);
      for (float& x : lse_.back().values()) x = -std::numeric_limits<float>::infinity();
    }
    merged_lse_ = OwnedTensor<float>(1, 1, c.heads, c.length);
  }

  void operator()(const Inputs<float>& in, longspan::TensorView<float> out) {
    const longspan::softmax_attention attend{longspan::causal{}};
    std::vector<longspan::Partial<const float>> parts;
    for (std::size_t n = 0; n < case_.branches.size(); ++n) {
      const auto lse = longspan::compact_rows_view(lse_[n].values().data(), 1, case_.heads, case_.length);
      const Branch& branch = case_.branches[n];
      // Each segment is one task, a call on one thread.
      const Index segments = (case_.length + branch.segment - 1) / branch.segment;
      execution_.executor.for_each(segments * case_.heads, [&](Index task, Index) {
        const Index h = task / segments, first = task % segments * branch.segment, r = branch.dilation;
        const Index count = longspan::kept_rows(std::min(branch.segment, case_.length - first), h % r, r);
        if (count == 0) return;
        const auto rows = [&](auto x) {
          x.data = x.row(0, h, first + h % r);
          x.heads = 1;
          x.rows = count;
          x.row_stride *= r;
          return x;
        };
        const longspan::RowsView<float> of_rows{&lse(0, h, first + h % r), 1, 1, count, 0, 0, r};
        attend(rows(in.q.view()), rows(in.k.view()), rows(in.v.view()), rows(out_[n].view()), of_rows,
               longspan::serial{});
      });
      parts.push_back(longspan::partial(std::as_const(out_[n]).view(), longspan::RowsView<const float>(lse)));
    }
    const auto lse = longspan::compact_rows_view(merged_lse_.values().data(), 1, case_.heads, case_.length);
    longspan::merge<float>(parts, longspan::partial(out, lse), execution_);
  }

 private:
  Case case_;
  longspan::Execution<longspan::openmp> execution_;
  std::vector<OwnedTensor<float>> out_, lse_;
  OwnedTensor<float> merged_lse_;
};

template <class Call>
void run_case(benchmark::State& state, const Case& c, Data& data, Index threads, const Call& call) {
  std::fill(data.out.values().begin(), data.out.values().end(), std::numeric_limits<float>::quiet_NaN());
  call();
  const double ratio = all_finite(std::as_const(data.out).values())
                           ? worst_ratio(std::as_const(data.out).view(), data.exact)
                           : std::numeric_limits<double>::infinity();
  if (!(ratio <= highest_ratio)) {
    state.SkipWithError(("wrong: error ratio " + printed("%.3g", ratio) + ", right is at most 16").c_str());
    return;
  }
  double seconds = 0;
  const double roof =
      roof_around([&] { return fma_peak(threads); }, [&] { seconds = timed_calls(state, call); });
  report_flop(state, longspan::dilated_flop(c.branches, c.heads, c.length, c.head_dim, c.head_dim, true),
              seconds, roof);
  set_counter(state, "ns/token", 1e9 * seconds / static_cast<double>(c.length));
  set_counter(state, "max_ratio", ratio);
}

void add(const Case& c) {
  static const auto last = std::make_shared<LastData>();
  std::vector<Index> team{1};
  if (default_threads() > 1) team.push_back(default_threads());
  for (const Index threads : team) {
    const auto name = [&](const char* method) {
      return method + c.text() + "/threads:" + std::to_string(threads);
    };
    const auto dilated = [=](benchmark::State& state) {
      Data& data = last->get(c);
      const longspan::dilated_attention attend{c.branches, longspan::causal{}};
      longspan::Execution execution(longspan::openmp{threads});
      run_case(state, c, data, threads, [&] {
        attend(data.in.q.view(), data.in.k.view(), data.in.v.view(), data.out.view(), execution);
      });
    };
    const auto composed = [=](benchmark::State& state) {
      Data& data = last->get(c);
      Composed attend(c, threads);
      run_case(state, c, data, threads, [&] { attend(data.in, data.out.view()); });
    };
    benchmark::RegisterBenchmark(name("dilated").c_str(), dilated)
        ->UseRealTime()
        ->Unit(benchmark::kMillisecond);
    benchmark::RegisterBenchmark(name("composed").c_str(), composed)
        ->UseRealTime()
        ->Unit(benchmark::kMillisecond);
  }
}

void add_all() {
  add({{{64, 1}, {128, 2}, {256, 4}}, 512});
  const std::vector<Branch> paper{{2048, 1}, {4096, 2}, {8192, 4}};
  for (const Index head_dim : {64, 128}) add({paper, 32768, head_dim});
  for (const Index length : {65536, 262144}) add({paper, length});
  for (const Index length : {65536, 262144})
    add({longspan::geometric_branches_to({2048, 1}, 2, length), length});
  // Small segments: many calls with a few rows.
  add({{{64, 1}, {128, 2}, {256, 4}}, 32768});
}

}  // namespace
}  // namespace bench

int main(int count, char** words) { return bench::run_benchmarks(count, words, bench::add_all); }
