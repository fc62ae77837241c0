// What a landmark_cache allocates.
#include <filesystem>
#include <utility>

#include "examples/temporary_folder.hpp"
#include "longspan/stream/landmark_cache.hpp"
#include "support/catch.hpp"
#include "support/count_allocations.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using namespace longspan;

using Options = landmark_cache_options;

template <class T>
void decode_without_allocating(const Options& options) {
  Random random(1);
  const rotary turned(Pairing::half_split);
  const StreamShape shape{2, 6, 2, 24, 20};
  Call<float> call(Shape{2, 6, 2, 200, 200, 24, 20}, Values::normal, random);
  landmark_cache<T, rotary> cache(shape, options, turned);
  Execution<openmp> execution(openmp{2});
  const auto step = [&](Index i) {
    cache.extend(std::as_const(call.q).view().slice_rows(i, 1), std::as_const(call.k).view().slice_rows(i, 1),
                 std::as_const(call.v).view().slice_rows(i, 1), call.out.view().slice_rows(i, 1), execution);
  };
  cache.append(std::as_const(call.k).view().slice_rows(0, 160),
               std::as_const(call.v).view().slice_rows(0, 160));
  // One whole block first, so that unsealed rows have all the room that they need.
  for (Index i = 0; i < 16; ++i) step(i);
  step(16);
  REQUIRE(cache.tokens_to_landmark() == 14);
  for (Index i = 17; i < 31; ++i) {
    INFO("step " << i);
    REQUIRE(allocations_of([&] { step(i); }) == 0);
  }
  CHECK(allocations_of([&] { step(31); }) > 0);  // seals a block
}

}  // namespace

TEST_CASE("landmark_cache: a token within a block allocates nothing", "[stream][memory]") {
  for (const auto select :
       {LandmarkSelect::per_token_and_head, LandmarkSelect::max_over_both, LandmarkSelect::per_kv_group}) {
    decode_without_allocating<float>({.block_size = 16, .top_k = 3, .select = select, .window_blocks = 1});
    decode_without_allocating<Eigen::bfloat16>(
        {.block_size = 16, .top_k = 3, .select = select, .capacity = 5});
  }
  const TemporaryFolder folder;
  decode_without_allocating<Eigen::half>(
      {.block_size = 16, .top_k = 3, .path = folder.file("blocks"), .resident_bytes = 0});
}
