// Tests of the matrix unit (AMX) run only on machines that have one.
#pragma once

#include "longspan/amx.hpp"
#include "support/catch.hpp"

namespace test {

/// True if the process may use the matrix unit. Otherwise warns that the test did not run, and marks it as passed.
inline bool has_tiles() {
  if (longspan::request_amx()) return true;
  WARN("not run: this machine has no matrix unit (AMX), or the process may not use it");
  SUCCEED();
  return false;
}

}  // namespace test
