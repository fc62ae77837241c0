#include "longspan/dilated_attention.hpp"

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "longspan/partial.hpp"
#include "longspan/reference/dilated_attention.hpp"
#include "longspan/softmax_attention.hpp"
#include "support/catch.hpp"
#include "support/gauge.hpp"
#include "support/refusal.hpp"

namespace {

using namespace test;
using Eigen::bfloat16;
using longspan::Branch;
using longspan::causal;
using longspan::dilated_attention;
using longspan::everything;
using longspan::Overlap;
using longspan::Phase;
using Branches = std::vector<Branch>;

std::string text_of(const Branches& branches) {
  std::string text;
  for (const Branch& b : branches)
    text += " (" + std::to_string(b.segment) + ", " + std::to_string(b.dilation) + ")";
  return text;
}

/// Random branches whose segments and dilations need not divide one another.
Branches draw_branches(Random& random) {
  static const std::vector<Index> segments{1,  2,  3,   5,   8,   16,   17,
                                           48, 64, 100, 128, 256, 1000, Index{1} << 62};
  static const std::vector<Index> dilations{1, 1, 2, 3, 4, 6, 12, 40, Index{1} << 61};
  Branches branches(static_cast<std::size_t>(random.between(1, 4)));
  for (Branch& branch : branches) branch = {random.pick(segments), random.pick(dilations)};
  return branches;
}

Shape draw_self_shape(Random& random) {
  Shape shape = draw_shape(random);
  if (random.chance(0.7)) shape.q_len = shape.kv_len;
  shape.q_len = std::min(shape.q_len, shape.kv_len);
  return shape;
}

/// The number of branches in which query i sees key j, by the definition in the paper.
Index times_met(const Branches& branches, Phase phase, Index heads, Index h, Index i, Index j) {
  Index met = 0;
  for (const Branch& branch : branches) {
    const Index w = branch.segment, r = branch.dilation;
    const Index offset = phase == Phase::modulo ? h % r : h / ((heads + r - 1) / r);
    met += i >= 0 && i / w == j / w && i % w % r == offset && j % w % r == offset;
  }
  return met;
}

/// Seeing a key c times is the same as raising its score by log(c).
template <class Attend>
Definition as_one_softmax(const Attend& attend, Index heads, Definition what) {
  const auto met = [=, branches = attend.branches, phase = attend.phase](Index h, Index i, Index j) {
    return times_met(branches, phase, heads, h, i, j);
  };
  what.sees = [met, before = what.sees](Index b, Index h, Index i, Index j) {
    return met(h, i, j) > 0 && (!before || before(b, h, i, j));
  };
  if (attend.overlap == Overlap::multiset) {
    what.score = [met, before = what.score](double s, Index b, Index h, Index i, Index j) {
      return (before ? before(s, b, h, i, j) : s) + std::log(static_cast<double>(met(h, i, j)));
    };
  }
  return what;
}

template <class Attend>
Attend draw_options(Attend attend, Random& random) {
  attend.phase = random.pick({Phase::modulo, Phase::blocked});
  attend.overlap = random.pick({Overlap::multiset, Overlap::set});
  return attend;
}

template <class T, class... Parts>
void check_drawn(Random& random, const Definition& what, Trust& trust, const Parts&... parts) {
  auto attend = draw_options(dilated_attention{draw_branches(random), parts...}, random);
  const Shape shape = draw_self_shape(random);
  // One slope for each head and one length for each batch row of the random shape.
  if constexpr (requires { attend.score.slopes; })
    attend.score.slopes = attend.score.slopes.first(static_cast<std::size_t>(shape.heads));
  if constexpr (requires { attend.mask.b.lengths; })
    attend.mask.b.lengths = attend.mask.b.lengths.first(static_cast<std::size_t>(shape.batch));
  INFO("branches" << text_of(attend.branches) << " blocked=" << (attend.phase == Phase::blocked)
                  << " set=" << (attend.overlap == Overlap::set));
  check_call<T>(shape, random.pick(all_values), random, attend, as_one_softmax(attend, shape.heads, what),
                &trust);
}

const Definition is_causal{.sees = [](Index, Index, Index i, Index j) { return j <= i; }};

template <class T = float>
Call<T> outputs_of(const Call<T>& call, const auto& attend) {
  Call<T> own = call.unrun();
  own.run(attend, longspan::openmp{2});
  return own;
}

}  // namespace

