// attend_npy landmark: grouped softmax over blocks with landmarks.
#include <array>
#include <string_view>

#include "attend_files.hpp"
#include "longspan/landmark_attention.hpp"
#include "longspan/mask.hpp"
#include "variants.hpp"

namespace attend_npy {
namespace {

void run(const Arguments& arguments) {
  const Keys& keys = arguments.keys;
  keys.allow("landmark", std::array<std::string_view, 4>{"block", "landmarks", "causal", "scale"});
  const auto block = keys.positive_integer("block");
  const auto list = keys.rising_integers("landmarks");
  if (block.has_value() == list.has_value()) {
    throw Error(block ? "the keys block and landmarks are both given, wanted one"
                      : "the key block is missing, and so is landmarks");
  }
  // With and without causal the mask is a window, so the kernel is compiled only once.
  longspan::window mask;
  if (keys.flag("causal")) mask.right = 0;
  longspan::landmark_attention attend{
      block ? longspan::landmarks::every(*block) : longspan::landmarks::at(*list), mask};
  if (const auto scale = keys.nonzero("scale")) attend.scale = *scale;
  attend_files(arguments, read_inputs(arguments), attend);
}

}  // namespace

const Variant landmark{
    "landmark",
    "block=B              every B-th key is a landmark, the last of its block\n"
    "landmarks=7,15,23    or: these keys are, in every batch row; none after `landmarks=`\n"
    "causal=0|1           1: a query sees no later key (default 0)\n"
    "scale=x              multiplies q.k, not 0 (default 1 / sqrt(head_dim))\n",
    run};

}  // namespace attend_npy
