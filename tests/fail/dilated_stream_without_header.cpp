// expect: dilated_attention::stream needs #include <longspan/stream/dilated_cache.hpp>
#include <longspan/dilated_attention.hpp>

const longspan::StreamShape shape{.heads = 2, .kv_heads = 1, .head_dim = 8, .value_dim = 8};
auto stream = longspan::dilated_attention{{{512, 1}, {1024, 2}}, longspan::causal{}}.stream(shape);
