// softmax_attention for several shapes, storage types and threads, and the naive Eigen version.
//
// All families have the same arguments, so that two of them, or two builds, can be compared line by line. Before it is
// timed, each result is checked against double; a wrong result is an error and has no time. "mask:dense", "mask:bits"
// and "bias:1" are calls of the same sizes with a mask or a bias that is a tensor.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "longspan/dense_mask.hpp"
#include "longspan/softmax_attention.hpp"
#include "support/benchmark_program.hpp"
#include "support/eigen_naive.hpp"
#include "support/exact_rows.hpp"
#include "support/hashed_values.hpp"

namespace bench {
namespace {

enum class Order : unsigned char {
  heads_first,
  rows_first
};  ///< memory layout: [heads, rows, d] or [rows, heads, d]

/// How the scores of a case are changed.
enum class ScoreKind : unsigned char { unchanged, softcap, alibi, lambda, bias };
constexpr std::array<const char*, 5> score_names{"unchanged", "softcap", "alibi", "lambda", "bias"};

constexpr float cap = 5, slope = 0.0625f;
/// The number that the lambda and the bias add.
constexpr float added(Index h, Index j) { return static_cast<float>((h + 3 * j) % 17) / 8 - 1; }

struct Case {
  Index heads = 8;
  Index kv_heads = 8;
  Index q_len = 0;
  Index kv_len = 0;
  Index head_dim = 64;
  Visible visible = Visible::causal;
  Order order = Order::heads_first;
  ScoreKind score = ScoreKind::unchanged;

  bool is_decode() const { return q_len < kv_len; }
  double flop() const { return attention_flop(visible, 1, heads, q_len, kv_len, head_dim, head_dim); }
  double cache_elements() const { return 2.0 * static_cast<double>(kv_heads * kv_len * head_dim); }

  /// The name of a case: softmax_f32/heads:8/kv_heads:8/n:2048/d:64/causal:1/threads:1, or
  /// softmax_decode_f32/heads:32/.../m:4096/d:128/...
  std::string name(const std::string& method, const std::string& type, Index threads) const {
    const auto part = [](const char* key, Index value) {
      return "/" + std::string(key) + ":" + std::to_string(value);
    };
    std::string text = method + (is_decode() ? "_decode_" : "_") + type;
    text +=
        (order == Order::rows_first ? "_rows_first" : "") + part("heads", heads) + part("kv_heads", kv_heads);
    if (score != ScoreKind::unchanged)
      text += std::string("/score:") + score_names[static_cast<std::size_t>(score)];
    text += part("n", q_len) + (is_decode() ? part("m", kv_len) : "") + part("d", head_dim);
    return text + (is_decode() ? "" : part("causal", visible == Visible::causal)) + part("threads", threads);
  }
};

template <class T>
longspan::TensorView<T> with_heads(longspan::TensorView<T> x, Index heads, Order order) {
  if (order == Order::heads_first) return x;
  return {x.data, 1, heads, x.rows, x.cols / heads, 0, x.cols / heads, x.cols};
}

/// The tensors of a case, and the exact rows with which it is checked.
template <class T>
struct Data {
  Case of;
  Inputs<T> in;
  OwnedTensor<T> out;
  std::vector<ExactRow> exact;
  std::vector<float> bias;  ///< [heads, q_len, kv_len], only for cases with a bias

  explicit Data(const Case& c) : of(c) {
    in = c.order == Order::heads_first ? hashed_inputs<T>(c.heads, c.kv_heads, c.q_len, c.kv_len, c.head_dim)
                                       : hashed_inputs<T>(1, 1, c.q_len, c.kv_len, c.heads * c.head_dim);
    out = in.empty_output();
    const std::vector<RowId> rows = sampled_rows(1, c.heads, c.q_len, 4);
    // The oracle is slow for long contexts: about 2^22 keys in total, but at least a few rows.
    const auto most = std::max<std::size_t>(4, (std::size_t{1} << 22) / static_cast<std::size_t>(c.kv_len));
    std::vector<RowId> chosen;
    for (std::size_t n = 0; n < std::min(most, rows.size()); ++n) {
      chosen.push_back(rows[n * rows.size() / std::min(most, rows.size())]);
    }
    const std::span<const RowId> of_rows(chosen);
    if (c.score == ScoreKind::unchanged) {
      exact = exact_rows(q(), k(), v(), c.visible, of_rows, default_threads());
    } else {
      exact = exact_rows(q(), k(), v(), c.visible, of_rows, default_threads(),
                         [&](double s, Index h, Index i, Index j) { return exact_score(s, h, i, j); });
    }
    if (c.score != ScoreKind::bias) return;
    for (Index h = 0; h < c.heads; ++h) {
      for (Index n = 0; n < c.q_len * c.kv_len; ++n) bias.push_back(added(h, n % c.kv_len));
    }
  }

