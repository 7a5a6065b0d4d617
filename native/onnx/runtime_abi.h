// The part of onnxruntime's C interface that a custom operator needs, in our own words.
//
// Its wheels bring no headers. The interface is a table of function pointers that only ever grows: the first 102 are
// those of its version 1, and its own source asserts that they stay where they are. Where its header is there
// (-DBELLBOX_ONNXRUNTIME_INCLUDE=folder), every place below is compared with it at compile time.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef BELLBOX_ONNXRUNTIME_HEADER
#include <onnxruntime_c_api.h>
#endif

namespace bellbox::runtime {

constexpr uint32_t kVersion = 16;  // the first whose kernels return a status
constexpr int kFloat = 1, kUint8 = 2, kInvalidArgument = 2;

// Places in the table.
enum Place : size_t {
    kCreateStatus = 0,
    kCreateCustomOpDomain = 26,
    kCustomOpDomainAdd = 27,
    kAddCustomOpDomain = 28,
    kGetTensorMutableData = 51,
    kGetDimensionsCount = 61,
    kGetDimensions = 62,
    kGetTensorShapeElementCount = 64,
    kGetTensorTypeAndShape = 65,
    kKernelInfoGetAttributeInt64 = 86,
    kKernelContextGetInput = 90,
    kKernelContextGetOutput = 91,
    kReleaseTensorTypeAndShapeInfo = 99,
};

struct Api {
    const void* places[102];
};
struct ApiBase {
    const Api* (*get_api)(uint32_t version);
    const char* (*version)();
};
using Status = void;  // null where all went well

template <typename... Arguments>
Status* call(const Api* api, Place place, Arguments... arguments) {
    return reinterpret_cast<Status* (*)(Arguments...)>(const_cast<void*>(api->places[place]))(arguments...);
}

// What describes an operator; callbacks that are null are not asked for.
struct CustomOp {
    uint32_t version;
    void* (*create_kernel)(const CustomOp*, const Api*, const void* info);
    const char* (*name)(const CustomOp*);
    const char* (*provider)(const CustomOp*);
    int (*input_type)(const CustomOp*, size_t);
    size_t (*input_count)(const CustomOp*);
    int (*output_type)(const CustomOp*, size_t);
    size_t (*output_count)(const CustomOp*);
    void (*compute)(void* kernel, void* context);
    void (*destroy)(void* kernel);
    int (*input_characteristic)(const CustomOp*, size_t);
    int (*output_characteristic)(const CustomOp*, size_t);
    int (*input_memory)(const CustomOp*, size_t);
    int (*variadic_input_least)(const CustomOp*);
    int (*variadic_input_alike)(const CustomOp*);
    int (*variadic_output_least)(const CustomOp*);
    int (*variadic_output_alike)(const CustomOp*);
    Status* (*create_kernel_v2)(const CustomOp*, const Api*, const void* info, void** kernel);
    Status* (*compute_v2)(void* kernel, void* context);
    const void* unused[16];  // what later versions have: shape inference, versions, aliases
};

#ifdef BELLBOX_ONNXRUNTIME_HEADER
#define BELLBOX_SAME(name, place) static_assert(offsetof(OrtApi, name) / sizeof(void*) == place, #name)
BELLBOX_SAME(CreateStatus, kCreateStatus);
BELLBOX_SAME(CreateCustomOpDomain, kCreateCustomOpDomain);
BELLBOX_SAME(CustomOpDomain_Add, kCustomOpDomainAdd);
BELLBOX_SAME(AddCustomOpDomain, kAddCustomOpDomain);
BELLBOX_SAME(GetTensorMutableData, kGetTensorMutableData);
BELLBOX_SAME(GetDimensionsCount, kGetDimensionsCount);
BELLBOX_SAME(GetDimensions, kGetDimensions);
BELLBOX_SAME(GetTensorShapeElementCount, kGetTensorShapeElementCount);
BELLBOX_SAME(GetTensorTypeAndShape, kGetTensorTypeAndShape);
BELLBOX_SAME(KernelInfoGetAttribute_int64, kKernelInfoGetAttributeInt64);
BELLBOX_SAME(KernelContext_GetInput, kKernelContextGetInput);
BELLBOX_SAME(KernelContext_GetOutput, kKernelContextGetOutput);
BELLBOX_SAME(ReleaseTensorTypeAndShapeInfo, kReleaseTensorTypeAndShapeInfo);
static_assert(offsetof(OrtCustomOp, KernelDestroy) == offsetof(CustomOp, destroy));
static_assert(offsetof(OrtCustomOp, KernelComputeV2) == offsetof(CustomOp, compute_v2));
#undef BELLBOX_SAME
#endif

}  // namespace bellbox::runtime
