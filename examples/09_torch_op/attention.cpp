// Longspan as an operator of PyTorch: a library to load in Python or C++. The kernels read torch's tensors in place and
// run on torch's threads.
//
// After copying, change: `attend`, to the mask, score and position of your model, and the schema with it.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <cstdint>
#include <longspan/longspan.hpp>

namespace {

using longspan::Index;
using longspan::TensorView;

/// Torch's threads as an executor of Longspan.
struct OnTorch {
  Index workers() const { return at::get_num_threads(); }

  template <class Task>
  void for_each(Index tasks, Task&& task) const {
    std::atomic<Index> next{0};
    at::parallel_for(0, workers(), 1, [&](std::int64_t begin, std::int64_t end) {
      for (Index worker = begin; worker < end; ++worker) {
        for (Index t = next++; t < tasks; t = next++) task(t, worker);
      }
    });
  }
};

/// A view [batch, heads, rows, head_dim]; only the last dimension must be contiguous, so a transposed or narrowed
/// tensor is not copied.
template <class T>
TensorView<T> view_of(const at::Tensor& x) {
  TORCH_CHECK(x.stride(3) == 1 || x.size(3) <= 1,
              "longspan::attention: the last dimension is not contiguous");
  return {static_cast<T*>(x.data_ptr()),
          x.size(0),
          x.size(1),
          x.size(2),
          x.size(3),
          x.stride(0),
          x.stride(1),
          x.stride(2)};
}

template <class T>
void attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal,
            const at::Tensor& out) {
  thread_local longspan::Execution<OnTorch> execution;  // keeps its scratch memory from call to call
  const auto run = [&](const auto& attention) {
    attention(view_of<const T>(q), view_of<const T>(k), view_of<const T>(v), view_of<T>(out), execution);
  };
  if (causal) {
    run(longspan::softmax_attention{longspan::causal{}});
  } else {
    run(longspan::softmax_attention{});
  }
}

/// Only shapes and types, for torch.compile.
at::Tensor empty_result(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool) {
  for (const at::Tensor& x : {q, k, v}) {
    TORCH_CHECK(x.dim() == 4, "longspan::attention: wanted [batch, heads, rows, head_dim], got ", x.sizes());
    TORCH_CHECK(x.scalar_type() == q.scalar_type(), "longspan::attention: q, k and v are of different types");
  }
  return at::empty({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options());
}

at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal) {
  const at::Tensor out = empty_result(q, k, v, causal);
  switch (q.scalar_type()) {
    case at::kFloat:
      attend<float>(q, k, v, causal, out);
      break;
    case at::kDouble:
      attend<double>(q, k, v, causal, out);
      break;
    case at::kHalf:
      attend<Eigen::half>(q, k, v, causal, out);
      break;
    case at::kBFloat16:
      attend<Eigen::bfloat16>(q, k, v, causal, out);
      break;
    default:
      TORCH_CHECK(false, "longspan::attention: no kernel for ", q.scalar_type());
  }
  return out;
}

}  // namespace

// Causal: the last query sees all keys. kv_heads divides heads. Forward only: it has no gradient.
TORCH_LIBRARY(longspan, library) {
  library.def("attention(Tensor q, Tensor k, Tensor v, bool causal=False) -> Tensor");
}
TORCH_LIBRARY_IMPL(longspan, CPU, library) { library.impl("attention", attention); }
TORCH_LIBRARY_IMPL(longspan, Meta, library) { library.impl("attention", empty_result); }
