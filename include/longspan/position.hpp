// Position encodings, which write positions into queries and keys: rotary, xpos, or none.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>

#include "longspan/detail/call/check_view.hpp"
#include "longspan/detail/call/finite.hpp"
#include "longspan/detail/simd/packet.hpp"
#include "longspan/eigen.hpp"
#include "longspan/element.hpp"
#include "longspan/error.hpp"
#include "longspan/options.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_VOCABULARY_BEGIN

/// Which two columns of a row are rotated together. Published weights need the pairing that they were trained with, and
/// the wrong one gives wrong results without an error, so there is no default.
enum class Pairing : std::uint8_t {
  interleaved,  ///< (0, 1), (2, 3), ...: RoFormer, GPT-J
  half_split,   ///< (0, n/2), (1, n/2 + 1), ...: GPT-NeoX, Llama as Hugging Face stores it
};

/// Whether a row is a query or a key: xpos scales queries up and keys down.
enum class Role : std::uint8_t { query, key };

LONGSPAN_VOCABULARY_END

LONGSPAN_NAMESPACE_BEGIN
/// Numbers that identify an encoding: two encodings with the same numbers write the same rows. The first number is the
/// kind: 0 none, 1 rotary, 2 xpos, 100 or more for user-defined encodings.
using PositionIdentity = std::array<double, 6>;

/// A position encoding. `encode(rows, first_position, role)` changes rows of floats or doubles in place; row i is at
/// position first_position + i. `check(cols)` throws Error if rows of that length cannot be encoded.
/// `encode_transposed(rows, first_position, role)` is optional: the transpose of what `encode` does to a row, through
/// which gradients come back. `PositionIdentity identity() const` is optional: a stream saves it in its file, and
/// `load` throws Error if the keys in the file have another identity. All encodings without this member share one
/// identity.
template <class P>
concept Position = std::is_object_v<P> && requires(const P& encoding, float* row, Index x, Role role) {
  encoding.encode(MatrixView<float>{row, x, x, x}, x, role);
  encoding.check(x);
};

namespace detail {

/// The positions of rows: row i is at position first + (skipped + i) / alike, so that `alike` consecutive rows are at
/// the same position.
struct RowPositions {
  Index first = 0;
  Index alike = 1;
  Index skipped = 0;
};

template <class P, class Real>
void encode_at(const P& encoding, MatrixView<Real> rows, const RowPositions& positions, Role role) {
  if constexpr (requires { encoding.encode_at(rows, positions, role); }) {
    encoding.encode_at(rows, positions, role);
  } else {
    const Index step = positions.alike;
    for (Index i = 0; i < (std::min)(step, rows.rows); ++i) {
      const MatrixView<Real> every{rows.row(i), (rows.rows - i + step - 1) / step, rows.cols,
                                   rows.row_stride * step};
      encoding.encode(every, positions.first + (positions.skipped + i) / step, role);
    }
  }
}

/// Position encodings through which gradients come back.
template <class P>
concept TransposablePosition = requires(const P& encoding, MatrixView<float> rows, Index x, Role role) {
  encoding.encode_transposed(rows, x, role);
};

template <class P>
PositionIdentity position_identity(const P& encoding) {
  if constexpr (requires { PositionIdentity(encoding.identity()); }) {
    return encoding.identity();
  } else {
    return {99};
  }
}

}  // namespace detail

/// No position encoding: q and k stay unchanged.
struct no_position {
  PositionIdentity identity() const noexcept { return {}; }
  template <class Real>
  void encode(MatrixView<Real>, Index, Role) const noexcept {}
  template <class Real>
  void encode_transposed(MatrixView<Real>, Index, Role) const noexcept {}
  void check(Index) const noexcept {}
};

namespace detail {

/// cos and sin of up to 16 pairs at one position: c + i s = exp(n * rate) (cos(n * frequency) + i sin(...)). The
/// compiler vectorises loops over all 16 if it does not unroll them first; missing pairs are 0.
struct PairTurns {
  static constexpr Index capacity = 16;
  using Numbers = std::array<double, capacity>;

  Numbers frequency{}, rate{}, c{}, s{}, turn_c{}, turn_s{};

  void add(Index p, double pair_frequency, double pair_rate) {
    const auto at = static_cast<std::size_t>(p);
    const double stretched = exp_of(pair_rate);
    frequency[at] = pair_frequency;
    rate[at] = pair_rate;
    turn_c[at] = stretched * std::cos(pair_frequency);
    turn_s[at] = stretched * std::sin(pair_frequency);
  }
  void start_at(Index position, Index count) {
    for (std::size_t p = 0; p < static_cast<std::size_t>(count); ++p) {
      const double n = static_cast<double>(position), stretched = exp_of(rate[p] * n);
      c[p] = stretched * std::cos(frequency[p] * n);
      s[p] = stretched * std::sin(frequency[p] * n);
    }
  }
  /// Advances all pairs to the next position.
  void turn() {
    LONGSPAN_NO_UNROLL
    for (std::size_t p = 0; p < capacity; ++p) {
      const double next = c[p] * turn_c[p] - s[p] * turn_s[p];
      s[p] = c[p] * turn_s[p] + s[p] * turn_c[p];
      c[p] = next;
    }
  }
  /// Turns pairs p of a row, which are at first[p * step] and second[p * step].
  template <Index step, class Real>
  void apply(Real* first, Real* second, Index count) const {
    if (count == capacity) return apply_to<step>(first, second, capacity);  // with a constant count
    apply_to<step>(first, second, count);
  }

