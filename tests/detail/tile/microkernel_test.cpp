// The inner loops compared with scalar loops, for every number of packets and of rows.
#include "longspan/detail/tile/microkernel.hpp"

#include <cmath>
#include <limits>
#include <span>
#include <type_traits>
#include <vector>

#include "longspan/detail/call/arena.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"

namespace {

using namespace longspan::detail;
using longspan::Index;
using test::Random;

template <class Real>
std::vector<Real> normals(Index count, Random& random) {
  std::vector<Real> x(static_cast<std::size_t>(count));
  for (Real& value : x) value = static_cast<Real>(random.normal());
  return x;
}

template <class Real>
inline constexpr double u = double(std::numeric_limits<Real>::epsilon()) / 2;
constexpr double canary = 12345;

template <class Real, int packets>
void check_score_rows() {
  constexpr Index used = packets * lanes<Real>, width = used + 5, k_stride = 70;
  Random random(1);
  for (const Index head_dim : {0, 1, 2, 7, 64}) {
    for (Index rows = 1; rows <= 2 * tile_rows + 1; ++rows) {
      // Rows after the last one contain NaN and must not be read.
      const Index written = round_up(rows, tile_rows);
      std::vector<Real> k(static_cast<std::size_t>(written * k_stride),
                          std::numeric_limits<Real>::quiet_NaN());
      for (Index r = 0; r < rows; ++r) {
        for (Index c = 0; c < head_dim; ++c)
          k[std::size_t(r * k_stride + c)] = static_cast<Real>(random.normal());
      }
      const auto q = normals<Real>(std::max<Index>(1, head_dim) * width, random);
      std::vector<Real> s(std::size_t((written + 1) * width), Real(canary)),
          highest = normals<Real>(width, random);
      const std::vector<Real> before = highest;
      score_rows<packets>(k.data(), k_stride, rows, q.data(), head_dim, s.data(), highest.data(), width);
      bool right = true;
      for (Index lane = 0; lane < width; ++lane) {
        Real row_max = before[std::size_t(lane)];
        for (Index r = 0; r <= written; ++r) {
          const Real got = s[std::size_t(r * width + lane)];
          if (lane >= used || r == written) {
            right = right && got == Real(canary);
            continue;
          }
          double wanted = 0, size = 0;
          for (Index c = 0; c < head_dim; ++c) {
            const double x = double(k[std::size_t(std::min(r, rows - 1) * k_stride + c)]) *
                             double(q[std::size_t(c * width + lane)]);
            wanted += x;
            size += std::abs(x);
          }
          right = right && std::abs(double(got) - wanted) <= double(head_dim + 2) * u<Real> * size;
          row_max = std::max(row_max, got);
        }
        right = right && highest[std::size_t(lane)] == row_max;
      }
      INFO("packets=" << packets << " rows=" << rows << " head_dim=" << head_dim);
      CHECK(right);
    }
  }
}

template <class Real, int packets>
void check_weigh_rows() {
  constexpr Index used = packets * lanes<Real>, width = used + 3;
  Random random(2);
  for (const Index keys : {0, 1, 2, 3, 8, 17}) {
    std::vector<Real> s = normals<Real>((keys + 1) * width, random), shift(std::size_t(width), Real(3));
    std::vector<Real> total = normals<Real>(width, random);
    for (Real& x : s) x = -std::abs(x) * 5;
    if (keys > 2) s[std::size_t(2 * width)] = std::numeric_limits<Real>::lowest();
    const std::vector<Real> scores = s, totals = total;
    exp_rows<packets>(s.data(), width, keys, shift.data(), total.data());
    bool right = true;
    for (Index lane = 0; lane < width; ++lane) {
      double sum = double(totals[std::size_t(lane)]), size = std::abs(sum);
      for (Index j = 0; j <= keys; ++j) {
        const auto at = std::size_t(j * width + lane);
        if (j == keys || lane >= used) {
          right = right && s[at] == scores[at];
          continue;
        }
        const double p = std::exp((double(scores[at]) - 3) / double(score_unit<Real>));
        right = right && std::abs(double(s[at]) - p) <= 64 * u<Real> * p;
        sum += p;
        size += p;
      }
      if (lane < used)
        right = right && std::abs(double(total[std::size_t(lane)]) - sum) <= 100 * u<Real> * size;
    }
    if (keys > 2) right = right && s[std::size_t(2 * width)] == 0;
    INFO("packets=" << packets << " keys=" << keys);
    CHECK(right);
  }
}

template <class Real, int packets>
void check_value_rows() {
  constexpr Index used = packets * lanes<Real>, width = used + 2, columns = 2 * tile_rows,
                  v_stride = columns + 3;
  Random random(3);
  for (const Index keys : {0, 1, 2, 9, 128}) {
    for (const Accumulate into : {Accumulate::overwrite, Accumulate::add, Accumulate::rescale}) {
      const auto v = normals<Real>((keys + 1) * v_stride, random),
                 p = normals<Real>((keys + 1) * width, random);
      const auto scale = normals<Real>(width, random), before = normals<Real>(columns * width, random);
      std::vector<Real> o = before;
      value_rows<packets>(v.data(), v_stride, columns, p.data(), width, keys, o.data(), width, into,
                          scale.data());
      bool right = true;
      for (Index r = 0; r < columns; ++r) {
        for (Index lane = 0; lane < width; ++lane) {
          const auto at = std::size_t(r * width + lane);
          const double old = double(before[at]);
          double wanted = into == Accumulate::overwrite ? 0
                          : into == Accumulate::add     ? old
                                                        : old * double(scale[std::size_t(lane)]);
          double size = std::abs(wanted);
          for (Index j = 0; j < keys; ++j) {
            const double x =
                double(v[std::size_t(j * v_stride + r)]) * double(p[std::size_t(j * width + lane)]);
            wanted += x;
            size += std::abs(x);
          }
          right =
              right && (lane < used ? std::abs(double(o[at]) - wanted) <= double(keys + 3) * u<Real> * size
                                    : o[at] == before[at]);
        }
      }
      INFO("packets=" << packets << " keys=" << keys << " into=" << int(into));
      CHECK(right);
    }
  }
}

/// A compile-time stride changes no bit.
template <class Real, int packets>
void check_tile_stride() {
  constexpr Index stride = packets * lanes<Real>, keys = 2 * tile_rows, head_dim = 20,
                  columns = 2 * tile_rows;
  constexpr std::integral_constant<Index, stride> known;
  Random random(5);
  const auto k = normals<Real>(keys * head_dim, random), q = normals<Real>(head_dim * stride, random),
             v = normals<Real>(keys * columns, random), scale = normals<Real>(stride, random);
  std::vector<Real> s(std::size_t(keys * stride)), s_known = s, row_max(std::size_t(stride), Real(-1)),
                                                   top_known = row_max;
  score_rows<packets>(k.data(), head_dim, keys, q.data(), head_dim, s.data(), row_max.data(), stride);
  score_rows<packets>(k.data(), head_dim, keys, q.data(), head_dim, s_known.data(), top_known.data(), known);
  CHECK(s == s_known);
  CHECK(row_max == top_known);
  std::vector<Real> o = normals<Real>(columns * stride, random), o_known = o;
  const RowRun all{keys, 0, packets};
  value_rows<packets>(v.data(), columns, columns, s.data(), stride, std::span(&all, 1), o.data(), stride,
                      Accumulate::rescale, scale.data());
  value_rows<packets>(v.data(), columns, columns, s.data(), known, std::span(&all, 1), o_known.data(), known,
                      Accumulate::rescale, scale.data());
  CHECK(o == o_known);
}

/// Runs of rows with some packets each, compared lane by lane with the same rows one by one.
template <class Real, int packets>
void check_value_runs() {
  constexpr Index width = packets * lanes<Real>, v_stride = tile_rows;
  test::for_each_case(30, [](Random& random) {
    std::vector<RowRun> runs(static_cast<std::size_t>(random.between(0, 6)));
    Index rows = 0;
    for (RowRun& run : runs) {
      run.rows = random.between(0, 19);
      run.first_packet = static_cast<int>(random.between(0, packets - 1));
      run.packets = static_cast<int>(random.between(1, packets - run.first_packet));
      rows += run.rows;
    }
    const auto v = normals<Real>((rows + 1) * v_stride, random),
               p = normals<Real>((rows + 1) * width, random);
    const auto scale = normals<Real>(width, random), before = normals<Real>(tile_rows * width, random);
    for (const Accumulate into : {Accumulate::overwrite, Accumulate::add, Accumulate::rescale}) {
      std::vector<Real> o = before, wanted = before;
      value_rows<packets>(v.data(), v_stride, tile_rows, p.data(), width, runs, o.data(), width, into,
                          scale.data());
      for (int c = 0; c < packets; ++c) {
        const Index lane = c * lanes<Real>;
        std::vector<Real> of_packet;  // the rows that include this packet
        std::vector<Real> values;
        Index row = 0;
        for (const RowRun& run : runs) {
          const bool takes_part = c >= run.first_packet && c < run.first_packet + run.packets;
          for (Index j = row; takes_part && j < row + run.rows; ++j) {
            of_packet.insert(of_packet.end(), p.begin() + j * width + lane,
                             p.begin() + j * width + lane + lanes<Real>);
            values.insert(values.end(), v.begin() + j * v_stride, v.begin() + (j + 1) * v_stride);
          }
          row += run.rows;
        }
        const Index taken = static_cast<Index>(of_packet.size()) / lanes<Real>;
        of_packet.resize(of_packet.size() + std::size_t(lanes<Real>));  // memory even if there are none
        values.resize(values.size() + std::size_t(v_stride));
        value_rows<1>(static_cast<const Real*>(values.data()), v_stride, tile_rows,
                      static_cast<const Real*>(of_packet.data()), lanes<Real>, taken, wanted.data() + lane,
                      width, into, scale.data() + lane);
      }
      REQUIRE(o == wanted);
    }
  });
}

template <class Real, template <class, int> class Check>
void for_each_packets() {
  Check<Real, 1>::run();
  Check<Real, 2>::run();
  if constexpr (tile_packets == 3) Check<Real, 3>::run();
}

template <class Real, int packets>
struct Scores {
  static void run() { check_score_rows<Real, packets>(); }
};
template <class Real, int packets>
struct Weights {
  static void run() { check_weigh_rows<Real, packets>(); }
};
template <class Real, int packets>
struct Products {
  static void run() {
    check_value_rows<Real, packets>();
    check_value_runs<Real, packets>();
    check_tile_stride<Real, packets>();
  }
};

}  // namespace

