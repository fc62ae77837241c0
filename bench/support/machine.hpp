// The machine on which a figure was measured, without which a speed means nothing.
#pragma once

#include <ctime>
#include <fstream>
#include <string>
#include <thread>

#include "longspan/eigen.hpp"
#include "longspan/version.hpp"
#include "support/json.hpp"

#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#if !defined(LONGSPAN_BENCH_FLAGS)
#define LONGSPAN_BENCH_FLAGS "not recorded by this build"
#endif

namespace bench {

struct Machine {
  std::string cpu;
  longspan::Index cores = 0;
  std::string compiler;
  std::string flags;
  std::string instructions;  ///< instruction sets that Eigen's packets use
  std::string eigen;
  std::string longspan;
  std::string date;  ///< UTC
};

inline std::string cpu_model() {
#if defined(__APPLE__)
  char name[128] = "";
  std::size_t size = sizeof name;
  if (sysctlbyname("machdep.cpu.brand_string", name, &size, nullptr, 0) == 0) return name;
#endif
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    const std::size_t colon = line.find(": ");
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown processor";
}

inline std::string compiler_text() {
#if defined(__clang__)
  return "clang " + std::to_string(__clang_major__) + "." + std::to_string(__clang_minor__) + "." +
         std::to_string(__clang_patchlevel__);
#elif defined(__GNUC__)
  return "g++ " + std::to_string(__GNUC__) + "." + std::to_string(__GNUC_MINOR__) + "." +
         std::to_string(__GNUC_PATCHLEVEL__);
#else
  return "unknown compiler";
#endif
}

inline std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  char text[32] = "";
  std::tm parts{};
#if defined(_WIN32)
  gmtime_s(&parts, &now);
#else
  gmtime_r(&now, &parts);
#endif
  std::strftime(text, sizeof text, "%Y-%m-%d %H:%M UTC", &parts);
  return text;
}

inline Machine this_machine() {
  const auto version = [](int major, int minor, int patch) {
    return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch);
  };
#if EIGEN_VERSION_AT_LEAST(5, 0, 0)
  const std::string eigen = version(EIGEN_MAJOR_VERSION, EIGEN_MINOR_VERSION, EIGEN_PATCH_VERSION);
#else
  const std::string eigen = version(EIGEN_WORLD_VERSION, EIGEN_MAJOR_VERSION, EIGEN_MINOR_VERSION);
#endif
  return {cpu_model(),
          static_cast<longspan::Index>(std::thread::hardware_concurrency()),
          compiler_text(),
          LONGSPAN_BENCH_FLAGS,
          Eigen::SimdInstructionSetsInUse(),
          eigen,
          version(LONGSPAN_VERSION_MAJOR, LONGSPAN_VERSION_MINOR, LONGSPAN_VERSION_PATCH),
          utc_now()};
}

inline void add_machine(Json& json, const Machine& machine, longspan::Index threads) {
  json.begin_object("machine");
  json.add("cpu", machine.cpu);
  json.add("cores", machine.cores);
  json.add("threads", threads);
  json.add("compiler", machine.compiler);
  json.add("flags", machine.flags);
  json.add("instructions", machine.instructions);
  json.add("eigen", machine.eigen);
  json.add("longspan", machine.longspan);
  json.add("date", machine.date);
  json.end_object();
}

}  // namespace bench