TEMPLATE_TEST_CASE("dilated_attention: one softmax over the keys of all branches", "[gauge]", float, double,
                   bfloat16) {
  Trust trust;
  for_each_case(150, [&](Random& random) {
    if (random.chance(0.5)) {
      check_drawn<TestType>(random, is_causal, trust, causal{});
    } else {
      check_drawn<TestType>(random, {}, trust);
    }
  });
  CHECK(trust.outputs_are_mostly_nonzero());
}

TEST_CASE("dilated_attention: scores and encodings receive positions in the whole sequence", "[gauge]") {
  Trust trust;
  const longspan::rotary turn(longspan::Pairing::half_split);
  Definition alibi = is_causal, turned = is_causal;
  const std::vector<float> slopes(16, 0.125f);
  alibi.score = [](double s, Index, Index, Index i, Index j) { return s - 0.125 * std::abs(double(i - j)); };
  turned.encode = [](double* row, Index cols, Index position, bool) {
    for (Index p = 0; p < cols / 2; ++p) {
      const double angle = double(position) * std::pow(10000.0, -2.0 * double(p) / double(cols));
      const double x = row[p], y = row[p + cols / 2];
      row[p] = x * std::cos(angle) - y * std::sin(angle);
      row[p + cols / 2] = x * std::sin(angle) + y * std::cos(angle);
    }
  };
  turned.encode_error = 4;
  for_each_case(60, [&](Random& random) {
    check_drawn<float>(random, alibi, trust, causal{}, longspan::alibi{slopes});
    const auto attend = draw_options(dilated_attention{draw_branches(random), causal{}, turn}, random);
    Shape shape = draw_self_shape(random);
    shape.head_dim += shape.head_dim % 2;
    INFO("branches" << text_of(attend.branches));
    check_call<float>(shape, Values::normal, random, attend, as_one_softmax(attend, shape.heads, turned));
  });
}

TEST_CASE("dilated_attention: within the bound with masks of every kind", "[gauge][mask]") {
  Trust trust;
  for_each_case(40, [&](Random& random) {
    const std::vector<Index> unpadded{random.between(0, 300), random.between(0, 300), random.between(0, 300)};
    const Definition padded{.sees = [&](Index b, Index, Index i, Index j) {
      return j <= i && j < unpadded[static_cast<std::size_t>(b)];
    }};
    check_drawn<float>(random, padded, trust, causal{} & longspan::padding{unpadded});
    const Definition sinks{.sees = [](Index, Index, Index i, Index j) { return j < 4 || j + 30 >= i; }};
    check_drawn<float>(random, sinks, trust, longspan::sinks{4} | longspan::window{.left = 30});
  });
}

TEST_CASE("dilated_attention: zero_pad_compat matches the oracle") {
  for_each_case(60, [](Random& random) {
    dilated_attention attend{draw_branches(random)};
    attend.zero_pad_compat = true;
    attend.phase = random.pick({Phase::modulo, Phase::blocked});
    const longspan::reference::exact oracle{attend};
    Shape shape = draw_self_shape(random);
    shape.q_len = shape.kv_len;
    Call<double> call(shape, Values::normal, random), exact = call.unrun();
    call.run(attend);
    oracle(exact.q.view(), exact.k.view(), exact.v.view(), exact.out.view(), exact.lse.view());
    INFO(shape.text() << " branches" << text_of(attend.branches));
    for (std::size_t n = 0; n < call.out.values.size(); ++n)
      REQUIRE(std::abs(call.out.values[n] - exact.out.values[n]) < 1e-13);
  });
}

// ----------------------------------------------------------------------------------------------------------
// Laws

