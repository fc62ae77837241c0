// expect: the local functor of a stream must hide later keys: use the mask causal
#include <longspan/longspan.hpp>

using namespace longspan;
infini_attention attend{merged{softmax_attention{sinks{4}}, softmax_attention{causal{} & !sinks{4}}}};
auto memory = attend.stream({.heads = 2, .kv_heads = 1, .head_dim = 8, .value_dim = 8});
