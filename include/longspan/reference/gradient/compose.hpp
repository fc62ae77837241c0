// The references of the gradients of functors made of functors: merged, gated, per_head.
#pragma once

#include <algorithm>
#include <cstddef>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "longspan/compose.hpp"
#include "longspan/detail/call/slices.hpp"
#include "longspan/gradient/compose.hpp"
#include "longspan/partial.hpp"
#include "longspan/position.hpp"
#include "longspan/reference/compose.hpp"
#include "longspan/reference/gradient/exact.hpp"
#include "longspan/reference/gradient/partial.hpp"
#include "longspan/reference/gradient/softmax_attention.hpp"
#include "longspan/reference/gradient/softmax_rows.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace reference {

/// dq, dk and dv of several parts, added.
class ExactSums {
 public:
  template <class Q, class K, class V>
  ExactSums(const Q& q, const K& k, const V& v) : sums_{like(q), like(k), like(v)}, next_(sums_) {}

  /// Calls differentiate(dq, dk, dv) and adds what it writes.
  template <class Differentiate>
  void add(const Differentiate& differentiate) {
    const auto all = [](DoubleTensor& x) {
      return compact_view(x.values.data(), x.batch, x.heads, x.rows, x.cols);
    };
    differentiate(all(next_[0]), all(next_[1]), all(next_[2]));
    for (std::size_t n = 0; n < sums_.size(); ++n) {
      for (std::size_t at = 0; at < sums_[n].values.size(); ++at) sums_[n].values[at] += next_[n].values[at];
    }
  }
  template <class Dq, class Dk, class Dv>
  void write(Dq dq, Dk dk, Dv dv) {
    sums_[0].write(no_position{}, 0, Role::query, dq);
    sums_[1].write(no_position{}, 0, Role::key, dk);
    sums_[2].write(no_position{}, 0, Role::key, dv);
  }

 private:
  template <class X>
  static DoubleTensor like(const X& x) {
    return DoubleTensor(x.batch, x.heads, x.rows, x.cols);
  }

  std::vector<DoubleTensor> sums_, next_;
};

/// A tensor, or numbers for rows, as doubles.
template <class Dout, class Dlse>
ExactPartial exact_gradient_of_result(const Dout& dout, const Dlse& dlse) {
  ExactPartial same(dout);
  for (Index b = 0; b < dout.batch; ++b) {
    for (Index h = 0; h < dout.heads; ++h) {
      for (Index i = 0; i < dout.rows; ++i) {
        for (Index c = 0; c < dout.cols; ++c)
          same.views.out.row(b, h, i)[c] = static_cast<double>(dout.row(b, h, i)[c]);
        if (dlse.data != nullptr) same.views.lse(b, h, i) = static_cast<double>(dlse(b, h, i));
      }
    }
  }
  return same;
}

template <class... Parts>
struct exact<gradient_of<merged<Parts...>>> : ExactGradientCalls<exact<gradient_of<merged<Parts...>>>> {
  gradient_of<merged<Parts...>> of;

  explicit exact(gradient_of<merged<Parts...>> gradient) : of(std::move(gradient)) {}

  template <class Q, class K, class V, class Dout, class Dlse, class Dq, class Dk, class Dv>
  void differentiate_exactly(Q q, K k, V v, Dout dout, Dlse dlse, Dq dq, Dk dk, Dv dv) const {
    const ExactPartial dmerged = exact_gradient_of_result(dout, dlse);
    std::vector<ExactPartial> found, changes;
    std::vector<Partial<const double>> parts;
    std::vector<Partial<double>> dparts;
    const auto attend = [&](const auto& part) {
      found.emplace_back(dout);
      changes.emplace_back(dout);
      exact<std::remove_cvref_t<decltype(part.attend)>>{part.attend}(q, k, v, found.back().views.out,
                                                                     found.back().views.lse);
      parts.push_back(found.back().views);
      dparts.push_back(changes.back().views);
    };
    std::apply([&](const auto&... part) { (..., attend(part)); }, of.parts);
    merge_gradient(parts, dmerged.views, dparts);
    ExactSums sums(q, k, v);
    std::size_t n = 0;
    const auto differentiate = [&](const auto& part) {
      const Partial<const double> change = dparts[n++];
      sums.add([&](auto to_q, auto to_k, auto to_v) {
        exact<std::remove_cvref_t<decltype(part)>>{part}(q, k, v, change.out, change.lse, to_q, to_k, to_v);
      });
    };
    std::apply([&](const auto&... part) { (..., differentiate(part)); }, of.parts);
    sums.write(dq, dk, dv);
  }
};

