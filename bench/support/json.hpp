// JSON, written in the order of the calls, so that the same run writes the same bytes.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>
#include <string_view>

#include "longspan/view.hpp"
#include "support/format.hpp"

namespace bench {

class Json {
 public:
  void begin_object(std::string_view key = {}) { open(key, '{'); }
  void end_object() { close('}'); }
  void begin_array(std::string_view key = {}) { open(key, '['); }
  void end_array() { close(']'); }

  void add(std::string_view key, std::string_view text) { put(key, quoted(text)); }
  void add(std::string_view key, const char* text) { put(key, quoted(text)); }
  void add(std::string_view key, bool value) { put(key, value ? "true" : "false"); }
  void add(std::string_view key, longspan::Index value) { put(key, std::to_string(value)); }
  /// Infinity and NaN, for which JSON has no number, become null.
  void add(std::string_view key, double value) {
    put(key, std::isfinite(value) ? printed("%.6g", value) : "null");
  }

  std::string text() const { return text_ + "\n"; }

 private:
  static std::string quoted(std::string_view text) {
    std::string out = "\"";
    for (const char c : text) {
      if (c == '"' || c == '\\') out += '\\';
      if (static_cast<unsigned char>(c) < 0x20) {
        char escape[8];
        std::snprintf(escape, sizeof escape, "\\u%04x", static_cast<unsigned>(static_cast<unsigned char>(c)));
        out += escape;
      } else {
        out += c;
      }
    }
    return out + "\"";
  }

  void put(std::string_view key, const std::string& value) {
    if (!first_) text_ += ",";
    if (depth_ > 0) new_line();
    if (!key.empty()) text_ += quoted(key) + ": ";
    text_ += value;
    first_ = false;
  }

  void open(std::string_view key, char bracket) {
    put(key, std::string(1, bracket));
    ++depth_;
    first_ = true;
  }

  void close(char bracket) {
    --depth_;
    if (!first_) new_line();
    text_ += bracket;
    first_ = false;
  }

  void new_line() { text_.append(1, '\n').append(static_cast<std::size_t>(2 * depth_), ' '); }

  std::string text_;
  int depth_ = 0;
  bool first_ = true;
};

}  // namespace bench
