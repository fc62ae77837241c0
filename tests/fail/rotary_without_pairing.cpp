// expect: no matching (function|constructor)
#include <longspan/longspan.hpp>
#include <unsupported/Eigen/CXX11/Tensor>

longspan::rotary encoding;
