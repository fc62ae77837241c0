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
