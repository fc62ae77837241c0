// What bad input ends in.
#pragma once

#include <stdexcept>

namespace bench {

/// Bad input: the program prints this one sentence, writes nothing and ends with exit code 2.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace bench
