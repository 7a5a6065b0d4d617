# bellbox.js and bellbox.wasm: libbellbox for a browser's worker (`make web`; docs/device.md).
#
# The exceptions are WebAssembly's own, which browsers have for as long as SIMD. Nothing is evaluated as a program
# (DYNAMIC_EXECUTION), so that a page's policy may forbid it.

# A header of the machine's, by itself: beside it in /usr/include lie those of another C library.
find_path(BELLBOX_JSON nlohmann/json.hpp PATHS /usr/include /usr/local/include NO_CMAKE_FIND_ROOT_PATH REQUIRED)
file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/include)
file(CREATE_LINK ${BELLBOX_JSON}/nlohmann ${CMAKE_BINARY_DIR}/include/nlohmann SYMBOLIC)

add_executable(bellbox_web native/web/web.cpp native/runtime/api.cpp native/dispatch.cpp ${BELLBOX_OBJECTS})
set_target_properties(bellbox_web PROPERTIES OUTPUT_NAME bellbox SUFFIX .js)
target_include_directories(bellbox_web PRIVATE native/include SYSTEM ${CMAKE_BINARY_DIR}/include)
target_compile_options(bellbox_web PRIVATE ${BELLBOX_FLAGS} -Os)
target_link_options(bellbox_web PRIVATE -O2 -sMODULARIZE -sEXPORT_NAME=createBellbox -sENVIRONMENT=worker,node -sALLOW_MEMORY_GROWTH
  -sDYNAMIC_EXECUTION=0 -sFORCE_FILESYSTEM -sEXPORTED_FUNCTIONS=_malloc,_free -sEXPORTED_RUNTIME_METHODS=FS -sINCOMING_MODULE_JS_API=[])
