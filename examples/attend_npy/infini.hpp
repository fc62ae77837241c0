// attend_npy infini: Infini-attention in chunks, and the memory that it leaves.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "arguments.hpp"
#include "attend_files.hpp"
#include "chunks.hpp"
#include "longspan/stream/infini_memory.hpp"

namespace attend_npy {

inline constexpr std::string_view infini_help =
    "segment=S                tokens of a segment\n"
    "rule=linear|delta        how a segment is written to the memory (default linear)\n"
    "first=gate|bypass        bypass: local attention alone while nothing is written (default gate)\n"
    "chunks=n,n,...           tokens that come together (default: all of them)\n"
    "flush=0|1                1: the last segment is written too if it is not full (default 0)\n"
    "scale=x                  multiplies q.k, not 0 (default 1 / sqrt(head_dim))\n";

/// Streams its tokens through a memory, and gives that as a further output.
struct InfiniStream {
  longspan::infini_attention<> attend;
  std::vector<Index> chunks;
  bool flush = false;
  std::string memory_out, norm_out;

  template <class Q, class K, class V, class Out, class Lse, class E>
  auto operator()(const Q& q, const K& k, const V& v, const Out& out, const Lse&, const E& executor) const {
    if (q.rows != k.rows) {
      throw Error("infini: q has " + std::to_string(q.rows) + " rows and k has " + std::to_string(k.rows) +
                  ", wanted one query for each key");
    }
    using Real = longspan::Arithmetic<std::remove_const_t<typename Q::Element>>;
    auto memory = attend.stream<Real>({q.batch, q.heads, k.heads, q.cols, v.cols});
    Index first = 0;
    for (const Index length : chunks_of(chunks, q.rows)) {
      memory.extend(q.slice_rows(first, length), k.slice_rows(first, length), v.slice_rows(first, length),
                    out.slice_rows(first, length), executor);
      first += length;
    }
    if (flush) memory.flush(executor);

    FurtherOutput<Real> m{memory_out, {q.batch, k.heads, q.cols, v.cols}, {}};
    FurtherOutput<Real> z{norm_out, {q.batch, k.heads, q.cols}, {}};
    for (Index b = 0; b < q.batch; ++b) {
      for (Index h = 0; h < k.heads; ++h) {
        for (Index c = 0; c < q.cols; ++c) {
          z.values.push_back(memory.norm(b, h, c));
          for (Index column = 0; column < v.cols; ++column)
            m.values.push_back(memory.memory(b, h, c, column));
        }
      }
    }
    std::vector<FurtherOutput<Real>> wanted;
    if (!memory_out.empty()) wanted.push_back(std::move(m));
    if (!norm_out.empty()) wanted.push_back(std::move(z));
    return wanted;
  }
};

inline void infini(const Arguments& arguments) {
  const Keys& keys = arguments.keys;
  keys.allow("infini",
             std::array<std::string_view, 6>{"segment", "rule", "first", "chunks", "flush", "scale"});
  if (!arguments.lse.empty()) throw Error("infini has no lse: its output is no softmax over all keys");
  InfiniStream stream;
  const auto segment = keys.positive_integer("segment");
  if (!segment) throw Error("the key segment is missing");
  stream.attend.segment = *segment;
  stream.attend.rule = keys.choice("rule", "linear", "delta") == 0 ? longspan::InfiniRule::linear
                                                                   : longspan::InfiniRule::delta;
  stream.attend.first = keys.choice("first", "gate", "bypass") == 0 ? longspan::InfiniFirst::gate
                                                                    : longspan::InfiniFirst::bypass;
  if (const auto scale = keys.nonzero("scale")) stream.attend.local.scale = *scale;
  stream.chunks = keys.positive_integers("chunks");
  stream.flush = keys.flag("flush");
  stream.memory_out = arguments.memory_out;
  stream.norm_out = arguments.norm_out;

  std::vector<float> beta;
  if (!arguments.beta.empty()) {
    const npy::Array file = npy::read(arguments.beta);
    if (file.shape.empty() || file.shape.size() > 2) {
      throw Error(arguments.beta + ": has the shape " + npy::shape_text(file.shape) +
                  ", wanted [1], [H] or [H, dv]");
    }
    std::visit([&](const auto& values) { beta.assign(values.begin(), values.end()); }, file.values);
    const Index cols = file.shape.size() == 2 ? file.shape[1] : 1;
    stream.attend.beta = {beta.data(), file.shape[0], cols, cols};
  }
  attend_files(arguments, stream);
}

}  // namespace attend_npy
