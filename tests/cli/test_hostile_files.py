"""Files that the commands read back, with anything in any field: used or refused in a sentence, never a traceback."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from certify_cli.errors import RecordsError
from certify_cli.output.read import read_document
from tests.cli.conftest import Outcome
from tests.hostile import TEXTS, is_sentence

Curvcert = Callable[..., Outcome]
WORDS = [text for text in TEXTS.values() if "\x00" not in text and "\ud800" not in text]
"""What an argument of a process can be."""
SPARE = ("newline", "ansi", "rich", "markdown", "command", "formula", "wide")
"""A page takes its time to draw."""


def sentence(done: Outcome, codes: tuple[int, ...] = (2, 3)) -> None:
    assert done.code in codes, done
    assert is_sentence(done.last), done.err[:3000]
    assert done.err.count("error:") >= 1
    for line in (*done.err.split("\n"), *done.out.split("\n")):
        assert line.isprintable()


# records

VALUES: list[Any] = [
    *TEXTS.values(), None, True, -1, 2**70, 10**400, 1.5, 1e308, float("nan"), float("inf"), [], ["a"], [[]], {},
    {"a": 1}, [10**400], {"1_0": 0.5}, {"nan": 1}, {"٣": 0.1}, {"x" * 10**5: 0.5},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a document, the root left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def placed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(document)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return changed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data, and a run with all that it keeps."""
    from certify_cli.cli.app import main

    folder = tmp_path_factory.mktemp("run")
    weights = {"a.weight": torch.eye(3, 4), "b.weight": torch.eye(2, 3)}
    save_file(weights, folder / "m.safetensors")
    np.savez(folder / "d.npz", x=np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4), y=np.array([0, 1, 0]))
    words = ["--data", str(folder / "d.npz"), "--activation", "tanh", "--eps", "0.05", "--eps", "1/3", "-q"]
    kept = ["--witnesses", str(folder / "w.npz"), "--certificate", str(folder / "c.npz")]
    for name, more in (("run.json", kept), ("run.jsonl", [])):
        assert main(["certify", str(folder / "m.safetensors"), *words, "-o", str(folder / name), *more]) == 0
    return folder


@pytest.fixture
def document(folder: Path) -> Any:
    return json.loads((folder / "run.json").read_text("utf-8"))


def test_any_value_in_any_field_of_a_record(
    document: Any, folder: Path, tmp_path: Path, curvcert: Curvcert, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # what a record says of a path must leave nothing here
    good, bad, model = folder / "run.json", folder / "bad.json", folder / "m.safetensors"
    kept = ("--witnesses", folder / "w.npz", "--certificate", folder / "c.npz")
    read = 0
    for number, path in enumerate(places(document)):
        for k, value in enumerate(VALUES):
            bad.write_text(json.dumps(placed(document, path, value)), encoding="utf-8")
            try:
                read_document(str(bad))
            except RecordsError as error:
                said = str(error).replace(str(bad), "FILE")
                if not is_sentence(said):
                    pytest.fail(said)
                continue
            read += 1
            commands = (
                ("diff", good, bad),
                ("verify", bad, model, "--offline", *kept),
                ("diff", bad, bad, "--format", "markdown"),
                ("verify", bad, model, "--offline", "--format", "markdown"),
            )
            acted_upon = path[:2] in (("run", "arguments"), ("run", "preprocessing"))
            if (number + k) % (5 if acted_upon else 17) == 0:
                done = curvcert(*map(str, commands[(number + k) % 4]))
                if done.code not in (0, 1):
                    sentence(done)
                assert all(line.isprintable() for line in (done.out + done.err).split("\n"))
    assert read > 500
    assert not list(tmp_path.iterdir())


PARTS = {
    "deep": "[" * 100_000,
    "deep objects": '{"a":' * 100_000,
    "long integer": '{"type": ' + "1" * 5000 + "}",
    "type of a list": '{"type": []}',
    "type samples": '{"type": "samples"}\n{"type": "sample"}',
    "type schema": '{"type": "schema"}',
    "text": '"text"',
    "number": "1",
    "null": "null",
    "nan": "NaN",
    "nul": "\x00",
    "samples of a text": '{"schema": "curvcert/1", "run": {}, "samples": "abc", "summary": {}}',
    "samples of texts": '{"schema": "curvcert/1", "run": {}, "samples": ["abc"], "summary": {}}',
    "summary of a list": '{"schema": "curvcert/1", "run": {}, "samples": [], "summary": []}',
    "run of a list": '{"schema": "curvcert/1", "run": [], "samples": [], "summary": {"samples": 0}}',
    "schema of a list": '{"schema": [[1]], "run": [], "samples": [], "summary": {"samples": 0}}',
    "schema without end": json.dumps({"schema": "x" * 10**5, "run": [], "samples": [], "summary": {}}),
}


@pytest.mark.parametrize("name", PARTS)
def test_files_that_hold_no_records(name: str, tmp_path: Path, curvcert: Curvcert) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(PARTS[name], encoding="utf-8")
    sentence(curvcert("diff", str(path), str(path)))
    sentence(curvcert("report", str(path), "-o", str(tmp_path / "r.html")))
    done = curvcert("certify", "two.onnx", "--data", "2", "--resume", "-o", str(path))
    sentence(done)


def test_any_value_in_a_run_that_is_gone_on_with(folder: Path, tmp_path: Path, curvcert: Curvcert) -> None:
    path = tmp_path / "begun.jsonl"
    words = ("certify", folder / "m.safetensors", "--data", folder / "d.npz", "--activation", "tanh", "--eps", "0.05")
    lines = [json.loads(line) for line in (folder / "run.jsonl").read_text("utf-8").splitlines()]
    for row in (0, 1):
        for number, place in enumerate(places(lines[row])):
            for value in VALUES[number % 19 :: 19]:
                changed = placed(lines, (row, *place), value)
                path.write_text("".join(json.dumps(line) + "\n" for line in changed[: 2 + row]), encoding="utf-8")
                done = curvcert(*map(str, words), "--eps", "1/3", "--resume", "-o", str(path))
                if done.code != 0:
                    sentence(done, (2,))


# settings


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("name", TEXTS)
def test_texts_of_a_settings_file(name: str, tmp_path: Path, curvcert: Curvcert) -> None:
    text = json.dumps(TEXTS[name].replace("\ud800", "?")).replace("\\u007f", "\\u007F")
    path = tmp_path / "s.toml"
    lines = [
        *(
            f"{key} = {text}"
            for key in ("method", "effort", "attack", "eps", "data-layout", "layout", "split", "device")
        ),
        *(f"{key} = {text}" for key in ("mean", "std", "threads", "shuffle", "samples", "seed", "resize", "memory")),
        f"{text} = 1",
        f"[{text}]",
        f"[policy]\n{text} = 1",
        f"[policy]\naccuracy = {text}",
        f"[policy]\naccuracy = [{text}]",
        f"[policy]\ncertified_accuracy = {{ {text} = 0.5 }}",
        f'[policy]\ncertified_accuracy = {{ "0.5" = {text} }}',
        f"[policy]\ncertified_accuracy = {{ {text} = {{ {text} = 1 }} }}",
        f"[policy]\nbaseline = {text}",
        f"[policy]\nbaseline = [{text}]",
        f"[policy]\nbaseline = 'x'\nfall = {text}",
        f"[policy]\nbaseline = 'x'\nfall = {{ {text} = 0.5 }}",
        f"{text} = 1\n{text} = 2",
        f"[policy]\n[policy.{text}]\n[policy.{text}]",
        text,
    ]
    for line in lines:
        path.write_text(line + "\n", encoding="utf-8")
        sentence(curvcert("check", "two.onnx", "--data", "2", "--policy", str(path)))


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    "content",
    [
        b"a = " + b"[" * 100_000,
        b"a = " + b"{a=" * 100_000,
        b"seed = " + b"1" * 5000,
        b"seed = 0x" + b"f" * 5000,
        b"seed = 2030-01-01",
        b"\xff\xfe",
        b"a\x00 = 1",
        b"seed = [[[[1]]]]",
        b"policy = 1",
        b"a." * 1000 + b"a = 1",
        b"# long" * 2**18,
        b"accuracy = 1\r\xe2\x80\xae",
    ],
    ids=range(12),
)
def test_settings_that_are_none(content: bytes, tmp_path: Path, curvcert: Curvcert) -> None:
    for name in ("s.toml", "pyproject.toml"):
        path = tmp_path / name
        path.write_bytes(content)
        sentence(curvcert("check", "two.onnx", "--data", "2", "--policy", str(path)))


