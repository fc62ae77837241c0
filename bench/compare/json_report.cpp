// All figures for other programs. Times in seconds, rates in FLOP/s and tokens/s, sizes in bytes.
#include "compare/results.hpp"
#include "support/json.hpp"

namespace bench {
namespace {

void add_shape(Json& json, const Shape& s) {
  json.begin_object("shape");
  json.add("mask", "causal");
  json.add("type", "float32");
  json.add("batch", s.batch);
  json.add("heads", s.heads);
  json.add("kv_heads", s.kv_heads);
  json.add("head_dim", s.head_dim);
  json.add("value_dim", s.value_dim);
  json.end_object();
}

void add_cell(Json& json, const Results& r, const Cell& cell) {
  constexpr const char* verdicts[] = {"timed", "skipped", "wrong"};
  json.begin_object();
  json.add("tokens", cell.length);
  json.add("contender", r.contenders[cell.contender].name);
  json.add("verdict", verdicts[static_cast<std::size_t>(cell.verdict)]);
  if (!cell.note.empty()) json.add("note", cell.note);
  json.add("flop", cell.flop);
  json.add("state_bytes", cell.state_bytes);
  if (cell.verdict != Verdict::skipped) {
    json.add("distance_to_exact", cell.distance);
    json.add("error_ratio", cell.error_ratio);
  }
  if (cell.is_timed()) {
    json.add("seconds_median", cell.seconds.median);
    json.add("seconds_min", cell.seconds.min);
    json.add("rounds", cell.seconds.samples);
    json.add("tokens_per_second", cell.tokens_per_second(r.shape));
    json.add("flop_per_second", cell.flop_rate());
    json.add("roof_flop_per_second", cell.roof);
    json.add("percent_of_roof", cell.percent_of_roof());
    if (r.speed_up(cell) > 0) json.add("speed_up_over_baseline", r.speed_up(cell));
  }
  json.end_object();
}

void add_decode_cell(Json& json, const Results& r, const DecodeCell& cell) {
  constexpr const char* verdicts[] = {"timed", "skipped", "wrong"};
  json.begin_object();
  json.add("tokens", cell.length);
  json.add("contender", r.contenders[cell.contender].name);
  json.add("stream", r.contenders[cell.contender].stream);
  json.add("verdict", verdicts[static_cast<std::size_t>(cell.verdict)]);
  if (!cell.note.empty()) json.add("note", cell.note);
  if (cell.verdict != Verdict::skipped) {
    json.add("distance_to_exact", cell.distance);
    json.add("error_ratio", cell.error_ratio);
  }
  if (cell.is_timed()) {
    json.add("seconds_median", cell.seconds.median);
    json.add("seconds_min", cell.seconds.min);
    json.add("steps", cell.seconds.samples);
    json.add("state_bytes", cell.state_bytes);
    if (r.decode_speed_up(cell) > 0) json.add("speed_up_over_exact", r.decode_speed_up(cell));
  }
  if (!cell.found.empty()) {
    json.begin_array("facts_found_by_depth");
    for (const double share : cell.found) json.add("", share);
    json.end_array();
  }
  json.end_object();
}

}  // namespace

std::string json_report(const Results& r) {
  Json json;
  json.begin_object();
  json.add("program", "longspan compare");
  add_machine(json, r.machine, r.options.threads);
  json.add("input", r.input);
  json.add("problem", problem_text(r));
  add_shape(json, r.shape);
  json.add("roof_flop_per_second", r.roof);
  json.begin_array("contenders");
  for (const Contender& contender : r.contenders) {
    json.begin_object();
    json.add("name", contender.name);
    json.add("description", contender.description);
    json.add("exact", contender.exact);
    json.add("baseline", contender.baseline);
    json.end_object();
  }
  json.end_array();
  json.begin_array("lengths");
  for (std::size_t n = 0; n < r.lengths.size(); ++n) {
    json.begin_object();
    json.add("tokens", r.lengths[n]);
    json.add("keys_in_effect", r.keys_in_effect[n]);
    json.end_object();
  }
  json.end_array();
  json.begin_array("cells");
  for (const Cell& cell : r.cells) add_cell(json, r, cell);
  json.end_array();
  json.begin_array("decoding");
  for (const DecodeCell& cell : r.decoding) add_decode_cell(json, r, cell);
  json.end_array();
  json.end_object();
  return json.text();
}

}  // namespace bench
