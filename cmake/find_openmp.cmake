# find_package(OpenMP), which on macOS does not look where Homebrew keeps libomp. Also run by the installed
# package.
if(APPLE AND NOT OpenMP_ROOT)
  execute_process(COMMAND brew --prefix libomp OUTPUT_VARIABLE OpenMP_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
find_package(OpenMP QUIET COMPONENTS CXX)
