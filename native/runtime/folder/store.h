// What a folder's files of tensors hold, each taken once and by shape.
#pragma once

#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "runtime/folder/mapped.h"
#include "runtime/folder/tensors.h"

namespace bellbox {

using Floats = std::vector<float>;

inline float float_of_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float size = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
                       : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                        : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
    return bits >> 15 ? -size : size;
}
inline float float_of_bf16(uint16_t bits) {
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
}
inline float rounded_to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (!std::isfinite(value)) return value;
    return float_of_bf16(static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16));
}

class Store {
  public:
    Store(const Mapped& file, const std::string& path) : file_(file), path_(path), tensors_(read_tensors(file.bytes(), path)) {}

    // The file of a width (docs/format.md, several widths).
    void add_width(int bits, const Mapped& file, const std::string& path) { widths_[bits] = std::make_unique<Store>(file, path); }
    Store& width(int bits) { return *widths_.at(bits); }

    bool has(const std::string& name) const { return tensors_.count(name) != 0; }
    std::string_view bytes(const std::string& name, Number number, const std::vector<int64_t>& shape) { return take(name, shape, number, true).bytes; }
    // Of any floating type, as fp32.
    Floats floats(const std::string& name, const std::vector<int64_t>& shape, bool finite = false) {
        const StoredTensor tensor = take(name, shape, Number::f32, false);
        const size_t count = static_cast<size_t>(tensor.count());
        Floats out(count);
        const auto read = [&](size_t i, auto value) {
            std::memcpy(&value, tensor.bytes.data() + i * sizeof(value), sizeof(value));
            return value;
        };
        for (size_t i = 0; i < count; ++i) {
            switch (tensor.number) {
                case Number::f32: out[i] = read(i, 0.0f); break;
                case Number::f64: out[i] = static_cast<float>(read(i, 0.0)); break;
                case Number::bf16: out[i] = float_of_bf16(read(i, uint16_t{0})); break;
                case Number::f16: out[i] = float_of_half(read(i, uint16_t{0})); break;
                default: refuse(name, "is of no floating type");
            }
            if (finite && !std::isfinite(out[i])) refuse(name, "holds NaN or infinity");
        }
        return out;
    }
    Floats scales(const std::string& name, int64_t count) {
        bytes(name, Number::f32, {count});
        return floats(name, {count}, true);
    }
    // Passed over: a counter of training.
    void pass_counter(const std::string& name) { take(name, {}, Number::i64, true); }
    // The tensor that keeps others from loading codes as a plain model (docs/format.md).
    void pass_guard(const std::string& layer) {
        const auto found = tensors_.find(layer + ".weight");
        if (found != tensors_.end() && found->second.number == Number::u8 && found->second.shape == std::vector<int64_t>{0}) taken_.insert(found->first);
    }
    void done() const {
        for (const auto& [name, tensor] : tensors_)
            if (taken_.count(name) == 0) refuse(name, "is of nothing in the model");
        for (const auto& [bits, store] : widths_) store->done();
    }
    [[noreturn]] void refuse(const std::string& name, const std::string& why) const { throw Error(path_ + ": tensor " + shown(name) + " " + why); }

  private:
    const StoredTensor& take(const std::string& name, const std::vector<int64_t>& shape, Number number, bool exactly) {
        const auto found = tensors_.find(name);
        if (found == tensors_.end()) refuse(name, "is missing");
        if (found->second.shape != shape || (exactly && found->second.number != number)) refuse(name, "has another shape or type than the model");
        taken_.insert(name);
        file_.forget(last_);  // whoever asks for a tensor has done with the one before
        last_ = found->second.bytes;
        return found->second;
    }
    const Mapped& file_;
    std::string_view last_;
    std::string path_;
    std::map<std::string, StoredTensor> tensors_;
    std::set<std::string> taken_;
    std::map<int, std::unique_ptr<Store>> widths_;
};

}  // namespace bellbox
