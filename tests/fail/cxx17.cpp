// expect: longspan: this library needs C\+\+20
// with -std=c++17
#include <longspan/longspan.hpp>

int main() {}
