#include "longspan/stream/file_blocks.hpp"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "longspan/infini_attention.hpp"
#include "longspan/stream/blocks.hpp"
#include "longspan/stream/infini_memory.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/tensor.hpp"

namespace {

using namespace test;
namespace fs = std::filesystem;
using longspan::file_blocks;
using longspan::SequenceFiles;
using longspan::StreamShape;

/// A folder for one test, which is removed at its end.
class Folder {
 public:
  explicit Folder(const std::string& name) : path_(fs::temp_directory_path() / ("longspan_" + name)) {
    fs::remove_all(path_);
    fs::create_directories(path_);
  }
  ~Folder() { fs::remove_all(path_); }
  std::string operator/(const char* file) const { return (path_ / file).string(); }

 private:
  fs::path path_;
};

constexpr StreamShape shape{1, 4, 2, 8, 6};

/// Writes the rows of a tensor, [tokens, heads, cols], after a header.
template <class T>
void write_rows(const std::string& path, const Tensor<T>& x, std::size_t header_bytes = 0) {
  std::ofstream file(path, std::ios::binary);
  file << std::string(header_bytes, 'h');
  for (Index i = 0; i < x.rows; ++i) {
    for (Index h = 0; h < x.heads; ++h)
      file.write(reinterpret_cast<const char*>(x.row(0, h, i)),
                 static_cast<std::streamsize>(x.cols * static_cast<Index>(sizeof(T))));
  }
}

template <class T>
Tensor<T> read_rows(const std::string& path, Index heads, Index rows, Index cols) {
  Tensor<T> x(1, heads, rows, cols);
  std::ifstream file(path, std::ios::binary);
  for (Index i = 0; i < rows; ++i) {
    for (Index h = 0; h < heads; ++h)
      file.read(reinterpret_cast<char*>(x.row(0, h, i)),
                static_cast<std::streamsize>(cols * static_cast<Index>(sizeof(T))));
  }
  CHECK(file.good());
  return x;
}

SequenceFiles files_of(const Folder& folder) {
  return {folder / "q.bin", folder / "k.bin", folder / "v.bin", folder / "out.bin"};
}

template <class T>
SequenceFiles write_call(const Folder& folder, const Call<T>& call, std::size_t header_bytes = 0) {
  SequenceFiles files = files_of(folder);
  write_rows(files.q, call.q, header_bytes);
  write_rows(files.k, call.k, header_bytes);
  write_rows(files.v, call.v, header_bytes);
  files.header_bytes = static_cast<Index>(header_bytes);
  return files;
}

}  // namespace

TEMPLATE_TEST_CASE("file_blocks: extends a stream from files, and can be continued", "", float,
                   Eigen::bfloat16) {
  const Folder folder("file_blocks");
  Random random(1);
  Call<TestType> call(Shape{1, 4, 2, 90, 90, 8, 6}, Values::normal, random);
  const SequenceFiles files = write_call(folder, call, 128);
  longspan::infini_attention attend;
  attend.segment = 32;
  attend.template stream<TestType>(shape).extend(std::as_const(call.q).view(), std::as_const(call.k).view(),
                                                 std::as_const(call.v).view(), call.out.view());

  auto stream = attend.template stream<TestType>(shape);
  {
    file_blocks<TestType> source(shape, files);
    CHECK(source.length() == 90);
    longspan::extend_by_blocks(stream, source, 64, 32);
  }
  // Another source over the same files finds the outputs of the first.
  file_blocks<TestType> source(shape, files);
  longspan::extend_by_blocks(stream, source, source.length(), 32);
  CHECK(fs::file_size(files.out) == 90 * 4 * 6 * sizeof(TestType));
  CHECK(read_rows<TestType>(files.out, 4, 90, 6) == call.out);
}

