// Longspan as an operator of a ggml graph, instead of ggml_flash_attn_ext: the kernels read ggml's tensors in place and
// run on ggml's threads.
//
// After copying, change: Attention, to the mask, score and position of your model (any functor of Longspan that
// has a `first_query`); `main` stands for the graph of your model.

#include <ggml-backend.h>
#include <ggml-cpp.h>
#include <ggml.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <longspan/longspan.hpp>
#include <longspan/reference/softmax_attention.hpp>
#include <utility>
#include <vector>

using longspan::Index;
using longspan::TensorView;

/// A view of a ggml tensor [head_dim, rows, heads, batch] (ggml's order of dimensions, strides in bytes), which may be
/// permuted.
template <class T>
static TensorView<T> view_of(const ggml_tensor* x) {
  const auto stride = [&](int n) { return static_cast<Index>(x->nb[n] / sizeof(T)); };
  return {static_cast<T*>(x->data), x->ne[3], x->ne[2], x->ne[1], x->ne[0], stride(3), stride(2), stride(1)};
}

/// The heads [first, first + count) of batch row b.
template <class T>
static TensorView<T> heads_of(TensorView<T> x, Index b, Index first, Index count) {
  x.data = x.row(b, first, 0);
  x.batch = 1;
  x.heads = count;
  return x;
}

/// The state of the operator, kept from call to call. It must outlive the graph; only one graph at a time may compute
/// it.
class Attention {
 public:
  explicit Attention(int most_threads) : executions_(static_cast<std::size_t>(most_threads)) {}

  /// Shapes as in ggml_flash_attn_ext: q [d, n, heads, batch] in float, k and v [d, m, kv_heads, batch] in half,
  /// the result [d, heads, n, batch]. Causal: the last query sees all keys.
  ggml_tensor* operator()(ggml_context* context, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v) {
    GGML_ASSERT(q->type == GGML_TYPE_F32 && k->type == GGML_TYPE_F16 && v->type == GGML_TYPE_F16);
    ggml_tensor* inputs[] = {q, k, v};
    return ggml_custom_4d(context, GGML_TYPE_F32, v->ne[0], q->ne[2], q->ne[1], q->ne[3], inputs, 3, run,
                          static_cast<int>(executions_.size()), this);
  }

 private:
  /// ggml calls this on each of its `threads` threads and continues when all have returned.
  static void run(ggml_tensor* out, int thread, int threads, void* self) {
    static_cast<Attention*>(self)->take_part(out, thread, threads);
  }

  /// The shapes determine the shares, and free threads take them: the result does not depend on the threads.
  void take_part(ggml_tensor* dst, int thread, int threads) {
    const auto q = view_of<const float>(dst->src[0]);
    const auto k = view_of<const Eigen::half>(dst->src[1]), v = view_of<const Eigen::half>(dst->src[2]);
    TensorView<float> out = view_of<float>(dst);  // memory order: rows, then heads
    std::swap(out.heads, out.rows);
    std::swap(out.head_stride, out.row_stride);

    constexpr Index share = 192;  // rows
    const Index group = q.heads / k.heads, shares = (q.rows + share - 1) / share;
    longspan::softmax_attention attend{longspan::causal{}};
    for (Index n = next_++; n < q.batch * k.heads * shares; n = next_++) {
      const Index b = n / (k.heads * shares), kv_head = n / shares % k.heads;
      const Index first =
          (shares - 1 - n % shares) * share;  // the last rows see most keys, so they start first
      const Index count = std::min(share, q.rows - first);
      attend.first_query = k.rows - q.rows + first;
      attend(heads_of(q, b, kv_head * group, group).slice_rows(first, count), heads_of(k, b, kv_head, 1),
             heads_of(v, b, kv_head, 1), heads_of(out, b, kv_head * group, group).slice_rows(first, count),
             executions_[static_cast<std::size_t>(thread)]);
    }
    if (++left_ == threads) next_ = left_ = 0;  // ready for the next call
  }

  std::vector<longspan::Execution<longspan::serial>> executions_;  // one for each thread
  std::atomic<Index> next_{0};
  std::atomic<Index> left_{0};
};

