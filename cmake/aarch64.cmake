# For ARM from another machine: cmake -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64.cmake (Debian: g++-aarch64-linux-gnu, qemu-user).
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu)
# Programs are this machine's. Headers alone (nlohmann_json) may be; what is linked is not.
set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
# By name, so that static programs get the static one.
set(OpenMP_gomp_LIBRARY gomp CACHE STRING "")
set(OpenMP_pthread_LIBRARY pthread CACHE STRING "")
