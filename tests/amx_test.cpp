// request_amx, which asks the operating system for the permission to use the matrix unit (AMX).
#include "longspan/amx.hpp"

#include "support/catch.hpp"

TEST_CASE("request_amx: returns whether later calls may use the matrix unit", "[amx]") {
  const bool permitted = longspan::request_amx();
  CHECK(longspan::detail::amx_is_permitted() == permitted);
  CHECK(longspan::request_amx() == permitted);
}

#if !defined(LONGSPAN_TARGETS_AMX) && !defined(LONGSPAN_EMULATE_AMX)
TEST_CASE("request_amx: false in code compiled for processors without AMX", "[amx]") {
  CHECK_FALSE(longspan::request_amx());
}
#endif
