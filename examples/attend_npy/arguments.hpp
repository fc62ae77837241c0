// The command line of attend_npy: VARIANT key=value ... --option value ..., read strictly.
#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "longspan/error.hpp"
#include "longspan/view.hpp"

namespace attend_npy {

using longspan::Error;
using longspan::Index;

/// The type to which q, k and v are rounded.
enum class Storage { f32, f64, bf16, f16 };

/// The order of the dimensions of q, k, v and out: [B, H, N, d] or [B, N, H, d].
enum class Layout { bhnd, bnhd };

/// "a, b and c"
std::string listed(std::span<const std::string_view> words);

/// The key=value words of a variant.
class Keys {
 public:
  void add(std::string_view key, std::string_view value);

  /// Called by each variant before it reads its keys.
  void allow(std::string_view variant, std::span<const std::string_view> keys) const;

  bool flag(std::string_view key) const;
  std::optional<Index> positive_integer(std::string_view key) const;
  std::optional<Index> integer_from_0(std::string_view key) const;
  std::optional<double> nonzero(std::string_view key) const;
  std::optional<float> positive_float(std::string_view key) const;

  /// "8,16,64"; empty where the key is absent.
  std::vector<Index> positive_integers(std::string_view key) const;
  /// "0,7,15", each more than the one before, or "", which is none; nothing where the key is absent.
  std::optional<std::vector<Index>> rising_integers(std::string_view key) const;

  /// Which of the words the key has, counted from 0; nothing where it is absent.
  std::optional<std::size_t> word(std::string_view key, std::span<const std::string_view> words) const;
  /// Which of two words the key has, 0 or 1; 0 where it is absent.
  int choice(std::string_view key, const char* first, const char* second) const;

 private:
  const std::string* find(std::string_view key) const;

  std::map<std::string, std::string, std::less<>> values_;
};

struct Arguments {
  Keys keys;
  std::string q, k, v, out;
  std::string lse;                 ///< empty: not wanted
  std::string beta;                ///< of variants with a memory; empty: 0
  std::string memory_out;          ///< of infini, as is the next; empty: not wanted
  std::string norm_out;            ///< empty: not wanted
  std::optional<Storage> storage;  ///< absent: as the files have it
  Index threads = 0;               ///< 0: as many as OpenMP takes
  Layout layout = Layout::bhnd;
};

/// The words behind VARIANT; keys and options in any order.
Arguments parse_arguments(std::span<const std::string_view> words);

}  // namespace attend_npy
