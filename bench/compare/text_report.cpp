// The table on the terminal: at most 110 columns.
#include "compare/results.hpp"
#include "support/text_table.hpp"

namespace bench {

namespace {

std::string prefill_table(const Results& r) {
  TextTable table;
  table.add_column("tokens", TextTable::Align::right);
  table.add_column("prefill", TextTable::Align::left);
  for (const char* title : {"ms", "tokens/s", "GFLOP/s", "% roof", "x naive", "state", "vs exact", "error"}) {
    table.add_column(title, TextTable::Align::right);
  }
  for (const Cell& cell : r.cells) {
    if (cell.contender == 0 && cell.length != r.lengths.front()) table.add_rule();
    const std::string length = cell.contender == 0 ? std::to_string(cell.length) : "";
    const std::string& name = r.contenders[cell.contender].name;
    if (!cell.is_timed()) {
      table.add_row({length, name}, cell.note);
      continue;
    }
    const double speed_up = r.speed_up(cell);
    table.add_row({length, name, readable(1e3 * cell.seconds.median),
                   per_second(cell.tokens_per_second(r.shape)), printed("%.1f", cell.flop_rate() / 1e9),
                   printed("%.1f", cell.percent_of_roof()), speed_up > 0 ? printed("%.2f", speed_up) : "-",
                   bytes_text(cell.state_bytes), printed("%.1e", cell.distance),
                   printed("%.2f", cell.error_ratio)});
  }
  return table.text();
}

std::string decode_table(const Results& r) {
  TextTable table;
  table.add_column("tokens", TextTable::Align::right);
  table.add_column("decoding", TextTable::Align::left);
  for (const char* title : {"ms a token", "x exact", "state", "vs exact", "error", "facts found"}) {
    table.add_column(title, TextTable::Align::right);
  }
  for (const DecodeCell& cell : r.decoding) {
    const bool first = cell.contender == r.decoding.front().contender;
    if (first && cell.length != r.lengths.front()) table.add_rule();
    const std::string length = first ? std::to_string(cell.length) : "";
    const std::string& name = r.contenders[cell.contender].stream;
    if (!cell.is_timed()) {
      table.add_row({length, name}, cell.note);
      continue;
    }
    const double speed_up = r.decode_speed_up(cell);
    table.add_row({length, name, readable(1e3 * cell.seconds.median),
                   speed_up > 0 ? printed("%.2f", speed_up) : "-", bytes_text(cell.state_bytes),
                   printed("%.1e", cell.distance), printed("%.2f", cell.error_ratio),
                   cell.found.empty() ? "-" : printed("%.0f %%", 100 * cell.found_share())});
  }
  return table.text();
}

}  // namespace

std::string text_report(const Results& r) {
  std::string text = "longspan compare: " + problem_text(r) + "\n";
  text += machine_text(r.machine) + "\n";
  text += "FMA roof " + printed("%.0f", r.roof / 1e9) + " GFLOP/s, measured in this run\n";
  text += "input: " + r.input + "\n\n" + prefill_table(r) + "\n" + decode_table(r) + "\n";
  text +=
      "ms        median of the rounds          GFLOP/s   useful work, 4 H N^2 d / 2: half of the square is "
      "masked\n"
      "% roof    of the FMA roof               state     bytes kept to continue after the last token\n"
      "vs exact  relative distance from exact attention on sampled rows, Euclidean norm\n"
      "error     max |out - double| / (u (1 + a) sum p |v|): right up to 16, or no time is shown\n"
      "found     share of ten hidden facts that queries at the end of the text find, over all heads; by "
      "chance 10 %\n";
  return text;
}

}  // namespace bench
