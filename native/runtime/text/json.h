// JSON of a file, read by a library and asked for by kind: what is missing or of another kind is one line.
#pragma once

#include <cmath>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "runtime/error.h"

namespace bellbox {

using Json = nlohmann::json;

constexpr size_t kMostJson = size_t{64} << 20;  // bytes
constexpr int kDeepestJson = 100;               // what goes over values does so by recursion

// Whether brackets outside of strings go deeper than that.
inline bool is_deep(std::string_view text) {
    int depth = 0;
    bool inside = false;
    for (size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (inside && c == '\\') ++i;
        else if (c == '"') inside = !inside;
        else if (!inside && (c == '[' || c == '{') && ++depth > kDeepestJson) return true;
        else if (!inside && (c == ']' || c == '}')) --depth;
    }
    return false;
}

inline Json parse_json(std::string_view text, const std::string& what) {
    if (text.size() > kMostJson) throw Error(what + ": is " + std::to_string(text.size()) + " bytes of JSON; at most " + std::to_string(kMostJson) + " are read");
    if (is_deep(text)) throw Error(what + ": nests JSON deeper than " + std::to_string(kDeepestJson) + " levels");
    Json parsed = Json::parse(text.begin(), text.end(), nullptr, false);
    if (parsed.is_discarded()) throw Error(what + ": is no JSON that can be read");
    return parsed;
}

// A member; null where it is missing.
inline const Json& member(const Json& object, const char* name) {
    static const Json none;
    const auto found = object.is_object() ? object.find(name) : object.end();
    return found == object.end() ? none : *found;
}

inline std::string text_or(const Json& object, const char* name, const std::string& otherwise) {
    const Json& value = member(object, name);
    return value.is_string() ? value.get<std::string>() : otherwise;
}

inline bool flag_or(const Json& object, const char* name, bool otherwise) {
    const Json& value = member(object, name);
    return value.is_boolean() ? value.get<bool>() : otherwise;
}

}  // namespace bellbox
