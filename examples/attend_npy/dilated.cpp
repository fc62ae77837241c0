// attend_npy dilated: LongNet's dilated attention.
#include <array>
#include <string_view>
#include <utility>

#include "attend_files.hpp"
#include "dilated_functor.hpp"
#include "gradient.hpp"
#include "longspan/dilation.hpp"
#include "longspan/gradient/dilated_attention.hpp"
#include "longspan/mask.hpp"
#include "variants.hpp"

namespace attend_npy {
namespace {

void run(const Arguments& arguments) {
  const Keys& keys = arguments.keys;
  keys.allow("dilated", std::array<std::string_view, 8>{"segments", "dilations", "causal", "phase", "overlap",
                                                        "zero_pad", "scale", "mixing"});
  // With and without causal the mask is a window, so the kernel is compiled only once.
  longspan::window mask;
  if (keys.flag("causal")) mask.right = 0;
  auto attend = dilated_functor(keys, mask);
  attend.zero_pad_compat = keys.flag("zero_pad");
  const auto mixing =
      keys.choice("mixing", "exact", "detached") == 0 ? longspan::Mixing::exact : longspan::Mixing::detached;
  Inputs inputs = read_inputs(arguments);
  if (arguments.dout.empty()) return attend_files(arguments, std::move(inputs), attend);
  const WithGradient with_gradient(longspan::gradient(attend, mixing), arguments, inputs);
  attend_files(arguments, std::move(inputs), with_gradient);
}

}  // namespace

const Variant dilated{
    "dilated",
    "segments=W,W,...         segment lengths, one for each branch\n"
    "dilations=r,r,...        their dilations (default 1 each)\n"
    "causal=0|1               1: a query sees no later key (default 0)\n"
    "phase=modulo|blocked     offset of head h: h mod r, or as torchscale (default modulo)\n"
    "overlap=multiset|set     a key of several branches counts several times, or once (default multiset)\n"
    "zero_pad=0|1             1: short segments are padded with zeros as in torchscale (default 0)\n"
    "scale=x                  multiplies q.k, not 0 (default 1 / sqrt(head_dim))\n"
    "mixing=exact|detached    --dout: weights of the branches have gradients, or are constants as in "
    "torchscale\n"
    "                         (default exact)\n",
    run,
    false,
    false,
    true};

}  // namespace attend_npy