TEST_CASE("file_blocks: invalid files and ranges are refused", "[errors]") {
  const Folder folder("file_blocks_errors");
  Random random(2);
  const Call<float> call(Shape{1, 4, 2, 10, 10, 8, 6}, Values::normal, random);
  const SequenceFiles files = write_call(folder, call);
  const auto error = [](const StreamShape& of, const SequenceFiles& which) {
    return refusal([&] { file_blocks<float>(of, which); });
  };
  const auto file_error = [&](const SequenceFiles& which) {
    return file_refusal([&] { file_blocks<float>(shape, which); });
  };
  CHECK_NOTHROW(file_blocks<float>(shape, files));

  SequenceFiles wrong = files;
  wrong.k = folder / "missing.bin";
  CHECK(file_error(wrong) ==
        "longspan: file_blocks: cannot open the file " + wrong.k + " for reading: No such file or directory");
  wrong = files;
  wrong.out = folder / "no_folder" + "/out.bin";
  CHECK(file_error(wrong) == "longspan: file_blocks: cannot open the file " + wrong.out +
                                 " for writing: No such file or directory");
  wrong.out = files.v;
  CHECK(error(shape, wrong).find("is both input and output") != std::string::npos);
  wrong = files;
  wrong.header_bytes = 7;
  CHECK(file_error(wrong) == "longspan: file_blocks: the file " + files.q +
                                 " has 1280 bytes, wanted 7 plus a multiple of the 128 bytes of a token");
  CHECK(error({2, 4, 2, 8, 6}, files).find("the batch is 2, wanted 1") != std::string::npos);
  CHECK(error({1, 4, 3, 8, 6}, files) != "");

  fs::resize_file(files.v, 9 * 2 * 6 * sizeof(float));
  CHECK(file_error(files) ==
        "longspan: file_blocks: the file " + files.v + " has 9 tokens, but " + files.q + " has 10");
}

TEST_CASE("file_blocks: a file that shrinks while it is read is refused, and its block is not written",
          "[errors]") {
  const Folder folder("file_blocks_shrinks");
  Random random(3);
  const Call<float> call(Shape{1, 4, 2, 1000, 1000, 8, 6}, Values::normal, random);
  const SequenceFiles files = write_call(folder, call);
  file_blocks<float> source(shape, files);
  fs::resize_file(files.k, 500 * 2 * 8 * sizeof(float));
  CHECK_NOTHROW(source.open(0, 500));
  CHECK(file_refusal([&] { source.open(900, 100); }) ==
        "longspan: file_blocks: the file " + files.k + " ends before token 1000");
  CHECK(refusal([&] { source.open(950, 51); }) ==
        "longspan: file_blocks: the range of tokens is 51 from 950 on, wanted within [0, 1000)");
  CHECK(fs::file_size(files.out) == 0);

  // After an error the source works again when the file is complete.
  CHECK_NOTHROW(source.open(0, 500));
  write_rows(files.k, call.k);
  const auto block = source.open(900, 100);
  for (Index i = 0; i < 100; ++i)
    CHECK(std::equal(block.k.row(0, 1, i), block.k.row(0, 1, i) + 8, call.k.row(0, 1, 900 + i)));
  CHECK_NOTHROW(source.close(900, 100));
  CHECK(refusal([&] { source.close(0, 101); }) ==
        "longspan: file_blocks: the range of tokens is 101 from 0 on, wanted the block that is open");
}

TEST_CASE("file_blocks: a full disk throws a FileError", "[errors]") {
  if (!fs::exists("/dev/full")) {
    SUCCEED("this system has no /dev/full");
    return;
  }
  const Folder folder("file_blocks_full");
  Random random(4);
  const Call<float> call(Shape{1, 4, 2, 10, 10, 8, 6}, Values::normal, random);
  SequenceFiles files = write_call(folder, call);
  files.out = "/dev/full";
  file_blocks<float> source(shape, files);
  source.open(0, 10);
  CHECK(file_refusal([&] { source.close(0, 10); }) ==
        "longspan: file_blocks: cannot write the rows of tokens from 0 on to the file /dev/full: No space "
        "left on "
        "device");
}
