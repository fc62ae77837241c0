// The precompiled header needs a target that is compiled, and the kernels that it declares a place.
#include "support/kernels.hpp"

#define LONGSPAN_TEST_KERNELS_HERE(Real, Key, Value) \
  template struct longspan::detail::RowPass<Real, Key, Value>;
LONGSPAN_TEST_KERNELS(LONGSPAN_TEST_KERNELS_HERE)
