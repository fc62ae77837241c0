// The command line of attend_npy: VARIANT key=value ... --option value ..., read strictly.
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "longspan/error.hpp"
#include "longspan/view.hpp"

namespace attend_npy {

using longspan::Error;
using longspan::Index;

/// The type in which the kernel sees q, k and v.
enum class Storage { f32, f64, bf16, f16 };

/// "a, b and c"
inline std::string listed(std::span<const std::string_view> words) {
  std::string text;
  for (std::size_t i = 0; i < words.size(); ++i) {
    if (i > 0) text += i + 1 < words.size() ? ", " : " and ";
    text += words[i];
  }
  return text;
}

/// The whole of `text` as a number, or nothing. No leading white space, no plus sign.
template <class Number>
std::optional<Number> number_in(std::string_view text) {
  Number number{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return number;
}

/// The key=value words of a variant.
class Keys {
 public:
  void add(std::string_view key, std::string_view value) {
    if (!values_.emplace(key, value).second) throw Error("the key " + std::string(key) + " is given twice");
  }

  /// Called by each variant before it reads its keys.
  void allow(std::string_view variant, std::span<const std::string_view> keys) const {
    for (const auto& [key, value] : values_) {
      bool known = false;
      for (const std::string_view allowed : keys) known = known || key == allowed;
      if (!known) {
        throw Error("unknown key '" + key + "', the keys of " + std::string(variant) + " are " +
                    listed(keys));
      }
    }
  }

  /// As it stands in the command line, for variants that have their own form of a value.
  std::optional<std::string_view> text(std::string_view key) const {
    const std::string* value = find(key);
    if (!value) return std::nullopt;
    return *value;
  }

  bool flag(std::string_view key) const {
    const std::string* value = find(key);
    if (value && *value != "0" && *value != "1") refuse(key, *value, "0 or 1");
    return value && *value == "1";
  }

  std::optional<Index> positive_integer(std::string_view key) const {
    const std::string* value = find(key);
    if (!value) return std::nullopt;
    const auto number = number_in<Index>(*value);
    if (!number || *number < 1) refuse(key, *value, "an integer from 1 to 2^63 - 1");
    return number;
  }

  /// "8,16,64"; empty where the key is absent.
  std::vector<Index> positive_integers(std::string_view key) const {
    const std::string* value = find(key);
    std::vector<Index> numbers;
    for (std::size_t begin = 0; value != nullptr && begin <= value->size();) {
      const std::size_t comma = std::min(value->find(',', begin), value->size());
      const auto number = number_in<Index>(std::string_view(*value).substr(begin, comma - begin));
      if (!number || *number < 1) refuse(key, *value, "integers from 1 to 2^63 - 1 with commas between");
      numbers.push_back(*number);
      begin = comma + 1;
    }
    return numbers;
  }

  /// Which of two words the key has, 0 or 1; 0 where it is absent.
  int choice(std::string_view key, const char* first, const char* second) const {
    const std::string* value = find(key);
    if (value && *value != first && *value != second) {
      refuse(key, *value, (std::string(first) + " or " + second).c_str());
    }
    return value && *value == second ? 1 : 0;
  }

  std::optional<double> nonzero(std::string_view key) const {
    const std::string* value = find(key);
    if (!value) return std::nullopt;
    const auto number = number_in<double>(*value);
    if (!number || !std::isfinite(*number) || *number == 0) {
      refuse(key, *value, "a finite number other than 0");
    }
    return number;
  }

  std::optional<float> positive_float(std::string_view key) const {
    const std::string* value = find(key);
    if (!value) return std::nullopt;
    const auto number = number_in<float>(*value);
    if (!number || !std::isfinite(*number) || *number <= 0) refuse(key, *value, "a finite number above 0");
    return number;
  }

 private:
  const std::string* find(std::string_view key) const {
    const auto found = values_.find(key);
    return found == values_.end() ? nullptr : &found->second;
  }

  [[noreturn]] static void refuse(std::string_view key, const std::string& got, const char* wanted) {
    throw Error("the key " + std::string(key) + " is '" + got + "', wanted " + wanted);
  }

  std::map<std::string, std::string, std::less<>> values_;
};

struct Arguments {
  Keys keys;
  std::string q, k, v, out;
  std::string lse;                 ///< empty: not wanted
  std::string beta;                ///< of infini, as are the next two; empty: 0
  std::string memory_out;          ///< empty: not wanted
  std::string norm_out;            ///< empty: not wanted
  std::optional<Storage> storage;  ///< absent: as the files have it
  Index threads = 0;               ///< 0: as many as OpenMP takes
};

namespace detail {

inline Storage storage_named(std::string_view name) {
  if (name == "f32") return Storage::f32;
  if (name == "f64") return Storage::f64;
  if (name == "bf16") return Storage::bf16;
  if (name == "f16") return Storage::f16;
  throw Error("the option --dtype is '" + std::string(name) + "', wanted f32, f64, bf16 or f16");
}

inline Index thread_count(std::string_view text) {
  constexpr Index most = 4096;  // each thread takes scratch memory before it has work
  const auto count = number_in<Index>(text);
  if (!count || *count < 1 || *count > most) {
    throw Error("the option --threads is '" + std::string(text) + "', wanted an integer from 1 to " +
                std::to_string(most));
  }
  return *count;
}

}  // namespace detail

/// The words behind VARIANT; keys and options in any order.
inline Arguments parse_arguments(std::span<const std::string_view> words) {
  static constexpr std::array<std::string_view, 10> names{
      "--q", "--k", "--v", "--out", "--lse", "--dtype", "--threads", "--beta", "--memory-out", "--norm-out"};
  Arguments arguments;
  std::map<std::string_view, std::string_view> options;
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::string_view word = words[i];
    if (!word.starts_with("--")) {
      const std::size_t equals = word.find('=');
      if (equals == std::string_view::npos || equals == 0) {
        throw Error("'" + std::string(word) + "' is neither key=value nor one of the options " +
                    listed(names));
      }
      arguments.keys.add(word.substr(0, equals), word.substr(equals + 1));
      continue;
    }
    const std::string option(word);
    if (std::find(names.begin(), names.end(), word) == names.end()) {
      throw Error("unknown option '" + option + "', the options are " + listed(names));
    }
    if (i + 1 == words.size() || words[i + 1].empty() || words[i + 1].starts_with("--")) {
      throw Error("the option " + option + " has no value");
    }
    if (!options.emplace(word, words[++i]).second) throw Error("the option " + option + " is given twice");
  }
  for (const std::string_view wanted : std::span(names).first(4)) {
    if (!options.contains(wanted)) throw Error("the option " + std::string(wanted) + " is missing");
  }
  arguments.q = options["--q"];
  arguments.k = options["--k"];
  arguments.v = options["--v"];
  arguments.out = options["--out"];
  arguments.lse = options["--lse"];
  arguments.beta = options["--beta"];
  arguments.memory_out = options["--memory-out"];
  arguments.norm_out = options["--norm-out"];
  if (options.contains("--dtype")) arguments.storage = detail::storage_named(options["--dtype"]);
  if (options.contains("--threads")) arguments.threads = detail::thread_count(options["--threads"]);
  return arguments;
}

}  // namespace attend_npy
