// One HTML page: table and plots, without scripts and external resources, for light and dark screens. Also the first
// plot.
#include <algorithm>

#include "compare/results.hpp"
#include "support/needles.hpp"
#include "support/svg_chart.hpp"

namespace bench {
namespace {

// Eight colours that colour-blind readers can distinguish, for a light and for a dark page.
constexpr const char* palette = R"(
:root { color-scheme: light dark;
  --page: #ffffff; --text: #1d2126; --muted: #5b6670; --rule: #dde2e7; --band: #f5f7f9;
  --c0: #0072b2; --c1: #d55e00; --c2: #00815f; --c3: #a8558a;
  --c4: #9a6b00; --c5: #3f51b5; --c6: #b71c1c; --c7: #4e6b12;
  --c8: #007c91; --c9: #6d4c41; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181d; --text: #e4e8ec; --muted: #98a3ae; --rule: #303841; --band: #1b2027;
    --c0: #5db8f5; --c1: #ff9a57; --c2: #4fd1a5; --c3: #e79ccb;
    --c4: #e9c04f; --c5: #9fa8ff; --c6: #ff8a80; --c7: #b5d66a;
    --c8: #4dd0e1; --c9: #d7b3a4; }
}
)";

constexpr const char* page_style = R"(
body { margin: 0 auto; padding: 2rem 1.25rem 3rem; max-width: 66rem;
  background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
p { margin: .25rem 0; } .muted { color: var(--muted); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .6rem; text-align: right; white-space: nowrap; }
thead th, thead th.name { color: var(--muted); font-weight: 600;
  border-bottom: 2px solid var(--rule); vertical-align: bottom; }
th.name, td.note { text-align: left; } tbody th.name { font-weight: 400; } td.note { color: var(--muted); }
td.wrong { color: var(--c6); font-weight: 600; }
tbody { border-bottom: 1px solid var(--rule); } tbody:nth-of-type(even) { background: var(--band); }
tbody th.tokens { vertical-align: top; font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.25rem; margin: 0;
  font-size: .92rem; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1.5rem; }
.wide svg { min-width: 44rem; }
)";

constexpr const char* chart_style = R"(
svg { display: block; width: 100%; height: auto; font-family: inherit; }
svg text { fill: var(--text); font-size: 13px; }
svg .tick, svg .axis { fill: var(--muted); }
svg .grid { stroke: var(--rule); } svg .frame { stroke: var(--muted); }
svg .line { fill: none; stroke-width: 2.5; stroke-linejoin: round; } svg .line1 { stroke-dasharray: 9 5; }
svg .guide { fill: none; stroke: var(--muted); stroke-width: 1.25; stroke-dasharray: 2 4; }
svg .mark { stroke: var(--page); stroke-width: 1; stroke-dasharray: none; }
)";

std::string colours() {
  std::string text;
  for (int n = 0; n < 10; ++n) {
    const std::string line = ".line" + std::to_string(n), colour = "var(--c" + std::to_string(n) + ")";
    text +=
        "svg .line" + line + " { stroke: " + colour + "; } svg .mark" + line + " { fill: " + colour + "; }\n";
  }
  return text;
}

std::string cell_text(const std::string& words) { return "<td>" + escaped(words) + "</td>"; }

template <class C>
std::string note_text(const C& cell, int columns) {
  const std::string kind = cell.verdict == Verdict::wrong ? "note wrong" : "note";
  return "<td class=\"" + kind + "\" colspan=\"" + std::to_string(columns) + "\">" + escaped(cell.note) +
         "</td>";
}

std::string row_text(const Results& r, const Cell& cell) {
  std::string row =
      "<th class=\"name\" scope=\"row\">" + escaped(r.contenders[cell.contender].name) + "</th>";
  if (!cell.is_timed()) return row + note_text(cell, 8);
  const double speed_up = r.speed_up(cell);
  row +=
      cell_text(readable(1e3 * cell.seconds.median)) + cell_text(per_second(cell.tokens_per_second(r.shape)));
  row +=
      cell_text(printed("%.1f", cell.flop_rate() / 1e9)) + cell_text(printed("%.1f", cell.percent_of_roof()));
  row += cell_text(speed_up > 0 ? printed("%.2f", speed_up) : "-") + cell_text(bytes_text(cell.state_bytes));
  return row + cell_text(printed("%.1e", cell.distance)) + cell_text(printed("%.2f", cell.error_ratio));
}

