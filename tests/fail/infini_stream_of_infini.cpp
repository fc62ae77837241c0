// expect: the local functor of a stream must not be infini_attention
#include <longspan/longspan.hpp>

// It wants a query for each key; the rows of an open segment come a few at a time.
longspan::infini_attention<longspan::infini_attention<>> attend{longspan::infini_attention{}};
auto memory = attend.stream({.heads = 2, .kv_heads = 1, .head_dim = 8, .value_dim = 8});
