// What a folder, a flag or a prompt is refused with: one line that names the thing, the limit and the way out.
#pragma once

#include <stdexcept>
#include <string>

namespace bellbox {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A string of a file, as a message shows it: on one line, at most 100 bytes.
inline std::string shown(const std::string& text) {
    std::string out = "'";
    for (const char c : text.substr(0, 100)) out += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? ' ' : c;
    return out + (text.size() > 100 ? "...'" : "'");
}

}  // namespace bellbox
