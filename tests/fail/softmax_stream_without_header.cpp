// expect: softmax_attention::stream needs #include <longspan/stream/kv_cache.hpp>
#include <longspan/softmax_attention.hpp>

const longspan::StreamShape shape{.heads = 2, .kv_heads = 1, .head_dim = 8, .value_dim = 8};
auto stream = longspan::softmax_attention{longspan::causal{}}.stream(shape, {.page_size = 16});
