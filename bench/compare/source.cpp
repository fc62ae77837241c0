#include "compare/source.hpp"

#include <limits>
#include <memory>
#include <variant>

#include "npy.hpp"
#include "support/text_input.hpp"

#if !defined(LONGSPAN_SOURCE_DIR)
#define LONGSPAN_SOURCE_DIR "."
#endif

namespace bench {
namespace {

Source text_source(const Options& options) {
  const bool own = options.text.empty();
  const auto input = std::make_shared<TextInput>(
      own ? repository_text(LONGSPAN_SOURCE_DIR) : read_bytes(options.text), options.threads);
  Source source;
  source.description = (own ? "the sources of this repository" : options.text) + ", " +
                       std::to_string(input->text().size()) + " bytes, one token each";
  source.available = std::numeric_limits<Index>::max();
  source.shape = {1, options.heads, options.kv_heads, 0, options.head_dim, options.head_dim};
  source.first = [input, shape = source.shape](Index length) {
    return input->first(length, shape.heads, shape.kv_heads, shape.head_dim);
  };
  return source;
}

OwnedTensor<float> read_tensor(const std::string& path) {
  const npy::Array array = npy::read(path);
  const std::size_t rank = array.shape.size();
  if (rank < 2 || rank > 4) {
    throw UsageError(path + " has the shape " + npy::shape_text(array.shape) + ", wanted 2 to 4 dimensions");
  }
  const auto dimension = [&](std::size_t from_end) {
    return from_end < rank ? array.shape[rank - 1 - from_end] : 1;
  };
  OwnedTensor<float> tensor(dimension(3), dimension(2), dimension(1), dimension(0));
  if (tensor.view().empty()) {
    throw UsageError(path + " has the shape " + npy::shape_text(array.shape) + ", wanted no dimension of 0");
  }
  std::visit(
      [&](const auto& values) {
        std::transform(values.begin(), values.end(), tensor.values().begin(),
                       [](auto x) { return static_cast<float>(x); });
      },
      array.values);
  if (!all_finite(std::as_const(tensor).values()))
    throw UsageError(path + " holds values that are not finite in float32");
  return tensor;
}

std::string shape_text(const OwnedTensor<float>& x) {
  const auto view = x.view();
  const Index sizes[] = {view.batch, view.heads, view.rows, view.cols};
  return npy::shape_text(sizes);
}

void require_fitting(const Inputs<float>& in, const Options& options) {
  const auto q = in.q.view(), k = in.k.view(), v = in.v.view();
  const auto refuse = [](const std::string& path, const OwnedTensor<float>& x, const std::string& wanted) {
    throw UsageError(path + " has the shape " + shape_text(x) + ", wanted " + wanted);
  };
  if (k.batch != q.batch || k.rows != q.rows || k.cols != q.cols || q.heads % k.heads != 0) {
    refuse(options.k, in.k, "that of q, " + shape_text(in.q) + ", or fewer heads that divide those of q");
  }
  if (v.batch != k.batch || v.heads != k.heads || v.rows != k.rows) {
    refuse(options.v, in.v, "that of k, " + shape_text(in.k) + ", or another last dimension");
  }
}

OwnedTensor<float> first_rows(const OwnedTensor<float>& x, Index length) {
  const auto from = x.view();
  OwnedTensor<float> to(from.batch, from.heads, length, from.cols);
  for (Index b = 0; b < from.batch; ++b) {
    for (Index h = 0; h < from.heads; ++h) {
      std::copy_n(from.row(b, h, 0), length * from.cols, to.view().row(b, h, 0));
    }
  }
  return to;
}

Source tensor_source(const Options& options) {
  const auto whole = std::make_shared<Inputs<float>>(
      Inputs<float>{read_tensor(options.q), read_tensor(options.k), read_tensor(options.v)});
  require_fitting(*whole, options);
  Source source;
  source.description = "tensors " + options.q + " " + shape_text(whole->q) + ", " + options.k + " " +
                       shape_text(whole->k) + ", " + options.v + " " + shape_text(whole->v);
  source.available = whole->q_len();
  source.shape = {whole->batch(),    whole->heads(),    whole->kv_heads(), 0,
                  whole->head_dim(), whole->value_dim()};
  source.first = [whole](Index length) {
    return Inputs<float>{first_rows(whole->q, length), first_rows(whole->k, length),
                         first_rows(whole->v, length)};
  };
  return source;
}

}  // namespace

Source open_source(const Options& options) {
  return options.has_tensors() ? tensor_source(options) : text_source(options);
}

}  // namespace bench
