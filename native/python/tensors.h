// What the bindings ask Python's tensors themselves, by their attributes: nothing here links to PyTorch.
//
// A small layer's kernel takes a microsecond; the same questions asked from Python cost three.
#pragma once

#include <nanobind/nanobind.h>

#include <stdexcept>
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

// The tensors of a module's dictionary and how often each was changed in place, at one moment.
class Snapshot {
  public:
    explicit Snapshot(nb::dict tensors) {
        for (auto [name, tensor] : tensors) {
            // A tensor made in inference mode counts no changes.
            const bool counted = !tensor.is_none() && !nb::cast<bool>(tensor.attr("is_inference")());
            held_.push_back({nb::borrow(tensor), counted ? version(tensor.ptr()) : -1});
        }
    }

    // Whether the dictionary still holds these, unchanged.
    bool holds(nb::dict tensors) const {
        if (tensors.size() != held_.size()) return false;
        Py_ssize_t place = 0;
        PyObject *name = nullptr, *tensor = nullptr;
        for (const Held& each : held_) {
            PyDict_Next(tensors.ptr(), &place, &name, &tensor);
            if (tensor != each.tensor.ptr() || (each.version >= 0 && version(tensor) != each.version)) return false;
        }
        return true;
    }

  private:
    struct Held {
        nb::object tensor;
        int64_t version;
    };
    static int64_t version(PyObject* tensor) {
        static PyObject* const name = interned("_version");
        return nb::cast<int64_t>(checked(PyObject_GetAttr(tensor, name)));
    }
    std::vector<Held> held_;
};

inline uintptr_t address_of(nb::handle tensor) {
    static PyObject* const name = interned("data_ptr");
    return nb::cast<uintptr_t>(checked(PyObject_CallMethodNoArgs(tensor.ptr(), name)));
}

// float32 and bfloat16 as torch's objects, in the order of Type.
inline Type type_of(nb::handle dtype) {
    static const nb::handle torch = nb::module_::import_("torch").release();
    static const nb::handle known[] = {nb::object(torch.attr("float32")).release(),
                                       nb::object(torch.attr("bfloat16")).release()};
    for (int i = 0; i < 2; ++i)
        if (dtype.is(known[i])) return static_cast<Type>(i);
    throw std::invalid_argument("the kernels take and give float32 and bfloat16");
}

// Siblings::run on a tensor [..., k] on the CPU; a tensor [..., n] in `dtype` of each matrix.
inline nb::list call(const Siblings& layers, nb::handle x, nb::handle dtype, int threads) {
    static PyObject *const shape_of = interned("shape"), *const dtype_of = interned("dtype"),
                           *const contiguous = interned("contiguous"), *const new_empty = interned("new_empty"),
                           *const keywords = Py_BuildValue("(s)", "dtype");
    const nb::object given = checked(PyObject_GetAttr(x.ptr(), dtype_of));
    const nb::object dense = checked(PyObject_CallMethodNoArgs(x.ptr(), contiguous));
    const Type in_type = type_of(given), out_type = type_of(dtype);
    const auto shape = nb::cast<nb::tuple>(checked(PyObject_GetAttr(x.ptr(), shape_of)));
    if (shape.size() == 0 || nb::cast<int64_t>(shape[shape.size() - 1]) != layers.weights[0]->k())
        throw std::invalid_argument("the last dimension of the input is not the columns of the weights");
    const size_t last = shape.size() - 1;
    int64_t rows = 1;
    std::vector<PyObject*> arguments{x.ptr()};
    for (size_t i = 0; i < last; ++i) {
        arguments.push_back(PyTuple_GET_ITEM(shape.ptr(), i));
        rows *= nb::cast<int64_t>(shape[i]);
    }
    arguments.resize(last + 2);
    arguments.push_back(dtype.ptr());
    nb::list outs;
    std::vector<void*> addresses;
    for (const PackedWeights* each : layers.weights) {
        const nb::object width = nb::int_(each->n());
        arguments[last + 1] = width.ptr();
        // Sizes one by one and no dtype where it need not be: torch takes half a microsecond longer to read the others.
        const nb::object out = checked(PyObject_VectorcallMethod(new_empty, arguments.data(), last + 2,
                                                                 dtype.is(given) ? nullptr : keywords));
        addresses.push_back(reinterpret_cast<void*>(address_of(out)));
        outs.append(out);
    }
    const auto input = reinterpret_cast<const void*>(address_of(dense));
    nb::gil_scoped_release release;
    layers.run(input, in_type, rows, addresses, out_type, threads);
    return outs;
}

}  // namespace bellbox
