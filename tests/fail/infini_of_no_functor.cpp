// expect: the local functor must be callable with q, k, v, out and an execution
#include <longspan/longspan.hpp>

longspan::infini_attention attend{longspan::causal{}};
