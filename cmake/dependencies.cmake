# What Longspan needs: from the system where it is there, else downloaded. CMAKE_DISABLE_FIND_PACKAGE_<name>=ON
# downloads it in any case; FETCHCONTENT_FULLY_DISCONNECTED=ON never downloads.
include(FetchContent)

function(longspan_say_fetched name version)
  message(STATUS "longspan: ${name} is not installed, downloading ${version} (cmake/install-deps.sh installs it)")
endfunction()

# Eigen is asked for without a version and checked after: 3.4.0 refuses every range that 5.x accepts, and the
# other way round.
find_package(Eigen3 CONFIG QUIET)
if(NOT TARGET Eigen3::Eigen)
  longspan_say_fetched(Eigen 5.0.1)
  # Eigen's own CMakeLists.txt is not run (its SOURCE_SUBDIR does not exist): headers are all that is needed, and
  # an imported target keeps Eigen's warnings out of builds that include it.
  FetchContent_Declare(
    eigen3
    URL https://gitlab.com/libeigen/eigen/-/archive/5.0.1/eigen-5.0.1.tar.gz
    URL_HASH SHA256=e9c326dc8c05cd1e044c71f30f1b2e34a6161a3b6ecf445d56b53ff1669e3dec
    SOURCE_SUBDIR not-configured)
  FetchContent_MakeAvailable(eigen3)
  add_library(Eigen3::Eigen INTERFACE IMPORTED GLOBAL)
  target_include_directories(Eigen3::Eigen INTERFACE ${eigen3_SOURCE_DIR})
elseif(DEFINED Eigen3_VERSION AND (Eigen3_VERSION VERSION_LESS 3.4 OR Eigen3_VERSION VERSION_GREATER_EQUAL 6))
  message(FATAL_ERROR "longspan: Eigen is ${Eigen3_VERSION} in ${Eigen3_DIR}, wanted 3.4 or 5.x "
                      "(-DCMAKE_DISABLE_FIND_PACKAGE_Eigen3=ON downloads 5.0.1)")
endif()

if(LONGSPAN_USE_OPENMP)
  include(${CMAKE_CURRENT_LIST_DIR}/find_openmp.cmake)
  if(NOT TARGET OpenMP::OpenMP_CXX)
    message(STATUS "longspan: ${CMAKE_CXX_COMPILER_ID} finds no OpenMP here, so kernels will run on one thread")
  endif()
endif()

if(LONGSPAN_BUILD_TESTS)
  find_package(Catch2 CONFIG QUIET)
  if(NOT TARGET Catch2::Catch2)
    longspan_say_fetched(Catch2 3.7.1)
    FetchContent_Declare(
      Catch2
      URL https://github.com/catchorg/Catch2/archive/refs/tags/v3.7.1.tar.gz
      URL_HASH SHA256=c991b247a1a0d7bb9c39aa35faf0fe9e19764213f28ffba3109388e62ee0269c)
    FetchContent_MakeAvailable(Catch2)
    list(APPEND CMAKE_MODULE_PATH ${catch2_SOURCE_DIR}/extras)
    set(Catch2_VERSION 3.7.1)
  elseif(Catch2_VERSION VERSION_LESS 2.13)
    message(FATAL_ERROR "longspan: Catch2 is ${Catch2_VERSION} in ${Catch2_DIR}, wanted 2.13 or 3.x "
                        "(-DCMAKE_DISABLE_FIND_PACKAGE_Catch2=ON downloads 3.7.1)")
  endif()
endif()

if(LONGSPAN_BUILD_BENCH)
  find_package(benchmark CONFIG QUIET)
  if(NOT TARGET benchmark::benchmark)
    longspan_say_fetched("Google Benchmark" 1.9.1)
    set(BENCHMARK_ENABLE_TESTING OFF CACHE BOOL "")
    set(BENCHMARK_ENABLE_INSTALL OFF CACHE BOOL "")
    set(BENCHMARK_ENABLE_WERROR OFF CACHE BOOL "")
    FetchContent_Declare(
      benchmark
      URL https://github.com/google/benchmark/archive/refs/tags/v1.9.1.tar.gz
      URL_HASH SHA256=32131c08ee31eeff2c8968d7e874f3cb648034377dfc32a4c377fa8796d84981)
    FetchContent_MakeAvailable(benchmark)
  endif()

  find_package(nlohmann_json 3 CONFIG QUIET)
  if(NOT TARGET nlohmann_json::nlohmann_json)
    message(STATUS "longspan: nlohmann-json is not installed, so compare is built without --against")
  endif()
endif()
