// Options that all functors share.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <string_view>

#include "longspan/detail/call/finite.hpp"
#include "longspan/error.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

/// `first_query` of a functor: the last query is at the position of the last key.
inline constexpr Index queries_end_at_keys = (std::numeric_limits<Index>::min)();

namespace detail {

/// Positions of queries are between -2^62 and 2^62 + 2^60, so that differences of positions never overflow.
inline constexpr Index farthest_query = Index{1} << 62;

/// The position of row 0 of q: the user's option, or the position that aligns the last query with the last key.
inline Index resolved_first_query(std::string_view function, Index first_query, Index q_len, Index kv_len) {
  if (first_query == queries_end_at_keys) return kv_len - q_len;
  if (first_query < -farthest_query || first_query > farthest_query)
    refuse(function, "first_query", number_text("#", {first_query}), "a position between -2^62 and 2^62");
  return first_query;
}

/// The factor of q.k: the user's option, which may be 0 or negative, or 1 / sqrt(head_dim).
inline double resolved_scale(std::string_view function, std::optional<double> scale, Index head_dim) {
  if (scale && !is_finite(*scale)) refuse(function, "scale", number_text(*scale), "a finite number");
  return scale ? *scale : 1 / std::sqrt(static_cast<double>(std::max<Index>(1, head_dim)));
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
