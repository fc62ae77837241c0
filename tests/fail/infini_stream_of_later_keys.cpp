// expect: the local functor of a stream must hide later keys: use the mask causal
#include <longspan/longspan.hpp>

// Without a mask dilated attention shows later keys.
longspan::infini_attention attend{longspan::dilated_attention{{{512, 1}, {1024, 2}}}};
auto memory = attend.stream({.heads = 2, .kv_heads = 1, .head_dim = 8, .value_dim = 8});