  double exact_score(double s, Index h, Index i, Index j) const {
    switch (of.score) {
      case ScoreKind::unchanged:
        return s;
      case ScoreKind::softcap:
        return double(cap) * std::tanh(s / double(cap));
      case ScoreKind::alibi:
        return s - double(slope) * std::abs(static_cast<double>(of.kv_len - of.q_len + i - j));
      case ScoreKind::lambda:
      case ScoreKind::bias:
        return s + double(added(h, j));
    }
    return s;
  }

  longspan::TensorView<const T> q() const {
    return with_heads(std::as_const(in.q).view(), of.heads, of.order);
  }
  longspan::TensorView<const T> k() const {
    return with_heads(std::as_const(in.k).view(), of.kv_heads, of.order);
  }
  longspan::TensorView<const T> v() const {
    return with_heads(std::as_const(in.v).view(), of.kv_heads, of.order);
  }
  longspan::TensorView<T> output() { return with_heads(out.view(), of.heads, of.order); }

  /// The error of the output of `call`, see worst_ratio; infinite if a row is not written.
  template <class Call>
  double ratio_of(const Call& call, Rounding rounding) {
    std::fill(out.values().begin(), out.values().end(),
              static_cast<T>(std::numeric_limits<float>::quiet_NaN()));
    call();
    if (!all_finite(std::as_const(out).values())) return std::numeric_limits<double>::infinity();
    return worst_ratio(longspan::TensorView<const T>(output()), exact, rounding);
  }
};

/// Keeps only the data of the last case: Google Benchmark enters a case several times to find the
/// number of iterations, and the data of all cases would not fit into memory.
class LastData {
 public:
  template <class T>
  Data<T>& get(const Case& c, const std::string& type) {
    const std::string name = c.name("", type, 0);
    if (name != name_) {
      data_.reset();
      data_ = std::make_shared<Data<T>>(c);
      name_ = name;
    }
    return *static_cast<Data<T>*>(data_.get());
  }

  const StreamRead& stream(Index threads) {
    if (!stream_ || threads != stream_threads_) {
      stream_.reset();
      stream_ =
          std::make_unique<StreamRead>(threads, (std::size_t{512} << 20) / static_cast<std::size_t>(threads));
      stream_threads_ = threads;
    }
    return *stream_;
  }

