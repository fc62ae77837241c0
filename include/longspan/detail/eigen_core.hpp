// <Eigen/Core>, without the warnings that g++ 12 gives about its own AVX-512 intrinsics (GCC bug 105593).
// They come out of Eigen's packet functions; an including program that has read <Eigen/Core> before sees
// them.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <Eigen/Core>  // IWYU pragma: export

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
