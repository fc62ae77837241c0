// Compiled once for each set of flags: LONGSPAN_UNIT names the function that this translation unit defines.
#include "unit.hpp"

#include <longspan/stream/kv_cache.hpp>
#include <typeinfo>

namespace {

void attend(Input q, Input k, Input v, Output out, Lse lse, longspan::Pairing pairing) {
  longspan::softmax_attention{longspan::causal{}, longspan::rotary(pairing)}(q, k, v, out, lse);
}

void extend(const longspan::StreamShape& shape, const longspan::kv_cache_options& options, Input q, Input k,
            Input v, Output out, Lse lse) {
  auto stream = longspan::softmax_attention{longspan::causal{}}.stream(shape, options);
  stream.extend(q, k, v, out, lse);
}

void fail() { longspan::detail::refuse("unit", "the argument", "bad", "better"); }

bool catches(void (*thrower)()) {
#if defined(__cpp_exceptions)
  try {
    thrower();
  } catch (const longspan::Error&) {
    return true;
  }
#else
  static_cast<void>(thrower);
#endif
  return false;
}

longspan::Partial<float> pass(longspan::Partial<float> part) { return part; }

}  // namespace

Unit LONGSPAN_UNIT() {
  return {typeid(longspan::softmax_attention<longspan::causal>).name(), attend, extend, fail, catches, pass};
}
