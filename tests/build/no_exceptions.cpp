// Compiled with -fno-exceptions: invalid input calls the handler that the program defines.
#include <cstdio>
#include <cstdlib>
#include <cstring>

[[noreturn]] inline void on_longspan_error(const char* text) {
  std::puts(text);
  std::exit(std::strstr(text, "softmax_attention") != nullptr ? 0 : 1);
}
#define LONGSPAN_ERROR_HANDLER(text) on_longspan_error(text)
#include <longspan/longspan.hpp>

#if defined(__cpp_exceptions)
#error this program is to be compiled without exceptions
#endif

int main() {
  const float q[2] = {}, k[4] = {}, v[4] = {};
  float out[2] = {7, 7};
  const longspan::softmax_attention attend{longspan::causal{}};
  attend(longspan::compact_view(q, 1, 1, 1, 2), longspan::compact_view(k, 1, 1, 2, 2),
         longspan::compact_view(v, 1, 1, 2, 2), longspan::compact_view(out, 1, 1, 1, 2));
  if (out[0] != 0.0F || out[1] != 0.0F) return 1;
  // k has 2 rows and v has 1, so the handler is called; it ends the program with code 0.
  attend(longspan::compact_view(q, 1, 1, 1, 2), longspan::compact_view(k, 1, 1, 2, 2),
         longspan::compact_view(v, 1, 1, 1, 2), longspan::compact_view(out, 1, 1, 1, 2));
  return 1;
}
