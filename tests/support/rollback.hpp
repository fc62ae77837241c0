// The law of rollback, for any stream: after rejected tokens have been removed, all outputs have the bits of a stream
// that never saw them.
#pragma once

#include <algorithm>
#include <sstream>
#include <utility>
#include <vector>

#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/stream_calls.hpp"
#include "support/tensor.hpp"

namespace test {

struct RollbackStory {
  Index tokens = 200;    ///< accepted tokens of one story
  Index rollback = 16;   ///< the rollback option of the stream
  Index longest = 12;    ///< maximum number of tokens of an accepted call
  bool is_saved = true;  ///< whether the story also saves and loads the stream
};

/// Two streams from `fresh()` get the same accepted tokens in the same calls. The second one never sees any other
/// token. The first one also gets drafts of at most `rollback` tokens that are removed at once, has accepted tokens
/// removed, is copied (and the discarded copy gets other tokens), saved and loaded.
template <class Fresh>
void check_rollback(const Fresh& fresh, const Shape& sizes, Random& random, const RollbackStory& story = {}) {
  Shape shape = sizes;
  shape.q_len = shape.kv_len = story.tokens;
  Call<float> call(shape, Values::normal, random);
  shape.q_len = shape.kv_len = std::max(story.rollback, story.longest);
  Call<float> rejected(shape, Values::peaked, random);

  auto stream = fresh();
  auto never_saw = fresh();
  std::vector<Index> ends;  // of the accepted calls
  Index largest = 0;        // the largest size of `stream` so far: rollback counts from there
  const auto reject = [&](auto& from, Index count) {
    fill_normal(rejected.k, random, 3);
    extend(from, rejected, 0, count);
  };

  while (stream.size() < story.tokens) {
    const Index size = stream.size();
    const double dice = random.uniform();
    if (dice < 0.5) {
      const Index count = std::min(story.tokens - size, random.between(1, story.longest));
      extend(stream, call, size, count);
      Call<float> wanted = call.unrun();
      extend(never_saw, wanted, size, count);
      ends.push_back(size + count);
      INFO("tokens " << size << " to " << size + count << " of " << shape.text());
      REQUIRE(stream.size() == never_saw.size());
      REQUIRE(same_rows(call, wanted, size, size + count));
    } else if (dice < 0.8 && story.rollback > 0) {
      reject(stream, random.between(1, story.rollback));
      largest = std::max(largest, stream.size());
      const Index least = std::max<Index>(0, largest - story.rollback);
      const Index kept = random.chance(0.5) ? size : random.between(std::min(least, size), size);
      INFO("back from " << stream.size() << " to " << kept << " of " << shape.text());
      REQUIRE(stream.can_truncate(kept));
      stream.truncate(kept);
      REQUIRE(stream.size() == kept);
      if (kept <
          size) {  // accepted tokens were removed too: the other stream is replaced by one with the remaining tokens
        while (!ends.empty() && ends.back() > kept) ends.pop_back();
        if ((ends.empty() ? 0 : ends.back()) < kept) ends.push_back(kept);
        never_saw = fresh();
        Call<float> again = call.unrun();
        for (const Index end : ends) extend(never_saw, again, never_saw.size(), end - never_saw.size());
      }
    } else if (dice < 0.9) {
      auto copy = stream;
      std::swap(copy, stream);
      if (random.chance(0.5)) copy = std::as_const(stream);
      if (story.rollback > 0) reject(copy, random.between(1, story.rollback));
    } else if (story.is_saved) {
      std::stringstream file;
      stream.save(file);
      stream = fresh();
      stream.load(file);
      REQUIRE(stream.size() == size);
    }
    largest = std::max(largest, stream.size());
  }
}

}  // namespace test
