// Options that all functors share.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <string_view>

#include "longspan/error.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_BEGIN

/// `first_query` of a functor: the last query is at the position of the last key.
inline constexpr Index queries_end_at_keys = std::numeric_limits<Index>::min();

namespace detail {

/// The factor of q.k: what the user set, 0 and negative numbers included, or 1 / sqrt(head_dim).
inline double resolved_scale(std::string_view function, std::optional<double> scale, Index head_dim) {
  if (scale && !(std::abs(*scale) <= std::numeric_limits<double>::max()))
    refuse(function, "scale", std::to_string(*scale), "a finite number");
  return scale ? *scale : 1 / std::sqrt(static_cast<double>(std::max<Index>(1, head_dim)));
}

}  // namespace detail
LONGSPAN_END
