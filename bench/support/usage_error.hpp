// The exception for invalid input.
#pragma once

#include <stdexcept>

namespace bench {

/// Invalid input: the program prints this sentence, writes nothing and ends with exit code 2.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace bench
