// Runs the built program attend_npy, whose path is LONGSPAN_ATTEND_NPY, on files of a folder.
#pragma once

#include <sys/wait.h>

#include <algorithm>
#include <cstdlib>
#include <span>
#include <string>
#include <vector>

#include "examples/attend_npy/npy.hpp"
#include "support/catch.hpp"
#include "temporary_folder.hpp"

struct Outcome {
  int exit_code = -1;
  std::string out, err;
  std::string notes = {};  ///< the lines of stderr with shapes and warnings; `err` has the others
};

/// Moves the lines with shapes and warnings from err to notes.
inline Outcome with_notes(Outcome outcome) {
  std::string others;
  for (std::size_t begin = 0; begin < outcome.err.size();) {
    const std::size_t end = std::min(outcome.err.find('\n', begin), outcome.err.size() - 1) + 1;
    const std::string line = outcome.err.substr(begin, end - begin);
    const bool is_note = line.starts_with("attend_npy: read ") || line.starts_with("attend_npy: warning: ");
    (is_note ? outcome.notes : others) += line;
    begin = end;
  }
  outcome.err = others;
  return outcome;
}

inline std::string quoted(const std::string& text) { return "'" + text + "'"; }

/// Runs `attend_npy <words>` in the folder, in a shell that first runs `before`.
inline Outcome run(const TemporaryFolder& folder, const std::string& words, const std::string& before = "") {
  const TemporaryFolder streams;
  const std::string command = "cd " + quoted(folder.path()) + " && " + before + quoted(LONGSPAN_ATTEND_NPY) +
                              " " + words + " >" + quoted(streams.file("out")) + " 2>" +
                              quoted(streams.file("err"));
  const int status = std::system(command.c_str());
  return with_notes({WIFEXITED(status) ? WEXITSTATUS(status) : -1, streams.read("out"), streams.read("err")});
}

/// Runs a variant with q.npy, k.npy, v.npy and out.npy; `words` are keys, options and names of files.
inline Outcome run_variant(const TemporaryFolder& folder, const std::string& variant,
                           const std::vector<std::string>& words) {
  std::string line = variant + " --q q.npy --k k.npy --v v.npy --out out.npy";
  for (const std::string& word : words) line += " " + quoted(word);
  return run(folder, line);
}

/// Checks that the variant refuses the words with one line that contains `part`, and writes nothing.
inline void check_variant_refused(const TemporaryFolder& folder, const std::string& variant,
                                  const std::vector<std::string>& words, const std::string& part) {
  const auto names = folder.names();
  const Outcome outcome = run_variant(folder, variant, words);
  CAPTURE(words, outcome.err);
  CHECK(outcome.exit_code == 2);
  CHECK(outcome.err.find(part) != std::string::npos);
  CHECK(outcome.err.find('\n') == outcome.err.size() - 1);
  CHECK(folder.names() == names);
}

/// Saves the values as an array of T in the file `name` of the folder.
template <class T, class Value = double>
void save(const TemporaryFolder& folder, const std::string& name, const std::vector<longspan::Index>& shape,
          const std::vector<Value>& values) {
  struct {
    std::string bytes;
    void write(const void* from, std::size_t count) { bytes.append(static_cast<const char*>(from), count); }
  } file;
  const std::vector<T> converted(values.begin(), values.end());
  npy::write(file, shape, std::span<const T>(converted));
  folder.write(name, file.bytes);
}

/// The float32 values of a file, which must have the given shape.
inline std::vector<float> loaded(const TemporaryFolder& folder, const std::string& name,
                                 const std::vector<longspan::Index>& shape) {
  const npy::Array file = npy::read(folder.file(name));
  REQUIRE(file.shape == shape);
  return std::get<std::vector<float>>(file.values);
}
