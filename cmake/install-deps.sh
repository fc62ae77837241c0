#!/bin/sh
# Installs what building Longspan needs and this machine lacks: a C++20 compiler, CMake 3.25, Ninja, Eigen, Catch2,
# Google Benchmark, nlohmann-json, and OpenMP where the compiler does not bring it. With apt-get, dnf, pacman or brew; with sudo
# only when not root. If everything is there it says so and does nothing. `install-deps.sh format arm` also installs
# what contributors need: clang-format 16, and on Debian a cross compiler and an emulator for 64-bit ARM.
# shellcheck disable=SC2086 # lists of names are left unquoted, to be split
set -eu

cmake_wanted=3.25

say() { printf 'install-deps: %s\n' "$*"; }
fail() {
  say "$*" >&2
  exit 1
}
has() { command -v "$1" >/dev/null 2>&1; }

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'exit 1' HUP INT TERM

# The compiler that CMake would take: the first of these that exists.
compiler() {
  for candidate in ${CXX:-} c++ g++ clang++; do
    if has "$candidate"; then
      echo "$candidate"
      return
    fi
  done
}

compiler_speaks_cpp20() {
  [ -n "$(compiler)" ] || return 1
  cat >"$scratch/cpp20.cpp" <<'END'
#include <bit>
#include <concepts>
#include <span>
template <std::integral T> struct Parts { T begin = 0; int end = 0; };
int main() { return Parts<int>{.end = std::bit_cast<int>(0u)}.end + int(std::span<int>{}.size()); }
END
  "$(compiler)" -std=c++20 -o "$scratch/cpp20" "$scratch/cpp20.cpp" >/dev/null 2>&1
}

cmake_version() { cmake --version 2>/dev/null | sed -n '1s/[^0-9]*\([0-9.]*\).*/\1/p'; }

cmake_is_new_enough() {
  has cmake || return 1
  # The smaller of the two versions is the wanted one.
  [ "$(printf '%s\n%s\n' "$cmake_wanted" "$(cmake_version)" | sort -t. -k1,1n -k2,2n | head -n 1)" = "$cmake_wanted" ]
}

has_ninja() { has ninja || has ninja-build; }

wants() { case " $extras " in *" $1 "*) ;; *) return 1 ;; esac; }

missing_tools() {
  compiler_speaks_cpp20 || echo compiler
  cmake_is_new_enough || echo cmake
  has_ninja || echo ninja
  ! wants format || has clang-format-16 || echo format
  ! wants arm || { has aarch64-linux-gnu-g++ && has qemu-aarch64; } || echo arm
}

# Asked for as the build asks: by find_package.
missing_libraries() {
  mkdir -p "$scratch/probe"
  cat >"$scratch/probe/CMakeLists.txt" <<'END'
cmake_minimum_required(VERSION 3.24)
project(probe LANGUAGES CXX)
foreach(package Eigen3 Catch2 benchmark nlohmann_json)
  find_package(${package} CONFIG QUIET)
  if(NOT ${package}_FOUND)
    file(APPEND ${CMAKE_BINARY_DIR}/missing ${package}\n)
  endif()
endforeach()
include(${FIND_OPENMP})
if(NOT OpenMP_CXX_FOUND)
  file(APPEND ${CMAKE_BINARY_DIR}/missing openmp\n)
endif()
END
  rm -rf "$scratch/build"
  if ! cmake -S "$scratch/probe" -B "$scratch/build" -G Ninja -DFIND_OPENMP="$here/find_openmp.cmake" \
    -DCMAKE_CXX_COMPILER="$(compiler)" >"$scratch/log" 2>&1; then
    cat "$scratch/log" >&2
    fail "CMake cannot configure a project of one line, see above"
  fi
  [ ! -f "$scratch/build/missing" ] || sed 's/Eigen3/eigen/; s/Catch2/catch2/; s/nlohmann_//' "$scratch/build/missing"
}

package_manager() {
  for candidate in apt-get dnf pacman brew; do
    if has "$candidate"; then
      echo "$candidate"
      return
    fi
  done
}

