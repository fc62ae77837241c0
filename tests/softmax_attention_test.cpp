// softmax_attention: exactly known results, options, and errors.
#include "longspan/softmax_attention.hpp"

#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <unsupported/Eigen/CXX11/Tensor>
#include <vector>

#include "support/catch.hpp"
#include "support/gauge.hpp"

namespace {

using namespace test;
using Eigen::bfloat16;
using longspan::softmax_attention;

/// Small integers that differ from key to key and from column to column.
template <class T>
void fill_integers(Tensor<T>& v) {
  for (Index n = 0; n < v.batch * v.heads * v.rows; ++n) {
    for (Index c = 0; c < v.cols; ++c)
      v.row(0, 0, n)[c] = static_cast<T>(static_cast<float>((5 * n + 3 * c) % 8 - 3));
  }
}

/// V[j] is 1 in column j and 0 in all others, so that out[i][j] is the weight p_ij.
template <class T>
void fill_one_hot(Tensor<T>& v) {
  for (Index kv = 0; kv < v.batch * v.heads; ++kv) {
    for (Index j = 0; j < v.rows; ++j) v.row(0, kv, j)[j] = T(1);
  }
}

}  // namespace

TEMPLATE_TEST_CASE("softmax_attention: equal scores average the values exactly", "[exact]", float, double,
                   bfloat16) {
  for (const Index q_len : {1, 3, 8, 9, 25, 49}) {
    for (Index kv_len = 1; kv_len <= 8192; kv_len *= 2) {
      Random random(static_cast<std::uint64_t>(kv_len));
      Call<TestType> call(Shape{1, 2, 1, q_len, kv_len, 4, 11});
      fill_normal(call.k, random);  // q is 0, so every score is 0
      fill_integers(call.v);
      call.run(softmax_attention{}, longspan::openmp{2});
      for (Index c = 0; c < 11; ++c) {
        double sum = 0;
        for (Index j = 0; j < kv_len; ++j) sum += static_cast<double>(call.v.row(0, 0, j)[c]);
        const TestType mean = static_cast<TestType>(static_cast<float>(sum / static_cast<double>(kv_len)));
        for (Index n = 0; n < 2 * q_len; ++n) REQUIRE(call.out.row(0, 0, n)[c] == mean);
      }
    }
  }
}

TEMPLATE_TEST_CASE("softmax_attention: every key has the same weight if scores are equal", "[exact]", float,
                   double) {
  for (const Index q_len : {1, 4, 30}) {
    for (Index kv_len = 1; kv_len <= 512; kv_len *= 2) {
      Call<TestType> call(Shape{1, 1, 1, q_len, kv_len, 4, kv_len});
      fill_one_hot(call.v);
      call.run(softmax_attention{});
      for (const TestType p : call.out.values) REQUIRE(p == TestType(1) / static_cast<TestType>(kv_len));
    }
  }
}

TEST_CASE("softmax_attention: the weight of every key, read off with an identity matrix as v",
          "[exact][gauge]") {
  Random random(1);
  for (Index kv_len = 1; kv_len <= 300; ++kv_len) {
    const Index q_len = kv_len % 2 == 0 ? 2 : 10;
    const Values values = random.pick({Values::normal, Values::flat, Values::peaked, Values::rising});
    Call<float> call(Shape{1, 1, 1, q_len, kv_len, 5, kv_len}, values, random);
    std::fill(call.v.values.begin(), call.v.values.end(), 0.0f);
    fill_one_hot(call.v);
    call.run(softmax_attention{});
    INFO("kv_len=" << kv_len << " q_len=" << q_len << ' ' << text_of(values));
    check_against(exact_attention({}, call), call);
  }
}

TEMPLATE_TEST_CASE("softmax_attention: with one visible key the output is exactly its value", "[exact][mask]",
                   float, double, bfloat16) {
  for (const Index q_len : {1, 2, 8, 9, 60, 300}) {
    Random random(static_cast<std::uint64_t>(q_len));
    const Index kv_len = q_len + 250;
    Call<TestType> call(Shape{1, 2, 2, q_len, kv_len, 8, 13}, Values::normal, random);
    call.run(softmax_attention{longspan::window{0, 0}}, longspan::openmp{2});
    const Exact exact =
        exact_attention({.sees = [](Index, Index, Index i, Index j) { return i == j; }}, call);
    for (Index h = 0; h < 2; ++h) {
      for (Index i = 0; i < q_len; ++i) {
        const TestType* value = call.v.row(0, h, kv_len - q_len + i);
        REQUIRE(std::equal(value, value + 13, call.out.row(0, h, i)));
      }
    }
    check_against(exact, call, {0, std::is_same_v<TestType, bfloat16> ? 1e-4 : 0});
  }
}

// ----------------------------------------------------------------------------------------------------------
// Options

