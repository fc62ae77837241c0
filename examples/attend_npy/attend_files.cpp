#include "attend_files.hpp"

#include <filesystem>
#include <map>
#include <span>
#include <variant>

#include "longspan/eigen.hpp"
#include "staged_file.hpp"

namespace attend_npy {
namespace {

npy::Array read_tensor(const std::string& path) {
  npy::Array array = npy::read(path);
  if (array.shape.size() < 2 || array.shape.size() > 4) {
    throw Error(path + ": has the shape " + npy::shape_text(array.shape) +
                ", wanted 2 to 4 dimensions: [N, d], [H, N, d] or [B, H, N, d]");
  }
  return array;
}

/// No two outputs may be one file.
void check_targets(const Arguments& arguments) {
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

template <class T, class Value>
void round_each(std::vector<Value>& values) {
  for (Value& value : values) value = static_cast<Value>(static_cast<T>(value));
}

}  // namespace

Inputs read_inputs(const Arguments& arguments) {
  check_targets(arguments);
  Inputs inputs{read_tensor(arguments.q), read_tensor(arguments.k), read_tensor(arguments.v)};
  bool any_double = false;
  for (const npy::Array* array : {&inputs.q, &inputs.k, &inputs.v}) {
    any_double = any_double || std::holds_alternative<std::vector<double>>(array->values);
  }
  inputs.storage = arguments.storage.value_or(any_double ? Storage::f64 : Storage::f32);
  return inputs;
}

Gates read_gates(const Arguments& arguments) {
  if (arguments.beta.empty()) return {};
  const npy::Array file = npy::read(arguments.beta);
  if (file.shape.empty() || file.shape.size() > 2) {
    throw Error(arguments.beta + ": has the shape " + npy::shape_text(file.shape) +
                ", wanted [1], [H] or [H, dv]");
  }
  Gates gates{{}, file.shape[0], file.shape.size() == 2 ? file.shape[1] : 1};
  std::visit([&](const auto& values) { gates.values.assign(values.begin(), values.end()); }, file.values);
  return gates;
}

std::size_t checked_count(const std::string& path, const std::vector<Index>& shape) {
  const auto count = npy::value_count(shape);
  if (!count) {
    throw Error(path + ": would have the shape " + npy::shape_text(shape) + ", too large for any memory");
  }
  return static_cast<std::size_t>(*count);
}

void round_to(Storage storage, npy::Array& array) {
  const auto rounded = [&](auto& values) {
    switch (storage) {
      case Storage::f32:
        return round_each<float>(values);
      case Storage::f64:
        return;
      case Storage::bf16:
        return round_each<Eigen::bfloat16>(values);
      case Storage::f16:
        return round_each<Eigen::half>(values);
    }
  };
  std::visit(rounded, array.values);
}

template <class Real>
Tensor<Real>::Tensor(npy::Array array) : shape_(std::move(array.shape)) {
  if (auto* values = std::get_if<std::vector<Real>>(&array.values)) {
    values_ = std::move(*values);
  } else {
    std::visit([&](const auto& from) { values_.assign(from.begin(), from.end()); }, array.values);
  }
}
template class Tensor<float>;
template class Tensor<double>;

template <class Real>
void write_outputs(const std::vector<Output<Real>>& outputs) {
  std::vector<StagedFile> files;
  files.reserve(outputs.size());
  for (const Output<Real>& output : outputs) {
    if (!output.path.empty())
      npy::write(files.emplace_back(output.path), output.shape, std::span<const Real>(output.values));
  }
  StagedFile::put_in_place(files);
}
template void write_outputs(const std::vector<Output<float>>&);
template void write_outputs(const std::vector<Output<double>>&);

}  // namespace attend_npy
