// The parts of a functor (mask, score, position encoding): given in any order, recognised by the concepts they satisfy.
#pragma once

#include <tuple>
#include <type_traits>

#include "longspan/mask.hpp"
#include "longspan/position.hpp"
#include "longspan/score.hpp"
#include "longspan/version.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

struct MaskPart {
  template <class X>
  static constexpr bool is = Mask<X>;
};
struct ScorePart {
  template <class X>
  static constexpr bool is = Score<X>;
};
struct PositionPart {
  template <class X>
  static constexpr bool is = Position<X>;
};

template <class Kind, class Default, class... Parts>
struct FindPart {
  using type = Default;
};
template <class Kind, class Default, class First, class... Rest>
struct FindPart<Kind, Default, First, Rest...> {
  using type = typename std::conditional_t<Kind::template is<First>, std::type_identity<First>,
                                           FindPart<Kind, Default, Rest...>>::type;
};

/// A functor that has parts itself. In `softmax_attention b = a`, template argument deduction also tries `a` as a part
/// before it chooses the copy.
template <class X>
concept MadeOfParts = requires(const X& x) {
  x.mask;
  x.score;
  x.position;
};

/// The type of the part of that kind, or Default if there is none.
template <class Kind, class Default, class... Parts>
struct PartOfChecked {
  static_assert(((MadeOfParts<Parts> ||
                  MaskPart::is<Parts> + ScorePart::is<Parts> + PositionPart::is<Parts> == 1) &&
                 ...),
                "longspan: each part of a functor must be a mask, a score or a position encoding "
                "(their requirements are in mask.hpp, score.hpp and position.hpp)");
  static_assert((int(Kind::template is<Parts>) + ... + 0) <= 1,
                "longspan: a functor takes one mask, one score and one position encoding; "
                "combine masks by & | !, scores by |");
  using type = typename FindPart<Kind, Default, Parts...>::type;
};
template <class Kind, class Default, class... Parts>
using PartOf = typename PartOfChecked<Kind, Default, Parts...>::type;

/// Are these the parts of a functor with mask M, score S and position encoding P?
template <class M, class S, class P, class... Parts>
inline constexpr bool parts_are = std::is_same_v<M, PartOf<MaskPart, everything, Parts...>> &&
                                  std::is_same_v<S, PartOf<ScorePart, unchanged, Parts...>> &&
                                  std::is_same_v<P, PartOf<PositionPart, no_position, Parts...>>;

/// The part of that kind, or a default-constructed one if there is none.
template <class Kind, class Part, class... Parts>
Part take_part(const Parts&... parts) {
  if constexpr ((Kind::template is<Parts> || ...)) {
    const std::tuple<const Parts&...> all(parts...);
    return std::get<const typename FindPart<Kind, void, Parts...>::type&>(all);
  } else {
    return Part{};
  }
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
