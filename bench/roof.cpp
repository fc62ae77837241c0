// roof: the limits of this machine, with which the other figures are compared.
#include "support/roof.hpp"

#include <cstdio>
#include <exception>
#include <span>
#include <string>
#include <vector>

#include "support/arguments.hpp"
#include "support/format.hpp"
#include "support/machine.hpp"
#include "support/text_table.hpp"
#include "support/whole_file.hpp"

namespace bench {
namespace {

struct Limit {
  std::string name;
  std::string unit;
  std::vector<double> per_second;  ///< for each number of threads, in `unit`
};

/// 1, 2, 4, ... and `most`.
std::vector<Index> thread_counts(Index most) {
  std::vector<Index> counts;
  for (Index n = 1; n < most; n *= 2) counts.push_back(n);
  counts.push_back(most);
  return counts;
}

template <class Sample>
Limit measured(const char* name, const char* unit, std::span<const Index> threads, const Sample& sample) {
  Limit limit{name, unit, {}};
  for (const Index n : threads) limit.per_second.push_back(best_of(7, [&] { return sample(n); }) / 1e9);
  return limit;
}

Limit measured_read(const char* name, std::span<const Index> threads, std::size_t bytes,
                    bool of_each_thread) {
  Limit limit{name, "GB/s", {}};
  for (const Index n : threads) {
    const StreamRead read(n, of_each_thread ? bytes : bytes / static_cast<std::size_t>(n));
    limit.per_second.push_back(best_of(7, [&] { return read.sample(); }) / 1e9);
  }
  return limit;
}

/// Sizes that fit well into the named level of the processors of the last ten years.
std::vector<Limit> all_limits(std::span<const Index> threads) {
  constexpr std::size_t kib = 1024, mib = 1024 * kib;
  std::vector<Limit> limits;
  limits.push_back(measured("f32 multiply-add", "GFLOP/s", threads, [](Index n) { return fma_peak(n); }));
  if (bf16_dot_peak(1) > 0) {
    limits.push_back(
        measured("bf16 dot product", "GFLOP/s", threads, [](Index n) { return bf16_dot_peak(n); }));
  }
  if (tile_peak(1) > 0)
    limits.push_back(measured("bf16 matrix tiles", "GFLOP/s", threads, [](Index n) { return tile_peak(n); }));
  limits.push_back(measured_read("read L1, 24 KiB per thread", threads, 24 * kib, true));
  limits.push_back(measured_read("read L2, 192 KiB per thread", threads, 192 * kib, true));
  limits.push_back(measured_read("read L3, 3 MiB per thread", threads, 3 * mib, true));
  limits.push_back(measured_read("read memory, 512 MiB in total", threads, 512 * mib, false));
  return limits;
}

std::string text_report(const Machine& machine, std::span<const Index> threads,
                        std::span<const Limit> limits) {
  TextTable table;
  table.add_column("best of 7 samples", TextTable::Align::left);
  table.add_column("unit", TextTable::Align::left);
  for (const Index n : threads) {
    table.add_column(counted(n, "thread"), TextTable::Align::right);
  }
  for (const Limit& limit : limits) {
    std::vector<std::string> row{limit.name, limit.unit};
    for (const double value : limit.per_second) row.push_back(printed("%.1f", value));
    table.add_row(std::move(row));
  }
  return machine.cpu + ", " + counted(machine.cores, "core") + ", " + machine.compiler + ", " +
         machine.flags + ", " + std::to_string(longspan::detail::lanes<float>) + " floats per packet\n\n" +
         table.text();
}

std::string json_report(const Machine& machine, std::span<const Index> threads,
                        std::span<const Limit> limits) {
  Json json;
  json.begin_object();
  json.add("program", "longspan roof");
  add_machine(json, machine, threads.back());
  json.begin_array("limits");
  for (const Limit& limit : limits) {
    for (std::size_t n = 0; n < threads.size(); ++n) {
      json.begin_object();
      json.add("name", limit.name);
      json.add("threads", threads[n]);
      json.add("value", limit.per_second[n]);
      json.add("unit", limit.unit);
      json.end_object();
    }
  }
  json.end_array();
  json.end_object();
  return json.text();
}

int run(std::span<const std::string> words) {
  static constexpr std::string_view valued[] = {"--threads", "--json"}, flags[] = {"--help"};
  const Arguments given(words, valued, flags);
  if (given.has("--help")) {
    std::puts(
        "roof [--threads N] [--json FILE]: multiply-adds and bytes per second of 1, 2, 4 ... N threads");
    return 0;
  }
  const std::vector<Index> threads =
      thread_counts(given.number("--threads", default_threads(), 1, most_threads));
  const std::string json = given.value("--json").value_or("");
  if (given.has("--json")) require_writable("--json", json);
  const std::vector<Limit> limits = all_limits(threads);
  const Machine machine = this_machine();
  std::fputs(text_report(machine, threads, limits).c_str(), stdout);
  if (!json.empty()) write_whole(json, json_report(machine, threads, limits));
  return 0;
}

}  // namespace
}  // namespace bench

int main(int count, char** words) {
  try {
    return bench::run(std::vector<std::string>(words + 1, words + count));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "roof: %s\n", error.what());
    return 2;
  }
}
