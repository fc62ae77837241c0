// Writes reports completely or not at all.
#pragma once

#include <filesystem>
#include <fstream>
#include <string>

#include "support/usage_error.hpp"

namespace bench {

/// Throws UsageError if a path cannot be written, before the work for the report begins.
inline void require_writable(const std::string& option, const std::string& path) {
  namespace fs = std::filesystem;
  const fs::path folder = fs::path(path).parent_path();
  std::error_code ignored;
  if (fs::is_directory(path, ignored) || fs::path(path).filename().empty()) {
    throw UsageError("the option " + option + " is '" + path + "', wanted the name of a file");
  }
  if (!folder.empty() && !fs::is_directory(folder, ignored)) {
    throw UsageError("the option " + option + " is '" + path + "', wanted a file in a folder that exists");
  }
  const std::string probe = path + ".part";
  const bool opened = std::ofstream(probe, std::ios::binary).is_open();
  fs::remove(probe, ignored);
  if (!opened)
    throw UsageError("the option " + option + " is '" + path + "', wanted a file that can be written");
}

inline void write_whole(const std::string& path, const std::string& text) {
  const std::string part = path + ".part";
  {
    std::ofstream file(part, std::ios::binary);
    file << text;
    if (!file.flush()) throw UsageError("the file " + path + " cannot be written");
  }
  std::filesystem::rename(part, path);
}

}  // namespace bench
