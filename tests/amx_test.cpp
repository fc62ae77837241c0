// Permission to use matrix tiles.
#include "longspan/amx.hpp"

#include "support/catch.hpp"

TEST_CASE("request_amx: what it answers is what holds from then on", "[amx]") {
  const bool permitted = longspan::request_amx();
  CHECK(longspan::detail::amx_is_permitted() == permitted);
  CHECK(longspan::request_amx() == permitted);
}

#if !defined(LONGSPAN_TARGETS_AMX) && !defined(LONGSPAN_EMULATE_AMX)
TEST_CASE("request_amx: code for processors without tiles uses none", "[amx]") {
  CHECK_FALSE(longspan::request_amx());
}
#endif
