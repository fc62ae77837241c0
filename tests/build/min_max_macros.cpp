// Some system headers define min and max as macros, and a program may have read one before.
#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))
#include "consumer.cpp"  // NOLINT(bugprone-suspicious-include): the same program behind these macros
