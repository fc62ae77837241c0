// Runs a variant of attention with tensors from .npy files that a model has dumped, so that a port can be compared
// with its original layer by layer. Copy this folder to run your own functor: write a file like softmax.cpp for it,
// and add it to variants.hpp, CMakeLists.txt and `variants`.

#include <cstdio>
#include <exception>
#include <longspan/amx.hpp>
#include <new>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "arguments.hpp"
#include "variants.hpp"

namespace {

using namespace attend_npy;

constexpr const Variant* variants[] = {&softmax, &softmax_stream, &landmark, &landmark_stream,
                                       &infini,  &hybrid_stream,  &dilated,  &dilated_stream};

constexpr std::string_view usage =
    "usage: attend_npy VARIANT [key=value ...] --q q.npy --k k.npy --v v.npy --out out.npy\n"
    "                  [--lse lse.npy] [--dtype f32|f64|bf16|f16] [--threads n]\n"
    "                  [--layout bhnd|bnhd] [--beta beta.npy] [--memory-out m.npy] [--norm-out z.npy]\n"
    "                  [--dout dout.npy [--dlse dlse.npy] [--dq dq.npy] [--dk dk.npy] [--dv dv.npy]]\n"
    "\n"
    "Attention on tensors in .npy files, float32 or float64 in C order.\n"
    "\n"
    "  --q, --k, --v  in: [B, H, N, d], [B, Hkv, M, d], [B, Hkv, M, dv]; also [H, N, d] and [N, d]\n"
    "  --out          out: as q, with dv for d\n"
    "  --lse          out: the natural log-sum-exp of each query's scores, [B, H, N] in every layout\n"
    "  --layout       bnhd: q, k, v and out are [B, N, H, d], or [N, H, d] (default: bhnd, as above)\n"
    "  --beta         in: the gate of a memory, [1], [H] or [H, dv]; 0 if omitted\n"
    "  --memory-out   out: the memory of infini after the last token, [B, Hkv, d, dv]\n"
    "  --norm-out     out: its norm, [B, Hkv, d]\n"
    "  --dout         in: the gradient of a loss with respect to out, as out\n"
    "  --dlse         in: its gradient with respect to lse, as lse; 0 if omitted\n"
    "  --dq, --dk, --dv  out: its gradients with respect to q, k and v, as q, k and v\n"
    "  --dtype        type to which q, k and v are rounded (default: f64 if one of the files is\n"
    "                 float64, otherwise f32); arithmetic and outputs are float64 with f64, otherwise "
    "float32\n"
    "  --threads      default: OpenMP's own number; the result does not depend on it\n"
    "\n"
    "A line on stderr has the shapes, and a warning tells how many queries see no key. An output must not "
    "be\n"
    "one of the inputs under any name.\n";

std::string help() {
  std::string text(usage);
  for (const Variant* variant : variants) {
    text.append("\nkeys of ").append(variant->name).append("\n\n");
    for (std::string_view lines = variant->help; !lines.empty();) {
      const std::size_t length = lines.find('\n') + 1;
      text.append("  ").append(lines.substr(0, length));
      lines.remove_prefix(length);
    }
  }
  return text;
}

void check_options(const Variant& variant, const Arguments& arguments) {
  if (!variant.has_gates && !arguments.beta.empty()) {
    std::vector<std::string_view> names;
    for (const Variant* other : variants) {
      if (other->has_gates) names.push_back(other->name);
    }
    throw Error("the option --beta is for " + listed(names));
  }
  if (!variant.shows_memory && !(arguments.memory_out + arguments.norm_out).empty())
    throw Error("the options --memory-out and --norm-out are for infini");
  const std::string gradients = arguments.dq + arguments.dk + arguments.dv;
  if (!variant.has_gradient && !(arguments.dout + arguments.dlse + gradients).empty())
    throw Error("the options --dout, --dlse, --dq, --dk and --dv are for softmax");
  if (arguments.dout.empty() && !(arguments.dlse + gradients).empty())
    throw Error("the options --dlse, --dq, --dk and --dv need --dout");
}

void run(std::string_view name, std::span<const std::string_view> words) {
  std::vector<std::string_view> names;
  for (const Variant* variant : variants) {
    if (variant->name == name) {
      const Arguments arguments = parse_arguments(words);
      check_options(*variant, arguments);
      return variant->run(arguments);
    }
    names.push_back(variant->name);
  }
  throw Error("unknown variant '" + std::string(name) + "', the variants are: " + listed(names));
}

}  // namespace

int main(int argc, char** argv) {
  longspan::request_amx();
  const std::vector<std::string_view> words(argv + (argc > 0 ? 1 : 0), argv + argc);
  if (words.empty()) {
    std::fputs(help().c_str(), stderr);
    return 2;
  }
  for (const std::string_view word : words) {
    if (word == "--help") return std::fputs(help().c_str(), stdout) < 0 ? 2 : 0;
  }
  try {
    run(words.front(), std::span(words).subspan(1));
    return 0;
  } catch (const std::bad_alloc&) {
    std::fputs("attend_npy: not enough memory for these tensors\n", stderr);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "attend_npy: %s\n", error.what());
  }
  return 2;
}
