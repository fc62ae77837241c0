#include "longspan/reference/dilated_attention.hpp"

#include <cmath>
#include <vector>

#include "longspan/dilated_attention.hpp"
#include "support/catch.hpp"
#include "support/tensor.hpp"

namespace {

using namespace longspan;
using Branches = std::vector<Branch>;
using Numbers = std::vector<double>;

constexpr double infinity = std::numeric_limits<double>::infinity();

/// Heads of dimension 1 in which exp(score) of key j and the value of key j are j + 1.
struct Counts {
  test::Tensor<double> q, k, v, out;
  test::Rows<double> lse;

  Counts(Index heads, Index length)
      : q(1, heads, length, 1, 1.0),
        k(1, 1, length, 1),
        v(1, 1, length, 1),
        out(1, heads, length, 1, NAN),
        lse(1, heads, length, NAN) {
    for (Index j = 0; j < length; ++j) {
      k.row(0, 0, j)[0] = std::log(static_cast<double>(j + 1));
      v.row(0, 0, j)[0] = static_cast<double>(j + 1);
    }
  }
  template <class Attend>
  Counts& run(const Attend& attend) {
    attend(q.view(), k.view(), v.view(), out.view(), lse.view());
    return *this;
  }
  Numbers sums() const {
    Numbers all;
    for (const double x : lse.values) all.push_back(std::exp(x));
    return all;
  }
};

bool near(const Numbers& x, const Numbers& y) {
  if (x.size() != y.size()) return false;
  for (std::size_t n = 0; n < x.size(); ++n) {
    if (!(std::abs(x[n] - y[n]) <= 1e-14 * (1 + std::abs(y[n])))) return false;
  }
  return true;
}

/// Calls check(attend, form) for a functor, where form(attend) is its reference or the functor itself.
template <class Check, class... Parts>
void check_both(const Check& check, const Branches& branches, const Parts&... parts) {
  const dilated_attention attend{branches, parts...};
  SECTION("reference") {
    check(attend, [](const auto& of) { return reference::exact{of}; });
  }
  SECTION("kernel") {
    check(attend, [](const auto& of) { return of; });
  }
}

const Branches two{{2, 1}, {4, 2}};

}  // namespace

TEST_CASE("dilated_attention: two branches, two heads", "[golden]") {
  const auto check = [](const auto& attend, const auto& form) {
    Counts call(2, 4);
    call.run(form(attend));
    CHECK(near(call.out.values,
               {15.0 / 7, 5.0 / 3, 35.0 / 11, 25.0 / 7, 5.0 / 3, 25.0 / 9, 25.0 / 7, 45.0 / 13}));
    CHECK(near(call.sums(), {7, 3, 11, 7, 3, 9, 7, 13}));
  };
  check_both(check, two);
}

TEST_CASE("dilated_attention: the same, causal", "[golden]") {
  const auto check = [](const auto& attend, const auto& form) {
    Counts call(2, 4);
    call.run(form(attend));
    CHECK(near(call.out.values, {1, 5.0 / 3, 19.0 / 7, 25.0 / 7, 1, 9.0 / 5, 3, 45.0 / 13}));
    CHECK(near(call.sums(), {2, 3, 7, 7, 1, 5, 3, 13}));
  };
  check_both(check, two, causal{});
}

TEST_CASE("dilated_attention: with Overlap::set a key of two branches counts once", "[golden]") {
  const auto check = [](auto attend, const auto& form) {
    attend.overlap = Overlap::set;
    CHECK(std::abs(Counts(1, 4).run(form(attend)).out.values[0] - 14.0 / 6) < 1e-14);
  };
  check_both(check, two);
}

TEST_CASE("dilated_attention: outputs of tokens that no branch keeps are 0", "[golden]") {
  const auto check = [](const auto& attend, const auto& form) {
    Counts call(1, 7);
    call.run(form(attend));
    // The visible keys of the queries: 0; none; none; 0 and 3; 4; none; none.
    CHECK(near(call.out.values, {1, 0, 0, (1 + 16) / 5.0, 5, 0, 0}));
    CHECK(call.lse.values[1] == -infinity);
    CHECK(call.lse.values[6] == -infinity);
  };
  check_both(check, {{4, 3}}, causal{});
}

TEST_CASE("dilated_attention: a short segment, without and with torchscale's zeros", "[golden]") {
  const auto check = [](auto attend, const auto& form) {
    CHECK(near(Counts(2, 3).run(form(attend)).out.values, {2.5, 0, 2.5, 0, 2, 0}));
    attend.zero_pad_compat = true;
    CHECK(near(Counts(2, 3).run(form(attend)).out.values, {2.5, 0, 2.5, 0, 4.0 / 3, 0}));
    attend.branches = {{2, 1}};  // 3 tokens in segments of 2: one row of zeros is appended
    CHECK(near(Counts(1, 3).run(form(attend)).out.values, {5.0 / 3, 5.0 / 3, 9.0 / 4}));
  };
  check_both(check, {{4, 2}});
}
