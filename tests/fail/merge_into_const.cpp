// expect: no matching function for call to .*merge
#include <longspan/longspan.hpp>

void merge_all(longspan::Partial<const float> a, longspan::Partial<const float> b,
               const longspan::Partial<const float>& into) {
  longspan::merge({a, b}, into);
}