TEST_CASE("softmax_attention: with a scale of 0 all keys have the same weight", "[options]") {
  for (const Index q_len : {2, 40}) {
    Random random(6);
    Call<float> call(Shape{1, 2, 1, q_len, 64, 16, 8}, Values::normal, random);
    softmax_attention attend;
    attend.scale = 0;
    call.run(attend);
    for (Index c = 0; c < 8; ++c) {
      double mean = 0;
      for (Index j = 0; j < 64; ++j) mean += double(call.v.row(0, 0, j)[c]) / 64;
      CHECK(std::abs(double(call.out.row(0, 1, q_len - 1)[c]) - mean) < 1e-6);
    }
  }
}

TEST_CASE("softmax_attention: a scale that is not a finite number is refused", "[options]") {
  Random random(7);
  Call<float> call(Shape{1, 1, 1, 2, 4, 4, 4}, Values::normal, random);
  for (const double scale : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
    softmax_attention attend;
    attend.scale = scale;
    CHECK_THROWS_AS(call.run(attend), longspan::Error);
  }
}

TEST_CASE("softmax_attention: scale is 1 / sqrt(head_dim) unless it is set", "[options]") {
  for (const Index q_len : {2, 40}) {
    Random random(5);
    Call<float> call(Shape{1, 2, 1, q_len, 100, 16, 8}, Values::normal, random), explicitly = call.unrun();
    softmax_attention attend{longspan::causal{}};
    CHECK_FALSE(attend.scale.has_value());
    call.run(attend);
    attend.scale = 0.25;
    explicitly.run(attend);
    CHECK(call.same_outputs(explicitly));
    attend.scale = 0.26;
    explicitly.run(attend);
    CHECK_FALSE(call.same_outputs(explicitly));
  }
}

TEST_CASE("softmax_attention: the last query is at the position of the last key unless first_query is set",
          "[options]") {
  for (const Index q_len : {2, 40}) {
    Random random(6);
    Call<float> call(Shape{1, 2, 1, q_len, 100, 16, 8}, Values::normal, random), explicitly = call.unrun();
    softmax_attention attend{longspan::causal{}};
    CHECK(attend.first_query == longspan::queries_end_at_keys);
    call.run(attend);
    attend.first_query = 100 - q_len;
    explicitly.run(attend);
    CHECK(call.same_outputs(explicitly));
    attend.first_query = 99 - q_len;
    explicitly.run(attend);
    CHECK_FALSE(call.same_outputs(explicitly));
  }
}

TEST_CASE("softmax_attention: parts may be given in any order", "[options]") {
  using namespace longspan;
  Random random(7);
  const Call<float> call(Shape{1, 2, 1, 30, 60, 16, 8}, Values::normal, random);
  const auto outputs_of = [&](const auto& attend) {
    Call<float> own = call;
    own.run(attend);
    return own;
  };
  const causal mask;
  const softcap score{20};
  const rotary position(Pairing::half_split);
  const auto first = outputs_of(longspan::softmax_attention{mask, score, position});
  CHECK(first.same_outputs(outputs_of(longspan::softmax_attention{position, mask, score})));
  CHECK(first.same_outputs(outputs_of(longspan::softmax_attention{score, position, mask})));
  longspan::softmax_attention<causal, softcap, rotary> assigned{mask, score, position};
  CHECK(first.same_outputs(outputs_of(assigned)));
  assigned.score.cap = 5;
  CHECK_FALSE(first.same_outputs(outputs_of(assigned)));
}

TEST_CASE("softmax_attention: the same results with and without lse and execution", "[options]") {
  for (const Index q_len : {2, 40}) {
    Random random(8);
    Call<float> call(Shape{2, 2, 1, q_len, 100, 16, 8}, Values::normal, random);
    call.run(softmax_attention{});
    const softmax_attention<> attend;
    const auto q = std::as_const(call.q).view(), k = std::as_const(call.k).view(),
               v = std::as_const(call.v).view();
    longspan::Execution<longspan::serial> execution;
    longspan::Execution team(longspan::openmp{2});
    const std::vector<std::function<void(Call<float>&)>> ways{
        [&](Call<float>& own) { attend(q, k, v, own.out.view()); },
        [&](Call<float>& own) { attend(q, k, v, own.out.view(), longspan::serial{}); },
        [&](Call<float>& own) { attend(q, k, v, own.out.view(), execution); },
        [&](Call<float>& own) { attend(q, k, v, own.out.view(), own.lse.view()); },
        [&](Call<float>& own) { attend(q, k, v, own.out.view(), own.lse.view(), team); }};
    for (std::size_t way = 0; way < ways.size(); ++way) {
      Call<float> own = call.unrun();
      ways[way](own);
      INFO("way " << way);
      CHECK(own.out == call.out);
      if (way > 2) CHECK(own.lse == call.lse);
      if (way <= 2) CHECK(std::isnan(own.lse.values[0]));
    }
  }
}

