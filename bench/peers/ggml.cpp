// ggml: its flash attention on its CPU backend, called as in llama.cpp.
#include <ggml-backend.h>
#include <ggml-cpp.h>
#include <ggml.h>

#include <cmath>
#include <stdexcept>

#include "peers/peers.hpp"

namespace bench {
namespace {

class GgmlFlash {
 public:
  explicit GgmlFlash(Index threads) : threads_(threads) {}

  void prepare(const Inputs<float>& in) {
    if (!backend_) start_backend();
    buffers_.clear();
    context_.reset(ggml_init({.mem_size = std::size_t{1} << 20, .mem_buffer = nullptr, .no_alloc = true}));
    const Index n = in.kv_len();
    mask_ = causal_mask<ggml_fp16_t>(n, 0xfc00);  // -infinity
    out_ = OwnedTensor<float>(in.batch(), in.q_len(), in.heads(), in.value_dim());
    std::fill(out_.values().begin(), out_.values().end(), std::nanf(""));

    ggml_tensor* mask = ggml_new_tensor_2d(context_.get(), GGML_TYPE_F16, n, n);
    place(mask, mask_.view().data);
    const float scale = 1 / std::sqrt(static_cast<float>(in.head_dim()));
    ggml_tensor* out = ggml_flash_attn_ext(context_.get(), placed(in.q.view()), placed(in.k.view()),
                                           placed(in.v.view()), mask, scale, 0, 0);
    place(out, out_.view().data);
    graph_ = ggml_new_graph(context_.get());
    ggml_build_forward_expand(graph_, out);
  }

  void run(const longspan::TensorView<float>&) {
    if (ggml_backend_graph_compute(backend_.get(), graph_) != GGML_STATUS_SUCCESS)
      throw std::runtime_error("ggml could not compute its graph");
  }

  void collect(const longspan::TensorView<float>& out) const {
    copy_rows(rows_before_heads<const float>(out_.view().data, out), out);
  }

 private:
  void start_backend() {
    ggml_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
    ggml_backend_load_all();  // distributions have one library for each kind of processor
    backend_.reset(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
    if (!backend_) throw std::runtime_error("ggml has no CPU backend");
    ggml_backend_reg_t registry = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend_.get()));
    const auto set_threads = reinterpret_cast<ggml_backend_set_n_threads_t>(
        ggml_backend_reg_get_proc_address(registry, "ggml_backend_set_n_threads"));
    set_threads(backend_.get(), static_cast<int>(threads_));
  }

  void place(ggml_tensor* tensor, void* data) {
    buffers_.emplace_back(ggml_backend_cpu_buffer_from_ptr(data, ggml_nbytes(tensor)));
    ggml_backend_tensor_alloc(buffers_.back().get(), tensor, data);
  }
  /// A ggml tensor that refers to the input in place.
  ggml_tensor* placed(const longspan::TensorView<const float>& x) {
    ggml_tensor* tensor = ggml_new_tensor_4d(context_.get(), GGML_TYPE_F32, x.cols, x.rows, x.heads, x.batch);
    place(tensor, const_cast<float*>(x.data));
    return tensor;
  }

  Index threads_;
  ggml_backend_ptr backend_;
  ggml_context_ptr context_;
  std::vector<ggml_backend_buffer_ptr> buffers_;
  OwnedTensor<ggml_fp16_t> mask_;
  OwnedTensor<float> out_;
  ggml_cgraph* graph_ = nullptr;
};

}  // namespace

Contender ggml(Index threads) {
  Contender contender = peer<GgmlFlash>(
      "ggml",
      std::string("ggml ") + ggml_version() + ": ggml_flash_attn_ext, with a mask made before the call",
      threads);
  contender.obstacle = [](const Shape& shape) {
    return too_large(shape, "its whole mask", sizeof(ggml_fp16_t));
  };
  return contender;
}

}  // namespace bench