TEMPLATE_TEST_CASE("microkernel: scores of a few rows of keys", "[microkernel]", float, double) {
  for_each_packets<TestType, Scores>();
}
TEMPLATE_TEST_CASE("microkernel: exp scores", "[microkernel]", float, double) {
  for_each_packets<TestType, Weights>();
}
TEMPLATE_TEST_CASE("microkernel: weighted sums of a few columns of values", "[microkernel]", float, double) {
  for_each_packets<TestType, Products>();
}

TEMPLATE_TEST_CASE("microkernel: NaN in a score stays in its lane", "[microkernel][nan]", float, double) {
  constexpr Index width = lanes<TestType>;
  Random random(4);
  const auto k = normals<TestType>(tile_rows * 2, random);
  std::vector<TestType> q = normals<TestType>(2 * width, random), s(std::size_t(tile_rows * width));
  std::vector<TestType> highest(std::size_t(width), TestType(-1)), total(std::size_t(width), TestType(0));
  q[std::size_t(width - 1)] = std::numeric_limits<TestType>::quiet_NaN();
  score_rows<1>(k.data(), 2, tile_rows, q.data(), 2, s.data(), highest.data(), width);
  exp_rows<1>(s.data(), width, tile_rows, std::vector<TestType>(std::size_t(width), TestType(50)).data(),
              total.data());
  for (Index lane = 0; lane < width; ++lane)
    CHECK(std::isnan(total[std::size_t(lane)]) == (lane == width - 1));
}

TEST_CASE("microkernel: with_packets passes on the number of packets", "[microkernel]") {
  for (int packets = 1; packets <= tile_packets; ++packets) {
    int got = 0;
    with_packets(packets, [&]<int n>() { got = n; });
    CHECK(got == packets);
  }
}
