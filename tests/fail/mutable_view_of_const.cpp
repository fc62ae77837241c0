// expect: (no viable conversion|could not convert|conversion from)
#include <longspan/longspan.hpp>
#include <unsupported/Eigen/CXX11/Tensor>

longspan::TensorView<float> writable(longspan::TensorView<const float> x) { return x; }
