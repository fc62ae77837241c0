// One mask of each kind, with its own type and random options, together with its meaning.
#pragma once

#include <functional>
#include <vector>

#include "longspan/mask.hpp"
#include "support/masks.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"

namespace test {

using Predicate = std::function<bool(Index b, Index h, Index i, Index j)>;

/// Random options of masks; owns the arrays that the masks refer to.
class DrawnMasks {
 public:
  DrawnMasks(const Shape& shape, Random& random)
      : left_(random.between(0, shape.kv_len / 2 + 2)),
        right_(random.between(0, 20)),
        sinks_(random.between(0, 5)),
        length_(random.between(1, shape.kv_len / 2 + 2)) {
    for (Index start = 0; start < shape.kv_len; start += random.between(1, shape.kv_len / 3 + 2)) {
      starts_.push_back(start);
    }
    for (Index b = 0; b < shape.batch; ++b) lengths_.push_back(random.between(0, shape.kv_len));
  }
  DrawnMasks(const DrawnMasks&) = delete;
  DrawnMasks& operator=(const DrawnMasks&) = delete;

  /// Calls visit(name, mask, predicate) for each kind.
  template <class Visit>
  void for_each(const Visit& visit) const {
    using namespace longspan;
    const Index left = left_, right = right_, first = sinks_, length = length_;
    const Predicate near = [=](Index, Index, Index i, Index j) { return i - left <= j && j <= i + right; };
    const Predicate padded = [this](Index b, Index, Index, Index j) { return j < lengths_[std::size_t(b)]; };
    visit("everything", everything{}, Predicate{[](Index, Index, Index, Index) { return true; }});
    visit("causal", causal{}, Predicate{[](Index, Index, Index i, Index j) { return j <= i; }});
    visit("window", window{left, right}, near);
    visit("causal & (window | sinks)", causal{} & (window{.left = left} | longspan::sinks{first}),
          Predicate{[=](Index, Index, Index i, Index j) { return j <= i && (j >= i - left || j < first); }});
    visit("segments", segments{length}, Predicate{[=](Index, Index, Index i, Index j) {
            return floor_divide(i, length) == floor_divide(j, length);
          }});
    visit("documents & causal", documents{starts_} & causal{},
          Predicate{
              [this](Index, Index, Index i, Index j) { return document_of(i) == document_of(j) && j <= i; }});
    visit("padding", padding{lengths_}, padded);
    visit("!padding & causal", !padding{lengths_} & causal{},
          Predicate{[=](Index b, Index h, Index i, Index j) { return !padded(b, h, i, j) && j <= i; }});
    visit("!window", !window{left, right},
          Predicate{[=](Index b, Index h, Index i, Index j) { return !near(b, h, i, j); }});
    visit("every_third", every_third{},
          Predicate{[](Index, Index, Index i, Index j) { return every_third{}.sees(i, j); }});
    visit("head_stripes", head_stripes{},
          Predicate{[](Index b, Index h, Index i, Index j) { return head_stripes{}.sees(b, h, i, j); }});
  }

 private:
  std::size_t document_of(Index position) const {
    std::size_t n = 0;
    while (n < starts_.size() && starts_[n] <= position) ++n;
    return n;
  }

  Index left_, right_, sinks_, length_;
  std::vector<Index> starts_, lengths_;
};

}  // namespace test
