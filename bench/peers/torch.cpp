// libtorch: scaled_dot_product_attention, which on CPUs is torch's flash attention.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/version.h>

#include "peers/peers.hpp"

namespace bench {
namespace {

class TorchSdpa {
 public:
  explicit TorchSdpa(Index threads) : threads_(threads) {}

  void prepare(const Inputs<float>& in) {
    at::set_num_threads(static_cast<int>(threads_));
    q_ = where_it_lies(in.q.view());
    k_ = where_it_lies(in.k.view());
    v_ = where_it_lies(in.v.view());
  }

  void run(const longspan::TensorView<float>&) {
    const c10::InferenceMode no_gradients;
    const bool grouped = q_.size(1) != k_.size(1);
    out_ = at::scaled_dot_product_attention(q_, k_, v_, {}, 0, /*is_causal=*/true, std::nullopt, grouped);
  }

  void collect(const longspan::TensorView<float>& out) const {
    copy_rows({out_.const_data_ptr<float>(), out_.size(0), out_.size(1), out_.size(2), out_.size(3),
               out_.stride(0), out_.stride(1), out_.stride(2)},
              out);
  }

 private:
  static at::Tensor where_it_lies(const longspan::TensorView<const float>& x) {
    return at::from_blob(const_cast<float*>(x.data), {x.batch, x.heads, x.rows, x.cols}, at::kFloat);
  }

  Index threads_;
  at::Tensor q_, k_, v_, out_;
};

}  // namespace

Contender torch(Index threads) {
  return peer<TorchSdpa>("torch", "libtorch " TORCH_VERSION ": scaled_dot_product_attention", threads);
}

}  // namespace bench
