// What every variant does around its functor: files to tensors, tensors to files.
#pragma once

#include <cstddef>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "arguments.hpp"
#include "longspan/execution.hpp"
#include "longspan/view.hpp"
#include "npy.hpp"

namespace attend_npy {

/// The tensors of --q, --k and --v, and the type to which they are to be rounded.
struct Inputs {
  npy::Array q, k, v;
  Storage storage = Storage::f32;
};

/// Refuses outputs that cannot be written, or two that are one file, before it reads.
Inputs read_inputs(const Arguments& arguments);

/// The gates of --beta, [1], [H] or [H, dv]; no rows where it is left out.
struct Gates {
  std::vector<float> values;
  Index rows = 0, cols = 0;

  longspan::MatrixView<const float> view() const { return {values.data(), rows, cols, cols}; }
};
Gates read_gates(const Arguments& arguments);

/// How many values a file of that shape would hold.
std::size_t checked_count(const std::string& path, const std::vector<Index>& shape);

/// Rounds the values to the type, which they need not be in.
void round_to(Storage storage, npy::Array& array);

/// [B, H, N, d] with values of Real, which is float or double; a file of rank 2 or 3 is one batch row, or one
/// head of one.
template <class Real>
class Tensor {
 public:
  explicit Tensor(npy::Array array);

  const std::vector<Index>& shape() const noexcept { return shape_; }
  Index dimension_from_end(std::size_t n) const {
    return n < shape_.size() ? shape_[shape_.size() - 1 - n] : 1;
  }

  longspan::TensorView<const Real> view() const {
    return longspan::compact_view(values_.data(), dimension_from_end(3), dimension_from_end(2),
                                  dimension_from_end(1), dimension_from_end(0));
  }

 private:
  std::vector<Index> shape_;
  std::vector<Real> values_;
};

/// A tensor that a variant gives.
template <class Real>
struct Output {
  std::string path;  ///< empty: not wanted
  std::vector<Index> shape;
  std::vector<Real> values;
};

/// All of them, or none. Real: float or double.
template <class Real>
void write_outputs(const std::vector<Output<Real>>& outputs);

/// By value: each file's values are freed when they are in the type of the kernel.
template <class Real, class Attend>
void attend_in(const Arguments& arguments, Inputs inputs, const Attend& attend) {
  const Tensor<Real> q(std::move(inputs.q)), k(std::move(inputs.k)), v(std::move(inputs.v));
  Output<Real> out{arguments.out, q.shape(), {}}, lse{arguments.lse, q.shape(), {}};
  out.shape.back() = v.dimension_from_end(0);
  lse.shape.pop_back();
  out.values.resize(checked_count(out.path, out.shape));
  lse.values.resize(checked_count(lse.path, lse.shape));

  const auto q_view = q.view();
  const auto call = [&] {
    return attend(
        q_view, k.view(), v.view(),
        longspan::compact_view(out.values.data(), q_view.batch, q_view.heads, q_view.rows, out.shape.back()),
        longspan::compact_rows_view(lse.values.data(), q_view.batch, q_view.heads, q_view.rows),
        longspan::openmp{arguments.threads});
  };
  std::vector<Output<Real>> outputs;
  if constexpr (std::is_void_v<decltype(call())>) {
    call();
  } else {
    outputs = call();
  }
  outputs.insert(outputs.begin(), {std::move(out), std::move(lse)});
  write_outputs(outputs);
}

/// Calls attend(q, k, v, out, lse, executor) on the tensors of the files, as double with --dtype f64, else
/// as float, rounded to that type: bit for bit what the kernels give for 16-bit tensors, with half as many of
/// them to compile. What the call may return, a list of Output, is written too.
template <class Attend>
void attend_files(const Arguments& arguments, Inputs inputs, const Attend& attend) {
  if (inputs.storage == Storage::f64) return attend_in<double>(arguments, std::move(inputs), attend);
  for (npy::Array* array : {&inputs.q, &inputs.k, &inputs.v}) round_to(inputs.storage, *array);
  attend_in<float>(arguments, std::move(inputs), attend);
}

}  // namespace attend_npy
