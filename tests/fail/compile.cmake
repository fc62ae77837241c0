# Compiles SOURCE with COMPILER and judges the result: see CMakeLists.txt beside.
file(STRINGS ${SOURCE} first_line LIMIT_COUNT 1)
string(REPLACE "|" ";-isystem;" includes "-isystem;${INCLUDES}")

# NO_CARET leaves out the source lines that compilers quote: the sentence must stand in a message, not in the code
# that the message is about.
execute_process(
  COMMAND ${COMPILER} -std=c++20 -fsyntax-only ${NO_CARET} ${includes} ${SOURCE}
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
