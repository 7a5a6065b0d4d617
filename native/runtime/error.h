// What a folder, a flag or a prompt is refused with: one line that names the thing, the limit and the way out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>

namespace bellbox {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// How many numbers a vector is to hold: more than there are addresses for (2^32 in a browser) is no memory, not a smaller number.
inline size_t room_for(int64_t count) {
    if (count < 0 || static_cast<uint64_t>(count) > SIZE_MAX / 16) throw std::bad_alloc();
    return static_cast<size_t>(count);
}

// A string of a file, as a message shows it: on one line, at most 100 bytes.
inline std::string shown(const std::string& text) {
    std::string out = "'";
    for (const char c : text.substr(0, 100)) out += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? ' ' : c;
    return out + (text.size() > 100 ? "...'" : "'");
}

}  // namespace bellbox
