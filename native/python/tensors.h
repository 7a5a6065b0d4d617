// Python's tensors as the kernels see them: their claims are checked here, whoever calls. Nothing here links to PyTorch.
//
// A small layer's kernel takes a microsecond; the same questions asked from Python cost three.
#pragma once

#include <nanobind/nanobind.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "layers/layer.h"

namespace bellbox {

namespace nb = nanobind;

// A name to look up; made once and never freed: the interpreter may be gone before this module is.
inline PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

inline nb::object checked(PyObject* made) {
    if (made == nullptr) throw nb::python_error();
    return nb::steal(made);
}

inline nb::object attribute(nb::handle of, PyObject* name) { return checked(PyObject_GetAttr(of.ptr(), name)); }

// A method without arguments. As PyObject_CallMethodNoArgs, which is not of Python's stable interface.
inline nb::object call_method(nb::handle of, PyObject* name) {
    PyObject* const self = of.ptr();
    return checked(PyObject_VectorcallMethod(name, &self, 1, nullptr));
}

inline uintptr_t address_of(nb::handle tensor) {
    static PyObject* const name = interned("data_ptr");
    return nb::cast<uintptr_t>(call_method(tensor, name));
}

enum class Kind { f32, bf16, f16, f64, u8, i8, i16, i32, i64 };

inline const nb::handle* torch_dtypes() {
    static const nb::handle* const known = [] {
        const nb::object torch = nb::module_::import_("torch");
        static nb::handle all[9];
        const char* names[] = {"float32", "bfloat16", "float16", "float64", "uint8", "int8", "int16", "int32", "int64"};
        for (int i = 0; i < 9; ++i) all[i] = nb::object(torch.attr(names[i])).release();
        return all;
    }();
    return known;
}

inline bool is_tensor(nb::handle value) {
    static PyTypeObject* const type =
        reinterpret_cast<PyTypeObject*>(nb::object(nb::module_::import_("torch").attr("Tensor")).release().ptr());
    return PyObject_TypeCheck(value.ptr(), type) != 0;
}

inline bool truth(nb::handle of, PyObject* name) { return attribute(of, name).is(nb::handle(Py_True)); }

[[noreturn]] inline void refuse(const std::string& what) { throw std::invalid_argument(what); }

// The dtype of a tensor, where it is one of those.
inline Kind kind_of(nb::handle tensor, const char* what, std::initializer_list<Kind> wanted) {
    if (!is_tensor(tensor)) refuse(std::string(what) + " is no tensor");
    static PyObject* const name = interned("dtype");
    const nb::object dtype = attribute(tensor, name);
    for (const Kind kind : wanted)
        if (dtype.is(torch_dtypes()[static_cast<int>(kind)])) return kind;
    refuse(std::string(what) + " has a dtype that the kernels do not take: " + nb::repr(dtype).c_str());
}

inline int64_t numel_of(nb::handle tensor) {
    if (!is_tensor(tensor)) refuse("what should be a tensor is none");
    static PyObject* const name = interned("numel");
    return nb::cast<int64_t>(call_method(tensor, name));
}

// The address of a contiguous tensor on the CPU of one of these dtypes, with at least so many numbers.
template <typename T = void>
T* read(nb::handle tensor, const char* what, std::initializer_list<Kind> kinds, int64_t least) {
    static PyObject *const is_cpu = interned("is_cpu"), *const is_contiguous = interned("is_contiguous");
    if (!is_tensor(tensor)) refuse(std::string(what) + " is no tensor");
    if (!truth(tensor, is_cpu)) refuse(std::string(what) + " is not on the CPU");
    kind_of(tensor, what, kinds);
    if (!call_method(tensor, is_contiguous).is(nb::handle(Py_True)))
        refuse(std::string(what) + " is not contiguous");
    const int64_t numel = numel_of(tensor);
    if (numel < least)
        refuse(std::string(what) + " has " + std::to_string(numel) + " numbers, " + std::to_string(least) + " are needed");
    const uintptr_t address = address_of(tensor);
    if (address == 0 && numel > 0) refuse(std::string(what) + " has no memory");
    return reinterpret_cast<T*>(address);
}

template <typename T>
T* read_or_null(nb::handle tensor, const char* what, std::initializer_list<Kind> kinds, int64_t least) {
    return tensor.is_none() ? nullptr : read<T>(tensor, what, kinds, least);
}

// float32 and bfloat16 as torch's objects, in the order of Type.
inline Type type_of(nb::handle dtype) {
    for (int i = 0; i < 2; ++i)
        if (dtype.is(torch_dtypes()[i])) return static_cast<Type>(i);
    refuse("the kernels take and give float32 and bfloat16");
}

inline Type type_of_tensor(nb::handle tensor, const char* what) {
    return kind_of(tensor, what, {Kind::f32, Kind::bf16}) == Kind::f32 ? Type::f32 : Type::bf16;
}

inline void require(bool holds, const std::string& what) {
    if (!holds) refuse(what);
}

// Of floats, or of kept bytes, which are rotated already.
inline Type type_of_input(nb::handle tensor, int64_t block) {
    if (kind_of(tensor, "x", {Kind::f32, Kind::bf16, Kind::i8}) != Kind::i8) return type_of_tensor(tensor, "x");
    require(block == 1, "kept bytes go with block 1");
    return Type::kept;
}

inline bool power_of_two(int64_t value) { return value >= 1 && (value & (value - 1)) == 0; }

// Sizes of a product that is counted in bytes later: none is so large that such a count could overflow.
inline void require_sizes(std::initializer_list<int64_t> sizes) {
    __extension__ typedef __int128 wide;
    wide product = 64;
    for (const int64_t size : sizes) {
        if (size < 0) refuse("a size is negative");
        product *= size > 0 ? size : 1;
        if (product > (wide{1} << 62)) refuse("sizes are beyond any memory");
    }
}

// An input [..., k] of a layer.
struct Input {
    nb::object dense, dtype;
    nb::tuple shape;
    Type type;
    int64_t rows = 1;
    const void* data;