template <class A, class B>
struct exact<gradient_of<gated<A, B>>> : ExactGradientCalls<exact<gradient_of<gated<A, B>>>> {
  gradient_of<gated<A, B>> of;

  explicit exact(gradient_of<gated<A, B>> gradient) : of(std::move(gradient)) {}

  template <class Q, class K, class V, class Dout, class Dlse, class Dq, class Dk, class Dv>
  void differentiate_exactly(Q q, K k, V v, Dout dout, Dlse, Dq dq, Dk dk, Dv dv) const {
    const ExactPartial change = exact_gradient_of_result(dout, RowsView<const double>{});
    const ExactPartial of_a(dout), of_b(dout), da(dout), db(dout);
    exact<A>{of.a.attend}(q, k, v, of_a.views.out);
    exact<B>{of.b.attend}(q, k, v, of_b.views.out);
    const std::vector<double> beta = exact<gated<A, B>>::logits(of.attend.beta);
    std::vector<double> dbeta(beta.size());
    const bool given = of.attend.beta.data != nullptr;
    const Index rows = given ? of.attend.beta.rows : 1, cols = given ? of.attend.beta.cols : 1;
    gate_gradient({beta.data(), rows, cols, cols}, of_a.views.out, of_b.views.out, change.views.out,
                  {dbeta.data(), rows, cols, cols}, da.views.out, db.views.out);
    for (Index r = 0; of.dbeta.data != nullptr && r < rows; ++r) {
      for (Index c = 0; c < cols; ++c)
        of.dbeta.row(r)[c] = static_cast<float>(dbeta[static_cast<std::size_t>(r * cols + c)]);
    }
    ExactSums sums(q, k, v);
    const auto differentiate = [&](const auto& gradient, const ExactPartial& of_side) {
      sums.add([&](auto to_q, auto to_k, auto to_v) {
        exact<std::remove_cvref_t<decltype(gradient)>>{gradient}(q, k, v, of_side.views.out, to_q, to_k,
                                                                 to_v);
      });
    };
    differentiate(of.a, da);
    differentiate(of.b, db);
    sums.write(dq, dk, dv);
  }
};

template <class... F>
struct exact<gradient_of<per_head<F...>>> : ExactGradientCalls<exact<gradient_of<per_head<F...>>>> {
  gradient_of<per_head<F...>> of;

  explicit exact(gradient_of<per_head<F...>> gradient) : of(std::move(gradient)) {}

  template <class Q, class K, class V, class Dout, class Dlse, class Dq, class Dk, class Dv>
  void differentiate_exactly(Q q, K k, V v, Dout dout, Dlse dlse, Dq dq, Dk dk, Dv dv) const {
    const auto run = [&](const auto& range) {
      const Index begin = range.begin, heads = range.end - begin;
      with_heads(q, k, v, begin, range.end, [&](auto of_q, auto of_k, auto of_v) {
        with_heads(dq, dk, dv, begin, range.end, [&](auto to_q, auto to_k, auto to_v) {
          const exact<std::remove_cvref_t<decltype(range.attend)>> reference{range.attend};
          const auto change = detail::slice_heads(dout, begin, heads);
          if (dlse.data != nullptr) {
            reference(of_q, of_k, of_v, change, detail::slice_heads(dlse, begin, heads), to_q, to_k, to_v);
          } else {
            reference(of_q, of_k, of_v, change, to_q, to_k, to_v);
          }
        });
      });
    };
    std::apply([&](const auto&... range) { (..., run(range)); }, of.ranges);
  }
};

}  // namespace reference
LONGSPAN_NAMESPACE_END
