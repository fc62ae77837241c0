// The error texts of calls with invalid arguments.
#pragma once

#include <cstddef>
#include <sstream>
#include <string>

#include "longspan/error.hpp"
#include "support/catch.hpp"

namespace test {

/// The text of the Error that `call` throws; empty if it throws none.
template <class Call>
std::string refusal(const Call& call) {
  try {
    call();
  } catch (const longspan::Error& error) {
    return error.what();
  }
  return {};
}

/// The text of the FileError that `call` throws; empty if it throws none.
template <class Call>
std::string file_refusal(const Call& call) {
  try {
    call();
  } catch (const longspan::FileError& error) {
    return error.what();
  }
  return {};
}

/// The text of the FileError that a stream throws for a saved state; empty if it loads the state.
template <class Stream>
std::string refused(Stream& into, const std::string& state) {
  std::istringstream from(state);
  return file_refusal([&] { into.load(from); });
}

/// Changes every `step`-th byte of a saved state in turn and checks that the stream throws a FileError of `loader`.
template <class Stream>
void check_damage_is_refused(Stream& into, const std::string& state, std::size_t step, const char* loader) {
  for (std::size_t n = 0; n < state.size(); n += step) {
    std::string damaged = state;
    damaged[n] = static_cast<char>(damaged[n] ^ 0x10);
    REQUIRE(refused(into, damaged).find(loader) != std::string::npos);
  }
}

}  // namespace test