    Input(nb::handle x, int64_t k) {
        static PyObject *const shape_of = interned("shape"), *const dtype_of = interned("dtype"),
                               *const contiguous = interned("contiguous"), *const is_cpu = interned("is_cpu");
        if (!is_tensor(x)) refuse("the input is no tensor");
        if (!truth(x, is_cpu)) refuse("the input is not on the CPU");
        dtype = attribute(x, dtype_of);
        dense = call_method(x, contiguous);
        type = type_of(dtype);
        shape = nb::cast<nb::tuple>(attribute(x, shape_of));
        if (shape.size() == 0 || nb::cast<int64_t>(shape[shape.size() - 1]) != k)
            refuse("the last dimension of the input is not the columns of the weights");
        for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= nb::cast<int64_t>(shape[i]);
        data = reinterpret_cast<const void*>(address_of(dense));
    }

    // A new tensor [..., width] beside x.
    nb::object like(nb::handle x, int64_t width, nb::handle wanted) const {
        static PyObject *const new_empty = interned("new_empty"), *const keywords = Py_BuildValue("(s)", "dtype");
        const size_t last = shape.size() - 1;
        const nb::object columns = nb::int_(width);
        PyObject* arguments[16];
        if (last + 3 > 16) refuse("the input has more than 12 dimensions");
        arguments[0] = x.ptr();
        for (size_t i = 0; i < last; ++i) arguments[1 + i] = PyTuple_GetItem(shape.ptr(), static_cast<Py_ssize_t>(i));
        arguments[1 + last] = columns.ptr(), arguments[2 + last] = wanted.ptr();
        // Sizes one by one and no dtype where it need not be: torch takes half a microsecond longer to read the others.
        return checked(PyObject_VectorcallMethod(new_empty, arguments, last + 2, wanted.is(dtype) ? nullptr : keywords));
    }
};

}  // namespace bellbox
