// The state of a stream as a string.
#pragma once

#include <sstream>
#include <string>

namespace test {

template <class Stream>
std::string saved(const Stream& stream) {
  std::ostringstream to;
  stream.save(to);
  return to.str();
}

}  // namespace test
