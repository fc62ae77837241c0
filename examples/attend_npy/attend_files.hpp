// What every variant does around its functor: files to tensors, tensors to files.
#pragma once

#include <cstddef>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "arguments.hpp"
#include "longspan/element.hpp"
#include "longspan/execution.hpp"
#include "longspan/view.hpp"
#include "npy.hpp"
#include "staged_file.hpp"

namespace attend_npy {

/// [B, H, N, d] with values of T; a file of rank 2 or 3 is one batch row, or one head of one.
template <class T>
class Tensor {
 public:
  explicit Tensor(npy::Array array)
      : shape_(std::move(array.shape)),
        values_(std::visit([](auto& values) { return converted(std::move(values)); }, array.values)) {}

  const std::vector<Index>& shape() const noexcept { return shape_; }
  Index dimension_from_end(std::size_t n) const {
    return n < shape_.size() ? shape_[shape_.size() - 1 - n] : 1;
  }

  longspan::TensorView<const T> view() const {
    return longspan::compact_view(values_.data(), dimension_from_end(3), dimension_from_end(2),
                                  dimension_from_end(1), dimension_from_end(0));
  }

 private:
  template <class Value>
  static std::vector<T> converted(std::vector<Value>&& values) {
    if constexpr (std::is_same_v<T, Value>) {
      return std::move(values);
    } else {
      std::vector<T> result;
      result.reserve(values.size());
      for (const Value value : values) result.push_back(static_cast<T>(value));
      return result;
    }
  }

  std::vector<Index> shape_;
  std::vector<T> values_;
};

inline npy::Array read_tensor(const std::string& path) {
  npy::Array array = npy::read(path);
  if (array.shape.size() < 2 || array.shape.size() > 4) {
    throw Error(path + ": has the shape " + npy::shape_text(array.shape) +
                ", wanted 2 to 4 dimensions: [N, d], [H, N, d] or [B, H, N, d]");
  }
  return array;
}

inline std::vector<Index> without_last(std::vector<Index> shape) {
  shape.pop_back();
  return shape;
}

inline std::size_t checked_count(const std::string& path, const std::vector<Index>& shape) {
  const auto count = npy::value_count(shape);
  if (!count) {
    throw Error(path + ": would have the shape " + npy::shape_text(shape) + ", too large for any memory");
  }
  return static_cast<std::size_t>(*count);
}

/// A tensor that a variant gives beside its output.
template <class Real>
struct FurtherOutput {
  std::string path;
  std::vector<Index> shape;
  std::vector<Real> values;
};

/// By value: each file's values are freed when they are in the type of the kernel.
template <class T, class Attend>
void attend_in(const Arguments& arguments, npy::Array q_file, npy::Array k_file, npy::Array v_file,
               const Attend& attend) {
  using Real = longspan::Arithmetic<T>;
  const Tensor<T> q(std::move(q_file)), k(std::move(k_file)), v(std::move(v_file));
  const std::vector<Index> lse_shape = without_last(q.shape());
  std::vector<Index> out_shape = lse_shape;
  out_shape.push_back(v.dimension_from_end(0));
  std::vector<Real> out(checked_count(arguments.out, out_shape));
  std::vector<Real> lse(checked_count(arguments.lse, lse_shape));

  const auto q_view = q.view();
  std::vector<FurtherOutput<Real>> further;
  const auto call = [&] {
    return attend(
        q_view, k.view(), v.view(),
        longspan::compact_view(out.data(), q_view.batch, q_view.heads, q_view.rows, out_shape.back()),
        longspan::compact_rows_view(lse.data(), q_view.batch, q_view.heads, q_view.rows),
        longspan::openmp{arguments.threads});
  };
  if constexpr (std::is_void_v<decltype(call())>) {
    call();
  } else {
    further = call();
  }

  std::vector<StagedFile> outputs;
  outputs.reserve(2 + further.size());
  npy::write(outputs.emplace_back(arguments.out), out_shape, std::span<const Real>(out));
  if (!arguments.lse.empty()) {
    npy::write(outputs.emplace_back(arguments.lse), lse_shape, std::span<const Real>(lse));
  }
  for (const FurtherOutput<Real>& output : further) {
    npy::write(outputs.emplace_back(output.path), output.shape, std::span<const Real>(output.values));
  }
  StagedFile::put_in_place(outputs);
}

/// No two outputs may be one file.
inline void check_targets(const Arguments& arguments) {
  const std::pair<const char*, const std::string*> outputs[] = {{"--out", &arguments.out},
                                                                {"--lse", &arguments.lse},
                                                                {"--memory-out", &arguments.memory_out},
                                                                {"--norm-out", &arguments.norm_out}};
  std::map<std::filesystem::path, const char*> targets;
  for (const auto& [option, path] : outputs) {
    if (path->empty()) continue;
    const auto [target, is_new] = targets.emplace(checked_target(*path), option);
    if (!is_new) {
      throw Error("the options " + std::string(target->second) + " and " + option + " name the same file");
    }
  }
}

/// Calls attend(q, k, v, out, lse, executor) on the tensors of the files. What it may return, a list of
/// FurtherOutput, is written too.
template <class Attend>
void attend_files(const Arguments& arguments, const Attend& attend) {
  check_targets(arguments);
  npy::Array q = read_tensor(arguments.q), k = read_tensor(arguments.k), v = read_tensor(arguments.v);
  bool any_double = false;
  for (const npy::Array* array : {&q, &k, &v}) {
    any_double = any_double || std::holds_alternative<std::vector<double>>(array->values);
  }
  const auto run = [&]<class T>(std::type_identity<T>) {
    attend_in<T>(arguments, std::move(q), std::move(k), std::move(v), attend);
  };
  switch (arguments.storage.value_or(any_double ? Storage::f64 : Storage::f32)) {
    case Storage::f32:
      return run(std::type_identity<float>());
    case Storage::f64:
      return run(std::type_identity<double>());
    case Storage::bf16:
      return run(std::type_identity<Eigen::bfloat16>());
    case Storage::f16:
      return run(std::type_identity<Eigen::half>());
  }
}

}  // namespace attend_npy
