// An earlier run, read from its JSON report.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "compare/results.hpp"

namespace bench {

struct EarlierCell {
  std::string contender;
  Index length = 0;
  bool decoding = false;
  double seconds = 0;
  double roof = 0;  ///< FLOP/s; 0 for decoding
};

struct Earlier {
  std::string date, cpu, problem;
  std::vector<EarlierCell> cells;  ///< only cells with a time
};

/// Empty if no file is named. Throws UsageError if the file is not a report of compare.
std::optional<Earlier> earlier_run(const std::string& path);

/// A table of the times of this run and of the earlier one.
std::string against_report(const Results& results, const Earlier& earlier);

}  // namespace bench
