// The interface of each translation unit of the program. Views, errors, options and enums must be the same types in
// all of them, otherwise this does not link.
#pragma once

#include <longspan/partial.hpp>
#include <longspan/position.hpp>
#include <longspan/stream_shape.hpp>
#include <longspan/view.hpp>

using Input = longspan::TensorView<const float>;
using Output = longspan::TensorView<float>;
using Lse = longspan::RowsView<float>;

struct Unit {
  const char* kernel = nullptr;  ///< the name of the functor's type, which depends on the flags
  void (*attend)(Input q, Input k, Input v, Output out, Lse lse, longspan::Pairing pairing) = nullptr;
  void (*extend)(const longspan::StreamShape& shape, const longspan::kv_cache_options& options, Input q,
                 Input k, Input v, Output out, Lse lse) = nullptr;
  void (*fail)() = nullptr;                      ///< throws longspan::Error
  bool (*catches)(void (*thrower)()) = nullptr;  ///< whether this unit catches what another unit throws
  longspan::Partial<float> (*pass)(longspan::Partial<float>) = nullptr;
};

#define LONGSPAN_EACH_UNIT(DO) \
  DO(base) DO(v2) DO(v3) DO(avx2) DO(avx2_fma) DO(v4) DO(no_openmp) DO(no_exceptions) DO(fast_math) DO(scalar)
#define LONGSPAN_DECLARE_UNIT(name) Unit unit_##name();
LONGSPAN_EACH_UNIT(LONGSPAN_DECLARE_UNIT)
