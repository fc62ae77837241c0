// expect: landmark_retrieval::stream needs #include <longspan/stream/landmark_cache.hpp>
#include <longspan/landmark_retrieval.hpp>

auto stream = longspan::landmark_retrieval{{.block_size = 16}}.stream({.head_dim = 8, .value_dim = 8});
