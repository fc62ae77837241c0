// attend_npy softmax: exact attention.
#include <array>
#include <string_view>
#include <utility>

#include "attend_files.hpp"
#include "gradient.hpp"
#include "longspan/score.hpp"
#include "longspan/softmax_attention.hpp"
#include "softmax_mask.hpp"
#include "variants.hpp"

namespace attend_npy {
namespace {

void run(const Arguments& arguments) {
  const Keys& keys = arguments.keys;
  keys.allow("softmax", std::array<std::string_view, 4>{"causal", "window", "scale", "softcap"});
  const longspan::window mask = softmax_mask(keys, keys.flag("causal"));
  const auto scale = keys.nonzero("scale");
  const auto cap = keys.positive_float("softcap");
  const auto attend_with = [&](auto attend) {
    if (scale) attend.scale = *scale;
    Inputs inputs = read_inputs(arguments);
    if (arguments.dout.empty()) return attend_files(arguments, std::move(inputs), attend);
    const WithGradient with_gradient(attend, arguments, inputs);
    attend_files(arguments, std::move(inputs), with_gradient);
  };
  if (cap) {
    attend_with(longspan::softmax_attention{mask, longspan::softcap{*cap}});
  } else {
    attend_with(longspan::softmax_attention{mask});
  }
}

}  // namespace

const Variant softmax{"softmax",
                      "causal=0|1   1: a query sees no later key (default 0)\n"
                      "window=W     a query sees the keys less than W positions away\n"
                      "scale=x      multiplies q.k, not 0 (default 1 / sqrt(head_dim))\n"
                      "softcap=c    scores become c * tanh(score / c)\n",
                      run,
                      false,
                      false,
                      true};

}  // namespace attend_npy
