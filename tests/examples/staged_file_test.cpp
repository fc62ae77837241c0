#include "examples/attend_npy/staged_file.hpp"

#include <sys/resource.h>

#include <csignal>
#include <vector>

#include "support/catch.hpp"
#include "temporary_folder.hpp"

namespace {

using attend_npy::StagedFile;

void write(StagedFile& file, const std::string& text) { file.write(text.data(), text.size()); }

std::string refusal(const std::string& path) {
  try {
    StagedFile file(path);
    return "";
  } catch (const longspan::FileError& error) {
    return error.what();
  }
}

}  // namespace

TEST_CASE("StagedFile: appears under its name only when it is committed", "[staged_file]") {
  const TemporaryFolder folder;
  {
    std::vector<StagedFile> files;
    files.emplace_back(folder.file("a"));
    files.emplace_back(folder.file("b"));
    write(files[0], "first");
    write(files[1], "second");
    CHECK(folder.names().count("a") + folder.names().count("b") == 0);
    StagedFile::put_in_place(files);
  }
  CHECK(folder.names() == std::set<std::string>{"a", "b"});
  CHECK(folder.read("a") == "first");
  CHECK(folder.read("b") == "second");
}

TEST_CASE("StagedFile: replaces an existing file", "[staged_file]") {
  const TemporaryFolder folder;
  folder.write("a", "old and longer");
  folder.write("b", "old");
  {
    std::vector<StagedFile> files;
    files.emplace_back(folder.file("a"));
    files.emplace_back(folder.file("b"));
    write(files[0], "new");
    write(files[1], "new");
    StagedFile::put_in_place(files);
  }
  CHECK(folder.names() == std::set<std::string>{"a", "b"});
  CHECK(folder.read("a") == "new");
  CHECK(folder.read("b") == "new");
}

TEST_CASE("StagedFile: leaves nothing if it is not committed", "[staged_file]") {
  const TemporaryFolder folder;
  folder.write("a", "old");
  {
    StagedFile a(folder.file("a")), b(folder.file("b"));
    write(a, "new");
    write(b, "new");
    CHECK(folder.names().size() == 3);
  }
  CHECK(folder.names() == std::set<std::string>{"a"});
  CHECK(folder.read("a") == "old");
}

TEST_CASE("StagedFile: all files are committed or none", "[staged_file][errors]") {
  const TemporaryFolder folder;
  const bool with_previous = GENERATE(false, true);
  if (with_previous) folder.write("a", "old");
  {
    std::vector<StagedFile> files;
    files.emplace_back(folder.file("a"));
    files.emplace_back(folder.file("b"));
    files.emplace_back(folder.file("c"));
    for (StagedFile& file : files) write(file, "new");
    std::filesystem::create_directory(folder.file("c"));  // appears after the check
    CHECK_THROWS_AS(StagedFile::put_in_place(files), longspan::FileError);
  }
  CHECK(folder.names() == (with_previous ? std::set<std::string>{"a", "c"} : std::set<std::string>{"c"}));
  if (with_previous) CHECK(folder.read("a") == "old");
}

namespace {

/// Limits files of this process to `bytes`, as if the disk were full.
class SmallDisk {
 public:
  explicit SmallDisk(rlim_t bytes) : previous_handler_(std::signal(SIGXFSZ, SIG_IGN)) {
    getrlimit(RLIMIT_FSIZE, &previous_);
    const rlimit small{bytes, previous_.rlim_max};
    setrlimit(RLIMIT_FSIZE, &small);
  }
  SmallDisk(const SmallDisk&) = delete;
  SmallDisk& operator=(const SmallDisk&) = delete;
  ~SmallDisk() {
    setrlimit(RLIMIT_FSIZE, &previous_);
    std::signal(SIGXFSZ, previous_handler_);
  }

 private:
  rlimit previous_{};
  void (*previous_handler_)(int);
};

}  // namespace

TEST_CASE("StagedFile: a full disk is noticed, at the latest when the file is closed",
          "[staged_file][errors]") {
  const TemporaryFolder folder;
  folder.write("a", "old");
  const std::size_t size =
      GENERATE(std::size_t(100), std::size_t(1) << 20);  // one fits into a buffer, one does not
  std::string text;
  try {
    std::vector<StagedFile> files;
    files.emplace_back(folder.file("a"));
    const SmallDisk small(16);  // no assertions in this scope: the test's own report may go to a file
    write(files[0], std::string(size, 'x'));
    StagedFile::put_in_place(files);
  } catch (const longspan::FileError& error) {
    text = error.what();
  }
  CHECK(text == folder.file("a") + ": cannot be written: File too large");
  CHECK(folder.names() == std::set<std::string>{"a"});
  CHECK(folder.read("a") == "old");
}

TEST_CASE("StagedFile: never uses an existing file as its temporary file", "[staged_file]") {
  const TemporaryFolder folder;
  folder.write("a.0.part", "of another program");
  {
    std::vector<StagedFile> files;
    files.emplace_back(folder.file("a"));
    write(files[0], "new");
    StagedFile::put_in_place(files);
  }
  CHECK(folder.read("a") == "new");
  CHECK(folder.read("a.0.part") == "of another program");
}

TEST_CASE("StagedFile: a symbolic link stays a link, and its file is replaced", "[staged_file]") {
  const TemporaryFolder folder;
  std::filesystem::create_directory(folder.file("elsewhere"));
  folder.write("elsewhere/a", "old");
  std::filesystem::create_symlink(folder.file("elsewhere/a"), folder.file("link"));
  {
    std::vector<StagedFile> files;
    files.emplace_back(folder.file("link"));
    write(files[0], "new");
    StagedFile::put_in_place(files);
  }
  CHECK(std::filesystem::is_symlink(folder.file("link")));
  CHECK(folder.read("elsewhere/a") == "new");
  CHECK(attend_npy::checked_target(folder.file("link")) ==
        attend_npy::checked_target(folder.file("elsewhere/../elsewhere/a")));
}

TEST_CASE("StagedFile: a name that cannot be a file is refused at once", "[staged_file][errors]") {
  const TemporaryFolder folder;
  CHECK(refusal(folder.path()) == folder.path() + ": is there already and is not a regular file");
  CHECK(refusal("/dev/null") == "/dev/null: is there already and is not a regular file");
  CHECK(refusal(folder.file("none/out.npy")) ==
        folder.file("none/out.npy") + ": the folder to write it in does not exist");
  CHECK(folder.names().empty());
}