std::string row_text(const Results& r, const DecodeCell& cell) {
  std::string row =
      "<th class=\"name\" scope=\"row\">" + escaped(r.contenders[cell.contender].stream) + "</th>";
  if (!cell.is_timed()) return row + note_text(cell, 6);
  const double speed_up = r.decode_speed_up(cell);
  row += cell_text(readable(1e3 * cell.seconds.median)) +
         cell_text(speed_up > 0 ? printed("%.2f", speed_up) : "-") + cell_text(bytes_text(cell.state_bytes));
  row += cell_text(printed("%.1e", cell.distance)) + cell_text(printed("%.2f", cell.error_ratio));
  return row + cell_text(cell.found.empty() ? "-" : printed("%.0f %%", 100 * cell.found_share()));
}

/// A table head, and one table body for each length; `row(cell)` are the columns after the tokens.
template <class C, class Row>
std::string table_of(const Results& r, const std::vector<C>& cells, const std::vector<const char*>& titles,
                     const Row& row) {
  std::string text = "<div class=\"scroll\"><table>\n<thead><tr><th scope=\"col\">tokens</th>";
  text += std::string("<th class=\"name\" scope=\"col\">") + titles.front() + "</th>";
  for (std::size_t n = 1; n < titles.size(); ++n)
    text += std::string("<th scope=\"col\">") + titles[n] + "</th>";
  text += "</tr></thead>\n";
  for (const Index length : r.lengths) {
    const auto count =
        std::count_if(cells.begin(), cells.end(), [&](const C& cell) { return cell.length == length; });
    text += "<tbody>\n";
    bool first = true;
    for (const C& cell : cells) {
      if (cell.length != length) continue;
      text += "<tr>";
      if (first) {
        text += "<th class=\"tokens\" scope=\"rowgroup\" rowspan=\"" + std::to_string(count) + "\">" +
                std::to_string(length) + "</th>";
      }
      first = false;
      text += row(cell) + "</tr>\n";
    }
    text += "</tbody>\n";
  }
  return text + "</table></div>\n";
}

std::string prefill_table(const Results& r) {
  return table_of(
      r, r.cells,
      {"prefill", "ms", "tokens/s", "GFLOP/s", "% of roof", "&times; naive", "state", "vs exact", "error"},
      [&](const Cell& cell) { return row_text(r, cell); });
}

std::string decode_table(const Results& r) {
  return table_of(r, r.decoding,
                  {"decoding", "ms a token", "&times; exact", "state", "vs exact", "error", "facts found"},
                  [&](const DecodeCell& cell) { return row_text(r, cell); });
}

/// The share of heads that find the fact at each depth of the longest text with facts.
std::string depth_table(const Results& r) {
  Index longest = 0;
  for (const DecodeCell& cell : r.decoding) {
    if (!cell.found.empty()) longest = cell.length;
  }
  if (longest == 0) return {};
  std::string text = "<h2>Facts found in " + std::to_string(longest) +
                     " tokens, % of heads by depth</h2>\n<div class=\"scroll\"><table>\n<thead><tr>"
                     "<th class=\"name\" scope=\"col\">decoding</th>";
  for (Index n = 0; n < Needles::count; ++n)
    text += "<th scope=\"col\">" + printed("%g %%", 100 * (static_cast<double>(n) + 0.5) / Needles::count) +
            "</th>";
  text += "</tr></thead>\n<tbody>\n";
  for (const DecodeCell& cell : r.decoding) {
    if (cell.length != longest || cell.found.empty()) continue;
    text += "<tr><th class=\"name\" scope=\"row\">" + escaped(r.contenders[cell.contender].stream) + "</th>";
    for (const double share : cell.found) text += cell_text(printed("%.0f", 100 * share));
    text += "</tr>\n";
  }
  return text + "</tbody></table></div>\n";
}

constexpr double no_point = -1;

