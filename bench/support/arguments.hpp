// Parses command lines of --name value and --flag.
#pragma once

#include <charconv>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "longspan/view.hpp"
#include "support/usage_error.hpp"

namespace bench {

using longspan::Index;

class Arguments {
 public:
  /// Throws UsageError for an option in neither list, a missing value, or an option given twice.
  Arguments(std::span<const std::string> words, std::span<const std::string_view> valued,
            std::span<const std::string_view> flags) {
    for (std::size_t n = 0; n < words.size(); ++n) {
      const std::string& word = words[n];
      const bool takes_value = contains(valued, word);
      if (!takes_value && !contains(flags, word)) {
        throw UsageError("the option " + word + " is unknown, wanted one of " + listed(valued, flags));
      }
      if (given_.count(word) > 0) throw UsageError("the option " + word + " is given twice");
      if (takes_value && n + 1 == words.size()) throw UsageError("the option " + word + " lacks its value");
      given_[word] = takes_value ? words[++n] : "";
    }
  }

  bool has(std::string_view name) const { return given_.find(name) != given_.end(); }

  std::optional<std::string> value(std::string_view name) const {
    const auto found = given_.find(name);
    return found == given_.end() ? std::nullopt : std::optional(found->second);
  }

  Index number(std::string_view name, Index otherwise, Index lowest, Index highest) const {
    const std::optional<std::string> text = value(name);
    return text ? parsed(name, *text, lowest, highest) : otherwise;
  }

  /// Comma-separated numbers.
  std::vector<Index> numbers(std::string_view name, std::vector<Index> otherwise, Index lowest,
                             Index highest) const {
    const std::optional<std::string> text = value(name);
    if (!text) return otherwise;
    std::vector<Index> all;
    for (std::string_view rest = *text;;) {
      const std::size_t comma = rest.find(',');
      all.push_back(parsed(name, rest.substr(0, comma), lowest, highest));
      if (comma == std::string_view::npos) return all;
      rest.remove_prefix(comma + 1);
    }
  }

 private:
  static bool contains(std::span<const std::string_view> names, std::string_view name) {
    for (const std::string_view n : names) {
      if (n == name) return true;
    }
    return false;
  }

  static std::string listed(std::span<const std::string_view> valued,
                            std::span<const std::string_view> flags) {
    std::string text;
    for (const auto& names : {valued, flags}) {
      for (const std::string_view name : names) text += (text.empty() ? "" : ", ") + std::string(name);
    }
    return text;
  }

  static Index parsed(std::string_view name, std::string_view text, Index lowest, Index highest) {
    Index number = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (error != std::errc() || end != text.data() + text.size() || number < lowest || number > highest) {
      throw UsageError("the option " + std::string(name) + " is '" + std::string(text) +
                       "', wanted a whole number from " + std::to_string(lowest) + " to " +
                       std::to_string(highest));
    }
    return number;
  }

  std::map<std::string, std::string, std::less<>> given_;
};

}  // namespace bench
