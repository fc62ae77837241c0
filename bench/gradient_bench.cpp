// The gradient of softmax_attention for several shapes, storage types and threads.
//
// "%roof" counts the five products of a backward pass, 2.5 times the forward pass; in bfloat16 it is a share of the
// fastest bf16 instruction. Before it is timed, sampled rows of dq, dk and dv are checked against double; a wrong
// result is an error and has no time.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "longspan/gradient/softmax_attention.hpp"
#include "support/benchmark_program.hpp"
#include "support/exact_rows.hpp"
#include "support/hashed_values.hpp"

namespace bench {
namespace {

struct Case {
  Index heads = 8, kv_heads = 8, length = 0, head_dim = 64;
  Visible visible = Visible::all;

  double flop() const { return 2.5 * attention_flop(visible, 1, heads, length, length, head_dim, head_dim); }
  bool sees(Index i, Index j) const { return visible == Visible::all || j <= i; }

  /// For instance gradient_f32/heads:8/kv_heads:8/n:2048/d:64/causal:1/threads:1.
  std::string name(const std::string& type, Index threads) const {
    const auto part = [](const char* key, Index value) {
      return "/" + std::string(key) + ":" + std::to_string(value);
    };
    return "gradient_" + type + part("heads", heads) + part("kv_heads", kv_heads) + part("n", length) +
           part("d", head_dim) + part("causal", visible == Visible::causal) + part("threads", threads);
  }
};

/// A row of a gradient in double, and for each number the sum of the magnitudes that make it up.
struct GaugedRow {
  std::vector<double> value, gauge;
  explicit GaugedRow(Index cols)
      : value(static_cast<std::size_t>(cols)), gauge(static_cast<std::size_t>(cols)) {}

  template <class T>
  void add(double weight, double size, const T* row) {
    for (std::size_t c = 0; c < value.size(); ++c) {
      value[c] += weight * static_cast<double>(row[c]);
      gauge[c] += size * std::abs(static_cast<double>(row[c]));
    }
  }
};

/// All tensors of a backward call; out and lse are those of the forward call.
template <class T>
struct Data {
  Case of;
  Inputs<T> in;
  OwnedTensor<T> out, dout, dq, dk, dv;
  std::vector<float> lse;

  explicit Data(const Case& c)
      : of(c),
        in(hashed_inputs<T>(c.heads, c.kv_heads, c.length, c.length, c.head_dim)),
        out(in.empty_output()),
        dout(in.empty_output()),
        dq(1, c.heads, c.length, c.head_dim),
        dk(1, c.kv_heads, c.length, c.head_dim),
        dv(1, c.kv_heads, c.length, c.head_dim),
        lse(static_cast<std::size_t>(c.heads * c.length)) {
    fill_hashed(dout, 4);
    const auto forward = [&](const auto& attend) {
      attend(in.q.view(), in.k.view(), in.v.view(), out.view(), lse_rows());
    };
    c.visible == Visible::causal ? forward(longspan::softmax_attention{longspan::causal{}})
                                 : forward(longspan::softmax_attention{});
  }

  longspan::RowsView<float> lse_rows() {
    return longspan::compact_rows_view(lse.data(), 1, of.heads, of.length);
  }

  template <class Attend, class E>
  void differentiate(const Attend& attend, E& execution) {
    gradient(attend)(std::as_const(in.q).view(), std::as_const(in.k).view(), std::as_const(in.v).view(),
                     std::as_const(out).view(), lse_rows(), std::as_const(dout).view(), dq.view(), dk.view(),
                     dv.view(), execution);
  }

  static double dot(const T* a, const T* b, Index cols, double& size) {
    double sum = 0;
    for (Index c = 0; c < cols; ++c) {
      const double product = static_cast<double>(a[c]) * static_cast<double>(b[c]);
      sum += product;
      size += std::abs(product);
    }
    return sum;
  }

  /// Calls visit(p, ds, gauges of both) for a visible pair.
  template <class Visit>
  void with_pair(Index h, Index i, Index j, const Visit& visit) {
    if (!of.sees(i, j)) return;
    const Index kv = h / (of.heads / of.kv_heads), d = of.head_dim;
    const double scale = 1 / std::sqrt(static_cast<double>(d)), log_sum = lse_rows()(0, h, i);
    double magnitude = 0, size = 0;
    const double s = scale * dot(in.q.view().row(0, h, i), in.k.view().row(0, kv, j), d, magnitude);
    const double delta = dot(dout.view().row(0, h, i), out.view().row(0, h, i), d, size);
    const double dp = dot(dout.view().row(0, h, i), in.v.view().row(0, kv, j), d, size);
    const double p = std::exp(s - log_sum), of_weight = 1 + 2 * scale * magnitude + std::abs(log_sum);
    visit(p, scale * p * (dp - delta), p * of_weight, scale * p * of_weight * size);
  }

