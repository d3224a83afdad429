"""The errands of docs/architecture.md and docs/adding-an-activation.md, followed in a copy of the package.

A page's instructions are its bold numbered lines, each before a code block: **1.** Append to `FILE`, Create `FILE`, or
In `FILE`, after (before, in place of) `TEXT`. A Python block without an instruction runs, a console block runs and is
compared as in tests/cli/test_docs.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.pages import ACTIVATION, ARCHITECTURE, BLOCK, ROOT, matches, section, without_code

INSTRUCTION = re.compile(
    r"\*\*\d+\.\*\* (Append to|Create|In) `([^`]+)`"
    r"(?:, (after|before|in place of) (?:`` (.+?) ``|`([^`]+)`))?[^\n]*:\n\n\Z"
)
COPIED = ("certify_cli", "docs", "tests")

DRIVER = """
import contextlib, io, json, shlex, sys, traceback
from certify_cli.cli.app import main
namespace, found = {}, []
def python(body):
    try:
        exec(body, namespace)
    except Exception:
        traceback.print_exc()
        return 1
    return 0
for kind, body in json.load(sys.stdin):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = python(body) if kind == "python" else main(shlex.split(body)[1:])
    for stream in (out, err):
        stream.flush()
    found.append([code, *(stream.buffer.getvalue().decode() for stream in (out, err))])
json.dump(found, sys.__stdout__)
"""


@dataclass(frozen=True)
class Edit:
    """One instruction: `how` is "append", "create", "after", "before" or "in place of" the text `anchor` of `file`."""

    how: str
    file: str
    anchor: str
    code: str

    def apply(self, root: Path) -> None:
        path = root / self.file
        if self.how == "create":
            assert not path.exists(), f"{self.file} exists already"
            path.write_text(self.code, encoding="utf-8")
            return
        text = path.read_text(encoding="utf-8")
        if self.how == "append":
            path.write_text(f"{text}\n\n{self.code}", encoding="utf-8")
            return
        assert text.count(self.anchor) == 1, f"{self.file} holds {text.count(self.anchor)} times: {self.anchor}"
        if self.how == "in place of":
            path.write_text(text.replace(self.anchor, self.code.strip("\n")), encoding="utf-8")
            return
        place = text.index(self.anchor)
        cut = text.index("\n", place) + 1 if self.how == "after" else text.rindex("\n", 0, place) + 1
        path.write_text(text[:cut] + self.code + text[cut:], encoding="utf-8")


@dataclass(frozen=True)
class Errand:
    edits: tuple[Edit, ...]
    steps: tuple[tuple[str, str], ...]


def parsed(text: str) -> Errand:
    """The instructions and what is to be run, in order."""
    edits, steps = [], []
    for block in BLOCK.finditer(text):
        found = INSTRUCTION.search(text, 0, block.start())
        if found:
            verb, file, where, quoted, plain = found.groups()
            how = {"Append to": "append", "Create": "create"}.get(verb) or where
            edits.append(Edit(how, file, quoted or plain or "", block[2]))
        elif block[1] in ("python", "console"):
            steps.append((block[1], block[2]))
    return Errand(tuple(edits), tuple(steps))


TOY = parsed(section(ARCHITECTURE, "A model to try things on"))
HEADINGS = re.findall(r"^### (.+)$", without_code(section(ARCHITECTURE, "Errands")), re.MULTILINE)
ERRANDS = {heading: parsed(section(ARCHITECTURE, heading)) for heading in HEADINGS}
ERRANDS = {heading: errand for heading, errand in ERRANDS.items() if errand.edits}
ERRANDS["An activation"] = parsed(ACTIVATION.read_text(encoding="utf-8"))


def copied(errand: Errand, root: Path) -> None:
    """The package, the pages and the tests with the errand's edits made."""
    for name in COPIED:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for edit in errand.edits:
        edit.apply(root)


def environment(root: Path) -> dict[str, str]:
    """As a person's, but for what changes colours and widths."""
    kept = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "FORCE_COLOR", "NO_COLOR")}
    return {**kept, "PYTHONPATH": str(root)}


@dataclass(frozen=True)
class Done:
    """One step: what it was, what was to be printed, and what became of it."""

    step: str
    shown: str
    code: int
    out: str
    err: str

    @property
    def good(self) -> bool:
        return self.code == 0 and (not self.step.startswith("$ ") or matches(self.shown, self.out))


def done(steps: Sequence[tuple[str, str]], root: Path) -> list[Done]:
    """Every step, one after the other, in one process."""
    parts = [(kind, body.removeprefix("$ ").partition("\n")[0] if kind == "console" else body) for kind, body in steps]
    ran = subprocess.run(
        [sys.executable, "-c", DRIVER], input=json.dumps(parts), capture_output=True, text=True, check=False,
        cwd=root, env=environment(root),
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [
        Done(body, body.partition("\n")[2], *result)
        for (_, body), result in zip(steps, json.loads(ran.stdout), strict=True)
    ]


def commands(errand: Errand) -> tuple[tuple[str, str], ...]:
    """What can be run without pytest."""
    return tuple(step for step in errand.steps if not step[1].startswith("$ pytest"))


@pytest.mark.parametrize("heading", ERRANDS)
def test_an_errand_works_as_the_page_says(heading: str, tmp_path: Path) -> None:
    errand = ERRANDS[heading]
    copied(errand, tmp_path)
    for step in done([*TOY.steps, *commands(errand)], tmp_path):
        assert step.good, f"{step.step}\nends with {step.code} and prints\n{step.out}\n{step.err}"


def test_without_its_edits_no_errand_works(tmp_path: Path) -> None:
    """What an errand shows is what its edits add: otherwise it would not test them."""
    copied(Errand((), ()), tmp_path)
    toy, *rest = [TOY.steps, *map(commands, ERRANDS.values())]
    results = iter(done([step for steps in (toy, *rest) for step in steps], tmp_path))
    assert all(next(results).good for _ in toy)
    for heading, steps in zip(ERRANDS, rest, strict=True):
        found = [next(results).good for _ in steps]
        assert not all(found), heading


@pytest.mark.slow
def test_a_new_activation_passes_the_tests_that_go_over_the_table(tmp_path: Path) -> None:
    errand = ERRANDS["An activation"]
    copied(errand, tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (command,) = [body[2:].strip() for _, body in errand.steps if body.startswith("$ pytest")]
    ran = subprocess.run(
        [sys.executable, "-m", *command.split()], capture_output=True, text=True, cwd=tmp_path,
        env=environment(tmp_path), check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert "passed" in ran.stdout


def test_errands_are_found() -> None:
    assert len(ERRANDS) >= 7
    assert all(errand.edits and commands(errand) for errand in ERRANDS.values())
