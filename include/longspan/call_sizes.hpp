// The sizes of one call, against which masks, scores and positions check their own arrays.
#pragma once

#include <string_view>

#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_BEGIN

/// What a call is made of: the function's name for the text of an error, and its sizes. The queries are at the
/// positions [first_query, first_query + q_len), the keys are [0, kv_len).
struct CallSizes {
  std::string_view function;
  Index batch = 0;
  Index heads = 0;
  Index first_query = 0;
  Index q_len = 0;
  Index kv_len = 0;
};

LONGSPAN_END
