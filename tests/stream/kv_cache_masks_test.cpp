#include "longspan/stream/kv_cache.hpp"
#include "support/catch.hpp"
#include "support/drawn_masks.hpp"
#include "support/kv_oracle.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"

TEST_CASE("kv_cache: any chunking, storage and mask gives the causal call", "[law]") {
  using namespace test;
  for_each_case(40, [](Random& random) {
    const Shape shape = draw_self_shape(random);
    const DrawnMasks masks(shape, random);
    masks.for_each([&](const char* name, const auto& mask, const Predicate& sees) {
      INFO(name);
      Call<float> call(shape, random.pick(all_values), random);
      Definition what;
      what.sees = sees;
      check_stream<float>(call, longspan::softmax_attention{mask}, what, random);
    });
  });
}

TEST_CASE("kv_cache: a token far behind its ring sees its window and the sinks, and nothing between",
          "[law]") {
  using namespace test;
  Random random(1);
  const Shape shape{2, 3, 1, 9000, 9000, 8, 8};
  Call<float> call(shape, Values::normal, random);
  const Index left = 2500;
  const longspan::softmax_attention attend{longspan::causal{} &
                                           (longspan::window{.left = left} | longspan::sinks{4})};
  auto stream = attend.stream(stream_shape(shape), {.page = 256});
  stream.absorb(std::as_const(call.k).view().slice_rows(0, 8999),
                std::as_const(call.v).view().slice_rows(0, 8999));
  extend(stream, call, 8999, 1);
  // Keys between do not count: they may as well be anything.
  for (Index b = 0; b < 2; ++b) std::fill_n(call.v.row(b, 0, 4), (8999 - left - 4) * 8, NAN);
  Call<float> last(Shape{2, 3, 1, 1, 9000, 8, 8});
  last.k = call.k;
  last.v = call.v;
  for (Index n = 0; n < 6; ++n) {
    std::copy_n(call.q.row(0, n, 8999), 8, last.q.row(0, n, 0));
    std::copy_n(call.out.row(0, n, 8999), 8, last.out.row(0, n, 0));
    last.lse.values[std::size_t(n)] = call.lse(0, n, 8999);
  }
  Definition what;
  what.sees = [=](Index, Index, Index i, Index j) { return j < 4 || j >= i - left; };
  check_against(exact_attention(what, last), last);
}
