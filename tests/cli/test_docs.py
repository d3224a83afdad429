"""What the README and the pages in docs/ show is what the commands print, and every option in them exists.

A page is run in order, in a folder with the shipped models: `<!-- file: NAME -->` before a block writes it,
`<!-- run -->` (or `<!-- run: CODE -->`, the exit code) before a console block runs it and compares. A line `...` stands
for any lines.
"""

from __future__ import annotations

import doctest
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Outcome
from tests.pages import matches

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FLAGS = re.MULTILINE | re.DOTALL
BLOCK = re.compile(r"^<!-- (file|run)(?:: ([^\n]*))? -->\n```\w*\n(.*?)^```$", FLAGS)
SILENT = ("library.md", "theory.md", "trust.md")
"""Pages without a command."""
Curvcert = Callable[..., Outcome]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pages_show_what_is_printed(
    page: Path, curvcert: Curvcert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "models", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    for kind, argument, body in BLOCK.findall(page.read_text(encoding="utf-8")):
        if kind == "file":
            Path(argument).write_text(body, encoding="utf-8")
            continue
        command, _, shown = body.removeprefix("$ ").partition("\n")
        if "jq" in command and shutil.which("jq") is None:
            continue
        plain = command.startswith("curvcert ") and "|" not in command
        done = curvcert(*shlex.split(command)[1:]) if plain else through_a_shell(command)
        assert done.code == int(argument or 0), done.err
        assert matches(shown, done.out), f"{command} prints\n{done.out}"


def test_the_first_screen_shows_what_its_command_prints(curvcert: Curvcert, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first, _ = re.findall(r"^\$ (.*)", text.partition("<!-- end first screen -->")[0], re.MULTILINE)
    install, command = first.split(" && ")
    assert install == "pip install ."
    (shown,) = re.findall(r"<!-- digits output -->\n```text\n(.*?)^```\n<!-- end digits output -->", text, FLAGS)
    monkeypatch.chdir(ROOT)
    done = curvcert(*shlex.split(command)[1:])
    assert done.code == 0, done.err
    assert matches(shown, done.out), done.out


def through_a_shell(command: str) -> Outcome:
    """A pipeline, or another program."""
    names = f'curvcert() {{ "{sys.executable}" -m certify_cli "$@"; }}; python() {{ "{sys.executable}" "$@"; }}; '
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {names}{command}"], capture_output=True, text=True, check=False
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_sessions_in_python_show_what_is_printed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "models", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    found = doctest.testfile(str(page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert found.failed == 0
    assert found.attempted > 5 or page.name != "library.md"


def test_what_matches() -> None:
    assert matches("a\n...\nd\ntime   3 s\n", "a\nb\nc\nd\ntime   4.1 s\n")
    assert matches("a\n...\nd", "a\nd")
    assert matches("a\n...", "a\nb\nc")
    assert not matches("a\nd", "a\nb\nd")
    assert not matches("a 0.1", "a 0.2")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_option_shown_exists(page: Path, curvcert: Curvcert) -> None:
    text = page.read_text(encoding="utf-8")
    commands = re.findall(r"^(?:\$ |\s*- run: |\s*entry: ).*?\bcurvcert ([a-z]+)\b([^\n|]*)", text, re.MULTILINE)
    scripts = re.findall(r"^\$ python (benchmarks/\w+\.py)", text, re.MULTILINE)
    assert commands or scripts or page.name in SILENT
    assert all((ROOT / script).is_file() for script in scripts)
    for command, rest in commands:
        known = curvcert(command, "--help").out
        for option in re.findall(r"(?<!\w)(--[a-z][a-z-]*|-[a-z])\b", rest.partition("  #")[0]):
            assert re.search(rf"(^|[\s,]){re.escape(option)}\b", known), f"{command} has no {option}"


FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LARGEST_TABLE = 9
"""Columns that a browser shows without scrolling."""


def prose(page: Path) -> str:
    """The page without its code."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The headings as GitHub links to them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_inside_the_project_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "README.md"], ids=lambda p: p.name)
def test_tables_are_whole_and_not_too_wide(page: Path) -> None:
    for table in re.findall(r"(?:^\|.*\n)+", prose(page), re.MULTILINE):
        sizes = {len(re.findall(r"(?<!\\)\|", line)) - 1 for line in table.splitlines()}
        assert len(sizes) == 1, table
        assert sizes.pop() <= LARGEST_TABLE, table
