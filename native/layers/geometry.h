// The geometry of a convolution, and which places of its windows lie outside the image.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace bellbox {

struct ConvGeometry {
    int64_t height, width, channels;      // of the input
    int64_t rows, columns;                // of the output
    int64_t kernel_height, kernel_width, stride_y, stride_x, dilation_y, dilation_x;
    int64_t left, top;                    // padding; what lies right and below follows from the output's size
    bool padded;                          // whether any patch reaches beyond the image

    int64_t patch() const { return kernel_height * kernel_width * channels; }
};

// Which places of a window's line (or column) lie inside, for the output line (or column) `at`.
inline std::vector<bool> inside_of(int64_t at, int64_t kernel, int64_t stride, int64_t dilation, int64_t before, int64_t size) {
    std::vector<bool> inside;
    for (int64_t k = 0; k < kernel; ++k) {
        const int64_t place = at * stride - before + k * dilation;
        inside.push_back(place >= 0 && place < size);
    }
    return inside;
}

// The borders that windows have: sets of places inside the image, each that of some output pixels.
class Borders {
  public:
    std::vector<int32_t> of_pixel;        // [rows * columns]

    explicit Borders(const ConvGeometry& w) {
        std::vector<int32_t> of_line, of_column;
        for (int64_t y = 0; y < w.rows; ++y)
            of_line.push_back(number(inside_of(y, w.kernel_height, w.stride_y, w.dilation_y, w.top, w.height), lines_));
        for (int64_t x = 0; x < w.columns; ++x)
            of_column.push_back(number(inside_of(x, w.kernel_width, w.stride_x, w.dilation_x, w.left, w.width), columns_));
        of_pixel.reserve(of_line.size() * of_column.size());
        for (const int32_t line : of_line)
            for (const int32_t column : of_column) of_pixel.push_back(line * static_cast<int32_t>(columns_.size()) + column);
    }
    int64_t count() const { return static_cast<int64_t>(lines_.size() * columns_.size()); }

    // Adds what belongs to the places inside of a border, [places, n], to sums [n].
    void add_inside(int64_t border, const int32_t* by_place, int64_t n, int32_t* sums) const {
        const auto& lines = lines_[static_cast<size_t>(border) / columns_.size()];
        const auto& columns = columns_[static_cast<size_t>(border) % columns_.size()];
        for (const bool line : lines)
            for (const bool column : columns) {
                for (int64_t i = 0; line && column && i < n; ++i) sums[i] += by_place[i];
                by_place += n;
            }
    }
    int64_t places_inside(int64_t border) const {
        const auto& lines = lines_[static_cast<size_t>(border) / columns_.size()];
        const auto& columns = columns_[static_cast<size_t>(border) % columns_.size()];
        return std::count(lines.begin(), lines.end(), true) * std::count(columns.begin(), columns.end(), true);
    }

  private:
    static int32_t number(std::vector<bool> inside, std::vector<std::vector<bool>>& known) {
        const auto found = std::find(known.begin(), known.end(), inside);
        if (found == known.end()) return known.push_back(std::move(inside)), static_cast<int32_t>(known.size()) - 1;
        return static_cast<int32_t>(found - known.begin());
    }
    std::vector<std::vector<bool>> lines_, columns_;
};

}  // namespace bellbox
