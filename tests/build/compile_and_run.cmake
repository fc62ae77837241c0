# Compiles SOURCE to PROGRAM with one command and, unless COMPILE_ONLY is set, runs it. FLAGS are given, or what PKG_CONFIG says of the package
# in PKG_CONFIG_PATH.
if(PKG_CONFIG)
  set(ENV{PKG_CONFIG_PATH} ${PKG_CONFIG_PATH})
  execute_process(COMMAND ${PKG_CONFIG} --cflags --libs longspan OUTPUT_VARIABLE FLAGS COMMAND_ERROR_IS_FATAL ANY)
endif()
separate_arguments(flags UNIX_COMMAND "${FLAGS}")
execute_process(COMMAND ${COMPILER} -std=c++20 ${flags} ${SOURCE} -o ${PROGRAM} COMMAND_ECHO STDOUT COMMAND_ERROR_IS_FATAL ANY)
if(NOT COMPILE_ONLY)
  execute_process(COMMAND ${PROGRAM} COMMAND_ERROR_IS_FATAL ANY)
endif()
