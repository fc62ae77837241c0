#include "compare/earlier.hpp"

#include "support/text_input.hpp"
#include "support/text_table.hpp"

#if defined(LONGSPAN_BENCH_READS_JSON)
#include <nlohmann/json.hpp>
#endif

namespace bench {

#if defined(LONGSPAN_BENCH_READS_JSON)
namespace {

void add_cells(Earlier& earlier, const nlohmann::json& cells, bool decoding) {
  for (const nlohmann::json& cell : cells) {
    if (cell.at("verdict") != "timed") continue;
    earlier.cells.push_back({cell.at("contender"), cell.at("tokens"), decoding, cell.at("seconds_median"),
                             decoding ? 0.0 : cell.at("roof_flop_per_second").get<double>()});
  }
}

}  // namespace

std::optional<Earlier> earlier_run(const std::string& path) {
  if (path.empty()) return {};
  const std::string text = read_bytes(path);
  try {
    const nlohmann::json report = nlohmann::json::parse(text);
    Earlier earlier{
        report.at("machine").at("date"), report.at("machine").at("cpu"), report.at("problem"), {}};
    add_cells(earlier, report.at("cells"), false);
    add_cells(earlier, report.at("decoding"), true);
    return earlier;
  } catch (const nlohmann::json::exception& error) {
    throw UsageError("the option --against names " + path +
                     ", wanted a file that --json wrote: " + error.what());
  }
}
#else
std::optional<Earlier> earlier_run(const std::string& path) {
  if (path.empty()) return {};
  throw UsageError("--against needs a compare that was built with nlohmann-json");
}
#endif

std::string against_report(const Results& r, const Earlier& earlier) {
  std::string text = "\nagainst the run of " + earlier.date + "\n";
  if (earlier.cpu != r.machine.cpu) text += "another machine: " + earlier.cpu + "\n";
  if (earlier.problem != problem_text(r)) text += "another problem: " + earlier.problem + "\n";
  TextTable table;
  table.add_column("tokens", TextTable::Align::right);
  table.add_column("", TextTable::Align::left);
  for (const char* title : {"ms then", "ms now", "now / then", "of its roof"})
    table.add_column(title, TextTable::Align::right);
  const auto compare = [&](const auto& cell, const std::string& name, double roof) {
    if (!cell.is_timed()) return;
    for (const EarlierCell& then : earlier.cells) {
      if (then.contender != r.contenders[cell.contender].name || then.length != cell.length ||
          then.decoding != (roof == 0))
        continue;
      const double ratio = cell.seconds.median / then.seconds;
      table.add_row({std::to_string(cell.length), name, readable(1e3 * then.seconds),
                     readable(1e3 * cell.seconds.median), printed("%.3f", ratio),
                     roof > 0 ? printed("%.3f", ratio * roof / then.roof) : "-"});
    }
  };
  for (const Cell& cell : r.cells) compare(cell, r.contenders[cell.contender].name, cell.roof);
  table.add_rule();
  for (const DecodeCell& cell : r.decoding) compare(cell, r.contenders[cell.contender].stream, 0);
  return text + "\n" + table.text() +
         "\nof its roof  the ratio of the times relative to the roof of their own run, which removes the "
         "effect of "
         "the clock\n";
}

}  // namespace bench