 private:
  static double exp_of(double x) { return x == 0 ? 1 : std::exp(x); }

  template <Index step, class Real>
  void apply_to(Real* first, Real* second, Index count) const {
    std::array<Real, capacity> a, b;
    LONGSPAN_NO_UNROLL
    for (Index p = 0; p < count; ++p) {
      const auto at = static_cast<std::size_t>(p);
      const Real cosine = static_cast<Real>(c[at]), sine = static_cast<Real>(s[at]);
      a[at] = first[p * step] * cosine - second[p * step] * sine;
      b[at] = first[p * step] * sine + second[p * step] * cosine;
    }
    LONGSPAN_NO_UNROLL
    for (Index p = 0; p < count; ++p) {
      first[p * step] = a[static_cast<std::size_t>(p)];
      second[p * step] = b[static_cast<std::size_t>(p)];
    }
  }
};

/// Rotates pair p of a row at position n by the angle n * base^(-2p / turned), and multiplies it by exp(n * growth(p)).
///
/// Angles are computed in double: at position 10^6 a float angle has an error of 0.06. For rows of float, cos and sin
/// are called only at multiples of 64; the positions in between are reached by repeated rotation, always from that
/// multiple, so that the bits of a row depend on its position and not on the other rows. Up to 63 rotations have an
/// error of 1e-14. That is too much for rows of double, for which cos and sin are called in every row.
///
/// `direction` is 1, or -1 to rotate by the negative angles: the transposed rotation.
template <class Real, class Growth>
void rotate_rows(MatrixView<Real> x, const RowPositions& positions, Index turned, double base,
                 Pairing pairing, const Growth& growth, double direction = 1) {
  constexpr Index stretch = std::is_same_v<Real, double> ? 1 : 64;
  const Index pairs = turned / 2;
  for (Index first_pair = 0; first_pair < pairs; first_pair += PairTurns::capacity) {
    const Index count = (std::min)(PairTurns::capacity, pairs - first_pair);
    PairTurns turns;
    for (Index p = 0; p < count; ++p) {
      const double exponent = -2.0 * static_cast<double>(first_pair + p) / static_cast<double>(turned);
      turns.add(p, direction * std::pow(base, exponent), growth(first_pair + p));
    }
    Index position = positions.first, left = positions.alike - positions.skipped;  // rows left at it
    for (Index i = 0; i < x.rows; ++i, --left) {
      const bool is_next = left == 0;
      if (is_next) {
        ++position;
        left = positions.alike;
      }
      if (i == 0 || is_next) {
        const Index behind = ((position % stretch) + stretch) % stretch;
        if (i == 0 || behind == 0) turns.start_at(position - behind, count);
        for (Index t = 0; t < (i == 0 ? behind : std::min<Index>(behind, 1)); ++t) turns.turn();
      }
      Real* row = x.row(i);
      if (pairing == Pairing::interleaved) {
        turns.apply<2>(row + 2 * first_pair, row + 2 * first_pair + 1, count);
      } else {
        turns.apply<1>(row + first_pair, row + first_pair + pairs, count);
      }
    }
  }
}

inline void check_turned(std::string_view function, Index turned, Index cols) {
  if (turned < 0 || turned % 2 != 0 || turned > cols) {
    refuse(function, "the number of rotated dimensions", std::to_string(turned),
           "an even number of at most head_dim = " + std::to_string(cols));
  }
}

inline void check_positive(std::string_view function, std::string_view option, double got) {
  if (!is_finite(got) || got <= 0) refuse(function, option, number_text(got), "a positive finite number");
}

}  // namespace detail

/// Rotary positions: pair p of a row at position n is rotated by the angle n * base^(-2p / dims).
///
/// Source  Su et al. 2021 (RoFormer, arXiv 2104.09864), eq. 34.
struct rotary {
  Pairing pairing;
  double base = 10000;
  Index dims = 0;  ///< the number of leading columns that are rotated, even; 0: all

  explicit rotary(Pairing which, double frequency_base = 10000, Index turned_dims = 0)
      : pairing(which), base(frequency_base), dims(turned_dims) {}

