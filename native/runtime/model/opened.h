// A packed folder, checked and laid out for the kernels.
#pragma once

#include <algorithm>
#include <deque>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "bellbox.h"
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
    std::vector<int> choices;  // bits of the widths that the folder has, the widest first; empty: one
    int bits;                  // of the one that it was read at; 0 where it has one

    Opened(const std::string& folder, const bellbox_choices& wanted) : bits(wanted.bits) {
        if (bits < 0) throw Error("a width of " + std::to_string(bits) + " bits; give one of the folder's, or 0 for its widest");
        try {
            kernels();
        } catch (const std::runtime_error& refused) {  // of BELLBOX_ISA, or of this processor
            throw Error(refused.what());
        }
        const std::string config_path = folder + "/config.json", path = folder + "/model.safetensors";
        const Mapped config(config_path);
        const Description described = read_description(config.bytes(), config_path, bits);
        const std::set<int> widths = described.widths();
        choices = described.choices;
        if (bits == 0 && !choices.empty()) bits = choices[0];
        for (const auto& [name, file] : described.files) {
            if (names_width(name) && !is_read(name, widths)) continue;  // it may be missing
            const Mapped content(folder + "/" + name);
            if (content.bytes().size() != file.bytes || sha256_of(content) != file.sha256)
                throw Error(folder + "/" + name + ": damaged, its size or checksum does not match; save the model again");
        }
        const Mapped content(path);
        Store store(content, path);
        std::deque<Mapped> more;
        for (const int width : widths) store.add_width(width, more.emplace_back(folder + "/" + file_of_width(width)), folder + "/" + file_of_width(width));
        if (described.language) language.emplace(described, store, config_path, wanted.embedding_bits);
        else if (wanted.embedding_bits != 0) throw Error(folder + ": a model of images has no embeddings to round");
        else vision.emplace(described, store, config_path);
        store.done();
    }
    static bool is_read(const std::string& file, const std::set<int>& widths) {
        return std::any_of(widths.begin(), widths.end(), [&](int width) { return file == file_of_width(width); });
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