 private:
  std::shared_ptr<void> data_;
  std::string name_;
  std::unique_ptr<StreamRead> stream_;
  Index stream_threads_ = 0;
};

/// Checks, times and reports one case. The roof is sampled before and after the timed calls.
template <class T, class Call>
void run_case(benchmark::State& state, LastData& last, Data<T>& data, Index threads, Rounding rounding,
              bool bf16_roof, const Call& call) {
  const double ratio = data.ratio_of(call, rounding);
  if (!(ratio <= highest_ratio)) {
    state.SkipWithError(("wrong: error ratio " + printed("%.3g", ratio) + ", right is at most 16").c_str());
    return;
  }
  const auto sample_roof = [&] {
    if (data.of.is_decode()) return last.stream(threads).sample();
    return bf16_roof ? bf16_peak(threads) : fma_peak(threads);
  };
  double seconds = 0;
  const double roof = roof_around(sample_roof, [&] { seconds = timed_calls(state, call); });
  if (data.of.is_decode()) {
    const double rate = data.of.cache_elements() * sizeof(T) / seconds;
    set_counter(state, "GB/s", rate / 1e9);
    set_counter(state, "%stream", 100 * rate / roof);
  } else {
    report_flop(state, data.of.flop(), seconds, roof);
    if (bf16_roof) state.SetLabel("of the fastest bf16 instruction");
  }
  set_counter(state, "max_ratio", ratio);
}

/// The largest rounding error of the storage type: half a unit in the last of its 8 (bfloat16) or 11 (half) bits.
template <class T>
constexpr double storage_rounding() {
  return std::is_same_v<T, Eigen::bfloat16> ? 0x1p-8 : std::is_same_v<T, Eigen::half> ? 0x1p-11 : 0;
}

template <class Mask, class T>
void run_softmax(benchmark::State& state, LastData& last, Data<T>& data, Index threads, bool products) {
  const bool rounds_weights = products && longspan::detail::rounds_weights<T, T, T, T>();
  longspan::softmax_attention attend{Mask{}};
  attend.bf16_products = products;
  longspan::Execution<longspan::openmp> execution(longspan::openmp{threads});
  const auto q = data.q(), k = data.k(), v = data.v();
  const auto out = data.output();
  run_case(state, last, data, threads, {storage_rounding<T>(), rounds_weights ? storage_rounding<T>() : 0},
           products && std::is_same_v<T, Eigen::bfloat16>, [&] { attend(q, k, v, out, execution); });
}

enum class PairTensor : unsigned char { dense_mask, bit_mask, bias };

/// The mask shows every second key, so that every block is read pair by pair, and the exact rows are those for
/// every second row of k and v. The bias is 0.
void run_with_tensor(benchmark::State& state, LastData& last, const Case& c, PairTensor kind, Index threads) {
  Data<float>& data = last.get<float>(c, kind == PairTensor::bias ? "f32" : "f32, every second key");
  const auto q = data.q(), k = data.k(), v = data.v();
  const auto out = data.output();
  const Index n = c.q_len, words = (c.kv_len + 63) / 64;
  std::vector<std::uint8_t> bytes;
  std::vector<std::uint64_t> bits;
  std::vector<float> bias;
  longspan::Execution<longspan::openmp> execution(longspan::openmp{threads});
  const auto run = [&](const auto& attend) {
    run_case(state, last, data, threads, {}, false, [&] { attend(q, k, v, out, execution); });
  };
  if (kind == PairTensor::bias) {
    bias.assign(static_cast<std::size_t>(n * c.kv_len), 0.0f);
    return run(longspan::softmax_attention{
        longspan::additive_bias(longspan::compact_view(bias.data(), 1, 1, n, c.kv_len))});
  }
  const auto every_second = [](longspan::TensorView<const float> x) {
    x.rows = (x.rows + 1) / 2;
    x.row_stride *= 2;
    return x;
  };
  const std::vector<RowId> rows = sampled_rows(1, c.heads, n, 4);
  data.exact = exact_rows(q, every_second(k), every_second(v), Visible::all, std::span<const RowId>(rows),
                          default_threads());
  if (kind == PairTensor::bit_mask) {
    bits.assign(static_cast<std::size_t>(n * words), 0x5555555555555555);
    return run(longspan::softmax_attention{
        longspan::bit_mask(longspan::compact_view(bits.data(), 1, 1, n, words), c.kv_len)});
  }
  for (Index i = 0; i < n; ++i) {
    for (Index j = 0; j < c.kv_len; ++j) bytes.push_back(j % 2 == 0 ? 1 : 0);
  }
  run(longspan::softmax_attention{
      longspan::dense_mask(longspan::compact_view(bytes.data(), 1, 1, n, c.kv_len))});
}

/// Calls run(score) with the score function of the case.
template <class T, class Run>
void with_score(const Data<T>& data, const Run& run) {
  const Case& c = data.of;
  const std::vector<float> slopes(static_cast<std::size_t>(c.heads), slope);
  switch (c.score) {
    case ScoreKind::unchanged:
      return run(longspan::unchanged{});
    case ScoreKind::softcap:
      return run(longspan::softcap{cap});
    case ScoreKind::alibi:
      return run(longspan::alibi{slopes});
    case ScoreKind::lambda:
      return run([](float s, Index, Index h, Index, Index j) { return s + added(h, j); });
    case ScoreKind::bias:
      return run(
          longspan::additive_bias(longspan::compact_view(data.bias.data(), 1, c.heads, c.q_len, c.kv_len)));
  }
}

class Registry {
 public:
  /// One token, or a few, with each kind of score.
  void add_scores(Case c) const {
    for (std::size_t kind = 0; kind < score_names.size(); ++kind) {
      c.score = static_cast<ScoreKind>(kind);
      add(c.name("softmax", "f32_score", 1), [=, last = last_](benchmark::State& state) {
        Data<float>& data = last->get<float>(c, "f32");
        const auto out = data.output();
        longspan::Execution<longspan::serial> execution;
        with_score(data, [&](const auto& score) {
          const longspan::softmax_attention attend{longspan::causal{}, score};
          run_case(state, *last, data, 1, {}, false,
                   [&] { attend(data.q(), data.k(), data.v(), out, execution); });
        });
      });
    }
  }

  template <class T>
  void add_softmax(const Case& c, const char* type, const char* variant = "", bool products = true) const {
    for (const Index threads : thread_counts()) {
      add(c.name("softmax", std::string(type) + variant, threads),
          [=, last = last_](benchmark::State& state) {
            Data<T>& data = last->get<T>(c, type);
            c.visible == Visible::causal
                ? run_softmax<longspan::causal>(state, *last, data, threads, products)
                : run_softmax<longspan::everything>(state, *last, data, threads, products);
          });
    }
  }

