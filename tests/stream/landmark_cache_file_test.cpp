// A landmark cache whose sealed blocks are in a file.
#include <sys/resource.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "examples/temporary_folder.hpp"
#include "longspan/stream/landmark_cache.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/stream_calls.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
using namespace longspan;

using Options = landmark_cache_options;
using Cache = landmark_cache<float, rotary, exact_positions>;

const rotary turned(Pairing::half_split);
const StreamShape shape{2, 4, 2, 8, 6};

Call<float> drawn_call(Random& random) {
  return Call<float>(Shape{2, 4, 2, 90, 90, 8, 6}, Values::normal, random);
}

std::string contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}
void write_contents(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc).write(bytes.data(), std::streamsize(bytes.size()));
}

}  // namespace

TEST_CASE("landmark_cache: blocks in a file give the bits of blocks in memory", "[stream][file]") {
  const TemporaryFolder folder;
  Random random(1);
  Call<float> call = drawn_call(random), own = call.unrun();
  for (const Index capacity : {0, 4}) {
    for (const Index resident : {Index{0}, Index{1} << 26}) {
      const std::string path = folder.file("blocks");
      Options options{.block_size = 5, .top_k = 3, .window_blocks = 1, .capacity = capacity};
      options.rollback = random.pick({0, 3, 16});
      Cache cache(shape, options, turned);
      options.path = path;
      options.resident_bytes = resident;
      Cache filed(shape, options, turned);
      for (Index i = 0; i < 90; i += 9) {
        extend(cache, call, i, 9);
        extend(filed, own, i, 9);
      }
      CHECK(call.same_outputs(own));
      CHECK(filed.blocks() == cache.blocks());
      CHECK(filed.bytes() < cache.bytes());
      std::filesystem::remove(path);
    }
  }
}

TEST_CASE("landmark_cache: a file that is opened again has every block that no truncation could reach",
          "[stream][file]") {
  const TemporaryFolder folder;
  Random random(2);
  Call<float> call = drawn_call(random), own = call.unrun();
  for (const Index capacity : {0, 4}) {
    for (const Index rollback : {0, 16}) {
      const Options options{.block_size = 5,
                            .top_k = 3,
                            .capacity = capacity,
                            .rollback = rollback,
                            .path = folder.file("blocks")};
      {
        Cache cache(shape, options, turned);
        extend(cache, call, 0, 63);
        extend(cache, call, 63, 27);
      }
      std::filesystem::remove(options.path);
      { Cache(shape, options, turned); }
      {
        Cache cache(shape, options, turned);
        extend(cache, own, 0, 63);
      }
      Cache cache(shape, options, turned);
      const Index blocks = (63 - rollback) / 5;
      CHECK(cache.size() == blocks * 5);
      CHECK(cache.blocks() == (capacity == 0 ? blocks : 4));
      CHECK(cache.dropped() == blocks - cache.blocks());
      // The later tokens are appended again.
      extend(cache, own, blocks * 5, 63 - blocks * 5);
      extend(cache, own, 63, 27);
      CHECK(same_rows(call, own, 63, 90));
      std::filesystem::remove(options.path);
    }
  }
}

TEST_CASE("landmark_cache: removed tokens are not in the file", "[stream][file][rollback]") {
  const TemporaryFolder folder;
  Random random(8);
  Call<float> call = drawn_call(random), draft = drawn_call(random), own = call.unrun();
  for (const Index capacity : {0, 4}) {
    const Options options{
        .block_size = 5, .top_k = 3, .window_blocks = 1, .capacity = capacity, .path = folder.file("blocks")};
    {
      Cache cache(shape, options, turned);
      for (Index i = 0; i < 60; i += 4) {
        extend(cache, call, i, 4);
        extend(cache, draft, 0, 16);
        cache.truncate(i + 4);
      }
      CHECK(refusal([&] { cache.truncate(30); }).find("wanted 60..") != std::string::npos);
    }
    Cache reopened(shape, options, turned);
    CHECK(reopened.size() == 55);  // the largest size was 76, so the first 60 tokens cannot be removed
    Cache wanted(shape, {.block_size = 5, .top_k = 3, .window_blocks = 1, .capacity = capacity}, turned);
    extend(wanted, call, 0, 60);
    extend(reopened, own, 55, 5);
    extend(wanted, call, 60, 30);
    extend(reopened, own, 60, 30);
    CHECK(same_rows(call, own, 60, 90));
    std::filesystem::remove(options.path);
  }
}

