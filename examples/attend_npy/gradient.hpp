// The gradient of a functor on the tensors of files.
#pragma once

#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "attend_files.hpp"
#include "longspan/error.hpp"
#include "longspan/view.hpp"

namespace attend_npy {

/// The functor of a gradient that also computes the gradient with --dout and --dlse, and returns dq, dk and dv as
/// additional outputs.
template <class Gradient>
class WithGradient {
 public:
  WithGradient(Gradient gradient, const Arguments& arguments, const Inputs& inputs)
      : gradient_(std::move(gradient)),
        arguments_(arguments),
        storage_(inputs.storage),
        q_{inputs.q.shape, arguments.layout},
        k_{inputs.k.shape, arguments.layout},
        v_{inputs.v.shape, arguments.layout} {}

  template <class Q, class K, class V, class Out, class Lse, class E>
  auto operator()(const Q& q, const K& k, const V& v, const Out& out, const Lse& lse,
                  const E& executor) const {
    using Real = std::remove_const_t<typename Q::Element>;
    npy::Array dout_file = read_tensor(arguments_.dout, arguments_.layout);
    round_to(storage_, dout_file);
    const Tensor<Real> dout(std::move(dout_file), arguments_.layout);
    const std::vector<Real> dlse = read_dlse<Real>();
    gradient_.attend(q, k, v, out, lse, executor);

    std::vector<Output<Real>> outputs;
    for (const auto& [path, shape] :
         {std::pair(&arguments_.dq, &q_), std::pair(&arguments_.dk, &k_), std::pair(&arguments_.dv, &v_)}) {
      outputs.push_back({*path, shape->of_file, {}});
      outputs.back().values.resize(checked_count(*path, shape->of_file));
    }
    const auto dq = q_.view(outputs[0].values.data()), dk = k_.view(outputs[1].values.data()),
               dv = v_.view(outputs[2].values.data());
    if (arguments_.dlse.empty()) {
      gradient_(q, k, v, out, lse, dout.view(), dq, dk, dv, executor);
    } else {
      gradient_(q, k, v, out, lse, dout.view(),
                longspan::compact_rows_view(dlse.data(), q.batch, q.heads, q.rows), dq, dk, dv, executor);
    }
    return outputs;
  }

 private:
  /// Empty without --dlse.
  template <class Real>
  std::vector<Real> read_dlse() const {
    std::vector<Real> dlse;
    if (arguments_.dlse.empty()) return dlse;
    const npy::Array file = npy::read(arguments_.dlse);
    if (file.shape != q_.rows_of_heads()) {
      throw Error(arguments_.dlse + ": has the shape " + npy::shape_text(file.shape) + ", wanted " +
                  npy::shape_text(q_.rows_of_heads()));
    }
    std::visit([&](const auto& values) { dlse.assign(values.begin(), values.end()); }, file.values);
    return dlse;
  }

  Gradient gradient_;
  const Arguments& arguments_;
  Storage storage_;
  FileShape q_, k_, v_;
};

}  // namespace attend_npy
