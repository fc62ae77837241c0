// Tests of the tile unit of the hardware run where the machine has one.
#pragma once

#include "longspan/amx.hpp"
#include "support/catch.hpp"

namespace test {

/// Asks for the permission to use tiles. A test that gets none says so, and counts as passed.
inline bool has_tiles() {
  if (longspan::request_amx()) return true;
  WARN("not run: this machine gives no permission to use matrix tiles");
  SUCCEED();
  return false;
}

}  // namespace test