  void add_pair_tensors(const Case& c) const {
    const auto add_kind = [&](const char* suffix, PairTensor kind) {
      for (const Index threads : thread_counts()) {
        add(c.name("softmax", "f32", threads) + suffix,
            [=, last = last_](benchmark::State& state) { run_with_tensor(state, *last, c, kind, threads); });
      }
    };
    add_kind("/mask:dense", PairTensor::dense_mask);
    add_kind("/mask:bits", PairTensor::bit_mask);
    add_kind("/bias:1", PairTensor::bias);
  }

  void add_naive(const Case& c) const {
    for (const Index threads : thread_counts()) {
      add(c.name("eigen_naive", "f32", threads), [=, last = last_](benchmark::State& state) {
        Data<float>& data = last->get<float>(c, "f32");
        EigenNaive attend(threads);
        run_case(state, *last, data, threads, {}, false,
                 [&] { attend(data.in, data.out.view(), c.visible); });
      });
    }
  }

  void add_all_types(const Case& c) const {
    add_softmax<float>(c, "f32");
    add_naive(c);
    add_softmax<Eigen::bfloat16>(c, "bf16");
    if (!c.is_decode()) add_softmax<Eigen::bfloat16>(c, "bf16", "_float_products", false);
    add_softmax<Eigen::half>(c, "f16");
  }

 private:
  static std::vector<Index> thread_counts() {
    const Index all = default_threads();
    return all > 1 ? std::vector<Index>{1, all} : std::vector<Index>{1};
  }

  template <class Run>
  static void add(const std::string& name, const Run& run) {
    benchmark::RegisterBenchmark(name.c_str(), run)->UseRealTime()->Unit(benchmark::kMillisecond);
  }

  std::shared_ptr<LastData> last_ = std::make_shared<LastData>();
};

void add_prefill(const Registry& registry) {
  for (const Visible visible : {Visible::causal, Visible::all}) {
    for (const Index head_dim : {64, 128}) {
      for (const Index n : {512, 2048, 4096, 8192}) registry.add_all_types({8, 8, n, n, head_dim, visible});
    }
    registry.add_all_types({32, 8, 2048, 2048, 128, visible});
    registry.add_softmax<float>({8, 8, 2048, 2048, 64, visible, Order::rows_first}, "f32");
    registry.add_softmax<float>({8, 8, 2048, 2048, 128, visible, Order::rows_first}, "f32");
    for (const Index head_dim : {32, 40, 80, 96, 112, 160, 192, 256}) {
      registry.add_softmax<float>({8, 8, 2048, 2048, head_dim, visible}, "f32");
    }
  }
}

void add_pair_tensors(const Registry& registry) {
  for (const Index n : {512, 2048}) registry.add_pair_tensors({8, 8, n, n, 64, Visible::all});
}

void add_small(const Registry& registry) {
  for (const Index n : {1, 2, 4, 8, 16, 17, 24, 32, 47, 64}) {
    const Case c{8, 8, n, n, 64, Visible::causal};
    registry.add_softmax<float>(c, "f32");
    registry.add_naive(c);
  }
}

void add_decode(const Registry& registry) {
  for (const Index kv_heads : {8, 32}) {
    for (const Index kv_len : {4096, 8192, 16384, 32768, 65536, 131072}) {
      for (const Index q_len : {1, 8})
        registry.add_all_types({32, kv_heads, q_len, kv_len, 128, Visible::causal});
    }
  }
}

/// Cases with names softmax_decode_f32_score/.../score:softcap/..., and without `score:` for comparison.
void add_decode_scores(const Registry& registry) {
  registry.add_scores({8, 8, 1, 4096, 128, Visible::causal});
  registry.add_scores({32, 8, 1, 4096, 128, Visible::causal});
  registry.add_scores({8, 1, 1, 4096, 64, Visible::causal});
  registry.add_scores({16, 8, 1, 8192, 256, Visible::causal});
  registry.add_scores({32, 32, 1, 2048, 128, Visible::causal});
}

}  // namespace
}  // namespace bench

int main(int count, char** words) {
  return bench::run_benchmarks(count, words, [] {
    const bench::Registry registry;
    bench::add_prefill(registry);
    bench::add_pair_tensors(registry);
    bench::add_small(registry);
    bench::add_decode(registry);
    bench::add_decode_scores(registry);
  });
}
