// ONNX Runtime: the operator Attention, in a model of one node that is built in memory.
#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <iostream>

#include "peers/peers.hpp"

namespace bench {
namespace {

/// Debian's build enters every operator twice when the first model is made, and says so in 1258 lines.
struct Silence {
  Silence() { std::cerr.setstate(std::ios::failbit); }
  ~Silence() { std::cerr.clear(); }
};

/// The standard's Attention, not com.microsoft's MultiHeadAttention: that transposes heads, takes as many KV heads
/// as heads, and takes 1.07 to 1.2 times as long (2.14 ms for 1.77 at 8 heads, 512 tokens, d = 64, two threads).
class OrtAttention {
 public:
  explicit OrtAttention(Index threads) {
    options_.SetIntraOpNumThreads(static_cast<int>(threads));
    options_.AddConfigEntry("session.force_spinning_stop", "1");  // not into the next contender's time
  }

  void prepare(const Inputs<float>& in) {
    const Silence silence;
    const auto q = in.q.view(), k = in.k.view(), v = in.v.view();
    longspan::TensorView<const float> out = q;
    out.cols = v.cols;
    std::vector<Ort::ValueInfo> inputs, outputs;
    inputs.push_back(declared("q", q));
    inputs.push_back(declared("k", k));
    inputs.push_back(declared("v", v));
    outputs.push_back(declared("out", out));

    constexpr std::int64_t yes = 1;
    std::vector<Ort::OpAttr> attributes;
    attributes.emplace_back("is_causal", &yes, 1, ORT_OP_ATTR_INT);
    Ort::Node attention("Attention", "", "attention", {"q", "k", "v"}, {"out"}, attributes);
    Ort::Graph graph;
    graph.SetInputs(inputs);
    graph.SetOutputs(outputs);
    graph.AddNode(attention);
    Ort::Model model({{"", 23}});
    model.AddGraph(graph);
    session_ = Ort::Session(environment_, model, options_);
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
  static Ort::ValueInfo declared(const char* name, const longspan::TensorView<const float>& x) {
    const Ort::TensorTypeAndShapeInfo shape(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, shape_of(x));
    return Ort::ValueInfo(name, Ort::TypeInfo::CreateTensorInfo(shape.GetConst()).GetConst());
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