TEST_CASE("landmark_cache: an assigned cache does not write the file of the other", "[stream][file]") {
  const TemporaryFolder folder;
  Random random(9);
  Call<float> call = drawn_call(random), other = drawn_call(random);
  const Options options{.block_size = 5, .top_k = 3, .rollback = 0, .path = folder.file("blocks")};
  Options elsewhere = options;
  elsewhere.path = folder.file("elsewhere");
  {
    Cache cache(shape, options, turned), copy(shape, elsewhere, turned);
    extend(copy, other, 0, 40);
    extend(cache, call, 0, 40);
    copy = std::as_const(cache);
    const Index bytes = copy.bytes();
    extend(copy, other, 0, 45);
    CHECK(copy.bytes() > bytes);  // its own blocks are in memory
    Cache& same = cache;
    cache = std::as_const(same);
    CHECK(cache.bytes() == bytes);
    extend(cache, call, 40, 5);
  }
  Cache reopened(shape, options, turned), other_reopened(shape, elsewhere, turned);
  CHECK(reopened.size() == 45);
  CHECK(other_reopened.size() == 40);
  Cache wanted(shape, {.block_size = 5, .top_k = 3}, turned);
  Call<float> own = call.unrun();
  extend(wanted, call, 0, 45);
  extend(wanted, call, 45, 45);
  extend(reopened, own, 45, 45);
  CHECK(same_rows(call, own, 45, 90));
}

TEST_CASE("landmark_cache: if the file cannot be replaced, clear throws and changes nothing",
          "[stream][file][errors]") {
  const TemporaryFolder folder;
  Random random(10);
  Call<float> call = drawn_call(random), own = call.unrun();
  const Options options{.block_size = 5, .top_k = 3, .path = folder.file("blocks")};
  Cache cache(shape, options, turned), wanted(shape, {.block_size = 5, .top_k = 3}, turned);
  extend(cache, call, 0, 40);
  extend(wanted, own, 0, 40);
  std::filesystem::remove(options.path);
  std::filesystem::create_directory(options.path);
  const std::string refused = file_refusal([&] { cache.clear(); });
  CHECK(refused.find("cannot rename the file " + options.path + ".new to " + options.path + ": ") !=
        std::string::npos);
  std::filesystem::create_directory(options.path + ".new");
  CHECK(file_refusal([&] { cache.clear(); }).find("cannot open the file") != std::string::npos);
  CHECK(cache.size() == 40);
  extend(cache, call, 40, 50);
  extend(wanted, own, 40, 50);
  CHECK(call.same_outputs(own));
  std::filesystem::remove(options.path + ".new");
  std::filesystem::remove(options.path);
  cache.clear();
  CHECK(cache.size() == 0);
  CHECK_FALSE(std::filesystem::exists(options.path + ".new"));
  Call<float> again = call.unrun();
  extend(cache, again, 0, 40);
  extend(cache, again, 40, 50);
  CHECK(again.same_outputs(own));
}

TEST_CASE("landmark_cache: a process that ends between two writes loses no sealed block", "[stream][file]") {
  // The file between the writes of a seal: reserved space, part of a block, the whole block, and the count.
  const TemporaryFolder folder;
  Random random(3);
  Call<float> call = drawn_call(random);
  const Options options{.block_size = 5, .top_k = 3, .rollback = 0, .path = folder.file("blocks")};
  std::string four, five;
  {
    Cache cache(shape, options, turned);
    extend(cache, call, 0, 20);
    four = contents(options.path);
    extend(cache, call, 20, 5);
    five = contents(options.path);
  }
  REQUIRE(five.size() > four.size());
  const auto blocks_of = [&](const std::string& bytes) {
    write_contents(options.path, bytes);
    return Cache(shape, options, turned).blocks();
  };
  std::string bytes = four;
  bytes.resize(five.size());
  CHECK(blocks_of(bytes) == 4);
  for (std::size_t written = four.size(); written < five.size(); written += 97) {
    std::copy(five.begin() + std::ptrdiff_t(four.size()), five.begin() + std::ptrdiff_t(written),
              bytes.begin() + std::ptrdiff_t(four.size()));
    REQUIRE(blocks_of(bytes) == 4);
  }
  CHECK(blocks_of(five) == 5);
  CHECK(blocks_of(std::string()) == 0);
  CHECK(blocks_of(std::string(4096, '\0')) == 0);
}

