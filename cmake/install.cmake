# Headers, a CMake package and a pkg-config file. All of it may be moved as a whole after it was installed.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_DATADIR}/cmake/longspan)
install(TARGETS longspan EXPORT longspanTargets FILE_SET HEADERS)
install(EXPORT longspanTargets NAMESPACE longspan:: DESTINATION ${package_dir})

configure_package_config_file(cmake/longspanConfig.cmake.in longspanConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(longspanConfigVersion.cmake COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES ${PROJECT_BINARY_DIR}/longspanConfig.cmake ${PROJECT_BINARY_DIR}/longspanConfigVersion.cmake
              ${PROJECT_SOURCE_DIR}/cmake/find_openmp.cmake
        DESTINATION ${package_dir})

set(pkgconfig_dir ${CMAKE_INSTALL_DATADIR}/pkgconfig)
cmake_path(RELATIVE_PATH CMAKE_INSTALL_PREFIX BASE_DIRECTORY ${CMAKE_INSTALL_FULL_DATADIR}/pkgconfig
           OUTPUT_VARIABLE prefix_from_pkgconfig)
cmake_path(ABSOLUTE_PATH CMAKE_INSTALL_INCLUDEDIR BASE_DIRECTORY [[${prefix}]] OUTPUT_VARIABLE pkgconfig_includedir)
if(TARGET OpenMP::OpenMP_CXX AND LONGSPAN_USE_OPENMP)
  set(pkgconfig_openmp ${OpenMP_CXX_FLAGS})
endif()
configure_file(cmake/longspan.pc.in longspan.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/longspan.pc DESTINATION ${pkgconfig_dir})
