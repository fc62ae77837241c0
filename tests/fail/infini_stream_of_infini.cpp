// expect: the local functor of a stream must not be infini_attention
#include <longspan/longspan.hpp>

// infini_attention needs a query for each key, but a stream appends a few rows to an open segment at a time.
longspan::infini_attention<longspan::infini_attention<>> attend{longspan::infini_attention{}};
auto memory = attend.stream({.heads = 2, .kv_heads = 1, .head_dim = 8, .value_dim = 8});
