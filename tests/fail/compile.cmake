# Compiles SOURCE with COMPILER and judges the result: see CMakeLists.txt beside.
file(STRINGS ${SOURCE} lines LIMIT_COUNT 2)
list(GET lines 0 first_line)
list(GET lines 1 second_line)
set(standard -std=c++20)
if(second_line MATCHES "^// with (.+)$")
  set(standard ${CMAKE_MATCH_1})
endif()
string(REPLACE "|" ";-isystem;" includes "-isystem;${INCLUDES}")

# NO_CARET leaves out the source lines that compilers quote: the sentence must stand in a message, not in the code
# that the message is about.
execute_process(
  COMMAND ${COMPILER} ${standard} -fsyntax-only ${NO_CARET} ${includes} ${SOURCE}
  RESULT_VARIABLE result
  OUTPUT_VARIABLE output
  ERROR_VARIABLE output)

if(NOT first_line MATCHES "^// expect: (.+)$")
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${SOURCE} must compile, and the compiler says:\n${output}")
  endif()
  return()
endif()
set(expected "${CMAKE_MATCH_1}")
if(result EQUAL 0)
  message(FATAL_ERROR "${SOURCE} must not compile, and does")
endif()
if(NOT output MATCHES "error: " OR NOT output MATCHES "${expected}")
  message(FATAL_ERROR "${SOURCE} must be refused with \"${expected}\", and the compiler says:\n${output}")
endif()
# Without C++20 thousands of errors may follow the one that says so.
string(REGEX MATCHALL "\n" line_ends "${output}")
list(LENGTH line_ends lines_of_output)
if(NOT standard STREQUAL "-std=c++20" AND lines_of_output GREATER 40)
  message(FATAL_ERROR "${SOURCE} must be refused in at most 40 lines, and the compiler says ${lines_of_output}")
endif()
