// What the gradient of landmark attention keeps of each query while it takes the keys.
#pragma once

#include <cmath>

#include "longspan/detail/call/arena.hpp"
#include "longspan/detail/simd/exp2.hpp"
#include "longspan/detail/tile/accumulator.hpp"
#include "longspan/detail/tile/float_arithmetic.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Over some keys of one query, with their largest score `top` in score units: the sums of exp(score - top) and of that
/// times dP. Sums of many keys are in double, so that rounding errors do not grow with the number of keys.
template <class Real, class Sum>
struct ScoreSums {
  Real top = empty_max<Real>;
  Sum weights = 0, products = 0;

  bool empty() const { return weights == Sum(0); }
  /// The mean of dP under the softmax of these keys; 0 without keys.
  Real mean() const { return empty() ? Real(0) : static_cast<Real>(products / weights); }

  template <class Other>
  void add(const ScoreSums<Real, Other>& more) {
    if (more.empty()) return;
    const Real highest = top < more.top ? more.top : top;
    const double mine = share(top, highest), others = share(more.top, highest);
    weights = mine * weights + others * static_cast<double>(more.weights);
    products = mine * products + others * static_cast<double>(more.products);
    top = highest;
  }

 private:
  static double share(Real of, Real highest) {
    if (of == highest) return 1;
    return std::exp((static_cast<double>(of) - static_cast<double>(highest)) / double(score_unit<Real>));
  }
};

/// A landmark block that is wider than a group of key tiles, as one query sees it.
template <class Real>
struct WideBlockRow {
  ScoreSums<Real, double> tokens;
  Real landmark = FloatArithmetic<Real>::masked_score;  ///< the score of its landmark
};

/// What a worker keeps of the queries of one KV head: arrays over the padded rows of its query heads, null where no
/// block is wide or controlled.
template <class Real>
struct LandmarkRows {
  WideBlockRow<Real>* wide = nullptr;
  ScoreSums<Real, double>* controlled = nullptr;  ///< over the landmarks of the controlled blocks
  Real* controlled_shift = nullptr;  ///< exp(score of such a landmark - this) is the weight of its block
  Real* controlled_delta = nullptr;  ///< the mean of the gradients of these weights

  static LandmarkRows take(Arena& arena, Index rows, bool has_wide, bool has_controlled) {
    LandmarkRows taken;
    if (has_wide) taken.wide = arena.take<WideBlockRow<Real>>(rows);
    if (has_controlled) {
      taken.controlled = arena.take<ScoreSums<Real, double>>(rows);
      taken.controlled_shift = arena.take<Real>(rows);
      taken.controlled_delta = arena.take<Real>(rows);
    }
    return taken;
  }

  LandmarkRows from(Index row) const {
    LandmarkRows rows = *this;
    if (wide != nullptr) rows.wide += row;
    if (controlled != nullptr) {
      rows.controlled += row;
      rows.controlled_shift += row;
      rows.controlled_delta += row;
    }
    return rows;
  }
};

}  // namespace detail
LONGSPAN_NAMESPACE_END