TEST_CASE("dilated_attention: queries after the last key see the keys of their segment", "[law]") {
  for_each_case(60, [](Random& random) {
    const Shape shape{
        random.between(1, 2),  4, 2, random.pick({1, 5, 70}), random.pick({0, 1, 2, 9, 40, 130}), 8,
        random.pick({0, 6, 9})};
    Call<double> exact(shape, Values::normal, random);
    Call<float> call(shape);
    const auto copy = [](const auto& from, auto& to) {
      for (std::size_t n = 0; n < from.size(); ++n) to[n] = static_cast<float>(from[n]);
    };
    copy(exact.q.values, call.q.values);
    copy(exact.k.values, call.k.values);
    copy(exact.v.values, call.v.values);
    const Index first = shape.kv_len + random.between(-3, 60);
    const Branches branches = draw_branches(random);
    const auto check = [&](auto attend) {
      attend.first_query = first;
      attend.phase = random.pick({Phase::modulo, Phase::blocked});
      attend.overlap = random.pick({Overlap::multiset, Overlap::set});
      attend.zero_pad_compat = random.chance(0.3);
      INFO(shape.text() << " first_query=" << first << " branches" << text_of(branches)
                        << " zeros=" << attend.zero_pad_compat);
      call.run(attend);
      longspan::reference::exact{attend}(exact.q.view(), exact.k.view(), exact.v.view(), exact.out.view(),
                                         exact.lse.view());
      for (std::size_t n = 0; n < call.out.values.size(); ++n)
        REQUIRE(std::abs(double(call.out.values[n]) - exact.out.values[n]) < 1e-4);
      for (std::size_t n = 0; n < call.lse.values.size(); ++n) {
        const double got = call.lse.values[n], wanted = exact.lse.values[n];
        REQUIRE((got == wanted || std::abs(got - wanted) < 1e-4));
      }
    };
    check(dilated_attention{branches, causal{}});
    check(dilated_attention{branches});
    const longspan::window near{.left = 20, .right = 0};
    check(dilated_attention{branches, near});
  });
  Random random(10);
  Call<float> call(Shape{1, 1, 1, 1, 2, 2, 2}, Values::normal, random);
  dilated_attention attend{Branches{{4, 1}}, causal{}};
  attend.first_query = std::numeric_limits<Index>::max();
  CHECK(refusal([&] { call.run(attend); }).find("dilated_attention: first_query is 9223372036854775807") !=
        std::string::npos);
}

TEST_CASE("dilated_attention: one branch over the whole sequence is softmax_attention", "[law]") {
  Random random(1);
  Call<float> call(Shape{2, 6, 2, 333, 333, 33, 20}, Values::normal, random);
  const Call<float> dense = outputs_of(call, longspan::softmax_attention{causal{}});
  CHECK(outputs_of(call, dilated_attention{Branches{{333, 1}}, causal{}}).same_outputs(dense));
  CHECK(outputs_of(call, dilated_attention{Branches{{5000, 1}}, causal{}}).same_outputs(dense));
  const longspan::softmax_attention blocks{causal{} & longspan::segments{111}};
  const Definition block_diagonal{
      .sees = [](Index, Index, Index i, Index j) { return j <= i && i / 111 == j / 111; }};
  check_against(exact_attention(block_diagonal, call),
                outputs_of(call, dilated_attention{Branches{{111, 1}}, causal{}}));
}

TEST_CASE("dilated_attention: repeating a branch changes only the lse, and branches may have any order",
          "[law]") {
  Random random(2);
  Call<double> call(Shape{1, 4, 2, 200, 200, 16, 9}, Values::normal, random);
  const auto once = outputs_of(call, dilated_attention{Branches{{64, 2}}, causal{}});
  const auto twice = outputs_of(call, dilated_attention{Branches{{64, 2}, {64, 2}}, causal{}});
  const auto rising = outputs_of(call, dilated_attention{Branches{{16, 1}, {64, 2}, {100, 3}}});
  const auto falling = outputs_of(call, dilated_attention{Branches{{100, 3}, {64, 2}, {16, 1}}});
  for (std::size_t n = 0; n < once.out.values.size(); ++n) {
    REQUIRE(std::abs(once.out.values[n] - twice.out.values[n]) < 1e-14);
    REQUIRE(std::abs(rising.out.values[n] - falling.out.values[n]) < 1e-13);
  }
  for (std::size_t n = 0; n < once.lse.values.size(); ++n) {
    if (!std::isinf(once.lse.values[n]))
      REQUIRE(std::abs(once.lse.values[n] + std::log(2) - twice.lse.values[n]) < 1e-13);
  }
}

