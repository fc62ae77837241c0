// expect: local attention is called with q, k, v, out and an execution
#include <longspan/longspan.hpp>

longspan::infini_attention attend{longspan::causal{}};
