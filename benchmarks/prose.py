"""Sentence statistics of the documents: how long sentences are, page by page.

python benchmarks/prose.py                      # README.md and every page of docs/
python benchmarks/prose.py docs/training.md --long 30      # and each sentence of more than 30 words

Counted is running text and items of lists. Code, tables, headings, captions in comments and link targets are not.
A sentence ends at `.`, `!` or `?` before a blank, at the end of a paragraph, or at that of an item of a list. A word
is what blanks separate; what stands in backticks is one word.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MEDIAN, LONG, SHARE = 18, 30, 0.12
"""The bars: the median of all sentences in words, what is long, and how many may be."""

END = re.compile(r"(?<=[.!?])[\"')*_\]]*\s+(?=[\"'(*_\[`]*[A-Z0-9`])")
SHORT = re.compile(r"\b(e\.g|i\.e|etc|vs|cf|Fig|No|al|et)\.")


def paragraphs(text: str) -> Iterator[str]:
    """Of a Markdown page: running text and items of lists, each in one line."""
    text = re.sub(r"^---\n.*?^---\n", "", text, count=1, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->", "\n", text, flags=re.DOTALL)
    text = re.sub(r"^(`{3,}|:{3,}|~{3,}).*?^\1\s*$", "\n", text, flags=re.DOTALL | re.MULTILINE)
    held: list[str] = []
    for line in [*text.splitlines(), ""]:
        stripped = line.strip()
        begins = re.match(r"([-*+]|\d+\.)\s+", stripped)
        skipped = not stripped or stripped.startswith(("#", "|", "![", "(", "<"))
        if (skipped or begins) and held:
            yield " ".join(held)
            held = []
        if not skipped:
            held.append(stripped[begins.end() :] if begins else stripped)


def sentences(text: str) -> list[str]:
    """Of a page, as they are read."""
    found = []
    for paragraph in paragraphs(text):
        plain = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", paragraph)
        plain = re.sub(r"\{[\w:-]+\}(?=`)", "", plain)
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", plain)
        plain = re.sub(
            r"`+([^`]*)`+", lambda code: "`" + re.sub(r"\s+", "_", code[1].replace(".", "·")) + "`", plain
        )
        plain = SHORT.sub(lambda word: word[0].replace(".", ""), plain)
        found += [part.strip() for part in END.split(plain) if len(part.split()) > 1]
    return found


def lengths(pages: list[Path]) -> list[int]:
    """Words of each sentence of some pages."""
    return [len(each.split()) for page in pages for each in sentences(page.read_text(encoding="utf-8"))]


def documents() -> list[Path]:
    """README.md and the pages of docs/, tutorials and all."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def row(name: str, counts: list[int]) -> str:
    """A line of the table."""
    share = sum(count > LONG for count in counts) / len(counts)
    return (
        f"{name:<34} {len(counts):>9} {statistics.median(counts):>7g} {100 * share:>7.1f} % {max(counts):>8}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--long", type=int, help="print the sentences of more words than this")
    choices = parser.parse_args()
    pages = [each.resolve() for each in choices.pages] or documents()
    print(f"{'page':<34} {'sentences':>9} {'median':>7} {'over ' + str(LONG):>9} {'longest':>8}")
    for page in pages:
        if counts := lengths([page]):
            name = page.relative_to(ROOT) if page.is_relative_to(ROOT) else page
            print(row(str(name), counts))
        if choices.long:
            for each in sentences(page.read_text(encoding="utf-8")):
                if len(each.split()) > choices.long:
                    print(f"  {len(each.split())}: {each}")
    print(row("all", lengths(pages)))


if __name__ == "__main__":
    main()
