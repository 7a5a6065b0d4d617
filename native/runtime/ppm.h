// Pictures in the plain formats P5 (grey) and P6 (colours) of Netpbm, of at most 8 bits.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/error.h"

namespace bellbox {

struct Picture {
    int64_t width = 0, height = 0, channels = 0;
    std::vector<float> values;  // [height, width, channels], 0 to 1
};

class PictureReader {
  public:
    PictureReader(std::string_view file, const std::string& what) : rest_(file), what_(what) {}

    Picture read() {
        Picture picture;
        if (rest_.size() < 2 || rest_[0] != 'P' || (rest_[1] != '5' && rest_[1] != '6')) refuse("is no picture in PPM or PGM (P6 or P5)");
        picture.channels = rest_[1] == '6' ? 3 : 1;
        rest_.remove_prefix(2);
        picture.width = number(1 << 14), picture.height = number(1 << 14);
        const int64_t most = number(255), count = picture.width * picture.height * picture.channels;
        if (rest_.empty() || !is_blank(rest_[0])) refuse("has no pixels behind its header");
        rest_.remove_prefix(1);
        if (rest_.size() < static_cast<size_t>(count)) refuse("is cut short: " + std::to_string(rest_.size()) + " of " + std::to_string(count) + " bytes of pixels");
        for (int64_t i = 0; i < count; ++i) {
            const auto byte = static_cast<unsigned char>(rest_[static_cast<size_t>(i)]);
            if (byte > most) refuse("has a pixel above " + std::to_string(most));
            picture.values.push_back(static_cast<float>(byte) / static_cast<float>(most));
        }
        return picture;
    }

  private:
    static bool is_blank(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
    [[noreturn]] void refuse(const std::string& why) const { throw Error(what_ + ": " + why); }

    // The next number of the header, behind blanks and comments: 1 to `most`.
    int64_t number(int64_t most) {
        while (!rest_.empty() && (is_blank(rest_[0]) || rest_[0] == '#'))
            rest_.remove_prefix(rest_[0] == '#' ? std::min(rest_.find('\n'), rest_.size()) : 1);
        int64_t value = 0;
        size_t digits = 0;
        for (; digits < rest_.size() && rest_[digits] >= '0' && rest_[digits] <= '9'; ++digits)
            if ((value = 10 * value + (rest_[digits] - '0')) > most) refuse("has a number above " + std::to_string(most) + " in its header");
        if (value < 1) refuse("has no number where its header needs one");
        rest_.remove_prefix(digits);
        return value;
    }

    std::string_view rest_;
    std::string what_;
};

}  // namespace bellbox