# names of files and values of options


@pytest.mark.parametrize("text", WORDS, ids=range(len(WORDS)))
def test_names_that_are_typed(text: str, curvcert: Curvcert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (
        ("inspect", text or "?"),
        ("certify", "x.onnx", "--data", "digits", "--method", text),
        ("certify", "x.onnx", "--data", "digits", "--format", text),
        ("certify", "x.onnx", "--data", "digits", "--layout", text),
        ("certify", "x.onnx", "--data", "digits", "--device", text),
        ("certify", "x.onnx", "--data", "digits", f"--{text}"),
        ("certify", "x.onnx", "--data", "digits", "--witnesses", text),
        ("diff", text or "?", text or "?"),
        ("report", text or "?", "-o", "r.html"),
        (text or "?",),
    ):
        sentence(curvcert(*words))


def shown(done: Outcome) -> None:
    assert done.code == 0, done.err
    assert all(line.isprintable() for line in (done.out + done.err).split("\n"))


@pytest.mark.skipif(os.name == "nt", reason="names of files are narrower there")
@pytest.mark.parametrize("name", ["html", "mathtext", *(pytest.param(n, marks=pytest.mark.slow) for n in SPARE)])
def test_reports_on_files_of_any_name(
    name: str, curvcert: Curvcert, tmp_path: Path, document: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    file = f"{TEXTS[name].replace('/', '_')[:60]}.json"
    Path(file).write_text(json.dumps(placed(document, ("run", "model", "path"), file)), encoding="utf-8")
    shown(curvcert("report", f"./{file}", "-o", "r.html", "--svg", "plots"))


@pytest.mark.skipif(os.name == "nt", reason="names of files are narrower there")
@pytest.mark.parametrize("text", WORDS, ids=range(len(WORDS)))
def test_names_of_files(text: str, curvcert: Curvcert, tmp_path: Path, document: Any, monkeypatch: Any) -> None:
    """Records under a strange name are compared and shown like any others."""
    monkeypatch.chdir(tmp_path)
    name = f"{text.replace('/', '_')[:60]}.json"
    Path(name).write_text(json.dumps(placed(document, ("run", "model", "path"), name)), encoding="utf-8")
    for more in ((), ("--format", "markdown")):
        shown(curvcert("diff", f"./{name}", f"./{name}", *more))
    Path(name).write_text("{}", encoding="utf-8")
    sentence(curvcert("diff", f"./{name}", f"./{name}"))
