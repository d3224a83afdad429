"""How the tests stand together: what they share is no test's own."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "certify_cli"
FILES = sorted(path.relative_to(TESTS).as_posix() for path in TESTS.rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of modules and of what is imported from them; relative ones without their dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", FILES)
def test_no_file_imports_from_a_file_of_tests(file: str) -> None:
    """Helpers of two files stand in tests/networks.py, adversary.py, oracles.py, files.py, records.py and the like."""
    names = imported(ast.parse((TESTS / file).read_text(encoding="utf-8")))
    assert [name for name in names if any(part.startswith("test_") for part in name.split(".")[:-1])] == []


def test_no_file_is_long_without_a_reason() -> None:
    """At most 400 lines, or a sentence in the file's head that says why it is longer."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 400:
            assert "The file is long because" in (ast.get_docstring(ast.parse(text)) or ""), path.name


def test_no_block_of_six_lines_stands_twice() -> None:
    """Equal code, blank lines, comments, imports and lone brackets left out, is one function's."""
    seen: dict[tuple[str, ...], str] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        lines = [
            line
            for line in map(str.strip, path.read_text(encoding="utf-8").splitlines())
            if re.search(r"\w", line) and not line.startswith(("#", "from ", "import "))
        ]
        for block in zip(*(lines[i:] for i in range(6)), strict=False):
            other = seen.setdefault(block, path.name)
            assert other == path.name, f"{other} and {path.name} share {block}"
