// Random calls of softmax_attention, each compared with its definition.
#pragma once

#include <limits>
#include <utility>
#include <vector>

#include "longspan/amx.hpp"
#include "longspan/softmax_attention.hpp"
#include "support/catch.hpp"
#include "support/oracle.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"

namespace test {

inline const std::vector<Index> head_dims{1,  2,  8,  16,  24,  33,  40,  63,  64,
                                          65, 80, 96, 112, 128, 129, 160, 192, 256};
inline const std::vector<Index> lengths{0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 47, 48, 49, 127, 128, 129, 259, 300};
inline const std::vector<Index> groups{1, 2, 3, 4, 5, 6, 7, 8};

/// Random sizes from the lists, reduced until the oracle computes the call in a few milliseconds.
inline Shape draw_shape(Random& random) {
  constexpr Index most_work = 4'000'000;
  Shape shape;
  shape.batch = random.between(1, 3);
  shape.kv_heads = random.between(1, 2);
  shape.heads = shape.kv_heads * random.pick(groups);
  shape.q_len = random.pick(lengths);
  shape.kv_len = random.pick(lengths);
  shape.head_dim = random.pick(head_dims);
  shape.value_dim = random.chance(0.5) ? shape.head_dim : random.pick(head_dims);
  if (shape.work() > most_work) shape.batch = 1;
  if (shape.work() > most_work) shape.heads /= std::exchange(shape.kv_heads, 1);
  while (shape.work() > most_work && shape.value_dim > 16) shape.value_dim = shape.value_dim / 2 + 1;
  while (shape.work() > most_work && shape.q_len > 16) shape.q_len = shape.q_len / 2 + 1;
  return shape;
}

/// Tests use the matrix unit (AMX) if the machine has one.
inline const bool requested_amx = longspan::request_amx();

/// The additional error of products in bfloat16: weights are rounded (at most 2^-8) after an exponential with an error
/// of 7.5e-5, which their sum has too.
template <class Tq, class Tk, class Tv, class To>
Allowance allowance_of(bool bf16_products) {
  if (bf16_products && longspan::detail::rounds_weights<Tq, Tk, Tv, To>()) return {0x1p-8 + 1.5e-4, 1e-4};
  return {};
}

template <class Attend>
Attend with_options(Attend attend, const Definition& what) {
  attend.scale = what.scale;
  if (what.first_query != std::numeric_limits<Index>::min()) attend.first_query = what.first_query;
  return attend;
}

/// Runs one random call and checks it against its definition, within the documented error bound.
template <class Tq, class Tk = Tq, class Tv = Tk, class To = Tq, class Attend>
Errors check_call(const Shape& shape, Values values, Random& random, const Attend& attend,
                  const Definition& what, Trust* trust = nullptr) {
  INFO("types=" << type_text<Tq> << ',' << type_text<Tk> << ',' << type_text<Tv> << ','
                << type_text<To> << ' ' << shape.text() << " values=" << text_of(values)
                << " scale=" << what.scale.value_or(0) << " first_query=" << what.first_query);
  Call<Tq, Tk, Tv, To> call(shape, values, random);
  call.run(with_options(attend, what), longspan::openmp{random.between(1, 3)});
  const Exact exact = exact_attention(what, call);
  if (trust != nullptr) trust->add(exact);
  return check_against(exact, call, allowance_of<Tq, Tk, Tv, To>(attend.bf16_products));
}

}  // namespace test
