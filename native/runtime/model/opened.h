// A packed folder, checked and laid out for the kernels.
#pragma once

#include <algorithm>
#include <optional>
#include <string>

#include "runtime/folder/mapped.h"
#include "runtime/model/language.h"
#include "runtime/model/vision.h"
#include "runtime/sha256.h"

namespace bellbox {

// Of a mapped file, whose pages may leave memory again as it goes.
inline std::string sha256_of(const Mapped& file) {
    constexpr size_t kSlab = size_t{1} << 20;
    Sha256 sum;
    for (size_t begin = 0; begin < file.bytes().size(); begin += kSlab) {
        const std::string_view some = file.bytes().substr(begin, kSlab);
        sum.add(some), file.forget(some);
    }
    return sum.digest();
}

struct Opened {
    std::optional<Language> language;
    std::optional<Vision> vision;

    explicit Opened(const std::string& folder) {
        const std::string config_path = folder + "/config.json", path = folder + "/model.safetensors";
        const Mapped config(config_path);
        const Description described = read_description(config.bytes(), config_path);
        for (const auto& [name, file] : described.files) {
            const Mapped content(folder + "/" + name);
            if (content.bytes().size() != file.bytes || sha256_of(content) != file.sha256)
                throw Error(folder + "/" + name + ": damaged, its size or checksum does not match; save the model again");
        }
        const Mapped content(path);
        Store store(content, path);
        if (described.language) language.emplace(described, store, config_path);
        else vision.emplace(described, store, config_path);
        store.done();
    }
    const Language& text() const {
        if (!language) throw Error("it is a model of images; give it an image");
        return *language;
    }
    const Vision& images() const {
        if (!vision) throw Error("it is a model of text; give it a prompt");
        return *vision;
    }
};

}  // namespace bellbox
