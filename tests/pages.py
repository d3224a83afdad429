"""The pages of docs/, and their parts."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ARCHITECTURE, ACTIVATION = ROOT / "docs" / "architecture.md", ROOT / "docs" / "adding-an-activation.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def matches(shown: str, printed: str) -> bool:
    """Whether the printed text is the one shown, trailing blanks and the times that runs take left out."""

    def lines(text: str) -> list[str]:
        return [re.sub(r"^(time\b.*?  +).*", r"\1", line).rstrip() for line in text.strip().splitlines()]

    pattern = "".join(r"(?:.*\n)*" if line.strip() == "..." else re.escape(line) + r"\n" for line in lines(shown))
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in lines(printed))) is not None


def section(page: Path, heading: str) -> str:
    """From a heading of any level to the next one of its level or above."""
    text = page.read_text(encoding="utf-8")
    plain = without_code(text)
    found = re.search(rf"^(#+) {re.escape(heading)}$", plain, re.MULTILINE)
    assert found, f"{page.name} has no heading {heading!r}"
    end = re.compile(rf"^#{{1,{len(found[1])}}} ", re.MULTILINE).search(plain, found.end())
    return text[found.end() : end.start() if end else None]


def without_code(text: str) -> str:
    """The page with blanks in place of its code, which may hold lines that look like headings."""
    return BLOCK.sub(lambda block: " " * len(block[0]), text)
