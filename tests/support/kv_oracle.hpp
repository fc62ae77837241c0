// Random calls of a kv_cache, each compared with its definition.
#pragma once

#include <functional>

#include "longspan/stream/kv_cache.hpp"
#include "support/catch.hpp"
#include "support/oracle.hpp"
#include "support/random.hpp"
#include "support/stream_calls.hpp"
#include "support/tensor.hpp"

namespace test {

using Predicate = std::function<bool(Index b, Index h, Index i, Index j)>;

inline Shape draw_self_shape(Random& random) {
  Shape shape{random.between(1, 2),       0, random.between(1, 2), 0, 0, random.pick({1, 2, 8, 24, 33, 64}),
              random.pick({1, 8, 20, 33})};
  shape.heads = shape.kv_heads * random.pick({1, 2, 3, 5, 7});
  shape.q_len = shape.kv_len = random.pick({0, 1, 5, 17, 64, 130, 300});
  return shape;
}

inline longspan::kv_cache_options draw_options(Random& random) {
  return {.page_size = random.pick({0, 0, 7, 16, 64, 256}), .evict = random.chance(0.8)};
}

inline Index draw_longest(Random& random) { return random.pick({1, 3, 20, 400}); }

/// Runs the call through a stream that stores rows as T and checks it against the definition. The numbers of the call
/// must be exact in T.
template <class T, class C, class Attend>
void check_stream(C& call, const Attend& attend, Definition what, Random& random) {
  const Shape shape{call.q.batch, call.q.heads, call.k.heads, call.q.rows,
                    call.k.rows,  call.q.cols,  call.v.cols};
  const longspan::kv_cache_options options = draw_options(random);
  INFO(shape.text() << " page=" << options.page_size);
  auto stream = attend.template stream<T>(stream_shape(shape), options);
  extend_in_chunks(stream, call, random, shape.q_len, draw_longest(random));
  const Predicate sees = what.sees;
  what.sees = [&](Index b, Index h, Index i, Index j) { return j <= i && (!sees || sees(b, h, i, j)); };
  check_against(exact_attention(what, call), call);
}

}  // namespace test
