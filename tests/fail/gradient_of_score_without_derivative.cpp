// expect: the gradient needs the derivative of the score function: a member float derivative
#include <longspan/gradient/softmax_attention.hpp>

auto backward = longspan::gradient(longspan::softmax_attention{
    [](float s, longspan::Index, longspan::Index, longspan::Index, longspan::Index) { return 2 * s; }});
