// This file exists because a precompiled header needs a target with a source file, and because the kernels that the
// header declares must be instantiated in one place.
#include "support/kernels.hpp"

#define LONGSPAN_TEST_KERNELS_HERE(Real, Key, Value) \
  template struct longspan::detail::RowPass<Real, Key, Value>;
LONGSPAN_TEST_KERNELS(LONGSPAN_TEST_KERNELS_HERE)
