"""The command line as such: help, versions, usage errors, and that nothing heavy is loaded for them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import save_file

from certify_cli.cli import options as opt
from certify_cli.cli.app import app
from certify_cli.errors import UsageError
from certify_cli.names import METHOD_NAMES
from certify_cli.version import __version__
from tests.cli.conftest import Outcome

Curvcert = Callable[..., Outcome]
STACK = {
    "format": "curvcert-architecture/1",
    "input": [784],
    "layers": [{"type": "Linear", "name": "0"}, {"type": "softplus", "name": "1"}, {"type": "Linear", "name": "2"}],
}
ROOT = Path(__file__).parents[2]
COMMANDS = ["certify", "check", "diff", "verify", "report", "bounds", "inspect", "convert", "train", "doctor"]

LIGHT = """
import json, resource, sys
from certify_cli.cli.app import main
try:
    code = main({words!r})
except SystemExit as stop:  # Typer's completion leaves this way
    code = stop.code
used = resource.getrusage(resource.RUSAGE_SELF)
heavy = sorted({{"torch", "numpy", "onnx", "rich", "torchvision", "sklearn"}} & set(sys.modules))
print(json.dumps([code, heavy, used.ru_utime + used.ru_stime]), file=sys.stderr)
"""


@pytest.mark.parametrize("words", [["--help"], ["--version"], [], *([name, "--help"] for name in COMMANDS)])
def test_help_and_version_load_nothing_heavy_and_answer_at_once(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT.format(words=words)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    code, heavy, processor_seconds = json.loads(done.stderr)
    assert (code, heavy) == (0, [])
    assert processor_seconds < 0.5  # wall time would measure the other processes of the machine
    assert done.stdout


def test_completion_answers_at_once() -> None:
    asked = {"_CURVCERT_COMPLETE": "complete_bash", "COMP_WORDS": "curvcert certify --method l", "COMP_CWORD": "3"}
    done = subprocess.run(
        [sys.executable, "-c", LIGHT.format(words=[])], cwd=ROOT, capture_output=True, text=True, check=True, env=asked
    )
    code, heavy, processor_seconds = json.loads(done.stderr)
    assert (code, heavy) == (0, [])
    assert processor_seconds < 0.5
    assert done.stdout.split() == ["lipschitz", "local", "linear", "local-lipschitz"]


def test_version(curvcert: Curvcert) -> None:
    assert curvcert("--version").out == f"curvcert {__version__}\n"


def test_every_command_is_listed_and_no_other() -> None:
    command = typer.main.get_command(app)
    assert list(command.commands) == COMMANDS  # type: ignore[attr-defined]


def test_the_methods_of_help_are_the_methods_there_are() -> None:
    from certify_cli.certificates.methods import METHODS

    assert tuple(METHODS) == METHOD_NAMES


def test_the_names_of_help_are_those_that_data_takes() -> None:
    from certify_cli.data import datasets as data

    assert (opt.SPLITS, opt.DATA_LAYOUTS) == (data.SPLITS, data.LAYOUTS)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("bogus", "bogus"),
        ("--bogus", "--bogus"),
        ("certify", "MODEL"),
        ("certify x.onnx", "--data"),
        ("certify x.onnx y.onnx --data digits", "y.onnx"),
        ("certify x.onnx --data digits --seed x", "--seed"),
        ("certify x.onnx --data digits --resize 3", "--resize"),
        ("certify x.onnx --data digits --resize 3 x", "--resize"),
        ("inspect x.onnx --format csv", "--format 'csv' is not one of table, json"),
        ("bounds x.onnx --format csv", "--format 'csv' is not one of table, json"),
        ("convert x.onnx y.safetensors --format csv", "--format 'csv' is not one of table, json"),
        ("doctor --format csv", "--format 'csv' is not one of table, json"),
    ],
)
def test_usage_errors_are_one_plain_sentence(curvcert: Curvcert, words: str, said: str) -> None:
    done = curvcert(*words.split())
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert done.err.startswith("curvcert: error: ")
    assert said in done.err
    assert not set(done.err) & set("╭│╰─")


@pytest.mark.parametrize(
    ("text", "size"),
    [("auto", None), ("2GB", 2 * 10**9), ("2GiB", 2**31), ("512mb", 512 * 10**6), ("1.5 k", 1500), ("100", 100)],
)
def test_memory_sizes(text: str, size: int | None) -> None:
    assert opt.memory_size("--memory", text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e9", "0", "0.1B", "1QB", "²GB"])
def test_memory_sizes_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        opt.memory_size("--memory", text)


def test_numbers_by_repetition_and_comma() -> None:
    assert opt.numbers("--mean", ["0.1, 0.2", "0.3"]) == (0.1, 0.2, 0.3)
    assert opt.numbers("--mean", None) == ()


def test_a_name_that_no_file_can_have_is_a_sentence(curvcert: Curvcert, tmp_path: Path) -> None:
    """In every place of a command line that names a file or folder."""
    name = "n" * 300
    model, points, run = (tmp_path / file for file in ("m.safetensors", "d.npz", "r.json"))
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(784, 6), torch.nn.Softplus(), torch.nn.Linear(6, 3))
    save_file(module.state_dict(), model, metadata={"curvcert": json.dumps(STACK)})
    np.savez(points, x=np.random.default_rng(0).random((3, 784), dtype=np.float32), y=np.arange(3))
    certify = ("certify", model, "--data", points)
    assert curvcert(*certify, "-o", run, "-q").code == 0
    named = ("certify", model, "--data", "mnist", "--offline", "--data-root", name)
    cases: list[tuple[Any, ...]] = [
        ("certify", f"{name}.onnx", "--data", points),
        ("certify", model, "--data", f"{name}.npz"),
        ("certify", model, "--data", f"./{name}"),
        named,
        *((*certify, "-o", f"{name}.{end}") for end in ("json", "jsonl", "csv")),
        (*certify, "-o", f"{name}.jsonl", "--resume"),
        (*certify, "--witnesses", f"{name}.npz"),
        (*certify, "--certificate", f"{name}.npz"),
        (*certify, "--config", f"{name}.toml"),
        ("check", model, "--policy", f"{name}.toml", "--data", points),
        ("diff", f"{name}.json", run),
        ("verify", f"{name}.json", model),
        ("verify", run, f"{name}.onnx"),
        ("verify", run, model, "--witnesses", f"{name}.npz"),
        ("report", f"{name}.json", "-o", tmp_path / "page.html"),
        ("report", run, "-o", f"{name}.html"),
        ("report", run, "--svg", name),
        ("inspect", f"{name}.onnx"),
        ("bounds", f"{name}.onnx"),
        ("convert", model, f"{name}.safetensors"),
        ("convert", f"{name}.onnx", tmp_path / "c.safetensors"),
        ("train", "--recipe", f"{name}.toml"),
        ("train", "--data", "digits", "-o", f"{name}.safetensors"),
    ]
    for words in cases:
        outcome = curvcert(*words)
        assert outcome.code in (2, 3), (words, outcome.err)
        assert "nnn" in outcome.last, (words, outcome.last)
        assert "internal error" not in outcome.err, (words, outcome.err)
    assert {command for command, *_ in cases} == set(COMMANDS) - {"doctor"}
