// A safetensors file: 8 bytes of the header's length, a JSON header, numbers.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/folder/fields.h"

namespace bellbox {

enum class Number { u8, i8, bf16, f16, f32, f64, i64 };
inline int64_t bytes_of(Number number) {
    return number == Number::u8 || number == Number::i8 ? 1 : number == Number::bf16 || number == Number::f16 ? 2 : number == Number::f32 ? 4 : 8;
}

struct StoredTensor {
    Number number = Number::u8;
    std::vector<int64_t> shape;
    std::string_view bytes;

    int64_t count() const {
        int64_t all = 1;
        for (const int64_t size : shape) all *= size;
        return all;
    }
};

constexpr uint64_t kHeaderLimit = kMostJson;

inline std::map<std::string, StoredTensor> read_tensors(std::string_view file, const std::string& path) {
    uint64_t length = 0;
    if (file.size() < 8) throw Error(path + ": damaged, has no header");
    for (int i = 7; i >= 0; --i) length = length << 8 | static_cast<unsigned char>(file[static_cast<size_t>(i)]);
    if (length > kHeaderLimit || length > file.size() - 8)
        throw Error(path + ": damaged, claims a header of " + std::to_string(length) + " bytes");
    const std::string_view data = file.substr(8 + length);
    const Json header = parse_json(file.substr(8, length), path);
    if (!header.is_object()) throw Error(path + ": damaged, its header is no object");
    static const std::map<std::string, Number> kinds = {{"U8", Number::u8},   {"I8", Number::i8},   {"BF16", Number::bf16},
                                                        {"F16", Number::f16}, {"F32", Number::f32}, {"F64", Number::f64},
                                                        {"I64", Number::i64}};
    std::map<std::string, StoredTensor> found;
    std::map<uint64_t, uint64_t> ends;  // by where tensors begin; those of no bytes do not count
    for (const auto& [name, entry] : header.items()) {
        if (name == "__metadata__") continue;
        Fields fields(entry, path + ": tensor " + shown(name));
        StoredTensor tensor;
        const auto kind = kinds.find(fields.text("dtype"));
        if (kind == kinds.end()) fields.refuse("dtype", "is not supported");
        tensor.number = kind->second;
        const Json &shape = fields.any("shape"), &offsets = fields.any("data_offsets");
        if (!shape.is_array() || !offsets.is_array() || offsets.size() != 2) fields.refuse("shape", "is no list of sizes");
        fields.done();
        uint64_t bytes = static_cast<uint64_t>(bytes_of(tensor.number));
        for (const Json& size : shape) {
            if (!size.is_number_unsigned() || size.get<uint64_t>() > data.size() || (size != 0 && bytes > data.size() / size.get<uint64_t>()))
                fields.refuse("shape", "is larger than the file");
            bytes *= size.get<uint64_t>(), tensor.shape.push_back(size.get<int64_t>());
        }
        if (!offsets[0].is_number_unsigned() || !offsets[1].is_number_unsigned()) fields.refuse("data_offsets", "are no numbers");
        const uint64_t begin = offsets[0].get<uint64_t>(), end = offsets[1].get<uint64_t>();
        if (begin > end || end > data.size() || end - begin != bytes) fields.refuse("data_offsets", "do not fit its shape and the file");
        tensor.bytes = data.substr(begin, bytes);
        if (bytes > 0 && !ends.emplace(begin, end).second) fields.refuse("data_offsets", "are those of another tensor");
        found[name] = std::move(tensor);
    }
    uint64_t reached = 0;
    for (const auto& [begin, end] : ends) {
        if (begin != reached) throw Error(path + ": damaged, its tensors do not follow one another");
        reached = end;
    }
    if (reached != data.size()) throw Error(path + ": damaged, its tensors are not all of its bytes");
    return found;
}

}  // namespace bellbox
