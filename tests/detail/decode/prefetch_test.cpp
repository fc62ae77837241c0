// Iteration over the columns of rows: each column once, in order, first in whole cache lines.
#include "longspan/detail/decode/prefetch.hpp"

#include <cstdint>
#include <vector>

#include "support/catch.hpp"

namespace {

using namespace longspan::detail;
using longspan::Index;

/// The columns in the order in which a kernel receives them.
template <class Real, class T, PrefetchHint hint>
std::vector<Index> columns_seen(const std::vector<T>& row, Index row_stride) {
  constexpr Index w = lanes<Real>, step = loads_in_pairs<Real, T> ? 2 * w : w;
  const Index columns = static_cast<Index>(row.size());
  std::vector<Index> seen;
  const auto whole = [&](Index column) {
    for (Index c = column; c < column + step; ++c) seen.push_back(c);
  };
  const auto packet = [&](const auto& load_packet, Index column) {
    alignas(64) Real lane[std::size_t(lanes<Real>)];
    store<Real>(lane, load_packet(row.data() + column));
    for (Index c = column; c < column + w; ++c) {
      const bool there = c < columns;
      const Real wanted = there ? static_cast<Real>(row[static_cast<std::size_t>(c)]) : Real(0);
      if (there) seen.push_back(c);
      if (lane[c - column] != wanted) seen.push_back(-1);
    }
  };
  for_each_column<Real, T, 3, hint>(columns, {row.data(), columns, row_stride, 3, 4, row.data()}, whole,
                                    packet);
  return seen;
}

template <class Real, class T>
void check_columns() {
  for (Index columns = 0; columns <= 140; ++columns) {
    std::vector<T> row(static_cast<std::size_t>(columns));
    std::vector<Index> wanted;
    for (Index c = 0; c < columns; ++c) {
      row[static_cast<std::size_t>(c)] = static_cast<T>(static_cast<float>(c % 100 + 1));
      wanted.push_back(c);
    }
    INFO("columns=" << columns);
    CHECK(columns_seen<Real, T, PrefetchHint::none>(row, columns) == wanted);
    CHECK(columns_seen<Real, T, PrefetchHint::streaming>(row, columns) == wanted);
    CHECK(columns_seen<Real, T, PrefetchHint::reused>(row, 5 * columns + 1) == wanted);
  }
}

}  // namespace

TEST_CASE("for_each_column: every column once, and nothing after the last", "[row_columns]") {
  SECTION("float") { check_columns<float, float>(); }
  SECTION("double") { check_columns<double, double>(); }
  SECTION("bfloat16") { check_columns<float, Eigen::bfloat16>(); }
  SECTION("half") { check_columns<float, Eigen::half>(); }
  SECTION("int8") { check_columns<float, std::int8_t>(); }
  SECTION("float in double") { check_columns<double, float>(); }
}
