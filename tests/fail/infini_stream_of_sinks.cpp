// expect: the local functor of a stream must hide later keys: use the mask causal
#include <longspan/longspan.hpp>

// Queries before the last sink would see keys that do not exist yet.
longspan::infini_attention attend{longspan::softmax_attention{longspan::causal{} | longspan::sinks{4}}};
auto memory = attend.stream({.heads = 2, .kv_heads = 1, .head_dim = 8, .value_dim = 8});
