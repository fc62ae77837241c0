// CMakeLists.txt compiles this file once for each kind of processor; ATTEND is the name of its function there.
#include "kernel.hpp"

#include <longspan/amx.hpp>
#include <longspan/softmax_attention.hpp>

void ATTEND(Input q, Input k, Input v, Output out) {
  longspan::request_amx();  // does something in the one that is compiled for AMX
  longspan::softmax_attention{longspan::causal{}}(q, k, v, out);
}
