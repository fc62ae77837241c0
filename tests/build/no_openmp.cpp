// Compiled without OpenMP: the openmp executor is there and runs on the caller's thread.
#include "consumer.cpp"  // NOLINT(bugprone-suspicious-include): the same program, other flags

#if defined(_OPENMP)
#error this program is to be compiled without OpenMP
#endif
