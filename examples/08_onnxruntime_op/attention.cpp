// Longspan as an operator of ONNX Runtime: a library that a session loads. The kernels read ONNX Runtime's tensors in
// place, in the order [tokens, heads, head_dim] of projections, and run on its threads.
//
// After copying, change: `attend`, to the mask, score and position of your model, and the attributes with it.

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#include <onnxruntime_lite_custom_op.h>
#undef ORT_API_MANUAL_INIT

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <longspan/longspan.hpp>
#include <memory>
#include <thread>
#include <vector>

namespace {

using longspan::Index;
using longspan::TensorView;
using Tensor = Ort::Custom::Tensor<float>;

/// The session's threads as an executor of Longspan.
struct OnSession {
  OrtKernelContext* context = nullptr;

  /// The session does not report its number of threads. This is an upper bound; fewer threads share the work.
  Index workers() const { return std::max(1, static_cast<int>(std::thread::hardware_concurrency())); }

  template <class Task>
  void for_each(Index tasks, Task&& task) const {
    std::atomic<Index> next{0};
    auto work = [&](Index worker) {
      for (Index t = next++; t < tasks; t = next++) task(t, worker);
    };
    Ort::KernelContext(context).ParallelFor(
        [](void* data, std::size_t worker) {
          (*static_cast<decltype(work)*>(data))(static_cast<Index>(worker));
        },
        static_cast<std::size_t>(workers()), 0, &work);
  }
};

/// A node `Attention` of the domain `longspan`:
///   query [batch, n, num_heads * head_dim], key [batch, m, kv_num_heads * head_dim], value likewise,
///   output [batch, n, num_heads * value_dim]; causal = 1: the last query sees all keys.
class Attention {
 public:
  Attention(const OrtApi*, const OrtKernelInfo* info) {
    const Ort::ConstKernelInfo attributes(info);
    heads_ = attributes.GetAttribute<std::int64_t>("num_heads");
    kv_heads_ = attributes.GetAttribute<std::int64_t>("kv_num_heads");
    causal_ = attributes.GetAttribute<std::int64_t>("causal") != 0;
  }

  Ort::Status Compute(OrtKernelContext* context, const Tensor& query, const Tensor& key, const Tensor& value,
                      Tensor& output) {
    try {
      const auto q = view_of(query.Data(), query.Shape(), heads_);
      const auto k = view_of(key.Data(), key.Shape(), kv_heads_);
      const auto v = view_of(value.Data(), value.Shape(), kv_heads_);
      const std::vector<std::int64_t> shape{q.batch, q.rows, heads_ * v.cols};
      attend(q, k, v, view_of(output.Allocate(shape), shape, heads_), context);
      return Ort::Status(nullptr);
    } catch (const std::exception& error) {
      return Ort::Status(error.what(), ORT_INVALID_ARGUMENT);
    }
  }

 private:
  /// A tensor [batch, rows, heads * cols] as a view [batch, heads, rows, cols].
  template <class T>
  static TensorView<T> view_of(T* data, const std::vector<std::int64_t>& shape, Index heads) {
    if (shape.size() != 3 || shape[2] % heads != 0)
      throw longspan::Error("longspan: Attention: an input is not [batch, rows, heads * cols]");
    const Index rows = shape[1], row = shape[2], cols = row / heads;
    return {data, shape[0], heads, rows, cols, rows * row, cols, row};
  }

  void attend(TensorView<const float> q, TensorView<const float> k, TensorView<const float> v,
              TensorView<float> out, OrtKernelContext* context) const {
    // A session may compute a node on several threads at the same time. Scratch memory is kept from call to call.
    thread_local longspan::Execution<OnSession> execution;
    execution.executor.context = context;
    if (causal_) {
      longspan::softmax_attention{longspan::causal{}}(q, k, v, out, execution);
    } else {
      longspan::softmax_attention{}(q, k, v, out, execution);
    }
  }

  Index heads_, kv_heads_;
  bool causal_;
};

}  // namespace

/// A session calls this function when it loads the library.
extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* api) {
  Ort::InitApi(api->GetApi(ORT_API_VERSION));
  try {
    // These objects must outlive every session.
    static const std::unique_ptr<Ort::Custom::OrtLiteCustomOp> attention(
        Ort::Custom::CreateLiteCustomOp<Attention>("Attention", "CPUExecutionProvider"));
    static const Ort::CustomOpDomain domain = [] {
      Ort::CustomOpDomain made("longspan");
      made.Add(attention.get());
      return made;
    }();
    Ort::UnownedSessionOptions(options).Add(domain);
    return nullptr;
  } catch (const std::exception& error) {
    return Ort::Status(error.what(), ORT_FAIL).release();
  }
}
