// eigen_naive: the baseline. It keeps all scores in memory, so it runs only up to 8192 tokens.
#include "support/eigen_naive.hpp"

#include <memory>

#include "compare/contender.hpp"
#include "support/format.hpp"

namespace bench {
namespace {

std::string square_too_large(const Shape& shape) {
  constexpr Index longest = 8192;
  if (shape.length <= longest) return {};
  const std::string n = std::to_string(shape.length), bytes = bytes_text(4.0 * std::pow(shape.length, 2));
  return "skipped: needs " + n + " x " + n + " floats, " + bytes + " per thread";
}

}  // namespace

Contender eigen_naive(Index threads) {
  const auto attend = std::make_shared<EigenNaive>(threads);
  Contender contender;
  contender.name = "eigen_naive";
  contender.description = "three lines of Eigen per head: all scores, row softmax, product with V";
  contender.baseline = true;
  contender.flop = causal_flop;
  contender.state_bytes = cache_bytes;
  contender.obstacle = square_too_large;
  contender.run = [attend](const Inputs<float>& in, longspan::TensorView<float> out) {
    (*attend)(in, out, Visible::causal);
  };
  return contender;
}

}  // namespace bench
