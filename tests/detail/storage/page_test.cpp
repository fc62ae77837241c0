#include "longspan/detail/storage/page.hpp"

#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>

#include "support/catch.hpp"
#include "support/count_allocations.hpp"

using longspan::Index;
using longspan::detail::FreePages;
using longspan::detail::Page;
using longspan::detail::PageLayout;

TEST_CASE("Page: counts its owners") {
  Page page(100), none;
  CHECK(page.exists());
  CHECK_FALSE(none.exists());
  CHECK(page.is_own());
  {
    const Page copy = page;
    CHECK(copy.data() == page.data());
    CHECK_FALSE(page.is_own());
  }
  CHECK(page.is_own());
  none = std::move(page);
  CHECK_FALSE(page.exists());
  CHECK(none.is_own());
  CHECK(reinterpret_cast<std::uintptr_t>(none.data()) % 64 == 0);
}

TEMPLATE_TEST_CASE("PageLayout: the parts follow one another without overlap", "", float, std::int8_t) {
  const PageLayout<TestType> layout{3, 5, 7, 11};
  const Page page = layout.allocate();
  const auto bytes = [&](const void* at) {
    return static_cast<Index>(static_cast<const std::byte*>(at) - page.data());
  };
  const Index size = sizeof(TestType);
  CHECK(bytes(layout.keys(page, 0, 0)) == 0);
  CHECK(bytes(layout.keys(page, 2, 4)) == (2 * 5 + 4) * 7 * size);
  CHECK(bytes(layout.keys(page, 3, 0)) <= bytes(layout.values(page, 0, 0)));
  const Index end_of_values = bytes(layout.values(page, 3, 0));
  if (layout.is_scaled) {
    CHECK(end_of_values <= bytes(layout.k_scales(page, 0, 0)));
    CHECK(bytes(layout.k_scales(page, 3, 0)) <= bytes(layout.v_scales(page, 0, 0)));
    CHECK(bytes(layout.v_scales(page, 3, 0)) <= layout.bytes());
  } else {
    CHECK(end_of_values <= layout.bytes());
  }
}

TEST_CASE("bounded_product: the product, or the largest Index") {
  using longspan::detail::bounded_product;
  constexpr Index most = std::numeric_limits<Index>::max();
  CHECK(bounded_product(3, 7) == 21);
  CHECK(bounded_product(0, most) == 0);
  CHECK(bounded_product(most, 0) == 0);
  CHECK(bounded_product(most, 1) == most);
  CHECK(bounded_product(Index{1} << 31, Index{1} << 31) == Index{1} << 62);
  CHECK(bounded_product(Index{1} << 32, Index{1} << 31) == most);
  CHECK(bounded_product(Index{1} << 40, Index{1} << 40) == most);
}

TEST_CASE("FreePages: give allocates nothing, and take returns the last page given") {
  const PageLayout<float> layout{1, 2, 4, 4};
  FreePages free;
  free.reserve(layout, 3);
  Page a = free.take(layout), b = free.take(layout), c = free.take(layout), d = free.take(layout);
  const std::byte* const memory[] = {a.data(), b.data(), c.data(), d.data()};
  CHECK(test::allocations_of([&] {
          free.give(std::move(a));
          free.give(std::move(b));
          free.give(Page());
          free.give(std::move(c));
          free.reserve(layout, 3);
        }) == 0);
  CHECK(free.take(layout).data() == memory[2]);
  CHECK(free.take(layout).data() == memory[1]);
  CHECK(free.take(layout).data() == memory[0]);
}

TEST_CASE("FreePages: keeps only pages without another owner") {
  const PageLayout<float> layout{1, 2, 4, 4};
  FreePages free;
  Page first = free.take(layout);
  const auto* memory = first.data();
  const Page shared = first;
  free.give(std::move(first));
  CHECK(shared.is_own());
  CHECK(free.take(layout).data() != memory);
  free.give(shared);
  Page second = free.take(layout);
  CHECK(second.data() != memory);
  memory = second.data();
  free.give(std::move(second));
  CHECK(free.take(layout).data() == memory);
}
