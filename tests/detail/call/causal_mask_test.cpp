#include "longspan/detail/call/causal_mask.hpp"

#include <type_traits>

#include "support/catch.hpp"
#include "support/drawn_masks.hpp"
#include "support/random.hpp"

namespace {

using namespace test;
using longspan::causal;
using longspan::KeyRange;
using longspan::KeyRanges;
using longspan::sinks;
using longspan::window;
using longspan::detail::causal_mask;
using longspan::detail::later_keys;

bool holds(const KeyRanges& ranges, Index key) {
  for (const KeyRange& range : ranges) {
    if (range.contains(key)) return true;
  }
  return false;
}

}  // namespace

TEST_CASE("later_keys: holds every key that a later query sees") {
  for_each_case(20, [](Random& random) {
    Shape shape;
    shape.batch = 2;
    shape.kv_len = 60;
    const DrawnMasks masks(shape, random);
    const Index first = random.between(0, 60);
    masks.for_each([&](const char* name, const auto& mask, const Predicate& sees) {
      INFO(name << " first=" << first);
      for (Index b = 0; b < 2; ++b) {
        const KeyRanges later = later_keys(causal_mask(mask), b, first);
        bool all = true;
        for (Index i = first; i < 80; ++i) {
          for (Index j = 0; j <= i; ++j) all = all && (!sees(b, 0, i, j) || holds(later, j));
        }
        CHECK(all);
      }
    });
  });
}

TEST_CASE("later_keys: lets go of what windows leave behind") {
  const KeyRanges ring = later_keys(causal{} & (window{.left = 9} | sinks{4}), 0, 1000);
  REQUIRE(ring.size() == 2);
  CHECK(*ring.begin() == KeyRange{0, 4});
  CHECK((ring.begin() + 1)->begin == 991);
  CHECK(holds(later_keys(causal{}, 0, 1000), 0));
  CHECK_FALSE(holds(later_keys(causal{} & longspan::segments{100}, 0, 950), 899));
  CHECK(holds(later_keys(causal{} & longspan::segments{100}, 0, 950), 900));
}

TEST_CASE("causal_mask: a type of its own only where the mask is not causal") {
  using longspan::detail::CausalMask;
  CHECK(std::is_same_v<CausalMask<causal>, causal>);
  CHECK(std::is_same_v<CausalMask<longspan::everything>, causal>);
  using Local = decltype(causal{} & window{});
  CHECK(std::is_same_v<CausalMask<Local>, Local>);
  CHECK(std::is_same_v<CausalMask<window>, Local>);
}
