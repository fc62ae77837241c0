// Part of the precompiled header of the tests: the library's kernels for few queries, which headers.cpp compiles once
// for all tests of one level of optimisation.
#pragma once

#include <cstdint>

#include "longspan/detail/decode/row_pass.hpp"

#define LONGSPAN_TEST_KERNELS(X)             \
  X(float, float, float)                     \
  X(float, Eigen::bfloat16, Eigen::bfloat16) \
  X(float, Eigen::half, Eigen::half)         \
  X(float, std::int8_t, std::int8_t)         \
  X(double, double, double)

#define LONGSPAN_TEST_KERNELS_ELSEWHERE(Real, Key, Value) \
  extern template struct longspan::detail::RowPass<Real, Key, Value>;
LONGSPAN_TEST_KERNELS(LONGSPAN_TEST_KERNELS_ELSEWHERE)
#undef LONGSPAN_TEST_KERNELS_ELSEWHERE
