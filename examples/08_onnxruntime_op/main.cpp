// Runs a model of one node, the operator, and compares it with exact attention in double.

#include <onnxruntime_cxx_api.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <longspan/longspan.hpp>
#include <longspan/reference/softmax_attention.hpp>
#include <string>
#include <vector>

#include "one_node_model.hpp"

using longspan::Index;
using longspan::TensorView;

constexpr Index head_dim = 64, heads = 8, kv_heads = 2;

/// [1, tokens, heads * head_dim]
struct Rows {
  Index tokens, count;
  std::vector<float> values = std::vector<float>(static_cast<std::size_t>(tokens * count * head_dim));

  std::vector<std::int64_t> shape() const { return {1, tokens, count * head_dim}; }
  TensorView<const float> view() const {
    return {values.data(), 1, count, tokens, head_dim, tokens * count * head_dim, head_dim, count * head_dim};
  }
  Ort::Value tensor() {
    static const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    const auto sizes = shape();
    return Ort::Value::CreateTensor<float>(memory, values.data(), values.size(), sizes.data(), sizes.size());
  }
};

/// Numbers in place of those of a projection.
static Rows projected(Index tokens, Index count, double frequency) {
  Rows x{.tokens = tokens, .count = count};
  for (std::size_t n = 0; n < x.values.size(); ++n)
    x.values[n] = static_cast<float>(std::sin(frequency * static_cast<double>(n)));
  return x;
}

int main() {
  const Ort::Env environment(ORT_LOGGING_LEVEL_WARNING, "onnxruntime_op");
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(4);
  options.RegisterCustomOpsLibrary(LIBRARY);
  const std::string model = one_node_model({{"", 17}, {"longspan", 1}}, "Attention",
                                           {{"num_heads", heads}, {"kv_num_heads", kv_heads}, {"causal", 1}},
                                           {{"query", {1, -1, heads * head_dim}},
                                            {"key", {1, -1, kv_heads * head_dim}},
                                            {"value", {1, -1, kv_heads * head_dim}}},
                                           {"output", {1, -1, heads * head_dim}});
  Ort::Session session(environment, model.data(), model.size(), options);

  constexpr Index length = 530;
  Rows k = projected(length, kv_heads, 0.2), v = projected(length, kv_heads, 0.1);
  bool right = true;
  for (const Index rows : {500, 1}) {
    Rows q = projected(rows, heads, 0.3);
    const char *names[] = {"query", "key", "value"}, *results[] = {"output"};
    const Ort::Value inputs[] = {q.tensor(), k.tensor(), v.tensor()};
    const auto outputs = session.Run(Ort::RunOptions{nullptr}, names, inputs, 3, results, 1);
    const float* got = outputs[0].GetTensorData<float>();

    std::vector<double> exact(q.values.size());
    TensorView<double> out = {exact.data(),    1, heads, rows, head_dim, rows * heads * head_dim, head_dim,
                              heads * head_dim};
    longspan::reference::exact{longspan::softmax_attention{longspan::causal{}}}(q.view(), k.view(), v.view(),
                                                                                out);
    double off = 0;
    for (std::size_t n = 0; n < exact.size(); ++n) {
      const double difference = std::abs(static_cast<double>(got[n]) - exact[n]);
      if (!(difference <= off)) off = difference;  // NaN counts as the largest
    }
    std::printf("%td queries over %td keys: %.1e from exact attention\n", rows, length, off);
    right = right && off < 1e-5;
  }
  return right ? 0 : 1;
}