TEST_CASE("softmax_attention: Eigen tensors, maps and matrices give the results of views",
          "[options][eigen]") {
  using Tensor4 = Eigen::Tensor<float, 4, Eigen::RowMajor>;
  using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  Random random(9);
  Call<float> call(Shape{2, 2, 1, 20, 30, 16, 8}, Values::normal, random), own = call.unrun();
  call.run(softmax_attention{});

  const Eigen::TensorMap<const Tensor4> q(call.q.values.data(), 2, 2, 20, 16),
      k(call.k.values.data(), 2, 1, 30, 16);
  const Tensor4 v = Eigen::TensorMap<const Tensor4>(call.v.values.data(), 2, 1, 30, 8);
  Tensor4 out(2, 2, 20, 8);
  Eigen::Tensor<float, 3, Eigen::RowMajor> lse(2, 2, 20);
  softmax_attention{}(q, k, v, out, lse);
  CHECK(std::equal(call.out.values.begin(), call.out.values.end(), out.data()));
  CHECK(std::equal(call.lse.values.begin(), call.lse.values.end(), lse.data()));

  const Eigen::Map<const Matrix> q_head(call.q.values.data(), 20, 16), k_head(call.k.values.data(), 30, 16);
  Matrix v_head = Eigen::Map<const Matrix>(call.v.values.data(), 30, 8), out_head(20, 8);
  Eigen::VectorXf lse_head(20);
  softmax_attention{}(q_head, k_head, v_head, out_head, lse_head);
  CHECK(std::equal(out_head.data(), out_head.data() + 20 * 8, call.out.values.begin()));
  CHECK(std::equal(lse_head.data(), lse_head.data() + 20, call.lse.values.begin()));
}

// ----------------------------------------------------------------------------------------------------------
// Errors

namespace {

/// The views of one call, which the cases below change one at a time.
struct Views {
  TensorView<const float> q, k, v;
  TensorView<float> out;
  RowsView<float> lse;
};

struct Refused {
  const char* what;
  std::function<void(Views&)> bend;
  std::vector<std::string> words;  ///< parts of the error's text
};

const std::vector<Refused> refused_shapes{
    {"batch of q", [](Views& x) { x.q.batch = 1; }, {"k is [2, 2, 7, 8]", "wanted [1, kv_heads, kv_len, 8]"}},
    {"batch of k", [](Views& x) { x.k.batch = 1; }, {"k is [1, 2, 7, 8]", "wanted [2, kv_heads, kv_len, 8]"}},
    {"batch of v", [](Views& x) { x.v.batch = 1; }, {"v is [1, 2, 7, 4]", "wanted [2, 2, 7, value_dim]"}},
    {"batch of out", [](Views& x) { x.out.batch = 1; }, {"out is [1, 6, 5, 4]", "wanted [2, 6, 5, 4]"}},
    {"batch of lse", [](Views& x) { x.lse.batch = 1; }, {"lse is [1, 6, 5]", "wanted [2, 6, 5]"}},
    {"heads of q", [](Views& x) { x.q.heads = 5; }, {"heads of k is 2", "divisor of the 5 heads of q"}},
    {"heads of k", [](Views& x) { x.k.heads = 4; }, {"heads of k is 4", "divisor of the 6 heads of q"}},
    {"more heads of k than of q",
     [](Views& x) { x.k.heads = 12; },
     {"heads of k is 12", "divisor of the 6 heads"}},
    {"no heads of k", [](Views& x) { x.k.heads = 0; }, {"heads of k is 0", "divisor of the 6 heads"}},
    {"heads of v", [](Views& x) { x.v.heads = 1; }, {"v is [2, 1, 7, 4]", "wanted [2, 2, 7, value_dim]"}},
    {"heads of out", [](Views& x) { x.out.heads = 2; }, {"out is [2, 2, 5, 4]", "wanted [2, 6, 5, 4]"}},
    {"heads of lse", [](Views& x) { x.lse.heads = 2; }, {"lse is [2, 2, 5]", "wanted [2, 6, 5]"}},
    {"rows of q", [](Views& x) { x.q.rows = 4; }, {"out is [2, 6, 5, 4]", "wanted [2, 6, 4, 4]"}},
    {"rows of k", [](Views& x) { x.k.rows = 6; }, {"v is [2, 2, 7, 4]", "wanted [2, 2, 6, value_dim]"}},
    {"rows of v", [](Views& x) { x.v.rows = 6; }, {"v is [2, 2, 6, 4]", "wanted [2, 2, 7, value_dim]"}},
    {"rows of out", [](Views& x) { x.out.rows = 4; }, {"out is [2, 6, 4, 4]", "wanted [2, 6, 5, 4]"}},
    {"rows of lse", [](Views& x) { x.lse.rows = 4; }, {"lse is [2, 6, 4]", "wanted [2, 6, 5]"}},
    {"cols of q", [](Views& x) { x.q.cols = 7; }, {"k is [2, 2, 7, 8]", "kv_len, 7]", "q is [2, 6, 5, 7]"}},
    {"cols of k", [](Views& x) { x.k.cols = 7; }, {"k is [2, 2, 7, 7]", "kv_len, 8]", "q is [2, 6, 5, 8]"}},
    {"cols of v", [](Views& x) { x.v.cols = 3; }, {"out is [2, 6, 5, 4]", "wanted [2, 6, 5, 3]"}},
    {"cols of out", [](Views& x) { x.out.cols = 3; }, {"out is [2, 6, 5, 3]", "wanted [2, 6, 5, 4]"}},
    {"out in q",
     [](Views& x) { x.q.data = x.out.data; },
     {"out is the memory of an input", "memory of its own"}},
    {"out in k",
     [](Views& x) { x.k.data = x.out.data; },
     {"out is the memory of an input", "memory of its own"}},
    {"out in v",
     [](Views& x) { x.v.data = x.out.data; },
     {"out is the memory of an input", "memory of its own"}}};

template <class Attend>
std::string refusal_of(const Attend& attend, const Views& x) {
  try {
    attend(x.q, x.k, x.v, x.out, x.lse);
    return "";
  } catch (const longspan::Error& error) {
    return error.what();
  }
}

}  // namespace