TEST_CASE("landmark_cache: a damaged, short or foreign file is refused", "[stream][file]") {
  const TemporaryFolder folder;
  Random random(4);
  Call<float> call = drawn_call(random);
  const Options options{.block_size = 5, .top_k = 3, .rollback = 0, .path = folder.file("blocks")};
  {
    Cache cache(shape, options, turned);
    extend(cache, call, 0, 20);
  }
  const std::string good = contents(options.path);
  const auto refusal_of = [&](const std::string& bytes) {
    write_contents(options.path, bytes);
    std::string text = file_refusal([&] { Cache(shape, options, turned); });
    CHECK(contents(options.path) == bytes);
    return text;
  };
  for (std::size_t byte = 0; byte < 4096; byte += byte < 140 ? 1 : 89) {
    std::string tampered = good;
    tampered[byte] = static_cast<char>(tampered[byte] ^ 16);
    const std::string text = refusal_of(tampered);
    INFO(byte);
    REQUIRE(text.find("longspan: landmark_cache: the file " + options.path + " is ") == 0);
  }
  const std::size_t in_a_block = 4096 + 4096 + 100;
  std::string tampered = good;
  tampered[in_a_block] = static_cast<char>(tampered[in_a_block] ^ 1);
  CHECK(refusal_of(tampered).find("damaged in block 1") != std::string::npos);
  for (std::size_t length = 1; length < good.size(); length += length < 200 ? 1 : 613)
    REQUIRE(refusal_of(good.substr(0, length)).find("cut short") != std::string::npos);
  CHECK(refusal_of(std::string(10000, 'x')).find("is of another kind") != std::string::npos);

  write_contents(options.path, good);
  CHECK(file_refusal([&] {
          Cache(shape, {.block_size = 6, .path = options.path}, turned);
        }).find("block_size is 5 in the file, wanted 6") != std::string::npos);
  CHECK(file_refusal([&] {
          landmark_cache<float, rotary>(shape, options, turned);
        }).find("their positions in the text is yes in the file, wanted no") != std::string::npos);
  CHECK(file_refusal([&] {
          Cache(shape, options, rotary(Pairing::half_split, 500000));
        }).find("the base of the positions is 10000 in the file, wanted 500000") != std::string::npos);
  CHECK(file_refusal([&] {
          landmark_cache<float, no_position, exact_positions>(shape, options);
        }).find("the position encoding is rotary in the file, wanted none") != std::string::npos);
  CHECK(file_refusal([&] {
          Cache(shape, {.path = folder.file("no/such/folder")}, turned);
        }).find("cannot open the file") != std::string::npos);
  const Cache open(shape, options, turned);
  CHECK(file_refusal([&] { Cache(shape, options, turned); }).find("is in use by another cache") !=
        std::string::npos);
}

