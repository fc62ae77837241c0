// Compiled without OpenMP: the openmp executor exists and runs on the calling thread.
#include "consumer.cpp"  // NOLINT(bugprone-suspicious-include): the same program, other flags

#if defined(_OPENMP)
#error this program is to be compiled without OpenMP
#endif
