// UTF-8, one character at a time. Bytes that are none are taken as Rust's from_utf8_lossy takes them (and the WHATWG): the
// longest beginning of a character counts as one.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace bellbox {

struct Character {
    uint32_t code;    // U+FFFD where the bytes are no character
    uint32_t length;  // in bytes, at least 1
    bool valid;
};

inline Character character_at(std::string_view text, size_t at) {
    const auto byte = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
    const uint32_t first = byte(at);
    if (first < 0x80) return {first, 1, true};
    if (first < 0xc2 || first > 0xf4) return {0xfffd, 1, false};
    const uint32_t length = first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
    // The second byte's range keeps out overlong forms, surrogates, and what lies beyond U+10FFFF.
    const uint32_t low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80, high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
    uint32_t code = first & (0xffu >> (length + 1));
    for (uint32_t i = 1; i < length; ++i) {
        const uint32_t next = byte(at + i);
        if (next < (i == 1 ? low : 0x80u) || next > (i == 1 ? high : 0xbfu)) return {0xfffd, i, false};
        code = code << 6 | (next & 0x3f);
    }
    return {code, length, true};
}

inline bool is_utf8(std::string_view text) {
    for (size_t at = 0; at < text.size();) {
        const Character c = character_at(text, at);
        if (!c.valid) return false;
        at += c.length;
    }
    return true;
}

constexpr std::string_view kReplacement = "\xef\xbf\xbd";

// The text with U+FFFD in place of what is no UTF-8.
inline std::string lossy(std::string_view bytes) {
    std::string out;
    out.reserve(bytes.size());
    for (size_t at = 0; at < bytes.size();) {
        const Character c = character_at(bytes, at);
        out += c.valid ? bytes.substr(at, c.length) : kReplacement;
        at += c.length;
    }
    return out;
}

inline void append_utf8(std::string& out, uint32_t code) {
    const auto put = [&](uint32_t byte) { out += static_cast<char>(byte); };
    if (code < 0x80) return put(code);
    if (code < 0x800) return put(0xc0 | code >> 6), put(0x80 | (code & 0x3f));
    if (code < 0x10000) return put(0xe0 | code >> 12), put(0x80 | (code >> 6 & 0x3f)), put(0x80 | (code & 0x3f));
    put(0xf0 | code >> 18), put(0x80 | (code >> 12 & 0x3f)), put(0x80 | (code >> 6 & 0x3f)), put(0x80 | (code & 0x3f));
}

}  // namespace bellbox