TEST_CASE("softmax_attention: shapes that disagree are refused by name, and nothing is written", "[errors]") {
  Call<float> call(Shape{2, 6, 2, 5, 7, 8, 4});
  const Call<float> before = call;
  for (const Refused& refused : refused_shapes) {
    Views x{call.q.view(), call.k.view(), call.v.view(), call.out.view(), call.lse.view()};
    refused.bend(x);
    INFO(refused.what);
    const std::string text = refusal_of(softmax_attention<>{}, x);
    CAPTURE(text);
    CHECK(text.find("softmax_attention") != std::string::npos);
    for (const std::string& word : refused.words) CHECK(text.find(word) != std::string::npos);
    CHECK(before.same_outputs(call));
  }
}

TEST_CASE("softmax_attention: the unchanged shapes of the refused cases are accepted", "[errors]") {
  Call<float> call(Shape{2, 6, 2, 5, 7, 8, 4});
  const Views x{call.q.view(), call.k.view(), call.v.view(), call.out.view(), call.lse.view()};
  CHECK(refusal_of(softmax_attention<>{}, x).empty());
  for (const float value : call.out.values) REQUIRE(value == 0);
  for (const float lse : call.lse.values) REQUIRE(std::abs(lse - std::log(7.0f)) < 1e-6f);
}

TEST_CASE("softmax_attention: rows that cannot be encoded are refused", "[errors][position]") {
  using namespace longspan;
  Call<float> call(Shape{1, 2, 2, 5, 7, 7, 4});
  const Call<float> before = call;
  const Views x{call.q.view(), call.k.view(), call.v.view(), call.out.view(), call.lse.view()};
  CHECK(refusal_of(longspan::softmax_attention{rotary(Pairing::interleaved)}, x).find("rotary") !=
        std::string::npos);
  CHECK(refusal_of(longspan::softmax_attention{rotary(Pairing::half_split, 10000, 8)}, x)
            .find("head_dim = 7") != std::string::npos);
  CHECK(refusal_of(longspan::softmax_attention{xpos(Pairing::half_split)}, x).find("xpos") !=
        std::string::npos);
  CHECK(before.same_outputs(call));
  CHECK(refusal_of(longspan::softmax_attention{rotary(Pairing::half_split, 10000, 6)}, x).empty());
}

namespace {

struct FailingExecutor {
  Index workers() const { return 1; }
  template <class Task>
  void for_each(Index, Task&&) const {
    throw std::runtime_error("no worker");
  }
};

}  // namespace

TEST_CASE("softmax_attention: exceptions of an executor or a score reach the caller", "[errors]") {
  Random random(2);
  // Enough work that the caller's executor is used.
  Call<float> call(Shape{1, 2, 2, 100, 200, 32, 32}, Values::normal, random);
  CHECK_THROWS_AS(call.run(softmax_attention{}, FailingExecutor{}), std::runtime_error);
  const auto fails_at_key_150 = [](float s, Index, Index, Index, Index j) {
    if (j == 150) throw std::domain_error("key 150");
    return s;
  };
  CHECK_THROWS_AS(call.run(softmax_attention{fails_at_key_150}, longspan::openmp{3}), std::domain_error);
  CHECK_THROWS_AS(call.run(softmax_attention{fails_at_key_150}), std::domain_error);
}
