# Runs `program`: it must end with status 0 and print what matches `expected`. (ctest, given an expression to look for, no
# longer looks at the status.)
execute_process(COMMAND ${program} RESULT_VARIABLE status OUTPUT_VARIABLE printed)
message("${printed}")
if(NOT status EQUAL 0)
  message(FATAL_ERROR "${program} ended with status ${status}")
elseif(NOT printed MATCHES "${expected}")
  message(FATAL_ERROR "${program} did not print what matches \"${expected}\"")
endif()
