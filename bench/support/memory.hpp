// The peak memory of this process.
#pragma once

#if __has_include(<sys/resource.h>)
#include <sys/resource.h>
#endif

namespace bench {

/// The peak of resident bytes; 0 if the system does not report it.
inline double peak_memory() {
#if __has_include(<sys/resource.h>)
  rusage usage{};
  if (getrusage(RUSAGE_SELF, &usage) != 0) return 0;
#if defined(__APPLE__)
  return static_cast<double>(usage.ru_maxrss);
#else
  return 1024.0 * static_cast<double>(usage.ru_maxrss);
#endif
#else
  return 0;
#endif
}

}  // namespace bench
