// expect: each part of landmark_retrieval is a position encoding
#include <longspan/landmark_retrieval.hpp>

longspan::landmark_retrieval retrieve{longspan::landmark_cache_options{}, 3};
