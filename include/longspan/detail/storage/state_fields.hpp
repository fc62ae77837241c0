// The numbers in the header of a state file that must be the same in a stream that loads it, and how messages print
// them.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

#include "longspan/element.hpp"
#include "longspan/error.hpp"
#include "longspan/position.hpp"
#include "longspan/stream_shape.hpp"
#include "longspan/version.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// One number of a header: its name in messages, its value in this stream, and how to print a value.
struct StateField {
  std::string_view name;
  std::int64_t value = 0;
  std::string (*text)(std::int64_t) = [](std::int64_t x) { return std::to_string(x); };
};

/// A field that holds the bits of a double.
inline StateField real_field(std::string_view name, double value) {
  return {name, std::bit_cast<std::int64_t>(value), [](std::int64_t bits) {
            char text[32];
            std::snprintf(text, sizeof(text), "%.17g", std::bit_cast<double>(bits));
            return std::string(text);
          }};
}

/// The type of the stored elements. The codes are part of the file format.
template <class T>
StateField element_field() {
  constexpr std::int64_t code = std::is_same_v<T, float>             ? 1
                                : std::is_same_v<T, double>          ? 2
                                : std::is_same_v<T, Eigen::bfloat16> ? 3
                                : std::is_same_v<T, Eigen::half>     ? 4
                                                                     : 5;
  static_assert(code < 5 || std::is_same_v<T, std::int8_t>);
  return {"the element type", code, [](std::int64_t x) {
            static constexpr const char* names[] = {"float", "double", "bfloat16", "half", "int8"};
            return x >= 1 && x <= 5 ? std::string(names[x - 1]) : "unknown (" + std::to_string(x) + ")";
          }};
}

/// The sizes of a stream.
inline std::array<StateField, 5> shape_fields(const StreamShape& shape) {
  return {{{"batch", shape.batch},
           {"heads", shape.heads},
           {"kv_heads", shape.kv_heads},
           {"head_dim", shape.head_dim},
           {"value_dim", shape.value_dim}}};
}

/// The encoding of the stored keys, see position_identity.
template <class P>
std::array<StateField, std::tuple_size_v<PositionIdentity>> position_fields(const P& position) {
  static constexpr const char* names[] = {"the position encoding",       "the pairing of the positions",
                                          "the base of the positions",   "dims of the positions",
                                          "scale_base of the positions", "centre of the positions"};
  const PositionIdentity identity = position_identity(position);
  std::array<StateField, std::tuple_size_v<PositionIdentity>> fields;
  for (std::size_t n = 0; n < fields.size(); ++n) fields[n] = real_field(names[n], identity[n]);
  fields[0].text = [](std::int64_t bits) {
    const double kind = std::bit_cast<double>(bits);
    return kind == 0 ? std::string("none") : kind == 1 ? "rotary" : kind == 2 ? "xpos" : "user-defined";
  };
  fields[1].text = [](std::int64_t bits) {
    return std::string(std::bit_cast<double>(bits) == 0 ? "interleaved" : "half_split");
  };
  return fields;
}

/// The values of fields, as a header stores them.
inline std::vector<std::int64_t> values_of(std::span<const StateField> fields) {
  std::vector<std::int64_t> values;
  for (const StateField& field : fields) values.push_back(field.value);
  return values;
}

/// Throws FileError and names the first field in which a file differs from the stream that loads it.
inline void check_fields(std::string_view function, std::span<const std::int64_t> in_file,
                         std::span<const StateField> wanted) {
  for (std::size_t n = 0; n < wanted.size(); ++n) {
    const StateField& field = wanted[n];
    if (in_file[n] != field.value) {
      refuse<FileError>(function, field.name, field.text(in_file[n]) + " in the file",
                        field.text(field.value) + " as in this stream");
    }
  }
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
