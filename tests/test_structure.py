"""How the tests stand together: what they share is no test's own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
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