  /// Encodes `rows` in place; row i is at position `first_position` + i.
  template <class Real>
  void encode(MatrixView<Real> rows, Index first_position, Role) const {
    encode_at(rows, {.first = first_position}, Role::query);
  }
  /// The same for rows of which some are at the same position; angles are computed once for each position.
  template <class Real>
  void encode_at(MatrixView<Real> rows, const detail::RowPositions& positions, Role) const {
    detail::rotate_rows(rows, positions, turned(rows.cols), base, pairing, [](Index) { return 0.0; });
  }
  /// The gradient with respect to rows before `encode`, from the gradient with respect to the encoded rows.
  template <class Real>
  void encode_transposed(MatrixView<Real> rows, Index first_position, Role) const {
    detail::rotate_rows(
        rows, {.first = first_position}, turned(rows.cols), base, pairing, [](Index) { return 0.0; }, -1);
  }
  void check(Index cols) const {
    detail::check_turned("rotary", turned(cols), cols);
    detail::check_positive("rotary", "base", base);
  }
  PositionIdentity identity() const noexcept {
    return {1, static_cast<double>(pairing), base, static_cast<double>(dims)};
  }

 private:
  Index turned(Index cols) const noexcept { return dims == 0 ? cols : dims; }
};

/// Rotary positions with scores that also decrease with distance: a query is multiplied by
/// zeta_p^((n - centre) / scale_base) and a key by the inverse, with zeta_p = (2p / d + 0.4) / 1.4.
///
/// Only the product of both factors is bounded: far from the centre each factor exceeds the range of float. Positions
/// within 60 * scale_base of the centre are safe; set `centre` to the middle of the positions of a call.
///
/// Source  Sun et al. 2022 (A Length-Extrapolatable Transformer, arXiv 2212.10554), eq. 11 and algorithm 1.
struct xpos {
  Pairing pairing;
  double scale_base = 512;
  Index centre = 0;
  double base = 10000;

  explicit xpos(Pairing which, double decay_base = 512, Index around = 0, double frequency_base = 10000)
      : pairing(which), scale_base(decay_base), centre(around), base(frequency_base) {}

  template <class Real>
  void encode(MatrixView<Real> rows, Index first_position, Role role) const {
    rotate(rows, {.first = first_position}, role, 1);
  }
  template <class Real>
  void encode_at(MatrixView<Real> rows, const detail::RowPositions& positions, Role role) const {
    rotate(rows, positions, role, 1);
  }
  /// The gradient with respect to rows before `encode`, from the gradient with respect to the encoded rows.
  template <class Real>
  void encode_transposed(MatrixView<Real> rows, Index first_position, Role role) const {
    rotate(rows, {.first = first_position}, role, -1);
  }
  void check(Index cols) const {
    detail::check_turned("xpos", cols, cols);
    detail::check_positive("xpos", "base", base);
    detail::check_positive("xpos", "scale_base", scale_base);
    constexpr Index farthest = Index{1} << 61;
    if (centre < -farthest || centre > farthest)
      detail::refuse("xpos", "centre", std::to_string(centre), "a position between -2^61 and 2^61");
  }
  PositionIdentity identity() const noexcept {
    return {2, static_cast<double>(pairing), base, 0, scale_base, static_cast<double>(centre)};
  }

 private:
  template <class Real>
  void rotate(MatrixView<Real> rows, const detail::RowPositions& positions, Role role,
              double direction) const {
    const double sign = role == Role::query ? 1 : -1, cols = static_cast<double>(rows.cols);
    const auto growth = [&](Index p) {
      return sign * std::log((2 * static_cast<double>(p) / cols + 0.4) / 1.4) / scale_base;
    };
    // Angles are also relative to the centre, because scores depend only on differences of positions.
    detail::rotate_rows(rows, {positions.first - centre, positions.alike, positions.skipped}, rows.cols, base,
                        pairing, growth, direction);
  }
};

/// Encodes x in place: row i of every head is at position `first_position` + i.
///
/// Shapes  x [batch, heads, rows, cols], float or double
/// Cost    about 3 * batch * heads * rows * cols flop; no allocation
/// Error   each number within 2 ulp of the length of its pair, at any position up to 2^40
/// Throws  Error if rows of x cannot be encoded or |first_position| exceeds 2^62, before x is changed
template <TensorLike X, Position P>
void encode_positions(X&& x, const P& encoding, Index first_position, Role role) {
  const auto tensor = view(x);
  detail::check_view("encode_positions", "x", tensor);
  encoding.check(tensor.cols);
  if (first_position < -detail::farthest_query || first_position > detail::farthest_query) {
    detail::refuse("encode_positions", "first_position", std::to_string(first_position),
                   "a position between -2^62 and 2^62");
  }
  for (Index b = 0; b < tensor.batch; ++b) {
    for (Index h = 0; h < tensor.heads; ++h) encoding.encode(tensor.matrix(b, h), first_position, role);
  }
}

LONGSPAN_NAMESPACE_END
