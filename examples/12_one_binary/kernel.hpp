// What is compiled once for each kind of processor. Views are the same types everywhere, so they can stand in its
// signature.
#pragma once

#include <longspan/element.hpp>
#include <longspan/view.hpp>

using Input = longspan::TensorView<const Eigen::bfloat16>;
using Output = longspan::TensorView<Eigen::bfloat16>;
using Attend = void(Input q, Input k, Input v, Output out);

Attend attend_baseline;
#if defined(__x86_64__)
Attend attend_v2;   // SSE 4.2
Attend attend_v3;   // AVX2 and FMA
Attend attend_v4;   // AVX-512
Attend attend_amx;  // AVX-512 and matrix tiles
#endif
