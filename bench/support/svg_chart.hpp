// Line charts in SVG, for pages without scripts. The page defines the colours: lines have the classes line0,
// line1, ..., and text, grid and frame have their own classes.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "support/format.hpp"

namespace bench {

/// Escapes text for HTML and SVG text and attributes.
inline std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '&') {
      out += "&amp;";
    } else if (c == '<') {
      out += "&lt;";
    } else if (c == '>') {
      out += "&gt;";
    } else if (c == '"') {
      out += "&quot;";
    } else {
      out += c;
    }
  }
  return out;
}

struct Axis {
  std::string title;
  bool logarithmic = false;
  double low = 0;
  double high = 1;
  std::vector<std::pair<double, std::string>> ticks;

  /// 0 at `low`, 1 at `high`.
  double share(double x) const {
    return logarithmic ? std::log(x / low) / std::log(high / low) : (x - low) / (high - low);
  }
};

/// An axis from `low` to `high` in steps of a factor, starting at a power of it; label(number) is the text of a number.
template <class Label>
Axis logarithmic_axis(std::string title, double low, double high, double factor, const Label& label) {
  Axis axis{std::move(title), true, low / 1.25, high * 1.25, {}};
  if (high / low < factor) axis.low = low / factor, axis.high = high * factor;
  const auto first = static_cast<int>(std::ceil(std::log(axis.low) / std::log(factor) - 1e-9));
  for (int n = first; std::pow(factor, n) <= axis.high * (1 + 1e-9); ++n) {
    axis.ticks.emplace_back(std::pow(factor, n), label(std::pow(factor, n)));
  }
  return axis;
}

inline Axis percent_axis(std::string title, double high) {
  Axis axis{std::move(title), false, 0, std::max(100.0, std::ceil(high / 20) * 20), {}};
  for (double tick = 0; tick <= axis.high; tick += 20) axis.ticks.emplace_back(tick, printed("%.0f", tick));
  return axis;
}

struct ChartPoint {
  double x = 0;
  double y = 0;
  std::string text;  ///< the tooltip
};

struct ChartLine {
  std::string name;
  std::vector<ChartPoint> points;
  bool guide = false;  ///< a thin line without marks, for comparison
};

class Chart {
 public:
  Chart(std::string title, Axis x, Axis y, std::vector<ChartLine> lines, double width, double height)
      : title_(std::move(title)),
        x_(std::move(x)),
        y_(std::move(y)),
        lines_(std::move(lines)),
        width_(width),
        height_(height) {
    const std::vector<LegendEntry> legend = placed_legend();
    top_ = (legend.empty() ? 0 : legend.back().y) + 26;
  }

  std::string svg() const {
    std::string out = "<svg viewBox=\"0 0 " + at(width_) + " " + at(height_) +
                      "\" role=\"img\" aria-label=\"" +
                      escaped(title_ + ": " + y_.title + " against " + x_.title) + "\">\n";
    out += grid() + legend();
    for (std::size_t n = 0; n < lines_.size(); ++n) out += line(n);
    return out + "</svg>\n";
  }

 private:
  static constexpr double left = 92, right = 18, bottom = 54;

  static std::string at(double x) { return printed("%.1f", x); }
  double x_at(double x) const { return left + x_.share(x) * (width_ - left - right); }
  double y_at(double y) const { return height_ - bottom - y_.share(y) * (height_ - top_ - bottom); }

  static std::string text(double x, double y, const char* kind, const char* anchor, const std::string& words,
                          const std::string& more = {}) {
    return "<text class=\"" + std::string(kind) + "\" x=\"" + at(x) + "\" y=\"" + at(y) +
           "\" text-anchor=\"" + anchor + "\"" + more + ">" + escaped(words) + "</text>\n";
  }

  static std::string rule(const std::string& kind, double x1, double y1, double x2, double y2) {
    return "<line class=\"" + kind + "\" x1=\"" + at(x1) + "\" y1=\"" + at(y1) + "\" x2=\"" + at(x2) +
           "\" y2=\"" + at(y2) + "\"/>\n";
  }

  std::string grid() const {
    const double floor = height_ - bottom, end = width_ - right;
    std::string out;
    for (const auto& [value, label] : x_.ticks) {
      out += rule("grid", x_at(value), top_, x_at(value), floor) +
             text(x_at(value), floor + 18, "tick", "middle", label);
    }
    for (const auto& [value, label] : y_.ticks) {
      out += rule("grid", left, y_at(value), end, y_at(value)) +
             text(left - 8, y_at(value) + 4, "tick", "end", label);
    }
    out += rule("frame", left, floor, end, floor) + rule("frame", left, top_, left, floor);
    out += text((left + end) / 2, height_ - 12, "axis", "middle", x_.title);
    const double middle = (top_ + floor) / 2;
    return out +
           text(18, middle, "axis", "middle", y_.title, " transform=\"rotate(-90 18 " + at(middle) + ")\"");
  }

  struct LegendEntry {
    std::size_t line;
    double x, y;
  };

  /// Entries from left to right in rows, without lines that have no points. A letter counts as 7.2 wide.
  std::vector<LegendEntry> placed_legend() const {
    std::vector<LegendEntry> entries;
    double x = left, y = 14;
    for (std::size_t n = 0; n < lines_.size(); ++n) {
      if (lines_[n].points.empty()) continue;
      const double length = 34 + 7.2 * static_cast<double>(lines_[n].name.size());
      if (x > left && x + length > width_ - right) x = left, y += 22;
      entries.push_back({n, x, y});
      x += length + 24;
    }
    return entries;
  }

  std::string legend() const {
    std::string out;
    for (const auto& [n, x, y] : placed_legend()) {
      out += rule(kind(n), x, y, x + 28, y) + (lines_[n].guide ? "" : mark(n, x + 14, y, ""));
      out += text(x + 34, y + 4.5, "legend", "start", lines_[n].name);
    }
    return out;
  }

  std::string line(std::size_t n) const {
    std::string path, marks;
    for (const ChartPoint& p : lines_[n].points) {
      path += (path.empty() ? "M" : " L") + at(x_at(p.x)) + " " + at(y_at(p.y));
      if (!lines_[n].guide) marks += mark(n, x_at(p.x), y_at(p.y), p.text);
    }
    return path.empty() ? "" : "<path class=\"" + kind(n) + "\" d=\"" + path + "\"/>\n" + marks;
  }

  std::string kind(std::size_t n) const {
    return lines_[n].guide ? "guide" : "line line" + std::to_string(n);
  }

  /// Discs, squares and diamonds, so that lines differ not only in colour.
  std::string mark(std::size_t n, double x, double y, const std::string& words) const {
    const std::string style = " class=\"mark line" + std::to_string(n) + "\"";
    const std::string end = words.empty() ? "/>\n" : "><title>" + escaped(words) + "</title>";
    if (n % 3 == 0) {
      return "<circle" + style + " cx=\"" + at(x) + "\" cy=\"" + at(y) + "\" r=\"4.5\"" + end +
             (words.empty() ? "" : "</circle>\n");
    }
    const std::string turn = n % 3 == 2 ? " transform=\"rotate(45 " + at(x) + " " + at(y) + ")\"" : "";
    return "<rect" + style + " x=\"" + at(x - 4) + "\" y=\"" + at(y - 4) + "\" width=\"8\" height=\"8\"" +
           turn + end + (words.empty() ? "" : "</rect>\n");
  }

  std::string title_;
  Axis x_, y_;
  std::vector<ChartLine> lines_;
  double width_, height_, top_ = 0;
};

}  // namespace bench
