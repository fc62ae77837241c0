// expect: each part of a functor must be a mask, a score or a position encoding
#include <longspan/longspan.hpp>
#include <unsupported/Eigen/CXX11/Tensor>

longspan::softmax_attention attend{longspan::causal{}, 50.0f};
