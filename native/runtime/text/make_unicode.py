"""Write unicode_tables.h: the characters that the `tokenizers` library takes for letters and for numbers.

    python native/runtime/text/make_unicode.py > native/runtime/text/unicode_tables.h
"""

from __future__ import annotations

import tokenizers
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split


def ranges_of(pattern: str) -> list[tuple[int, int]]:
    """The runs of code points that a regular expression of the library matches."""
    split = Split(Regex(pattern), "removed")
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    matched: list[int] = []
    for begin in range(0, len(codes), 1024):
        some = codes[begin : begin + 1024]
        kept = {
            place
            for _, (start, end) in split.pre_tokenize_str("".join(map(chr, some)))
            for place in range(start, end)
        }
        matched += [code for place, code in enumerate(some) if place not in kept]
    found: list[tuple[int, int]] = []
    for code in matched:
        if found and found[-1][1] == code - 1:
            found[-1] = found[-1][0], code
        else:
            found.append((code, code))
    return found


def table(name: str, pattern: str) -> str:
    """The runs as an array of C++."""
    cells = [f"{{0x{first:x}, 0x{last:x}}}" for first, last in ranges_of(pattern)]
    lines, line = [], "   "
    for cell in cells:
        if len(line) + len(cell) > 120:
            lines.append(line)
            line = "   "
        line += f" {cell},"
    return f"constexpr Run {name}[] = {{\n" + "\n".join([*lines, line]) + "\n};"


print(f"// Made by make_unicode.py from tokenizers {tokenizers.__version__}; runs of code points, first and last.")
print("#pragma once\n\n#include <cstdint>\n\nnamespace bellbox {\n\nstruct Run {\n    uint32_t first, last;\n};\n")
print(table("kLetters", r"\p{L}") + "\n")
print(table("kNumbers", r"\p{N}") + "\n")
print(table("kSpaces", r"\s") + "\n")
print("}  // namespace bellbox")
