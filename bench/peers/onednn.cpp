// oneDNN: scaled dot-product attention as a graph, which oneDNN fuses into one partition.
#include <omp.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <oneapi/dnnl/dnnl_graph.hpp>
#include <stdexcept>

#include "peers/peers.hpp"

namespace bench {
namespace {

using dnnl::graph::logical_tensor;
using dnnl::graph::op;

class OneDnnSdpa {
 public:
  explicit OneDnnSdpa(Index threads) : threads_(threads) {}

  /// The mask is a tensor that is added: a causal mask that the graph computes (GenIndex, GreaterEqual, Select) is 8
  /// to 14 times slower (8 heads, 2048 tokens, d = 64, two threads: tensor 55 ms, computed 440 ms).
  void prepare(const Inputs<float>& in) {
    omp_set_num_threads(static_cast<int>(threads_));
    id_ = 0;
    // [batch, kv_heads, group, rows, cols] has the same memory as [batch, heads, rows, cols].
    const logical_tensor::dims kv_heads{in.batch(), in.kv_heads(), 1}, everywhere{1, 1, 1};
    const logical_tensor::dims heads{in.batch(), in.kv_heads(), in.heads() / in.kv_heads()};
    const Index n = in.kv_len();
    const auto q = tensor(heads, n, in.head_dim());
    const auto k = tensor(kv_heads, n, in.head_dim()), v = tensor(kv_heads, n, in.value_dim());
    const auto mask = tensor(everywhere, n, n), scale = tensor(everywhere, 1, 1);
    const auto score = tensor(heads, n, n), scaled = tensor(heads, n, n), masked = tensor(heads, n, n);
    const auto weight = tensor(heads, n, n);
    out_ = tensor(heads, n, in.value_dim());

    dnnl::graph::graph graph(dnnl::engine::kind::cpu);
    op products(id_++, op::kind::MatMul, {q, k}, {score}, "q k");
    graph.add_op(products.set_attr<bool>(op::attr::transpose_b, true));
    graph.add_op(op(id_++, op::kind::Multiply, {score, scale}, {scaled}, "scale"));
    graph.add_op(op(id_++, op::kind::Add, {scaled, mask}, {masked}, "mask"));
    op softmax(id_++, op::kind::SoftMax, {masked}, {weight}, "softmax");
    graph.add_op(softmax.set_attr<std::int64_t>(op::attr::axis, -1));
    graph.add_op(op(id_++, op::kind::MatMul, {weight, v}, {out_}, "p v"));
    graph.finalize();
    const auto partitions = graph.get_partitions();
    if (partitions.size() != 1 || !partitions[0].is_supported())
      throw std::runtime_error("oneDNN does not fuse this attention into one partition");
    const auto inputs = partitions[0].get_input_ports();
    attention_ = partitions[0].compile(inputs, {out_}, engine_);

    mask_ = causal_mask(n, -std::numeric_limits<float>::infinity());
    scale_ = 1 / std::sqrt(static_cast<float>(in.head_dim()));
    // In the order in which the ports were created.
    const float* bound[] = {in.q.view().data, in.k.view().data, in.v.view().data, mask_.view().data, &scale_};
    inputs_.clear();
    for (const logical_tensor& x : inputs)
      inputs_.emplace_back(x, engine_, const_cast<float*>(bound[x.get_id()]));
  }

  void run(const longspan::TensorView<float>& out) {
    attention_.execute(stream_, inputs_, {{out_, engine_, out.data}});
    stream_.wait();
  }

 private:
  logical_tensor tensor(logical_tensor::dims shape, Index rows, Index cols) {
    shape.insert(shape.end(), {rows, cols});
    return {id_++, logical_tensor::data_type::f32, shape, logical_tensor::layout_type::strided};
  }

  Index threads_;
  std::size_t id_ = 0;
  dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream_{engine_};
  dnnl::graph::compiled_partition attention_;
  logical_tensor out_;
  std::vector<dnnl::graph::tensor> inputs_;
  OwnedTensor<float> mask_;
  float scale_ = 0;
};

}  // namespace

Contender onednn(Index threads) {
  const dnnl_version_t& is = *dnnl_version();
  const std::string version = std::to_string(is.major) + "." + std::to_string(is.minor);
  Contender contender = peer<OneDnnSdpa>(
      "onednn", "oneDNN " + version + ": attention of its graph API, fused, with a mask made before the call",
      threads);
  contender.obstacle = [](const Shape& shape) { return too_large(shape, "its whole mask", sizeof(float)); };
  return contender;
}

}  // namespace bench
