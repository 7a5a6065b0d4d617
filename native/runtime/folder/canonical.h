// The canonical text of JSON values, of which a configuration's checksum is taken (docs/format.md, checksums).
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

#include "runtime/text/json.h"

namespace bellbox {

// The decimal after this one away from zero, as long: [-]d[.ddd]e+XX.
inline std::string next_decimal(std::string text) {
    const size_t mark = text.find('e');
    for (size_t i = mark; i-- > 0;) {
        if (text[i] < '0' || text[i] > '9') continue;  // a sign, or the point, which some locales write otherwise
        if (text[i] != '9') return ++text[i], text;
        text[i] = '0';
    }
    return text;  // all were nines: shorter digits were tried before
}

// [-]d[.ddd]e+XX: the shortest digits that read back. (std::to_chars is 170 KB of tables in a static program.) The nearest
// decimal of a length need not read back where another one does: above a power of two numbers lie half as dense as below.
inline std::string shortest(double value) {
    char digits[32];
    for (int places = 0;; ++places) {
        std::snprintf(digits, sizeof(digits), "%.*e", places, value);
        if (places == 16 || std::strtod(digits, nullptr) == value) return digits;
        const std::string next = next_decimal(digits);
        if (std::strtod(next.c_str(), nullptr) == value) return next;
    }
}

// As Python writes it.
inline void write_number(double value, std::string& out) {
    std::string text = shortest(value);
    if (text[0] == '-') out += '-', text.erase(0, 1);
    const size_t mark = text.find('e');
    const int exponent = std::stoi(text.substr(mark + 1));
    std::string figures = text.substr(0, 1) + (mark > 2 ? text.substr(2, mark - 2) : "");
    const int count = static_cast<int>(figures.size());
    if (exponent < -4 || exponent >= 16) {
        out += figures.substr(0, 1) + (count > 1 ? "." + figures.substr(1) : "") + (exponent < 0 ? "e-" : "e+");
        const std::string power = std::to_string(std::abs(exponent));
        out += power.size() < 2 ? "0" + power : power;
    } else if (exponent < 0) {
        out += "0." + std::string(static_cast<size_t>(-exponent - 1), '0') + figures;
    } else if (count <= exponent + 1) {
        out += figures + std::string(static_cast<size_t>(exponent + 1 - count), '0') + ".0";
    } else {
        out += figures.substr(0, static_cast<size_t>(exponent + 1)) + "." + figures.substr(static_cast<size_t>(exponent + 1));
    }
}

inline void write_canonical(const Json& value, std::string& out) {
    if (value.is_object()) {
        out += '{';
        bool first = true;
        for (const auto& [key, each] : value.items()) {  // in the order of UTF-8, which is that of the code points
            if (!first) out += ',';
            first = false;
            out += Json(key).dump(-1, ' ', true) + ":";
            write_canonical(each, out);
        }
        out += '}';
    } else if (value.is_array()) {
        out += '[';
        for (size_t i = 0; i < value.size(); ++i) {
            if (i > 0) out += ',';
            write_canonical(value[i], out);
        }
        out += ']';
    } else if (value.is_number_float()) {
        write_number(value.get<double>(), out);
    } else {
        out += value.dump(-1, ' ', true);
    }
}

inline std::string canonical(const Json& value) {
    std::string out;
    write_canonical(value, out);
    return out;
}

}  // namespace bellbox
