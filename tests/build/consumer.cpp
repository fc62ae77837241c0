// A user's program. It is built once for each way to find the headers.
#include <longspan/longspan.hpp>

int main() {
  // Two keys with equal scores: the output is the mean of their values, exactly.
  const float q[] = {1, 2}, k[] = {3, 4, 3, 4}, v[] = {1, 10, 2, 40};
  float out[2] = {};
  const longspan::softmax_attention attend{longspan::causal{}};
  attend(longspan::compact_view(q, 1, 1, 1, 2), longspan::compact_view(k, 1, 1, 2, 2),
         longspan::compact_view(v, 1, 1, 2, 2), longspan::compact_view(out, 1, 1, 1, 2));
  return out[0] == 1.5F && out[1] == 25.0F ? 0 : 1;
}
