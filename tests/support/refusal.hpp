// What a call says when it refuses its arguments.
#pragma once

#include <string>

#include "longspan/error.hpp"

namespace test {

/// The text of the Error that `call` throws; empty where it throws none.
template <class Call>
std::string refusal(const Call& call) {
  try {
    call();
  } catch (const longspan::Error& error) {
    return error.what();
  }
  return {};
}

}  // namespace test
