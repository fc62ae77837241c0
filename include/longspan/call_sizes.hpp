// The sizes of one call, with which masks and scores compare the sizes of their arrays.
#pragma once

#include <string_view>

#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN

/// The indices that a call of a functor passes to its mask and its score: query positions first_query .. first_query
/// + q_len - 1, keys 0 .. kv_len - 1, query heads 0 .. heads - 1, batch rows 0 .. batch - 1. `function` names the
/// caller in the text of an Error.
///
/// A functor checks its parts in every call, before it writes anything; a stream also checks them in its constructor,
/// with q_len and kv_len equal to 0.
struct CallSizes {
  std::string_view function;
  Index batch = 0;
  Index heads = 0;
  Index first_query = 0;
  Index q_len = 0;
  Index kv_len = 0;
};

namespace detail {

/// Calls part.check(sizes) if the mask or score has this member.
template <class Part>
void check_part(const Part& part, const CallSizes& sizes) {
  if constexpr (requires { part.check(sizes); }) part.check(sizes);
}

/// Checks mask and score of a functor.
template <class Functor>
void check_parts(const Functor& attend, const CallSizes& sizes) {
  check_part(attend.mask, sizes);
  check_part(attend.score, sizes);
}

}  // namespace detail

LONGSPAN_NAMESPACE_END
