// expect: a functor takes one mask, one score and one position encoding
#include <longspan/longspan.hpp>
#include <unsupported/Eigen/CXX11/Tensor>

longspan::softmax_attention attend{longspan::causal{}, longspan::window{.left = 3}};