/// Numbers in place of those of a projection.
template <class T>
static void fill(ggml_tensor* x, double frequency) {
  std::vector<T> values(static_cast<std::size_t>(ggml_nelements(x)));
  for (std::size_t n = 0; n < values.size(); ++n)
    values[n] = static_cast<T>(static_cast<float>(std::sin(frequency * static_cast<double>(n))));
  ggml_backend_tensor_set(x, values.data(), 0, ggml_nbytes(x));
}

/// The largest difference between the operator's result and exact attention in double.
static double distance(const ggml_tensor* out) {
  const auto q = view_of<const float>(out->src[0]);
  std::vector<double> memory(static_cast<std::size_t>(ggml_nelements(out)));
  const TensorView<double> exact =
      longspan::compact_view(memory.data(), q.batch, q.heads, q.rows, static_cast<Index>(out->ne[0]));
  const longspan::reference::exact reference{longspan::softmax_attention{longspan::causal{}}};
  reference(q, view_of<const Eigen::half>(out->src[1]), view_of<const Eigen::half>(out->src[2]), exact);

  const auto got = view_of<const float>(out);  // with heads and rows exchanged
  double largest = 0;
  for (Index b = 0; b < exact.batch; ++b) {
    for (Index h = 0; h < exact.heads; ++h) {
      for (Index i = 0; i < exact.rows; ++i) {
        for (Index c = 0; c < exact.cols; ++c) {
          const double difference =
              std::abs(static_cast<double>(got.row(b, i, h)[c]) - exact.row(b, h, i)[c]);
          if (!(difference <= largest)) largest = difference;  // NaN counts as the largest
        }
      }
    }
  }
  return largest;
}

static ggml_backend_t cpu_backend(int threads) {
  ggml_backend_load_all();
  ggml_backend_t backend = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
  GGML_ASSERT(backend != nullptr);
  ggml_backend_reg_t registry = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
  const auto set_threads = reinterpret_cast<ggml_backend_set_n_threads_t>(
      ggml_backend_reg_get_proc_address(registry, "ggml_backend_set_n_threads"));
  set_threads(backend, threads);
  return backend;
}

int main() {
  constexpr int threads = 4;
  constexpr std::int64_t head_dim = 64, heads = 8, kv_heads = 2, room = 1024, prompt = 500, length = 530;
  const ggml_backend_ptr backend(cpu_backend(threads));
  const ggml_context_ptr context(
      ggml_init({.mem_size = std::size_t{1} << 20, .mem_buffer = nullptr, .no_alloc = true}));
  ggml_context* c = context.get();

  // A cache with room for more tokens, [room][kv_heads][head_dim], and queries as a projection writes them.
  ggml_tensor* keys = ggml_new_tensor_3d(c, GGML_TYPE_F16, head_dim, kv_heads, room);
  ggml_tensor* values = ggml_new_tensor_3d(c, GGML_TYPE_F16, head_dim, kv_heads, room);
  ggml_tensor* queries = ggml_new_tensor_3d(c, GGML_TYPE_F32, head_dim, heads, prompt);

  // Two results in one graph, a prompt and a single token after it, which share the operator.
  Attention attention(threads);
  const auto attended = [&](std::int64_t rows, std::int64_t tokens) {
    const auto first = [&](ggml_tensor* x, std::int64_t n) {
      return ggml_permute(c, ggml_view_3d(c, x, x->ne[0], x->ne[1], n, x->nb[1], x->nb[2], 0), 0, 2, 1, 3);
    };
    return attention(c, first(queries, rows), first(keys, tokens), first(values, tokens));
  };
  ggml_tensor* results[] = {attended(prompt, prompt), attended(1, length)};
  ggml_cgraph* graph = ggml_new_graph(c);
  for (ggml_tensor* result : results) ggml_build_forward_expand(graph, result);

  const ggml_backend_buffer_ptr memory(ggml_backend_alloc_ctx_tensors(c, backend.get()));
  fill<float>(queries, 0.3);
  fill<Eigen::half>(keys, 0.2);
  fill<Eigen::half>(values, 0.1);
  if (ggml_backend_graph_compute(backend.get(), graph) != GGML_STATUS_SUCCESS) return 1;

  bool right = true;
  for (const ggml_tensor* result : results) {
    const double off = distance(result);
    std::printf("%td queries over %td keys: %.1e from exact attention\n", static_cast<Index>(result->ne[2]),
                static_cast<Index>(result->src[1]->ne[1]), off);
    right = right && off < 1e-5;
  }
  return right ? 0 : 1;
}
