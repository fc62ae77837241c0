// The common part of all variants: files to tensors, and tensors to files.
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

/// The tensors of --q, --k and --v, and the type to which they will be rounded.
struct Inputs {
  npy::Array q, k, v;
  Storage storage = Storage::f32;
};

/// Reads a file [N, d], [H, N, d] or [B, H, N, d], or with rows before heads; throws Error if it has another rank.
npy::Array read_tensor(const std::string& path, Layout layout);

/// Reads the inputs. Before that it throws Error if an output cannot be written, is an input, or is the same file as
/// another output.
Inputs read_inputs(const Arguments& arguments);

/// The gates of --beta, [1], [H] or [H, dv]; without rows if it is omitted.
struct Gates {
  std::vector<float> values;
  Index rows = 0, cols = 0;

  longspan::MatrixView<const float> view() const { return {values.data(), rows, cols, cols}; }
};
Gates read_gates(const Arguments& arguments);

/// The number of values of a file with that shape. Throws Error if it is too large.
std::size_t checked_count(const std::string& path, const std::vector<Index>& shape);

/// Rounds the values to the type; they stay stored in their own type.
void round_to(Storage storage, npy::Array& array);

/// A tensor [B, H, N, d] or [B, N, H, d] in the file; a file of rank 2 is one head of one batch row, one of rank 3 one
/// batch row.
struct FileShape {
  std::vector<Index> of_file;
  Layout layout = Layout::bhnd;

  Index from_end(std::size_t n) const { return n < of_file.size() ? of_file[of_file.size() - 1 - n] : 1; }
  bool rows_first() const { return layout == Layout::bnhd && of_file.size() > 2; }
  Index heads() const { return from_end(rows_first() ? 1 : 2); }
  Index rows() const { return from_end(rows_first() ? 2 : 1); }

  /// [B, H, N] without the dimensions that the file does not have: the shape of an lse.
  std::vector<Index> rows_of_heads() const;

  /// The tensor as [B, H, N, d], whatever the layout and rank of the file.
  template <class T>
  longspan::TensorView<T> view(T* values) const {
    const Index cols = from_end(0), head = rows() * cols, row = heads() * cols;
    return {values,
            from_end(3),
            heads(),
            rows(),
            cols,
            heads() * head,
            rows_first() ? cols : head,
            rows_first() ? row : cols};
  }
};

/// The tensors with values of Real, which is float or double.
template <class Real>
class Tensor {
 public:
  Tensor(npy::Array array, Layout layout);

  const FileShape& shape() const noexcept { return shape_; }
  longspan::TensorView<const Real> view() const { return shape_.view(values_.data()); }

 private:
  FileShape shape_;
  std::vector<Real> values_;
};

/// Prints the shapes of q, k and v to stderr, unless they disagree; then the kernel throws an Error.
template <class Real>
void report_inputs(const longspan::TensorView<const Real>& q, const longspan::TensorView<const Real>& k,
                   const longspan::TensorView<const Real>& v);

/// Prints a warning to stderr if queries see no key, which is often the sign of a wrong layout.
template <class Real>
void warn_of_unseeing(const std::vector<Real>& lse, Index q_len, Index kv_len);

/// A tensor that a variant writes.
template <class Real>
struct Output {
  std::string path;  ///< empty: not requested
  std::vector<Index> shape;
  std::vector<Real> values;
};

/// Writes all outputs, or none if one fails. Real is float or double.
template <class Real>
void write_outputs(const std::vector<Output<Real>>& outputs);

/// Takes the inputs by value, so that the values of each file are freed after their conversion to the kernel's type.
template <class Real, class Attend>
void attend_in(const Arguments& arguments, Inputs inputs, const Attend& attend) {
  const Layout layout = arguments.layout;
  const Tensor<Real> q(std::move(inputs.q), layout), k(std::move(inputs.k), layout),
      v(std::move(inputs.v), layout);
  FileShape out_shape = q.shape();
  out_shape.of_file.back() = v.shape().from_end(0);
  Output<Real> out{arguments.out, out_shape.of_file, {}}, lse{arguments.lse, q.shape().rows_of_heads(), {}};
  out.values.resize(checked_count(out.path, out.shape));
  lse.values.resize(checked_count(lse.path, lse.shape));

  const auto q_view = q.view(), k_view = k.view(), v_view = v.view();
  report_inputs(q_view, k_view, v_view);
  const auto call = [&] {
    return attend(q_view, k_view, v_view, out_shape.view(out.values.data()),
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
  warn_of_unseeing(outputs[1].values, q_view.rows, k_view.rows);
}

/// Calls attend(q, k, v, out, lse, executor) with the tensors of the files, as double with --dtype f64, otherwise as
/// float with values rounded to the type. The result has the bits of kernels for 16-bit tensors, with half as many
/// kernels to compile. If the call returns a list of Output, these are written too.
template <class Attend>
void attend_files(const Arguments& arguments, Inputs inputs, const Attend& attend) {
  if (inputs.storage == Storage::f64) return attend_in<double>(arguments, std::move(inputs), attend);
  for (npy::Array* array : {&inputs.q, &inputs.k, &inputs.v}) round_to(inputs.storage, *array);
  attend_in<float>(arguments, std::move(inputs), attend);
}

}  // namespace attend_npy