/// A line for each contender, with the same colour in all charts.
template <class C, class Value, class Words>
std::vector<ChartLine> lines_of(const Results& r, const std::vector<C>& cells, const Value& value,
                                const Words& words) {
  constexpr bool of_streams = std::is_same_v<C, DecodeCell>;
  std::vector<ChartLine> lines;
  for (std::size_t n = 0; n < r.contenders.size(); ++n) {
    ChartLine line{of_streams ? r.contenders[n].stream : r.contenders[n].name, {}, false};
    for (const C& cell : cells) {
      const double y = cell.contender == n && cell.verdict != Verdict::wrong ? value(cell) : no_point;
      if (y == no_point) continue;
      line.points.push_back({static_cast<double>(cell.length), y,
                             line.name + ", " + std::to_string(cell.length) + " tokens: " + words(y)});
    }
    lines.push_back(std::move(line));
  }
  return lines;
}

std::pair<double, double> range_of(const std::vector<ChartLine>& lines) {
  double low = 0, high = 0;
  for (const ChartLine& line : lines) {
    for (const ChartPoint& p : line.points) {
      low = low == 0 ? p.y : std::min(low, p.y);
      high = std::max(high, p.y);
    }
  }
  return low > 0 ? std::pair(low, high) : std::pair(1.0, 2.0);
}

Axis length_axis(const Results& r) {
  const auto low = static_cast<double>(r.lengths.front()), high = static_cast<double>(r.lengths.back());
  return logarithmic_axis("context length (tokens)", low, high, high / low > 512 ? 4 : 2,
                          [](double n) { return length_text(static_cast<Index>(std::llround(n))); });
}

template <class C>
double seconds_or_none(const C& cell) {
  return cell.is_timed() ? cell.seconds.median : no_point;
}

Axis time_axis(const char* title, double low, double high) {
  return logarithmic_axis(title, low, high, 10, [](double seconds) {
    return seconds < 0.9e-3 ? printed("%g us", seconds * 1e6)
           : seconds < 0.9  ? printed("%g ms", seconds * 1e3)
                            : printed("%g s", seconds);
  });
}

std::string time_chart(const Results& r) {
  auto lines = lines_of(r, r.cells, seconds_or_none<Cell>, seconds_text);
  ChartLine roof{"exact attention at the FMA roof", {}, true};
  for (const Index n : r.lengths) {
    Shape shape = r.shape;
    shape.length = n;
    roof.points.push_back({static_cast<double>(n), causal_flop(shape) / r.roof, ""});
  }
  lines.push_back(std::move(roof));
  const auto [low, high] = range_of(lines);
  return Chart("Time", length_axis(r), time_axis("time of one prefill", low, high), std::move(lines), 1000,
               440)
      .svg();
}

std::string decode_chart(const Results& r) {
  auto lines = lines_of(r, r.decoding, seconds_or_none<DecodeCell>, seconds_text);
  const auto [low, high] = range_of(lines);
  return Chart("Decoding", length_axis(r), time_axis("time of one token", low, high), std::move(lines), 520,
               380)
      .svg();
}

std::string found_chart(const Results& r) {
  auto lines = lines_of(
      r, r.decoding, [](const DecodeCell& c) { return c.found.empty() ? no_point : 100 * c.found_share(); },
      [](double y) { return printed("%.0f %%", y); });
  return Chart("Facts found", length_axis(r), percent_axis("facts found, % of heads", 100), std::move(lines),
               520, 380)
      .svg();
}

std::string roof_chart(const Results& r) {
  auto lines = lines_of(
      r, r.cells, [](const Cell& c) { return c.is_timed() ? c.percent_of_roof() : no_point; },
      [](double y) { return printed("%.1f %%", y); });
  const double high = range_of(lines).second;
  return Chart("Efficiency", length_axis(r), percent_axis("useful FLOP/s, % of the FMA roof", high),
               std::move(lines), 520, 380)
      .svg();
}

std::string state_chart(const Results& r) {
  auto lines = lines_of(
      r, r.cells, [](const Cell& c) { return c.state_bytes; }, bytes_text);
  const auto [low, high] = range_of(lines);
  const Axis y = logarithmic_axis(
      "state (bytes)", low, high,
      high / low > 256  ? 16
      : high / low > 16 ? 4
                        : 2,
      [](double bytes) {
        const std::string text = bytes_text(bytes);  // powers of 2 without decimals
        const std::size_t dot = text.find('.');
        return dot == std::string::npos ? text : text.substr(0, dot) + text.substr(text.find(' '));
      });
  return Chart("Memory kept", length_axis(r), y, std::move(lines), 520, 380).svg();
}

