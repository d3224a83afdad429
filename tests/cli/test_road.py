"""The real road behind the command line: digits, the engine and its records; only the model is built in code."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

import certify_cli
from certify_cli.load.loaded_model import LoadedModel
from certify_cli.network.activations import rows as activations
from certify_cli.network.affine import Dense
from certify_cli.network.graph import Builder, Network
from certify_cli.network.movement import Reshape
from certify_cli.records import ModelInfo
from tests.cli.conftest import Outcome
from tests.schema import SCHEMA

Curvcert = Callable[..., Outcome]


def digits_network() -> Network:
    """64 -> 12 softplus -> 10 with fixed weights of no merit: what is tested is the road, not the model."""
    made = torch.Generator().manual_seed(0)

    def dense(out: int, inputs: int) -> Dense:
        weight = torch.randn(out, inputs, generator=made, dtype=torch.float64) / inputs**0.5
        return Dense(weight, torch.randn(out, generator=made, dtype=torch.float64) / 10)

    builder = Builder((1, 8, 8))
    flat = builder.add("flatten", Reshape((64,)), 0)
    hidden = builder.add("softplus", activations.softplus(5.0), builder.add("fc1", dense(12, 64), flat))
    return builder.build(builder.add("fc2", dense(10, 12), hidden))


@pytest.fixture(autouse=True)
def _model(monkeypatch: pytest.MonkeyPatch) -> None:
    info = ModelInfo("digits.onnx", "ab" * 32, "onnx", 18, 10)
    loaded = LoadedModel(digits_network(), info, (1, 8, 8), "float32", ())
    monkeypatch.setitem(vars(certify_cli), "load_model", lambda path, *, activation=None, **rest: loaded)


WORDS = ("certify", "digits.onnx", "--data", "digits", "--samples", "30", "--eps", "0.01", "--device", "cpu")


def document(curvcert: Curvcert, *more: str) -> dict[str, Any]:
    done = curvcert(*WORDS, "--format", "json", *more)
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    jsonschema.Draft202012Validator(SCHEMA).validate(found)
    return found


@pytest.mark.smoke
def test_real_records_fit_the_schema_and_make_sense(curvcert: Curvcert) -> None:
    found = document(curvcert)
    assert [row["index"] for row in found["samples"]] == list(range(30))
    assert found["summary"]["samples"] == found["run"]["data"]["samples"] == 30
    assert found["run"]["arguments"]["samples"] == "30"
    for row in found["samples"]:
        assert row["status"] == "certified"
        assert row["certified_radius"] > 0
        if row["attack_radius"] is not None:
            assert row["certified_radius"] < row["attack_radius"]
            assert row["attack_kind"] == "certificate"
    assert sum(row["attack_radius"] is not None for row in found["samples"]) > 10


@pytest.mark.smoke
def test_every_format_tells_the_same(curvcert: Curvcert) -> None:
    rows = document(curvcert)["samples"]
    lines = [json.loads(line) for line in curvcert(*WORDS, "--format", "jsonl").out.splitlines()]
    for line in lines:
        jsonschema.Draft202012Validator({"$ref": "#/$defs/line", "$defs": SCHEMA["$defs"]}).validate(line)
    samples = [line for line in lines if line.pop("type") == "sample"]
    assert len({line.pop("chain") for line in samples}) == len(rows)  # of the lines, not of the samples
    assert samples == rows
    table = csv.DictReader(io.StringIO(curvcert(*WORDS, "--format", "csv").out))
    assert [float(row["certified_radius"]) for row in table] == [row["certified_radius"] for row in rows]


def test_python_gives_the_same_records(curvcert: Curvcert) -> None:
    model, data = certify_cli.load_model("digits.onnx"), certify_cli.load_data("digits", samples="30")
    result = certify_cli.certify(model, data, eps=("0.01",), device="cpu")
    found = document(curvcert)
    assert [sample.to_dict() for sample in result.samples] == found["samples"]
    own = {"seconds": 0, "seal": None}  # when it ran, and with which arguments
    assert result.summary.to_dict() | own == found["summary"] | own


def test_methods_and_attacks_can_be_chosen(curvcert: Curvcert) -> None:
    rows = document(curvcert, "--method", "lipschitz", "--attack", "none")["samples"]
    assert {row["method"] for row in rows} == {"lipschitz"}
    assert {row["attack_radius"] for row in rows} == {None}


def test_witnesses_change_the_prediction_at_the_radius_told(curvcert: Curvcert, tmp_path: Path) -> None:
    rows = {row["index"]: row for row in document(curvcert, "--witnesses", str(tmp_path / "w.npz"))["samples"]}
    network = digits_network()
    with np.load(tmp_path / "w.npz", allow_pickle=False) as file:
        index, x, d = file["index"], torch.from_numpy(file["x"]), torch.from_numpy(file["d"])
    assert index.tolist() == [i for i, row in rows.items() if row["attack_radius"] is not None]
    assert len(index) > 10
    moved = network(x + d).argmax(1).tolist()
    for i, step, prediction in zip(index.tolist(), d.flatten(1).norm(dim=1).tolist(), moved, strict=True):
        assert prediction != rows[i]["prediction"]
        assert step <= rows[i]["attack_radius"] * (1 + 1e-12)
        assert rows[i]["certified_radius"] < step


def test_the_table_of_a_real_run(curvcert: Curvcert) -> None:
    done = curvcert(*WORDS)
    assert done.code == 0
    assert "10 more samples (--all shows every row)" in done.out
    assert "certified accuracy at 0.01" in done.out
    assert "warning: accuracy" in done.err  # random weights guess


def test_data_that_do_not_fit_name_both_shapes(curvcert: Curvcert, tmp_path: Path) -> None:
    np.savez(tmp_path / "wide.npz", x=np.zeros((2, 3, 9, 9), dtype=np.float32), y=np.zeros(2, dtype=np.int64))
    done = curvcert("certify", "digits.onnx", "--data", tmp_path / "wide.npz")
    assert (done.code, done.out) == (3, "")
    assert done.err.count("\n") == 1


def test_a_named_set_that_cannot_fit_is_refused_before_its_download(
    curvcert: Curvcert, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vars(certify_cli), "load_data", lambda *_, **__: pytest.fail("the data were loaded"))
    done = curvcert("certify", "digits.onnx", "--data", "CIFAR10")
    assert (done.code, done.out) == (3, "")
    assert "(3, 32, 32)" in done.last
    assert "(1, 8, 8)" in done.last


@pytest.mark.parametrize(
    ("words", "code", "option"),
    [("--samples x", 2, "--samples"), ("--device abacus", 2, "--device"), ("--std 0", 2, "--std")],
)
def test_options_refused_further_down_the_road(curvcert: Curvcert, words: str, code: int, option: str) -> None:
    done = curvcert("certify", "digits.onnx", "--data", "digits", *words.split())
    assert (done.code, done.out) == (code, "")
    assert option in done.last


def test_where_a_sample_loses(curvcert: Curvcert) -> None:
    words = ("bounds", "digits.onnx", "--sample", "3", "--data", "digits")
    found = json.loads(curvcert(*words, "--format", "json").out)
    assert (found["sample"], found["losses"]["prediction"] != found["losses"]["rival"]) == (3, True)
    losses = found["losses"]
    parts = losses["gradient"] + losses["gap"] + sum(row["total"] for row in losses["layers"])
    assert losses["margin"] - losses["left"] == pytest.approx(parts)
    assert [row["name"] for row in losses["layers"]] == ["softplus"]
    table = curvcert(*words)
    assert table.code == 0
    assert "sample 3: class" in table.out
    lines = table.out.splitlines()
    titles = ["term", "half width", "nonlinear", "intercept", "quadratic", "residual", "loss", "of margin"]
    assert re.split(" {2,}", lines[2]) == titles
    assert [line.split()[0] for line in lines[-3:]] == ["gradient", "softplus", "proof"]
    certified = document(curvcert, "--method", "local", "--samples", "3:4")["samples"][0]
    assert losses["radius"] == pytest.approx(certified["certified_radius"], rel=0.02)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--sample 3", "--sample I and --data SOURCE belong together"),
        ("--data digits", "--sample I and --data SOURCE belong together"),
        ("--sample 99999 --data digits", "99999"),
    ],
)
def test_a_sample_that_is_not_there(curvcert: Curvcert, words: str, says: str) -> None:
    done = curvcert("bounds", "digits.onnx", *words.split())
    assert done.code in (2, 3)
    assert says in done.last


MEASURE = ("bounds", "digits.onnx", "--measure", "--data", "digits", "--samples", "4:7")


def test_bounds_beside_what_is_measured(curvcert: Curvcert) -> None:
    from certify_cli.attacks.measured_curvature import measured

    plain = json.loads(curvcert("bounds", "digits.onnx", "--format", "json").out)
    done = curvcert(*MEASURE, "--radius", "1/4", "--format", "json")
    assert (done.code, done.err) == (0, "")
    document = json.loads(done.out)
    found = document.pop("measured")
    assert document == plain
    assert found.pop("bounds").keys() == {"gradient_norm", "curvature"}
    data = certify_cli.load_data("digits", samples="4:7")
    assert found == measured(digits_network(), data.x, data.y, (4, 5, 6), 0.25).to_dict()
    assert (found["estimate"], found["loss"]) == (True, "cross-entropy with the label")
    table = curvcert(*MEASURE).out
    assert table.startswith(curvcert("bounds", "digits.onnx").out)
    head, _, rows = table.partition("\n\n")[2].partition("estimate ")
    assert head == (
        "at 3 samples of digits: estimates, of the cross-entropy with the label;\n"
        "gradients are compared at distance 0.1; the bound holds everywhere:\n"
    )
    assert rows.splitlines()[0].split() == ["mean", "median", "largest", "bound"]
    assert [line.endswith(" -") for line in rows.splitlines()[2:]] == [False, False, True, True, True]


def test_measured_without_labels_and_with_kinks(
    curvcert: Curvcert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).random((5, 1, 8, 8), dtype=np.float32))
    words = ("bounds", "digits.onnx", "--measure", "--data", str(tmp_path / "x.npz"))
    found = json.loads(curvcert(*words, "--format", "json").out)["measured"]
    assert found["loss"] == "cross-entropy with the prediction"
    assert len(found["samples"]) == 5
    monkeypatch.setattr(activations, "softplus", lambda beta: activations.relu())
    monkeypatch.setitem(vars(certify_cli), "load_model", lambda path, **rest: LoadedModel(
        digits_network(), ModelInfo("digits.onnx", "ab" * 32, "onnx", 18, 10), (1, 8, 8), "float32", ()))  # fmt: skip
    assert json.loads(curvcert(*words, "--format", "json").out)["measured"]["mean"]["curvature"] is None
    last = curvcert(*words).out.splitlines()[-1]
    assert last.startswith("softplus (relu) has no bounded second derivative: curvature is not measured")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--measure", "--measure needs --data SOURCE"),
        ("--measure --data digits --sample 3", "--sample and --measure are two tables"),
        ("--samples 3", "--samples and --radius say what is measured; add --measure"),
        ("--radius 0.2 --sample 3 --data digits", "--samples and --radius say what is measured; add --measure"),
        ("--measure --data digits --radius 0", "--radius '0' is not a positive number"),
        ("--measure --data digits --radius 1/0", "--radius '1/0' is not a positive number"),
        ("--measure --data digits --radius 1e9", "--radius '1e9' is not a positive number"),
        ("--measure --data digits --samples 999999:", "--samples starts at 999999"),
        ("--measure --data digits --mean 1,2", "mean"),
    ],
)
def test_what_cannot_be_measured(curvcert: Curvcert, words: str, says: str) -> None:
    done = curvcert("bounds", "digits.onnx", *words.split())
    assert done.code in (2, 3)
    assert done.out == ""
    assert says in done.last


def test_labels_of_another_data_set_are_refused(curvcert: Curvcert, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 1, 8, 8), dtype=np.float32), y=np.array([0, 10]))
    done = curvcert("bounds", "digits.onnx", "--measure", "--data", str(tmp_path / "x.npz"))
    assert "has the label 10, but the model has 10 classes" in done.last


@pytest.mark.parametrize("option", ["--mean 0.5", "--split train", "--data-root .", "--layout nhwc"])
def test_what_says_how_a_sample_is_read_needs_one(curvcert: Curvcert, option: str) -> None:
    done = curvcert("bounds", "digits.onnx", *option.split())
    assert done.code == 2
    assert option.split()[0] in done.last
