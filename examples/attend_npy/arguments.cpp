#include "arguments.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <system_error>

namespace attend_npy {
namespace {

/// `text` as a number, or nothing if it is not exactly one number. White space and a plus sign are not allowed.
template <class Number>
std::optional<Number> number_in(std::string_view text) {
  Number number{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return number;
}

/// Reads "8,16,64"; returns false if the text is something else, or if fits(the number before or -1, number) is false.
template <class Fits>
bool add_numbers(std::string_view text, std::vector<Index>& numbers, const Fits& fits) {
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t comma = std::min(text.find(',', begin), text.size());
    const auto number = number_in<Index>(text.substr(begin, comma - begin));
    if (!number || !fits(numbers.empty() ? -1 : numbers.back(), *number)) return false;
    numbers.push_back(*number);
    begin = comma + 1;
  }
  return true;
}

[[noreturn]] void refuse_key(std::string_view key, const std::string& got, const std::string& wanted) {
  throw Error("the key " + std::string(key) + " is '" + got + "', wanted " + wanted);
}

Storage storage_named(std::string_view name) {
  if (name == "f32") return Storage::f32;
  if (name == "f64") return Storage::f64;
  if (name == "bf16") return Storage::bf16;
  if (name == "f16") return Storage::f16;
  throw Error("the option --dtype is '" + std::string(name) + "', wanted f32, f64, bf16 or f16");
}

Layout layout_named(std::string_view name) {
  if (name == "bhnd") return Layout::bhnd;
  if (name == "bnhd") return Layout::bnhd;
  throw Error("the option --layout is '" + std::string(name) + "', wanted bhnd or bnhd");
}

Index thread_count(std::string_view text) {
  constexpr Index most = 4096;  // each thread needs scratch memory even if it gets no work
  const auto count = number_in<Index>(text);
  if (!count || *count < 1 || *count > most) {
    throw Error("the option --threads is '" + std::string(text) + "', wanted an integer from 1 to " +
                std::to_string(most));
  }
  return *count;
}

}  // namespace

std::string listed(std::span<const std::string_view> words) {
  std::string text;
  for (std::size_t i = 0; i < words.size(); ++i) {
    if (i > 0) text += i + 1 < words.size() ? ", " : " and ";
    text += words[i];
  }
  return text;
}

void Keys::add(std::string_view key, std::string_view value) {
  if (!values_.emplace(key, value).second) throw Error("the key " + std::string(key) + " is given twice");
}

void Keys::allow(std::string_view variant, std::span<const std::string_view> keys) const {
  for (const auto& [key, value] : values_) {
    bool known = false;
    for (const std::string_view allowed : keys) known = known || key == allowed;
    if (!known) {
      throw Error("unknown key '" + key + "', the keys of " + std::string(variant) + " are " + listed(keys));
    }
  }
}

bool Keys::flag(std::string_view key) const {
  const std::string* value = find(key);
  if (value && *value != "0" && *value != "1") refuse_key(key, *value, "0 or 1");
  return value && *value == "1";
}

std::optional<Index> Keys::positive_integer(std::string_view key) const {
  const std::string* value = find(key);
  if (!value) return std::nullopt;
  const auto number = number_in<Index>(*value);
  if (!number || *number < 1) refuse_key(key, *value, "an integer from 1 to 2^63 - 1");
  return number;
}

std::optional<Index> Keys::integer_from_0(std::string_view key) const {
  const std::string* value = find(key);
  if (!value) return std::nullopt;
  const auto number = number_in<Index>(*value);
  if (!number || *number < 0) refuse_key(key, *value, "an integer from 0 to 2^63 - 1");
  return number;
}

std::optional<double> Keys::nonzero(std::string_view key) const {
  const std::string* value = find(key);
  if (!value) return std::nullopt;
  const auto number = number_in<double>(*value);
  if (!number || !std::isfinite(*number) || *number == 0) {
    refuse_key(key, *value, "a finite number other than 0");
  }
  return number;
}

std::optional<float> Keys::positive_float(std::string_view key) const {
  const std::string* value = find(key);
  if (!value) return std::nullopt;
  const auto number = number_in<float>(*value);
  if (!number || !std::isfinite(*number) || *number <= 0) refuse_key(key, *value, "a finite number above 0");
  return number;
}

std::vector<Index> Keys::positive_integers(std::string_view key) const {
  const std::string* value = find(key);
  std::vector<Index> numbers;
  if (value && !add_numbers(*value, numbers, [](Index, Index number) { return number >= 1; }))
    refuse_key(key, *value, "integers from 1 to 2^63 - 1 with commas between");
  return numbers;
}

std::optional<std::vector<Index>> Keys::rising_integers(std::string_view key) const {
  const std::string* value = find(key);
  if (!value) return std::nullopt;
  std::vector<Index> numbers;
  if (!value->empty() &&
      !add_numbers(*value, numbers, [](Index last, Index number) { return number > last; }))
    refuse_key(key, *value, "rising integers like 7,15,23, or nothing");
  return numbers;
}

std::optional<std::size_t> Keys::word(std::string_view key, std::span<const std::string_view> words) const {
  const std::string* value = find(key);
  if (!value) return std::nullopt;
  const auto found = std::find(words.begin(), words.end(), *value);
  if (found == words.end()) refuse_key(key, *value, "one of " + listed(words));
  return static_cast<std::size_t>(found - words.begin());
}

int Keys::choice(std::string_view key, const char* first, const char* second) const {
  const std::string* value = find(key);
  if (value && *value != first && *value != second)
    refuse_key(key, *value, std::string(first) + " or " + second);
  return value && *value == second ? 1 : 0;
}

const std::string* Keys::find(std::string_view key) const {
  const auto found = values_.find(key);
  return found == values_.end() ? nullptr : &found->second;
}

Arguments parse_arguments(std::span<const std::string_view> words) {
  static constexpr std::array<std::string_view, 16> names{
      "--q",          "--k",        "--v",      "--out",  "--lse",  "--dtype", "--threads", "--beta",
      "--memory-out", "--norm-out", "--layout", "--dout", "--dlse", "--dq",    "--dk",      "--dv"};
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
  arguments.dout = options["--dout"];
  arguments.dlse = options["--dlse"];
  arguments.dq = options["--dq"];
  arguments.dk = options["--dk"];
  arguments.dv = options["--dv"];
  if (options.contains("--dtype")) arguments.storage = storage_named(options["--dtype"]);
  if (options.contains("--layout")) arguments.layout = layout_named(options["--layout"]);
  if (options.contains("--threads")) arguments.threads = thread_count(options["--threads"]);
  return arguments;
}

}  // namespace attend_npy
