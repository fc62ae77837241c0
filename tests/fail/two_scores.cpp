// expect: a functor takes one mask, one score and one position encoding
#include <longspan/longspan.hpp>

longspan::softmax_attention attend{longspan::softcap{50}, longspan::causal{}, longspan::softcap{30}};
