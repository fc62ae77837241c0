// expect: no matching function for call to .*merge
#include <longspan/longspan.hpp>

void merge_all(longspan::Partial<const float> a, longspan::Partial<const double> b,
               const longspan::Partial<float>& into) {
  longspan::merge({a, b}, into);
}
