"""`inspect`, `bounds`, `convert` and `doctor`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

import certify_cli
from certify_cli.cli import doctor as doctor_module
from certify_cli.cli.selftest import PROBLEMS
from certify_cli.load.loaded_model import LoadedModel
from certify_cli.names import METHOD_NAMES
from certify_cli.network.activations import rows as activations
from certify_cli.network.activations.table import from_name
from certify_cli.network.affine import Dense
from certify_cli.network.graph import Builder
from certify_cli.records import ModelInfo
from tests.cli.conftest import Outcome
from tests.records import sample

Curvcert = Callable[..., Outcome]


def dense(out: int, inputs: int) -> Dense:
    weight = torch.linspace(-1, 1, out * inputs, dtype=torch.float64).reshape(out, inputs)
    return Dense(weight, torch.zeros(out, dtype=torch.float64))


def model(activation: str) -> LoadedModel:
    assert activations  # its import fills the table that from_name reads
    builder = Builder((4,))
    hidden = builder.add("\x1b[31mfc1", dense(5, 4), 0)
    output = builder.add("fc2", dense(3, 5), builder.add("act", from_name(activation), hidden))
    info = ModelInfo("small.onnx", "ab" * 32, "onnx", 18, 3)
    return LoadedModel(builder.build(output), info, (4,), "float16", ("weights are float16, upcast exactly",))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """`small.onnx` has the activation given by --activation (here a stand-in for files of many kinds)."""

    def load_model(path: str, *, activation: str | None = None, **rest: Any) -> LoadedModel:
        return model(activation or "softplus")

    monkeypatch.setitem(vars(certify_cli), "load_model", load_model)


@pytest.mark.usefixtures("loads")
def test_inspect_json(curvcert: Curvcert) -> None:
    done = curvcert("inspect", "small.onnx", "--activation", "softplus:10", "--format", "json")
    found = json.loads(done.out)
    assert done.err == ""
    assert found["model"] == {
        "path": "small.onnx", "sha256": "ab" * 32, "format": "onnx", "opset": 18, "classes": 3,
    }  # fmt: skip
    assert (found["input_shape"], found["stored_dtype"], found["parameters"]) == ([4], "float16", 25 + 18)
    assert [node["shape"] for node in found["nodes"]] == [[4], [5], [5], [3]]
    assert [node["parameters"] for node in found["nodes"]] == [0, 25, 0, 18]
    assert found["nodes"][3]["inputs"] == ["act"]
    assert found["nodes"][2]["operation"] == "softplus(beta=10)"
    assert {method["name"]: method["applies"] for method in found["methods"]} == dict.fromkeys(METHOD_NAMES, True)
    assert all(method["reason"] is None for method in found["methods"])


@pytest.mark.usefixtures("loads")
def test_inspect_says_why_a_method_does_not_apply(curvcert: Curvcert) -> None:
    done = curvcert("inspect", "small.onnx", "--activation", "relu", "--format", "json")
    methods = {method["name"]: method for method in json.loads(done.out)["methods"]}
    assert methods["curvature"]["applies"] is False
    assert "act" in methods["curvature"]["reason"]
    table = curvcert("inspect", "small.onnx", "--activation", "relu")
    assert "does not apply" in table.out
    assert "note: weights are float16, upcast exactly" in table.err
    assert "\x1b" not in table.out


@pytest.mark.usefixtures("loads")
def test_bounds_json_is_the_layer_table(curvcert: Curvcert) -> None:
    from certify_cli.bounds.global_bounds.layer_report import layer_table

    rows = json.loads(curvcert("bounds", "small.onnx", "--format", "json").out)["layers"]
    wanted = [row.to_dict() for row in layer_table(model("softplus").network)]
    assert [row | {"shape": tuple(row["shape"])} for row in rows] == wanted
    assert len(rows) == 2


@pytest.mark.usefixtures("loads")
def test_bounds_table(curvcert: Curvcert) -> None:
    smooth = curvcert("bounds", "small.onnx")
    assert smooth.code == 0
    assert "curvature" in smooth.out
    assert "100.0 %" in smooth.out
    rough = curvcert("bounds", "small.onnx", "--activation", "relu").out.splitlines()
    assert rough[-1].split()[-2:] == ["-", "-"]  # no curvature, no share


@pytest.mark.usefixtures("loads")
@pytest.mark.parametrize("command", ["bounds", "inspect"])
def test_tables_fit_narrow_terminals_and_their_header_is_one_line(
    curvcert: Curvcert, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    tables = [part for part in curvcert(command, "small.onnx").out.split("\n\n") if "─" in part]
    for lines in map(str.splitlines, tables):
        assert max(map(len, lines)) <= 60
        assert set(lines[1]) == {"─"}
    assert len(tables) == {"bounds": 1, "inspect": 2}[command]


@pytest.mark.usefixtures("loads")
@pytest.mark.parametrize("command", ["bounds", "inspect"])
def test_a_json_file_holds_json(curvcert: Curvcert, tmp_path: Path, command: str) -> None:
    target = tmp_path / "found.json"
    assert curvcert(command, "small.onnx", "-o", target).code == 0
    assert json.loads(target.read_text())["model"]["path"] == "small.onnx"
    assert curvcert(command, "small.onnx", "-o", target, "--format", "table").code == 0
    assert "─" in target.read_text()


def test_convert_writes_a_file_that_certifies_alike(
    curvcert: Curvcert, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from certify_cli.load import convert as convert_module

    source = model("softplus:5")
    monkeypatch.setattr(convert_module, "load_model", lambda path, **rest: source)
    target = tmp_path / "small.safetensors"
    done = curvcert("convert", "small.onnx", target, "--format", "json")
    found = json.loads(done.out)
    assert done.code == 0
    assert found["source"] == "small.onnx"
    assert found["model"]["path"] == str(target)
    assert found["model"]["sha256"] == hashlib.sha256(target.read_bytes()).hexdigest()
    x = torch.rand(3, 4, dtype=torch.float64)
    assert torch.equal(certify_cli.load_model(target).network(x), source.network(x))
    again = curvcert("convert", "small.onnx", target)
    assert (again.code, again.out) == (2, "")
    assert again.last.endswith("small.safetensors: exists already; name another file, or overwrite it with --force")
    assert found["model"]["sha256"] in curvcert("convert", "small.onnx", target, "--force").out


def test_convert_refuses_another_kind_of_target(curvcert: Curvcert, tmp_path: Path) -> None:
    done = curvcert("convert", "small.onnx", tmp_path / "small.pt")
    assert (done.code, done.out) == (2, "")
    assert ".safetensors" in done.last


@pytest.mark.parametrize("command", ["inspect", "bounds"])
def test_a_missing_model_is_exit_3(curvcert: Curvcert, command: str) -> None:
    done = curvcert(command, "absent.onnx")
    assert (done.code, done.out) == (3, "")
    assert "absent.onnx" in done.last


def test_doctor_finds_nothing_wrong_here(curvcert: Curvcert) -> None:
    done = curvcert("doctor", "--format", "json", "--device", "cpu")
    found = json.loads(done.out)
    assert (done.code, done.err) == (0, "")
    assert found["ok"] is True
    assert {"python", "devices", "threads", "cores", "version"} <= set(found)
    names = [check["name"] for check in found["checks"]]
    assert "torch" in names
    assert "self-test: linear network, cpu" in names
    assert "FAULT" not in curvcert("doctor").out


def test_doctor_tells_of_a_library_that_is_missing(curvcert: Curvcert, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor_module.LIBRARIES, "no-such-library", "no_such_library")
    done = curvcert("doctor")
    assert done.code == 1
    assert done.last.startswith("curvcert: doctor found a fault: no-such-library: cannot be imported")
    assert "FAULT" in done.out


def test_doctor_tells_of_a_radius_that_is_too_large(curvcert: Curvcert, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(PROBLEMS[0], exact=PROBLEMS[0].exact * Fraction(9, 10))
    monkeypatch.setattr(doctor_module, "PROBLEMS", (wrong,))
    done = curvcert("doctor", "--format", "json")
    assert done.code == 1
    assert json.loads(done.out)["ok"] is False
    assert "results cannot be trusted" in done.last


@pytest.mark.parametrize("name", ["abacus", "meta", "mps", "cuda:x", "cuda:-1", "cuda:07", ""])
def test_a_device_that_does_not_exist_is_exit_2(curvcert: Curvcert, name: str) -> None:
    done = curvcert("doctor", "--device", name)
    assert (done.code, done.out) == (2, "")
    assert done.last == f"curvcert: error: --device {name!r} is not one of auto, cpu, cuda, cuda:N"


@pytest.mark.parametrize(("built", "why"), [(False, "this PyTorch is built without CUDA"), (True, "no GPU was found")])
def test_cuda_where_there_is_none_says_why_and_what_to_do(
    curvcert: Curvcert, monkeypatch: pytest.MonkeyPatch, built: bool, why: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    done = curvcert("doctor", "--device", "cuda")
    said = f"curvcert: error: --device 'cuda' cannot be used here: {why}; use --device cpu or --device auto"
    assert (done.code, done.last) == (2, said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"prediction": 1}, "predicted class 1"),
        ({"certified_radius": None, "reason": "why"}, "certified nothing (why)"),
        ({"certified_radius": 1.4000000000000001}, "results cannot be trusted"),  # 7/5 rounded up in float64
        ({"certified_radius": 1.3}, "certified only 1.3"),
        ({"attack_radius": None}, "found no attack"),
        ({"attack_radius": 1.3999}, "results cannot be trusted"),
        ({"attack_radius": 1.5}, "attacked only at 1.5"),
    ],
)
def test_the_self_test_sees_every_fault(changes: dict[str, Any], said: str | None) -> None:
    good = {"certified_radius": 1.3999999999999, "attack_radius": 1.4000000000000001}
    fault = PROBLEMS[0].fault(sample(0, **(good | changes)))
    if said is None:
        assert fault is None
    else:
        assert fault is not None
        assert said in fault