  /// The worst error of sampled rows, in units of 2^-24 times their gauge, after subtracting `rounding` times the
  /// gauge; infinite if a number is not finite.
  double worst_ratio(double rounding) {
    double worst = 0;
    const auto take = [&](const GaugedRow& row, const T* got) {
      for (std::size_t c = 0; c < row.value.size(); ++c) {
        const double error = std::abs(static_cast<double>(got[c]) - row.value[c]);
        if (!std::isfinite(error)) worst = std::numeric_limits<double>::infinity();
        worst = std::max(worst, (error / row.gauge[c] - rounding) * 0x1p24);
      }
    };
    const Index group = of.heads / of.kv_heads, d = of.head_dim;
    for (const RowId& id : sampled_rows(1, of.kv_heads, of.length, 4)) {
      GaugedRow q_row(d), k_row(d), v_row(d);
      const Index first = id.h * group;
      for (Index j = 0; j < of.length; ++j) {
        with_pair(first, id.i, j, [&](double, double ds, double, double size) {
          q_row.add(ds, size, in.k.view().row(0, id.h, j));
        });
      }
      for (Index h = first; h < first + group; ++h) {
        for (Index i = 0; i < of.length; ++i) {
          with_pair(h, i, id.i, [&](double p, double ds, double p_size, double size) {
            k_row.add(ds, size, in.q.view().row(0, h, i));
            v_row.add(p, p_size, dout.view().row(0, h, i));
          });
        }
      }
      take(q_row, dq.view().row(0, first, id.i));
      take(k_row, dk.view().row(0, id.h, id.i));
      take(v_row, dv.view().row(0, id.h, id.i));
    }
    const auto is_written = [](const OwnedTensor<T>& x) { return all_finite(x.values()); };
    return is_written(dq) && is_written(dk) && is_written(dv) ? worst
                                                              : std::numeric_limits<double>::infinity();
  }
};

template <class T, class Mask>
void run(benchmark::State& state, Data<T>& data, Index threads) {
  const longspan::softmax_attention attend{Mask{}};
  longspan::Execution execution(longspan::openmp{threads});
  for (auto* x : {&data.dq, &data.dk, &data.dv}) {
    std::fill(x->values().begin(), x->values().end(),
              static_cast<T>(std::numeric_limits<float>::quiet_NaN()));
  }
  const auto call = [&] { data.differentiate(attend, execution); };
  call();
  const double ratio = data.worst_ratio(std::is_same_v<T, float> ? 0 : 0x1p-8);
  if (!(ratio <= highest_ratio)) {
    state.SkipWithError(("wrong: error ratio " + printed("%.3g", ratio) + ", right is at most 16").c_str());
    return;
  }
  double seconds = 0;
  const double roof =
      roof_around([&] { return std::is_same_v<T, float> ? fma_peak(threads) : bf16_peak(threads); },
                  [&] { seconds = timed_calls(state, call); });
  report_flop(state, data.of.flop(), seconds, roof);
  set_counter(state, "max_ratio", ratio);
}

template <class T>
void add(const Case& c, const char* type) {
  std::vector<Index> team{1};
  if (default_threads() > 1) team.push_back(default_threads());
  for (const Index threads : team) {
    benchmark::RegisterBenchmark(c.name(type, threads).c_str(),
                                 [=](benchmark::State& state) {
                                   // Google Benchmark enters a case several times; the data are those of the last.
                                   static std::unique_ptr<Data<T>> data;
                                   if (data == nullptr || data->of.name("", 0) != c.name("", 0)) {
                                     data.reset();
                                     data = std::make_unique<Data<T>>(c);
                                   }
                                   c.visible == Visible::causal
                                       ? run<T, longspan::causal>(state, *data, threads)
                                       : run<T, longspan::everything>(state, *data, threads);
                                 })
        ->UseRealTime()
        ->Unit(benchmark::kMillisecond);
  }
}

void add_all() {
  for (const Visible visible : {Visible::all, Visible::causal}) {
    for (const Index head_dim : {64, 128}) {
      for (const Index n : {512, 2048, 8192}) {
        add<float>({8, 8, n, head_dim, visible}, "f32");
        add<Eigen::bfloat16>({8, 8, n, head_dim, visible}, "bf16");
      }
    }
    add<float>({32, 8, 2048, 128, visible}, "f32");
    add<Eigen::bfloat16>({32, 8, 2048, 128, visible}, "bf16");
  }
}

}  // namespace
}  // namespace bench

int main(int count, char** words) { return bench::run_benchmarks(count, words, bench::add_all); }
