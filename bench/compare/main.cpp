// compare: all contenders with growing context, on real input. `compare --help` lists the options.
#include <cstdio>
#include <exception>
#include <new>

#include "compare/earlier.hpp"
#include "compare/results.hpp"
#include "compare/source.hpp"
#include "longspan/amx.hpp"
#include "longspan/eigen.hpp"

namespace bench {
namespace {

int run(std::span<const std::string> words) {
  static constexpr std::string_view valued[] = {
      "--text",     "--q",       "--k",      "--v",    "--lengths", "--heads", "--kv-heads",
      "--head-dim", "--threads", "--rounds", "--json", "--html",    "--svg",   "--against"};
  static constexpr std::string_view flags[] = {"--full", "--smoke", "--list", "--help"};
  const Arguments given(words, valued, flags);
  if (given.has("--help")) {
    std::fputs(std::string(usage).c_str(), stdout);
    return 0;
  }
  const Options options = parsed_options(given);
  std::vector<Contender> contenders = all_contenders(options.threads);
  if (given.has("--list")) {
    for (const Contender& c : contenders) std::printf("%-20s %s\n", c.name.c_str(), c.description.c_str());
    return 0;
  }
  const Source source = open_source(options);
  const std::optional<Earlier> earlier = earlier_run(options.against);
  const Results results = compared(options, source, std::move(contenders));
  std::fputs(text_report(results).c_str(), stdout);
  if (earlier) std::fputs(against_report(results, *earlier).c_str(), stdout);
  if (!options.json.empty()) write_whole(options.json, json_report(results));
  if (!options.html.empty()) write_whole(options.html, html_report(results));
  if (!options.svg.empty()) write_whole(options.svg, svg_report(results));
  return results.any_wrong() ? 1 : 0;
}

int refused(const char* sentence) {
  std::fprintf(stderr, "compare: %s\n", sentence);
  return 2;
}

}  // namespace
}  // namespace bench

int main(int count, char** words) {
  longspan::request_amx();
  // eigen_naive is parallel over heads, so Eigen must not start threads within a head.
  Eigen::setNbThreads(1);
  try {
    return bench::run(std::vector<std::string>(words + 1, words + count));
  } catch (const std::bad_alloc&) {
    return bench::refused("the memory of this machine is too small for these lengths");
  } catch (const std::exception& error) {
    return bench::refused(error.what());
  }
}
