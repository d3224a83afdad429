"""The command line on model files as they come, with nothing replaced."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import save_file

from tests.cli.conftest import Outcome
from tests.schema import SCHEMA

Curvcert = Callable[..., Outcome]
SHARED = Path(__file__).parents[3] / "shared"
MODEL = SHARED / "models" / "crc_mnist_softplus_1x1024.onnx"

shared = pytest.mark.skipif(not MODEL.is_file(), reason="the shared models are not beside this checkout")


@shared
def test_certify_a_published_model(curvcert: Curvcert) -> None:
    words = ("certify", MODEL, "--data", "mnist", "--data-root", SHARED / "data", "--offline", "--samples", "40")
    done = curvcert(*words, "--eps", "1.58", "--format", "json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    jsonschema.Draft202012Validator(SCHEMA).validate(found)
    assert found["summary"]["accuracy"] > 0.85
    assert found["summary"]["certified_accuracy"]["1.58"] > 0.3
    assert found["run"]["model"]["format"] == "onnx"


@shared
def test_convert_and_inspect_a_published_model(curvcert: Curvcert, tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    assert curvcert("convert", MODEL, target).code == 0
    before, after = (json.loads(curvcert("inspect", path, "--format", "json").out) for path in (MODEL, target))
    assert before["parameters"] == after["parameters"] > 0
    assert before["methods"] == after["methods"]


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x07\x12", b"PK\x03\x04rest"])
@pytest.mark.parametrize("command", ["certify", "inspect", "bounds", "convert"])
def test_what_is_no_model_is_one_sentence_and_exit_3(
    curvcert: Curvcert, tmp_path: Path, content: bytes, command: str
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(content)
    more = {"certify": ["--data", "digits"], "convert": [tmp_path / "out.safetensors"]}.get(command, [])
    done = curvcert(command, broken, *more)
    assert (done.code, done.out) == (3, "")
    assert done.err.count("\n") == 1
    assert "broken.onnx" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["broken.onnx"]


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e22, 1e150])
def test_inspect_shows_blocks_of_any_size(size: float, curvcert: Curvcert, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    layers = [
        {"type": "Linear", "name": "v"},
        {"type": "relu", "name": "phi"},
        {"type": "Linear", "name": "g"},
        {"type": "add", "name": "sum", "inputs": ["input", "g"]},
        {"type": "Linear", "name": "head"},
    ]
    spec = {"format": "curvcert-architecture/1", "input": [2], "layers": layers}
    v = torch.tensor([[1.0, 0.5], [-0.5, 2.0]], dtype=torch.float64) * size
    tensors = {"v.weight": v, "g.weight": -0.3 * v.T.contiguous(), "head.weight": torch.eye(2, dtype=torch.float64)}
    save_file(tensors, path, metadata={"curvcert": json.dumps(spec)})
    for form in ("table", "json"):
        done = curvcert("inspect", path, "--format", form)
        assert done.code == 0, done.err
        assert ("V^T D phi" in done.out) == (size < 1e100)
