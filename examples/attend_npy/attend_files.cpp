#include "attend_files.hpp"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <span>
#include <string_view>
#include <system_error>
#include <variant>

#include "longspan/eigen.hpp"
#include "staged_file.hpp"

namespace attend_npy {

npy::Array read_tensor(const std::string& path, Layout layout) {
  npy::Array array = npy::read(path);
  if (array.shape.size() < 2 || array.shape.size() > 4) {
    throw Error(path + ": has the shape " + npy::shape_text(array.shape) +
                ", wanted 2 to 4 dimensions: [N, d], " +
                (layout == Layout::bhnd ? "[H, N, d] or [B, H, N, d]" : "[N, H, d] or [B, N, H, d]"));
  }
  return array;
}

namespace {

/// True if the paths lead to the same existing file, through any names and links.
bool are_one_file(const std::string& a, const std::string& b) {
  std::error_code error;
  return std::filesystem::equivalent(a, b, error) && !error;
}

/// Throws Error if an output is an input, or if two outputs are the same file.
void check_targets(const Arguments& arguments) {
  using Named = std::pair<const char*, const std::string*>;
  const Named inputs[] = {{"--q", &arguments.q},       {"--k", &arguments.k},
                          {"--v", &arguments.v},       {"--beta", &arguments.beta},
                          {"--dout", &arguments.dout}, {"--dlse", &arguments.dlse}};
  const Named outputs[] = {{"--out", &arguments.out},
                           {"--lse", &arguments.lse},
                           {"--memory-out", &arguments.memory_out},
                           {"--norm-out", &arguments.norm_out},
                           {"--dq", &arguments.dq},
                           {"--dk", &arguments.dk},
                           {"--dv", &arguments.dv}};
  const auto refuse = [](const Named& a, const Named& b, const char* why) {
    throw Error("the options " + std::string(a.first) + " and " + b.first + " name the same file" + why);
  };
  std::vector<std::filesystem::path> targets;
  for (const Named& output : outputs) {
    targets.push_back(output.second->empty() ? std::filesystem::path() : checked_target(*output.second));
    if (output.second->empty()) continue;
    for (const Named& input : inputs) {
      if (!input.second->empty() && are_one_file(*input.second, *output.second))
        refuse(input, output, ", and an output must not replace an input");
    }
    for (std::size_t n = 0; n + 1 < targets.size(); ++n) {
      if (targets[n] == targets.back() || are_one_file(*outputs[n].second, *output.second))
        refuse(outputs[n], output, "");
    }
  }
}

/// "1 head", "8 heads", "1 query", "2 queries"
std::string counted(Index count, std::string_view one, std::string_view many) {
  return std::to_string(count) + " " + std::string(count == 1 ? one : many);
}

template <class T, class Value>
void round_each(std::vector<Value>& values) {
  for (Value& value : values) value = static_cast<Value>(static_cast<T>(value));
}

}  // namespace

Inputs read_inputs(const Arguments& arguments) {
  check_targets(arguments);
  Inputs inputs{read_tensor(arguments.q, arguments.layout), read_tensor(arguments.k, arguments.layout),
                read_tensor(arguments.v, arguments.layout)};
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

std::vector<Index> FileShape::rows_of_heads() const {
  const std::vector<Index> all{from_end(3), heads(), rows()};
  return {all.end() - static_cast<std::ptrdiff_t>(of_file.size() - 1), all.end()};
}

template <class Real>
Tensor<Real>::Tensor(npy::Array array, Layout layout) : shape_{std::move(array.shape), layout} {
  if (auto* values = std::get_if<std::vector<Real>>(&array.values)) {
    values_ = std::move(*values);
  } else {
    std::visit([&](const auto& from) { values_.assign(from.begin(), from.end()); }, array.values);
  }
}
template class Tensor<float>;
template class Tensor<double>;

template <class Real>
void report_inputs(const longspan::TensorView<const Real>& q, const longspan::TensorView<const Real>& k,
                   const longspan::TensorView<const Real>& v) {
  if (q.batch != k.batch || k.batch != v.batch || k.heads != v.heads || k.rows != v.rows ||
      q.cols != k.cols || k.heads == 0 || q.heads % k.heads != 0) {
    return;
  }
  std::string text = q.batch == 1 ? "" : counted(q.batch, "batch row", "batch rows") + " of ";
  text += counted(q.heads, "head", "heads") + " of " + counted(q.rows, "query", "queries") + " on " +
          counted(k.heads, "KV head", "KV heads") + " of " + counted(k.rows, "key", "keys") + ", head_dim " +
          std::to_string(q.cols);
  if (v.cols != q.cols) text += ", value_dim " + std::to_string(v.cols);
  std::fprintf(stderr, "attend_npy: read %s\n", text.c_str());
}
template void report_inputs(const longspan::TensorView<const float>&,
                            const longspan::TensorView<const float>&,
                            const longspan::TensorView<const float>&);
template void report_inputs(const longspan::TensorView<const double>&,
                            const longspan::TensorView<const double>&,
                            const longspan::TensorView<const double>&);

template <class Real>
void warn_of_unseeing(const std::vector<Real>& lse, Index q_len, Index kv_len) {
  const auto unseeing = std::count(lse.begin(), lse.end(), -std::numeric_limits<Real>::infinity());
  if (unseeing == 0) return;
  std::string text = std::to_string(unseeing) + " of " +
                     counted(static_cast<Index>(lse.size()), "query sees", "queries see") +
                     " no key, and the output of each is 0";
  if (q_len > kv_len && kv_len > 0) {
    text += ": with " + std::to_string(q_len) + " queries on " + counted(kv_len, "key", "keys") +
            " the last query is at the last key";
  }
  std::fprintf(stderr, "attend_npy: warning: %s\n", text.c_str());
}
template void warn_of_unseeing(const std::vector<float>&, Index, Index);
template void warn_of_unseeing(const std::vector<double>&, Index, Index);

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