TEST_CASE("dilated_attention: equals softmax_attention on strided views, merged", "[law]") {
  constexpr Index length = 256, heads = 4;
  const Branches branches{{64, 1}, {128, 2}, {256, 4}};
  Random random(3);
  Call<float> call(Shape{1, heads, heads, length, length, 16, 16}, Values::normal, random);
  std::vector<Call<float>> parts;
  for (const Branch& branch : branches) {
    Call<float>& part = parts.emplace_back(call.unrun());
    std::fill(part.out.values.begin(), part.out.values.end(), 0.0f);
    std::fill(part.lse.values.begin(), part.lse.values.end(), -std::numeric_limits<float>::infinity());
    const longspan::softmax_attention attend{causal{}};
    for (Index h = 0; h < heads; ++h) {
      const Index r = branch.dilation, count = branch.segment / r;
      for (Index first = h % r; first < length; first += branch.segment) {
        const auto rows = [&](auto view) {
          view.data = view.row(0, h, first);
          view.heads = 1;
          view.rows = count;
          view.row_stride *= r;
          return view;
        };
        const RowsView<float> lse{&part.lse.view()(0, h, first), 1, 1, count, 0, 0, r};
        attend(rows(call.q.view()), rows(call.k.view()), rows(call.v.view()), rows(part.out.view()), lse);
      }
    }
  }
  std::vector<longspan::Partial<const float>> views;
  for (Call<float>& part : parts) views.push_back(longspan::partial(part.out.view(), part.lse.view()));
  Call<float> merged = call.unrun();
  longspan::merge<float>(views, longspan::partial(merged.out.view(), merged.lse.view()));
  const dilated_attention attend{branches, causal{}};
  check_against(exact_attention(as_one_softmax(attend, heads, is_causal), call), merged);
  check_against(exact_attention(as_one_softmax(attend, heads, is_causal), call), outputs_of(call, attend));
}

TEST_CASE("dilated_attention: a single dilated branch attends within its rows, other rows are 0", "[law]") {
  Random random(4);
  Call<float> call(Shape{1, 3, 1, 90, 90, 8, 8}, Values::normal, random);
  call.run(dilated_attention{Branches{{90, 3}}});
  for (Index h = 0; h < 3; ++h) {
    for (Index n = 0; n < 90; ++n) {
      const bool kept = n % 3 == h;
      CHECK(std::isinf(call.lse(0, h, n)) != kept);
      if (!kept)
        CHECK(std::all_of(call.out.row(0, h, n), call.out.row(0, h, n) + 8, [](float x) { return x == 0; }));
    }
  }
}

TEST_CASE("dilated_attention: half values, [batch, rows, heads, cols] layout, value_dim other than head_dim",
          "[layout]") {
  Random random(7);
  const dilated_attention attend{Branches{{24, 1}, {96, 4}}, causal{}};
  const Shape shape{2, 4, 2, 100, 100, 24, 8};
  check_call<float, Eigen::half, bfloat16>(shape, Values::normal, random, attend,
                                           as_one_softmax(attend, 4, is_causal));
  Call<float> call(shape, Values::normal, random), turned = call.unrun();
  call.run(attend);
  const auto rows_first = [](auto x) {
    x.head_stride = x.cols;
    x.row_stride = x.heads * x.cols;
    return x;
  };
  const auto turn = [&](const auto& from, auto to) {
    for (Index b = 0; b < to.batch; ++b)
      for (Index h = 0; h < to.heads; ++h)
        for (Index n = 0; n < to.rows; ++n) std::copy_n(from.row(b, h, n), to.cols, to.row(b, h, n));
  };
  turn(call.q, rows_first(turned.q.view()));
  turn(call.k, rows_first(turned.k.view()));
  turn(call.v, rows_first(turned.v.view()));
  attend(rows_first(turned.q.view()), rows_first(turned.k.view()), rows_first(turned.v.view()),
         rows_first(turned.out.view()));
  Tensor<float> back(2, 4, 100, 8);
  turn(rows_first(turned.out.view()), back.view());
  CHECK(back == call.out);
}

TEST_CASE("dilated_attention: what it refuses", "[errors]") {
  Call<float> call(Shape{1, 2, 2, 5, 5, 8, 4});
  const Call<float> before = call;
  const auto refused = [&](Branches branches) {
    return refusal([&] { call.run(dilated_attention{std::move(branches)}); });
  };
  CHECK(refused({}).find("dilated_attention: the number of branches is 0") != std::string::npos);
  CHECK(refused({{4, 1}, {0, 2}}).find("branch 1 is [segment 0, dilation 2]") != std::string::npos);
  CHECK(refused({{4, -1}}).find("branch 0 is [segment 4, dilation -1]") != std::string::npos);
  call.k.cols = 7;
  CHECK(refused({{4, 1}}).find("dilated_attention: k is") != std::string::npos);
  CHECK(before.same_outputs(call));
}
