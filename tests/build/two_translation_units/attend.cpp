// Compiled twice: LONGSPAN_ATTEND names the function that this translation unit defines.
#include "attend.hpp"

#include <longspan/longspan.hpp>
#include <typeinfo>

Attended LONGSPAN_ATTEND(const float* q, const float* k, const float* v) {
  Attended result{};
  const longspan::softmax_attention attend{longspan::causal{}};
  attend(longspan::compact_view(q, 1, 1, 1, 2), longspan::compact_view(k, 1, 1, kv_len, 2),
         longspan::compact_view(v, 1, 1, kv_len, 2), longspan::compact_view(result.out, 1, 1, 1, 2),
         longspan::compact_rows_view(&result.lse, 1, 1, 1));
  result.kernel = typeid(attend).name();
  return result;
}
