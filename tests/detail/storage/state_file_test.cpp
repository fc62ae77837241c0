#include "longspan/detail/storage/state_file.hpp"

#include <array>
#include <cstdint>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/refusal.hpp"

namespace {

using namespace longspan;
using detail::StateKind, detail::StateReader, detail::StateWriter;
using test::file_refusal;

constexpr StateKind kind{"sample", 3, "sample::save", "sample::load"};

struct Sample {
  std::array<std::int64_t, 2> numbers{2, -7};
  std::vector<float> floats{1.5f, -0.0f};
  std::vector<std::uint16_t> shorts{1, 2, 3};

  bool operator==(const Sample&) const = default;
};

std::string saved(const Sample& sample) {
  std::ostringstream to;
  StateWriter writer(to, kind, sample.numbers, 2 * 4 + 3 * 2);
  writer.array(sample.floats.data(), 2);
  writer.array(sample.shorts.data(), 3);
  writer.finish();
  return to.str();
}

Sample loaded(const std::string& bytes) {
  std::istringstream from(bytes);
  Sample sample;
  StateReader reader(from, kind, sample.numbers);
  reader.expect_payload(14);
  sample.floats = reader.array<float>(2);
  sample.shorts = reader.array<std::uint16_t>(3);
  reader.finish();
  return sample;
}

}  // namespace

TEST_CASE("state file: reads what was written", "[state_file]") {
  const Sample sample;
  CHECK(loaded(saved(sample)) == sample);
  // Header 32, two numbers 16, checksum 4, payload 14, checksum 4.
  CHECK(saved(sample).size() == 70);
}

TEST_CASE("state file: every truncation is refused", "[state_file]") {
  const std::string whole = saved({});
  for (std::size_t bytes = 0; bytes < whole.size(); ++bytes) {
    CHECK_THROWS_AS(loaded(whole.substr(0, bytes)), FileError);
  }
}

TEST_CASE("state file: every flip of a bit is refused", "[state_file]") {
  const std::string whole = saved({});
  for (std::size_t bit = 0; bit < 8 * whole.size(); ++bit) {
    std::string flipped = whole;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << bit % 8));
    CHECK_THROWS_AS(loaded(flipped), FileError);
  }
}

TEST_CASE("state file: the error text names what is wrong", "[state_file]") {
  CHECK(file_refusal([] { loaded("no such thing, but long enough for a whole header"); }) ==
        "longspan: sample::load: the file is not a state of longspan, wanted a file that begins with "
        "\"longspan\"");
  CHECK(file_refusal([] { loaded(saved({}).substr(0, 20)); }) ==
        "longspan: sample::load: the header is cut short, wanted 32 bytes");
  CHECK(file_refusal([] {
          std::istringstream from(saved({}));
          Sample sample;
          StateReader(from, {"other", 3, "", "other::load"}, sample.numbers);
        }) == "longspan: other::load: the file is a state of another kind, wanted other");
  CHECK(file_refusal([] {
          std::istringstream from(saved({}));
          Sample sample;
          StateReader(from, {"sample", 4, "", "sample::load"}, sample.numbers);
        }) == "longspan: sample::load: the layout is version 3 in the file, wanted 4");
  CHECK(file_refusal([] {
          std::istringstream from(saved({}));
          std::array<std::int64_t, 3> numbers{};
          StateReader(from, kind, numbers);
        }) == "longspan: sample::load: the header is 2 numbers, wanted 3");
  CHECK(file_refusal([] {
          std::istringstream from(saved({}));
          Sample sample;
          StateReader(from, kind, sample.numbers).expect_payload(15);
        }) == "longspan: sample::load: the payload is 14 bytes, wanted 15 for the sizes in the header");
  CHECK(file_refusal([] {
          std::istringstream from(saved({}));
          Sample sample;
          const StateReader reader(from, kind, sample.numbers);
          reader.expect_payload_of_at_least(14);
          reader.expect_payload_of_at_least(15);
        }) ==
        "longspan: sample::load: the payload is 14 bytes, wanted at least 15 for the sizes in the header");
}

TEST_CASE("state file: writing to a broken stream throws", "[state_file]") {
  std::ostringstream to;
  to.setstate(std::ios::badbit);
  const Sample sample;
  StateWriter writer(to, kind, sample.numbers, 8);
  writer.array(sample.floats.data(), 2);
  CHECK(file_refusal([&] { writer.finish(); }) ==
        "longspan: sample::save: the output stream is broken or full, wanted space for 8 bytes of state");
}

TEST_CASE("state file: a file that claims more than it contains costs no memory", "[state_file]") {
  std::ostringstream to;
  const Sample sample;
  constexpr Index promised = Index{1} << 50;
  StateWriter(to, kind, sample.numbers, promised);
  std::istringstream from(to.str());
  Sample read;
  StateReader reader(from, kind, read.numbers);
  reader.expect_payload(promised);
  CHECK_THROWS_AS(reader.array<float>(promised / 4), FileError);
  CHECK_THROWS_AS(reader.array<float>(std::numeric_limits<Index>::max()), FileError);
  CHECK_THROWS_AS(reader.array<float>(-1), FileError);
}
