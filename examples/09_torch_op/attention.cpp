// Longspan as an operator of PyTorch, with its gradient: a library to load in Python or C++. The kernels read torch's
// tensors in place and run on torch's threads.
//
// After copying, change: `with_functor`, to the mask, score and position of your model, and the schema with it.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <atomic>
#include <cstdint>
#include <longspan/gradient/softmax_attention.hpp>
#include <longspan/longspan.hpp>
#include <tuple>

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

/// Calls work(attention) with the functor of the operator.
template <class Work>
void with_functor(bool causal, const Work& work) {
  if (causal) {
    work(longspan::softmax_attention{longspan::causal{}});
  } else {
    work(longspan::softmax_attention{});
  }
}

/// Calls work.operator()<T>() with the element type of a tensor.
template <class Work>
void with_type(const at::Tensor& q, const Work& work) {
  switch (q.scalar_type()) {
    case at::kFloat:
      return work.template operator()<float>();
    case at::kDouble:
      return work.template operator()<double>();
    case at::kHalf:
      return work.template operator()<Eigen::half>();
    case at::kBFloat16:
      return work.template operator()<Eigen::bfloat16>();
    default:
      TORCH_CHECK(false, "longspan::attention: no kernel for ", q.scalar_type());
  }
}

/// Keeps its scratch memory from call to call.
longspan::Execution<OnTorch>& execution() {
  thread_local longspan::Execution<OnTorch> of_thread;
  return of_thread;
}

/// The log-sum-exps of queries of type T.
template <class T>
longspan::RowsView<longspan::Arithmetic<T>> rows_of(const at::Tensor& lse) {
  return longspan::compact_rows_view(static_cast<longspan::Arithmetic<T>*>(lse.data_ptr()), lse.size(0),
                                     lse.size(1), lse.size(2));
}

/// Only shapes and types, for torch.compile.
at::Tensor empty_result(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool) {
  for (const at::Tensor& x : {q, k, v}) {
    TORCH_CHECK(x.dim() == 4, "longspan::attention: wanted [batch, heads, rows, head_dim], got ", x.sizes());
    TORCH_CHECK(x.scalar_type() == q.scalar_type(), "longspan::attention: q, k and v are of different types");
  }
  return at::empty({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options());
}

/// The output, and the log-sum-exps that the gradient needs.
std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                           bool causal) {
  const at::Tensor out = empty_result(q, k, v, causal);
  const auto lse_type = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(lse_type));
  with_type(q, [&]<class T>() {
    with_functor(causal, [&](const auto& attend) {
      attend(view_of<const T>(q), view_of<const T>(k), view_of<const T>(v), view_of<T>(out), rows_of<T>(lse),
             execution());
    });
  });
  return {out, lse};
}

at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal) {
  return std::get<0>(forward(q, k, v, causal));
}

/// The operator for torch's autograd.
struct Differentiable : torch::autograd::Function<Differentiable> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& q,
                            const at::Tensor& k, const at::Tensor& v, bool causal) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [out, lse] = ::forward(q, k, v, causal);
    context->save_for_backward({q, k, v, out, lse});
    context->saved_data["causal"] = causal;
    return out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    const at::Tensor &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3], &lse = saved[4];
    // Torch may hand over a gradient whose strides are 0.
    const at::Tensor dout = gradients[0].contiguous();
    const auto like = [](const at::Tensor& x) { return at::empty(x.sizes(), x.options()); };
    const at::Tensor dq = like(q), dk = like(k), dv = like(v);
    with_type(q, [&]<class T>() {
      with_functor(context->saved_data["causal"].toBool(), [&](const auto& attend) {
        const auto backward = longspan::gradient(attend);
        backward(view_of<const T>(q), view_of<const T>(k), view_of<const T>(v), view_of<const T>(out),
                 rows_of<T>(lse), view_of<const T>(dout), view_of<T>(dq), view_of<T>(dk), view_of<T>(dv),
                 execution());
      });
    });
    return {dq, dk, dv, at::Tensor()};
  }
};

at::Tensor differentiable(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal) {
  return Differentiable::apply(q, k, v, causal);
}

}  // namespace

// Causal: the last query sees all keys. kv_heads divides heads.
TORCH_LIBRARY(longspan, library) {
  library.def("attention(Tensor q, Tensor k, Tensor v, bool causal=False) -> Tensor");
}
TORCH_LIBRARY_IMPL(longspan, CPU, library) { library.impl("attention", attention); }
TORCH_LIBRARY_IMPL(longspan, Meta, library) { library.impl("attention", empty_result); }
TORCH_LIBRARY_IMPL(longspan, Autograd, library) { library.impl("attention", differentiable); }
