// The command line of attend_npy: VARIANT key=value ... --option value ... Anything else is an error.
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

  /// Throws Error if there is any other key. Each variant calls this before it reads its keys.
  void allow(std::string_view variant, std::span<const std::string_view> keys) const;

  bool flag(std::string_view key) const;
  std::optional<Index> positive_integer(std::string_view key) const;
  std::optional<Index> integer_from_0(std::string_view key) const;
  std::optional<double> nonzero(std::string_view key) const;
  std::optional<float> positive_float(std::string_view key) const;

  /// Reads "8,16,64"; empty if the key is absent.
  std::vector<Index> positive_integers(std::string_view key) const;
  /// Reads "0,7,15", rising integers, or "" for none; nothing if the key is absent.
  std::optional<std::vector<Index>> rising_integers(std::string_view key) const;

  /// The index of the word that the key has; nothing if the key is absent.
  std::optional<std::size_t> word(std::string_view key, std::span<const std::string_view> words) const;
  /// The index, 0 or 1, of the word that the key has; 0 if the key is absent.
  int choice(std::string_view key, const char* first, const char* second) const;

 private:
  const std::string* find(std::string_view key) const;

  std::map<std::string, std::string, std::less<>> values_;
};

struct Arguments {
  Keys keys;
  std::string q, k, v, out;
  std::string lse;                 ///< empty: not requested
  std::string beta;                ///< for variants with a memory; empty: 0
  std::string memory_out;          ///< for infini; empty: not requested
  std::string norm_out;            ///< for infini; empty: not requested
  std::string dout, dlse;          ///< for softmax; empty: no gradients, and an lse without influence
  std::string dq, dk, dv;          ///< for softmax; empty: not requested
  std::optional<Storage> storage;  ///< absent: the type of the files
  Index threads = 0;               ///< 0: OpenMP's own number
  Layout layout = Layout::bhnd;
};

/// Parses the words after VARIANT; keys and options may be in any order.
Arguments parse_arguments(std::span<const std::string_view> words);

}  // namespace attend_npy
