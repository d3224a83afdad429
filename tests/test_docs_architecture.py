"""docs/architecture.md: the order of the rooms is that of the imports, and the files it names exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.pages import ARCHITECTURE, section, without_code

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "certify_cli"
PAGE = ARCHITECTURE.read_text(encoding="utf-8")
ORDER = re.findall(r"^ {4}(\w+ -> .+)$", PAGE, re.MULTILINE)[0].split(" -> ")


def imported(path: Path) -> set[str]:
    """The rooms and single files of the package that a file imports from, at whatever depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("certify_cli.")}
    return found


def test_the_rooms_are_the_folders() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert set(ORDER) == folders


@pytest.mark.parametrize("room", ORDER)
def test_a_room_imports_from_its_left_only(room: str) -> None:
    for path in (PACKAGE / room).rglob("*.py"):
        later = imported(path) & set(ORDER[ORDER.index(room) + 1 :])
        assert not later, f"{path.relative_to(PACKAGE)} imports from {later}"


@pytest.mark.parametrize("room", ORDER)
def test_every_room_has_a_heading_and_its_files_exist(room: str) -> None:
    text = without_code(section(ARCHITECTURE, room))
    assert len(text.strip()) > 100
    files = re.findall(r"`([\w]+(?:\.py|/))`", text)
    assert not [name for name in files if not any((PACKAGE / room).rglob(name.rstrip("/")))]


def test_every_path_that_is_named_exists() -> None:
    named = re.findall(r"`((?:certify_cli|tests|docs)/[^`*]+)`", PAGE)
    created = re.findall(r"Create `([^`]+)`", PAGE)
    assert len(named) > 20
    assert not [path for path in named if path not in created and not (ROOT / path).exists()]
