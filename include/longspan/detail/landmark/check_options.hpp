// The options of landmark attention, checked against a call.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>

#include "longspan/detail/call/check_view.hpp"
#include "longspan/detail/call/finite.hpp"
#include "longspan/error.hpp"
#include "longspan/landmarks.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Throws Error if landmarks, gate_keep or control do not fit the call; `is_grouped` as LandmarkSoftmax::grouped.
template <class Problem>
void check_landmark_options(std::string_view name, const Problem& call, const landmarks& at, bool is_grouped,
                            const TensorView<const float>& gate_keep, const landmark_control& control) {
  at.check(name, call.k.batch, call.kv_len());
  if (!is_grouped && (gate_keep.data != nullptr || control.cmt.data != nullptr))
    refuse(name, "softmax", "not grouped", "grouped, which gate_keep and control require");
  Index blocks = 0;
  for (Index b = 0; b < (at.same_in_all_rows() ? 1 : call.k.batch); ++b)
    blocks = (std::max)(blocks, at.count(b, call.kv_len()));
  if (gate_keep.data != nullptr) check_view(name, "gate_keep", gate_keep);
  if (gate_keep.data != nullptr && (gate_keep.batch != call.q.batch || gate_keep.heads != call.q.heads ||
                                    gate_keep.rows != call.q.rows || gate_keep.cols < blocks)) {
    refuse(name, "gate_keep", shape_text(gate_keep),
           shape_text(call.q.batch, call.q.heads, call.q.rows, blocks));
  }
  if (control.cmt.data == nullptr) return;
  if (control.cmt.batch != call.q.batch || control.cmt.heads != call.q.heads ||
      control.cmt.rows != call.q.rows) {
    refuse(name, "control.cmt", shape_text(control.cmt), shape_text(call.q.batch, call.q.heads, call.q.rows));
  }
  if (!is_finite(control.cutoff))
    refuse(name, "control.cutoff", number_text(control.cutoff), "a finite number");
  const auto& kinds = control.blocks;
  check_view(name, "control.blocks", kinds);
  if ((kinds.rows != 1 && kinds.rows != call.k.batch) || kinds.cols < blocks) {
    refuse(name, "control.blocks", "[" + std::to_string(kinds.rows) + ", " + std::to_string(kinds.cols) + "]",
           "[" + std::to_string(call.k.batch) + ", " + std::to_string(blocks) + "]");
  }
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