# What each package manager calls it.
package() {
  case "$manager:$1" in
    apt-get:compiler) echo g++ ;;
    apt-get:ninja) echo ninja-build ;;
    apt-get:format) echo clang-format-16 ;;
    apt-get:arm) echo g++-aarch64-linux-gnu qemu-user ;;
    apt-get:eigen) echo libeigen3-dev ;;
    apt-get:benchmark) echo libbenchmark-dev ;;
    apt-get:json) echo nlohmann-json3-dev ;;
    apt-get:openmp) echo libomp-dev ;;
    dnf:compiler) echo gcc-c++ ;;
    dnf:ninja) echo ninja-build ;;
    dnf:eigen) echo eigen3-devel ;;
    dnf:catch2) echo catch-devel ;;
    dnf:benchmark) echo google-benchmark-devel ;;
    dnf:json) echo json-devel ;;
    dnf:openmp) echo libomp-devel ;;
    pacman:compiler) echo gcc ;;
    pacman:json) echo nlohmann-json ;;
    brew:compiler) echo gcc ;;
    brew:benchmark) echo google-benchmark ;;
    brew:json) echo nlohmann-json ;;
    brew:openmp) echo libomp ;;
    *) echo "$1" ;;
  esac
}

may_be_root() { [ "$(id -u)" -eq 0 ] || has sudo; }

# Runs a command as root, and says which.
as_root() {
  if [ "$(id -u)" -ne 0 ]; then set -- sudo "$@"; fi
  say "running: $*"
  "$@"
}

refresh() {
  case "$manager" in
    apt-get) as_root apt-get update ;;
    pacman) [ -n "$(ls /var/lib/pacman/sync 2>/dev/null)" ] || as_root pacman -Sy ;;
    *) ;;
  esac
}

install() {
  case "$manager" in
    apt-get) as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" ;;
    dnf) as_root dnf install -y "$@" ;;
    pacman) as_root pacman -S --needed --noconfirm "$@" ;;
    brew)
      say "running: brew install $*"
      NONINTERACTIVE=1 brew install "$@"
      ;;
  esac
}

install_missing() {
  say "missing:" "$@"
  if [ -z "$manager" ]; then
    say "found none of apt-get, dnf, pacman and brew"
    return
  elif [ "$manager" != brew ] && ! may_be_root; then
    say "not root, and there is no sudo: as root, run: sh cmake/install-deps.sh"
    return
  fi
  if [ -z "$refreshed" ]; then
    refresh || say "$manager could not refresh its lists; going on with those it has"
    refreshed=yes
  fi
  packages=$(for name in "$@"; do package "$name"; done)
  if ! install $packages && [ $# -gt 1 ]; then
    # A distribution that lacks one of them: the others may still be had.
    for name in "$@"; do install "$(package "$name")" || say "$manager has no $(package "$name")"; done
  fi
  hash -r
}

extras=$*
here=$(cd "$(dirname "$0")" && pwd)
manager=$(package_manager)
refreshed=

tools=$(missing_tools)
tools_were_missing=$tools
if [ -n "$tools" ]; then
  install_missing $tools
  tools=$(missing_tools)
  found=$(cmake_version)
  for tool in $tools; do
    case "$tool" in
      cmake) say "cmake is ${found:-missing}, wanted $cmake_wanted or newer: https://cmake.org/download" >&2 ;;
      compiler) say "no C++20 compiler, wanted g++ 12, clang++ 14 or newer (CXX names one)" >&2 ;;
      *) say "$tool is still missing" >&2 ;;
    esac
  done
  [ -z "$tools" ] || exit 1
fi

libraries=$(missing_libraries)
if [ -n "$libraries" ]; then
  install_missing $libraries
  for name in $(missing_libraries); do
    case "$name" in
      json) say "nlohmann-json is still missing: compare is built without --against" ;;
      openmp) say "OpenMP is still missing: kernels will run on one thread" ;;
      *) say "$name is still missing: CMake will download it" ;;
    esac
  done
fi

if [ -n "$tools_were_missing$libraries" ]; then say "done"; else say "everything is there, nothing to do"; fi