std::string facts(const Results& r) {
  std::string text = "<dl>\n";
  const auto add = [&](const char* name, const std::string& value) {
    text += std::string("<dt>") + name + "</dt><dd>" + escaped(value) + "</dd>\n";
  };
  add("input", r.input);
  add("keys in effect", readable(r.keys_in_effect.front()) + " of " + std::to_string(r.lengths.front()) +
                            " and " + readable(r.keys_in_effect.back()) + " of " +
                            std::to_string(r.lengths.back()) +
                            ": exp of the entropy of a row of weights, the median of the sampled rows");
  add("processor", r.machine.cpu + ", " + counted(r.machine.cores, "core"));
  add("threads", std::to_string(r.options.threads));
  add("FMA roof",
      printed("%.0f", r.roof / 1e9) + " GFLOP/s, float32, sampled between the rounds of this run");
  add("instructions", r.machine.instructions);
  add("compiler", r.machine.compiler + ", " + r.machine.flags);
  add("libraries", "longspan " + r.machine.longspan + ", Eigen " + r.machine.eigen);
  add("date", r.machine.date);
  return text + "</dl>\n";
}

std::string explanations(const Results& r) {
  std::string text = "<dl>\n";
  const auto add = [&](const std::string& name, const char* meaning) {
    text += "<dt>" + escaped(name) + "</dt><dd>" + meaning + "</dd>\n";
  };
  add("ms", "median of the rounds, in which the contenders take turns");
  add("GFLOP/s", "useful work, 4 H N&sup2; d / 2: a causal mask hides half of the square");
  add("% of roof", "share of the multiply-adds that this machine achieved between the same rounds");
  add("state", "bytes that must be kept to continue after the last token");
  add("vs exact", "relative distance from exact attention, Euclidean norm, on sampled rows");
  add("error",
      "max |out &minus; double| / (u (1 + a) &Sigma; p |v|): the error in units of float rounding; right up "
      "to 16. "
      "A wrong result has no time");
  add("facts found",
      "the share of ten facts hidden in the text for which a head's output at the end of the text is nearest "
      "to the "
      "fact's value. Each fact has a key of its own, 2.5 times as long as the text's keys, and the landmark "
      "of its "
      "block has the same key. By chance 10 %");
  for (const Contender& c : r.contenders) add(c.name, escaped(c.description).c_str());
  return text + "</dl>\n";
}

}  // namespace

std::string html_report(const Results& r) {
  std::string page = "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n";
  page += "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n";
  page += "<title>longspan compare</title>\n<style>" + std::string(palette) + page_style + chart_style +
          colours() + "</style>\n</head>\n<body>\n";
  page += "<h1>Attention over growing context</h1>\n<p>" + escaped(problem_text(r)) + "</p>\n";
  page += "<p class=\"muted\">" + escaped(machine_text(r.machine)) + ", FMA roof " +
          printed("%.0f", r.roof / 1e9) + " GFLOP/s</p>\n";
  page += "<h2>Time</h2>\n<figure class=\"scroll wide\">" + time_chart(r) + "</figure>\n";
  page += "<h2>Figures</h2>\n" + prefill_table(r) + "<h2>Decoding</h2>\n" + decode_table(r);
  page += "<div class=\"pair\">\n";
  page += "<section><h2>Time of a token</h2><figure>" + decode_chart(r) + "</figure></section>\n";
  page += "<section><h2>Facts found</h2><figure>" + found_chart(r) + "</figure></section>\n";
  page += "<section><h2>Efficiency</h2><figure>" + roof_chart(r) + "</figure></section>\n";
  page += "<section><h2>Memory kept</h2><figure>" + state_chart(r) + "</figure></section>\n</div>\n" +
          depth_table(r);
  page += "<h2>How to read it</h2>\n" + explanations(r) + "<h2>Measured on</h2>\n" + facts(r);
  return page + "</body>\n</html>\n";
}

std::string svg_report(const Results& r) {
  const std::string chart = time_chart(r), open = "<svg ";
  return open + "xmlns=\"http://www.w3.org/2000/svg\" " +
         chart.substr(open.size(), chart.find('>') + 1 - open.size()) + "\n<style>" + palette +
         "svg { background: var(--page); font-family: sans-serif; }\n" + chart_style + colours() +
         "</style>" + chart.substr(chart.find('>') + 1);
}

}  // namespace bench
