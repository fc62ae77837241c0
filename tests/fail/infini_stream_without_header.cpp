// expect: infini_attention::stream needs #include <longspan/stream/infini_memory.hpp>
#include <longspan/infini_attention.hpp>

const longspan::StreamShape shape{.heads = 2, .kv_heads = 1, .head_dim = 8, .value_dim = 8};
auto stream = longspan::infini_attention{}.stream(shape);
