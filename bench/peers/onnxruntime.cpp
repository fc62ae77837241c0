// ONNX Runtime: the operator Attention, in a model of one node.
#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <iostream>

#include "08_onnxruntime_op/one_node_model.hpp"
#include "peers/peers.hpp"

namespace bench {
namespace {

/// Debian's build registers every operator twice when the first model is loaded, and prints 1258 lines about that.
struct Silence {
  Silence() { std::cerr.setstate(std::ios::failbit); }
  ~Silence() { std::cerr.clear(); }
};

/// The Attention operator of the ONNX standard. com.microsoft's MultiHeadAttention transposes heads, needs as many KV
/// heads as heads, and takes 1.07 to 1.2 times as long (8 heads, 512 tokens, d = 64, two threads, Attention: 1.77 ms,
/// MultiHeadAttention: 2.14 ms). ONNX Runtime has its own threads, while those of OpenMP still spin after the previous
/// contender: at 512 tokens 2.4 ms, with OMP_WAIT_POLICY=passive 2.0 ms.
class OrtAttention {
 public:
  explicit OrtAttention(Index threads) {
    options_.SetIntraOpNumThreads(static_cast<int>(threads));
    options_.AddConfigEntry("session.force_spinning_stop",
                            "1");  // its threads must not spin during the next contender's time
  }

  void prepare(const Inputs<float>& in) {
    const Silence silence;
    const auto q = in.q.view(), k = in.k.view(), v = in.v.view();
    auto out = q;
    out.cols = v.cols;
    const std::string model =
        one_node_model({{"", 23}}, "Attention", {{"is_causal", 1}},
                       {{"q", shape_of(q)}, {"k", shape_of(k)}, {"v", shape_of(v)}}, {"out", shape_of(out)});
    session_ = Ort::Session(environment_, model.data(), model.size(), options_);
    inputs_.clear();
    for (const auto& x : {q, k, v}) inputs_.push_back(where_it_lies(x));
  }

  void run(const longspan::TensorView<float>& out) {
    static constexpr const char *inputs[] = {"q", "k", "v"}, *outputs[] = {"out"};
    Ort::Value result = where_it_lies(out);
    session_.Run(Ort::RunOptions{nullptr}, inputs, inputs_.data(), 3, outputs, &result, 1);
  }

 private:
  static std::vector<std::int64_t> shape_of(const longspan::TensorView<const float>& x) {
    return {x.batch, x.heads, x.rows, x.cols};
  }
  Ort::Value where_it_lies(const longspan::TensorView<const float>& x) const {
    const std::vector<std::int64_t> shape = shape_of(x);
    const auto size = static_cast<std::size_t>(x.batch * x.heads * x.rows * x.cols);
    return Ort::Value::CreateTensor<float>(memory_, const_cast<float*>(x.data), size, shape.data(),
                                           shape.size());
  }

  Ort::Env environment_{ORT_LOGGING_LEVEL_ERROR, "compare"};
  Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
  Ort::SessionOptions options_;
  Ort::Session session_{nullptr};
  std::vector<Ort::Value> inputs_;
};

}  // namespace

Contender onnxruntime(Index threads) {
  Contender contender =
      peer<OrtAttention>("onnxruntime", "ONNX Runtime " + Ort::GetVersionString() + ": Attention", threads);
  contender.obstacle = [](const Shape& shape) {
    return too_large(shape, "all scores", sizeof(float) * static_cast<double>(shape.batch * shape.heads));
  };
  return contender;
}

}  // namespace bench
