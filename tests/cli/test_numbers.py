"""Numbers typed, set or recorded: one rule for all of them, and nothing that only looks like a number."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest

from certify_cli import plain
from certify_cli.cli import options
from certify_cli.data.datasets import parse_samples
from certify_cli.errors import UsageError
from certify_cli.network.activations import from_name
from certify_cli.records import parse_eps
from tests.cli.conftest import Outcome
from tests.hostile import NUMBERS, is_sentence

READERS: dict[str, Callable[[str], object]] = {
    "eps": parse_eps,
    "samples": parse_samples,
    "samples from": lambda text: parse_samples(f"{text}:20"),
    "mean": lambda text: options.numbers("--mean", [text]),
    "mean of two": lambda text: options.numbers("--mean", [f"0.5, {text}"]),
    "batch size": lambda text: options.count_or_auto("--batch-size", text),
    "memory": lambda text: options.memory_size("--memory", text),
    "memory with a unit": lambda text: options.memory_size("--memory", f"{text}GB"),
    "activation": lambda text: from_name(f"softplus:{text}"),
    "second parameter": lambda text: from_name(f"clip:0,{text}"),
}
FINE = {  # texts of the table that are something else to this reader
    "samples from": {""},
    "mean": {"1,5"},
    "mean of two": {"1,5"},
    "memory with a unit": {"1 "},
    "activation": {"1,5", "1 "},  # spaces may stand around the whole
    "second parameter": {"1 "},
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("text", NUMBERS)
def test_what_is_no_plain_number_is_refused(name: str, text: str) -> None:
    if text in FINE.get(name, ()):
        return
    with pytest.raises(UsageError) as error:
        READERS[name](text)
    assert is_sentence(str(error.value))


OPTIONS = (
    ("certify", "two.onnx", "--data", "2", "--seed", "{}"),
    ("certify", "two.onnx", "--data", "2", "--resize", "{}", "4"),
    ("certify", "two.onnx", "--data", "2", "--resize", "4", "{}"),
    ("certify", "two.onnx", "--data", "2", "--threads", "{}"),
    ("certify", "two.onnx", "--data", "2", "--eps", "{}"),
    ("bounds", "two.onnx", "--data", "2", "--sample", "{}"),
    ("bounds", "two.onnx", "--data", "2", "--measure", "--radius", "{}"),
    ("verify", "a.json", "two.onnx", "--share", "{}"),
    ("verify", "a.json", "two.onnx", "--seed", "{}"),
    ("diff", "a.json", "b.json", "--tolerance", "{}"),
)


@pytest.mark.parametrize("text", [text for text in NUMBERS if "\x00" not in text])
def test_the_command_line_refuses_them(text: str, curvcert: Callable[..., Outcome], fake: None) -> None:
    for words in OPTIONS:
        done = curvcert(*(word.format(text) if word == "{}" else word for word in words))
        assert (done.code, done.out) == (2, ""), (words, done.err)
        assert is_sentence(done.err.rstrip("\n")), words
        assert words[words.index("{}") - 1] in done.err or "--resize" in done.err


@pytest.mark.parametrize("text", [text for text in NUMBERS if text])
def test_the_environment_and_a_settings_file_are_read_alike(
    text: str, curvcert: Callable[..., Outcome], fake: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "s.toml"
    for name in ("seed", "resize", "threads", "eps", "memory", "batch_size"):
        settings.write_text(f"{name} = {json.dumps([text, text] if name == 'resize' else text)}\n", encoding="utf-8")
        done = curvcert("certify", "two.onnx", "--data", "2", "--config", str(settings))
        assert (done.code, done.out) == (2, ""), (name, done.err)
        assert is_sentence(done.last)
        if not text.strip() or text != text.strip() or "\x00" in text:
            continue  # an environment variable of two numbers is split at spaces
        with monkeypatch.context() as patch:
            patch.setenv(f"CURVCERT_{name.upper()}", f"{text} {text}" if name == "resize" else text)
            done = curvcert("certify", "two.onnx", "--data", "2")
        assert (done.code, done.out) == (2, ""), (name, done.err)
        assert is_sentence(done.last)


@pytest.mark.parametrize(
    "value",
    ["nan", "inf", "-inf", "-0.5", "true", "'0.5'", "1" + "0" * 400, "[0.5]", "2030-01-01", "0x" + "f" * 300, "1e400"],
)
def test_numbers_of_a_policy(value: str, curvcert: Callable[..., Outcome], fake: None, tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    for text in (
        f"accuracy = {value}",
        f"largest_lipschitz = {value}",
        f'certified_accuracy = {{ "0.5" = {value} }}',
        f"baseline = 'b.json'\nfall = {value}",
        f"baseline = 'b.json'\nfall = {{ accuracy = {value} }}",
    ):
        path.write_text(f"[policy]\n{text}\n", encoding="utf-8")
        done = curvcert("check", "two.onnx", "--data", "2", "--policy", str(path))
        assert (done.code, done.out) == (2, ""), (text, done.err)
        assert is_sentence(done.last)


@pytest.mark.parametrize("text", NUMBERS)
def test_radii_of_a_policy(text: str, curvcert: Callable[..., Outcome], fake: None, tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(f"[policy]\ncertified_accuracy = {{ {json.dumps(text)} = 0.5 }}\n", encoding="utf-8")
    done = curvcert("check", "two.onnx", "--data", "2", "--policy", str(path))
    assert (done.code, done.out) == (2, "")
    assert is_sentence(done.last)


@pytest.mark.parametrize("columns", [*NUMBERS, "0", "-3", "1" * 30])
def test_a_strange_width_is_no_width(
    columns: str, curvcert: Callable[..., Outcome], fake: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = curvcert("certify", "two.onnx", "--data", "2").out
    monkeypatch.setenv("COLUMNS", columns)
    assert len(curvcert("certify", "two.onnx", "--data", "2").out) == len(expected)


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.5", 0.5), (".5", 0.5), ("2.", 2.0), ("1e-3", 1e-3), ("5E2", 500.0), ("36/255", 36 / 255), ("1e-320", 1e-320)],
)
def test_radii_that_are_read(text: str, value: float) -> None:
    assert parse_eps(text) == value


@pytest.mark.parametrize("text", ["0.1/0.3", "1e-3/7e2", "0.3/255", "1e300/1e-5", "2e-300/3e10"])
def test_a_fraction_is_rounded_once(text: str) -> None:
    above, below = map(Fraction, text.split("/"))
    assert parse_eps(text) == float(above / below)


@pytest.mark.parametrize("text", ["0", "0.0", "-0.5", "0/3", "1/-3", "-1", "1e300/1e-300", "1e-300/1e300", "-0"])
def test_radii_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--eps"):
        parse_eps(text)


def test_signed_numbers_where_they_make_sense() -> None:
    assert options.numbers("--mean", ["-0.5,1e-3, -2"]) == (-0.5, 1e-3, -2.0)
    assert plain.integer("-12") == -12
    assert from_name("leaky-relu:-0.1").parameters["negative_slope"] == -0.1
    assert options.memory_size("--memory", "1.5 GiB") == 3 * 2**29