TEST_CASE("landmark_cache: a full disk throws a FileError and changes nothing", "[stream][file]") {
  const TemporaryFolder folder;
  Random random(5);
  Call<float> call = drawn_call(random), own = call.unrun();
  const Index rollback = GENERATE(0, 16);
  const Options options{.block_size = 5, .top_k = 3, .rollback = rollback, .path = folder.file("blocks")};
  Cache cache(shape, options, turned);
  extend(cache, call, 0, 33);
  const Index blocks = cache.blocks();

  std::signal(SIGXFSZ, SIG_IGN);
  struct ::rlimit before {};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  const auto size = static_cast<rlim_t>(std::filesystem::file_size(options.path));
  const struct ::rlimit full {
    size + 100, before.rlim_max
  };
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &full) == 0);
  const auto outputs = call.out.values;
  const std::string of_extend = file_refusal([&] { extend(cache, call, 33, 7); });
  const std::string of_append = file_refusal([&] {
    cache.append(std::as_const(call.k).view().slice_rows(33, 7),
                 std::as_const(call.v).view().slice_rows(33, 7));
  });
  extend(cache, call, 33, 1);  // writes nothing
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &before) == 0);
  for (const std::string& text : {of_extend, of_append}) {
    CAPTURE(text);
    CHECK(text.find("longspan: landmark_cache: cannot write ") == 0);
    CHECK(text.ends_with(" bytes to the file " + options.path + ": File too large"));
  }
  CHECK(cache.blocks() == blocks);
  CHECK(cache.size() == 34);
  extend(cache, call, 34, 56);
  landmark_cache<float, rotary, exact_positions> wanted(shape, {.block_size = 5, .top_k = 3}, turned);
  extend(wanted, own, 0, 33);
  extend(wanted, own, 33, 1);
  extend(wanted, own, 34, 56);
  CHECK(call.same_outputs(own));
}

TEST_CASE("landmark_cache: a copy reads the file and keeps its own blocks in memory", "[stream][file]") {
  const TemporaryFolder folder;
  Random random(6);
  Call<float> call = drawn_call(random), own = call.unrun(), other = call.unrun();
  const Options options{.block_size = 5, .top_k = 3, .capacity = 6, .path = folder.file("blocks")};
  Cache cache(shape, options, turned);
  extend(cache, call, 0, 40);
  extend(cache, call, 40, 50);

  Cache fresh(shape, {.block_size = 5, .top_k = 3, .capacity = 6}, turned);
  cache.clear();
  CHECK(cache.size() == 0);
  extend(cache, own, 0, 40);
  Cache copy = cache;
  extend(copy, other, 40, 50);
  CHECK(same_rows(call, other, 40, 90));
  copy = cache;
  cache.clear();  // the copy still has the blocks of the old file
  extend(cache, own, 0, 90);
  extend(copy, other, 40, 50);
  CHECK(same_rows(call, other, 40, 90));
  Cache moved = std::move(cache);
  CHECK(moved.blocks() == 6);
  const std::vector<Index> rows{0, 0};
  CHECK(refusal([&] { moved.reorder(rows); }).find("reorder: the blocks of this cache are in a file") !=
        std::string::npos);
  std::stringstream state;
  moved.save(state);
  CHECK(refusal([&] { moved.load(state); }).find("load: the blocks of this cache are in a file") !=
        std::string::npos);
  fresh.load(state);
  CHECK(fresh.blocks() == 6);
  copy.reorder(rows);
}

TEST_CASE("landmark_cache: the memory for mapped pages of the file is bounded", "[stream][file]") {
  // Only on systems that report the resident part of a process's mapped files.
  const auto mapped_kb = [] {
    std::ifstream status("/proc/self/status");
    for (std::string word; status >> word;) {
      long value = 0;
      if (word == "RssFile:" && status >> value) return value;
    }
    return -1L;
  };
  if (mapped_kb() < 0) {
    SUCCEED("this system does not report RssFile");
    return;
  }
  const TemporaryFolder folder;
  Random random(7);
  constexpr Index tokens = 16384, dim = 128;
  Call<float> call(Shape{1, 1, 1, 1024, 1024, dim, dim}, Values::normal, random);
  long grown[2] = {};
  for (const int bounded : {0, 1}) {
    const Options options{.block_size = 64,
                          .top_k = 8,
                          .path = folder.file("blocks"),
                          .resident_bytes = Index{1} << (bounded == 1 ? 20 : 30)};
    landmark_cache<float> cache({1, 1, 1, dim, dim}, options);
    while (cache.size() < tokens) cache.append(std::as_const(call.k).view(), std::as_const(call.v).view());
    const long before = mapped_kb();
    extend(cache, call, 0, 60);
    extend(cache, call, 60, 40);
    grown[bounded] = mapped_kb() - before;
    std::filesystem::remove(options.path);
  }
  CHECK(grown[0] > 8000);  // of 16 MB
  CHECK(grown[1] < 4000);
}
