// Text into the pieces that are tokenized each by itself: the regular expressions of GPT-2 and of those after it.
#pragma once

#include <algorithm>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/error.h"
#include "runtime/text/unicode_tables.h"
#include "runtime/text/utf8.h"

namespace bellbox {

enum class Kind : uint8_t { letter, number, space, line, other };

template <size_t kCount>
bool in_runs(const Run (&runs)[kCount], uint32_t code) {
    const Run* const after = std::upper_bound(std::begin(runs), std::end(runs), code, [](uint32_t c, const Run& r) { return c < r.first; });
    return after != std::begin(runs) && code <= (after - 1)->last;
}

inline Kind kind_of(uint32_t code) {
    if (code == '\r' || code == '\n') return Kind::line;
    if (in_runs(kSpaces, code)) return Kind::space;
    if (in_runs(kLetters, code)) return Kind::letter;
    return in_runs(kNumbers, code) ? Kind::number : Kind::other;
}

// What a pattern says of the choices below.
struct Pattern {
    std::string_view expression;
    bool any_case;          // contractions
    bool one_before_letters;  // any one character but a line's end, a letter or a number; else a blank
    int digits;             // of a number at most; 0: any, behind a blank
    bool lines;             // line ends go with what stands before them
};

constexpr Pattern kPatterns[] = {
    {R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)", false, false, 0, false},
    {R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)", true,
     true, 3, true},
    {R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)", true, true, 1,
     true},
};
constexpr const Pattern& kGpt2 = kPatterns[0];

inline const Pattern& pattern_of(const std::string& expression) {
    for (const Pattern& each : kPatterns)
        if (each.expression == expression) return each;
    throw Error("the tokenizer splits text by " + shown(expression) + ", which this program does not know; it knows those of GPT-2, "
                "Llama 3 and Qwen 2");
}

// Calls `each` with the pieces of a text, from left to right; together they are the text.
template <typename F>
void split_by(const Pattern& pattern, std::string_view text, const F& each) {
    struct Place {
        uint32_t code;
        Kind kind;
        size_t at;
    };
    std::vector<Place> places;
    places.reserve(text.size() + 1);
    for (size_t at = 0; at < text.size();) {
        const Character c = character_at(text, at);
        places.push_back({c.code, kind_of(c.code), at});
        at += c.length;
    }
    const size_t count = places.size();
    places.push_back({0, Kind::other, text.size()});
    const auto is = [&](size_t i, Kind kind) { return i < count && places[i].kind == kind; };
    const auto blank = [&](size_t i) { return i < count && (places[i].kind == Kind::space || places[i].kind == Kind::line); };
    const auto while_is = [&](size_t i, Kind kind) {
        while (is(i, kind)) ++i;
        return i;
    };
    // An apostrophe and what is written behind it: its end, or i.
    const auto contraction = [&](size_t i) {
        const auto letter = [&](size_t j) -> uint32_t {
            if (j >= count) return 0;
            const uint32_t c = places[j].code;
            if (!pattern.any_case) return c;
            return c == 0x17f ? 's' : c >= 'A' && c <= 'Z' ? c + 32 : c;  // the long s is an s of another case
        };
        if (places[i].code != '\'') return i;
        const uint32_t a = letter(i + 1), b = letter(i + 2);
        if (a == 's' || a == 't' || a == 'm' || a == 'd') return i + 2;
        if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return i + 3;
        return i;
    };
    const auto end_of = [&](size_t i) {
        if (const size_t end = contraction(i); end > i) return end;
        const bool space = places[i].code == ' ';
        const bool one = pattern.one_before_letters ? places[i].kind == Kind::space || places[i].kind == Kind::other : space;
        if (is(i, Kind::letter)) return while_is(i, Kind::letter);
        if (one && is(i + 1, Kind::letter)) return while_is(i + 1, Kind::letter);
        if (pattern.digits > 0) {
            size_t end = i;
            while (is(end, Kind::number) && end < i + static_cast<size_t>(pattern.digits)) ++end;
            if (end > i) return end;
        } else if (is(i, Kind::number) || (space && is(i + 1, Kind::number))) {
            return while_is(i + (is(i, Kind::number) ? 0 : 1), Kind::number);
        }
        if (is(i, Kind::other) || (space && is(i + 1, Kind::other))) {
            const size_t end = while_is(i + (is(i, Kind::other) ? 0 : 1), Kind::other);
            return pattern.lines ? while_is(end, Kind::line) : end;
        }
        size_t end = i;
        while (blank(end)) ++end;
        if (pattern.lines)
            for (size_t last = end; last > i; --last)
                if (places[last - 1].kind == Kind::line) return last;
        // All blanks but the last one, where something follows that may take it.
        return end < count && end - i > 1 ? end - 1 : end;
    };
    for (size_t i = 0; i < count;) {
        const size_t end = end_of(i);
        each(text.substr(places[i].at, places[end].at - places[i].at));
        i = end;
    }
}

}  // namespace bellbox
