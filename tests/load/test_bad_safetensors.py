"""Files that must be refused: each with one sentence that names the file and the place."""

from __future__ import annotations

import copy
import json
import math
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from certify_cli.errors import ModelError, UsageError
from certify_cli.load.model import load_model
from certify_cli.load.safetensors.architecture import FORMAT
from tests.files import tensors

SPEC: dict[str, Any] = {
    "format": FORMAT,
    "input": [1, 4, 4],
    "layers": [
        {"type": "Conv2d", "name": "conv", "padding": 1},
        {"type": "tanh", "name": "act"},
        {"type": "Flatten", "name": "flat"},
        {"type": "Linear", "name": "fc"},
    ],
}


def refused(path: Path, what: str, error: type[Exception] = ModelError, **options: Any) -> None:
    with pytest.raises(error, match=what) as caught:
        load_model(path, **options)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    assert len(message) < 1200


def test_the_unbroken_file_loads(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    save_file(tensors(), path, {"curvcert": json.dumps(SPEC)})
    assert load_model(path).info.classes == 3


# the container


def header(content: Any, body: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + body


ONE = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
CONTAINERS: dict[str, bytes] = {
    "truncated": save(tensors(), {"curvcert": json.dumps(SPEC)})[:-7],
    "only_a_header": save(tensors())[:100],
    "huge_header": struct.pack("<Q", 2**62) + b"{}",
    "not_json": header(b"{this is not json}"),
    "offsets_past_the_end": header({"a": {**ONE, "data_offsets": [0, 2**40]}}, bytes(16)),
    "shape_that_lies": header({"a": {**ONE, "shape": [2, 3]}}, bytes(16)),
    "shape_that_overflows": header({"a": {**ONE, "shape": [2**33, 2**33]}}, bytes(16)),
    "overlap": header({"a": ONE, "b": ONE}, bytes(16)),
    "hole": header({"a": ONE, "b": {**ONE, "data_offsets": [20, 36]}}, bytes(36)),
    "unknown_type": header({"a": {**ONE, "dtype": "Q7"}}, bytes(16)),
    "text": b"certainly not tensors at all",
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", CONTAINERS)
def test_damaged_containers(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(CONTAINERS[name])
    refused(path, "not a readable safetensors file")


BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


@pytest.mark.parametrize("shape", [[2, 4], [], [0, 4], [2, 2, 2]])
@pytest.mark.parametrize("dtype", BITS)
def test_every_type_of_numbers_loads_or_is_refused(dtype: str, shape: list[int], tmp_path: Path) -> None:
    size = -(-math.prod(shape) * BITS[dtype] // 8)
    spec = {"format": FORMAT, "input": [4], "layers": [{"type": "Linear", "name": "fc"}]}
    tensor = {"fc.weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    for metadata, activation in (({"curvcert": json.dumps(spec)}, None), ({}, "tanh")):
        path = tmp_path / "m.safetensors"
        path.write_bytes(header({"__metadata__": metadata, **tensor}, bytes(size)))
        try:
            loaded = load_model(path, activation=activation)
        except ModelError as error:
            refusal = str(error)
        else:
            assert shape == [2, 4]
            assert dtype.startswith(("F", "BF"))
            assert loaded.network.classes == 2
            continue
        assert path.name in refusal
        assert "\n" not in refusal
        assert dtype not in ("F16", "BF16", "F32", "F64") or shape != [2, 4]


# the architecture

Change = Callable[[dict[str, Any], dict[str, Tensor]], Any]


def layer(position: int, **fields: Any) -> Change:
    return lambda spec, _: spec["layers"][position].update(fields)


def field(**fields: Any) -> Change:
    return lambda spec, _: spec.update(fields)


def tensor(name: str, value: Tensor | None) -> Change:
    def change(_: dict[str, Any], held: dict[str, Tensor]) -> None:
        held.pop(name, None)
        if value is not None:
            held[name] = value

    return change


def insert(position: int, **entry: Any) -> Change:
    return lambda spec, _: spec["layers"].insert(position, entry)


def dead_end(spec: dict[str, Any], _: dict[str, Tensor]) -> None:
    spec["layers"][0]["inputs"] = ["input"]
    spec["layers"].insert(0, {"type": "tanh", "name": "dead"})


NAN, INF = torch.full((2,), float("nan")), torch.full((2,), float("inf"))
CHANGES: dict[str, tuple[Change, str]] = {
    "other format": (field(format="curvcert-architecture/9"), "architecture/9"),
    "unknown field": (field(code="import os"), "unknown field code"),
    "no layers": (field(layers=[]), "at least one layer"),
    "layers of a wrong type": (field(layers="Linear"), "list"),
    "layer of a wrong type": (field(layers=["Linear"]), "layer 1: a JSON object"),
    "input of a wrong type": (field(input="1x4x4"), "input"),
    "input with a hole": (field(input=[1, -1, 4]), "input"),
    "unknown layer": (layer(1, type="os.system"), "'act'.*unknown type"),
    "torch class outside the table": (layer(1, type="MultiheadAttention"), "unknown type"),
    "layer without a type": (layer(1, type=None), "type must be a text"),
    "name twice": (layer(1, name="conv"), "'conv'.*taken"),
    "name of the input": (layer(1, name="input"), "'input'.*taken"),
    "later input": (layer(1, inputs=["fc"]), "'fc' is no earlier layer"),
    "two inputs of one": (layer(1, inputs=["conv", "input"]), "takes one input, not 2"),
    "inputs of a wrong type": (layer(1, inputs="conv"), "inputs must be a list"),
    "layer that leads nowhere": (dead_end, "layers dead lead nowhere"),
    "unknown layer field": (layer(0, bias_scale=3), "unknown field bias_scale; it takes"),
    "field of a wrong type": (layer(0, stride="2"), "stride must be 2 integers"),
    "stride zero": (layer(0, stride=0), "at least 1"),
    "negative padding": (layer(0, padding=-1), "at least 0"),
    "groups that do not divide": (layer(0, groups=3), "'conv'"),
    "huge padding": (layer(0, padding=10**6), "too large"),
    "kernel larger than the image": (layer(0, padding=0, dilation=9), "'conv'.*larger"),
    "missing tensor": (tensor("fc.weight", None), "'fc'.*'fc.weight'"),
    "named tensor missing": (layer(3, bias="nowhere"), "no tensor 'nowhere'"),
    "tensor name of a wrong type": (layer(3, bias=7), "name of a tensor"),
    "extra tensor": (tensor("spare", torch.zeros(3)), "unused: spare"),
    "dropped bias": (layer(3, bias=None), r"unused: fc\.bias"),
    "shapes that do not fit": (tensor("fc.weight", torch.zeros(3, 30)), "'fc'.*30"),
    "bias that does not fit": (tensor("fc.bias", torch.zeros(4)), r"\(4,\)"),
    "weight of wrong rank": (tensor("conv.weight", torch.zeros(2, 9)), "4 dimensions"),
    "empty weight": (tensor("fc.weight", torch.zeros(0, 32)), r"\(0, 32\)"),
    "NaN weight": (tensor("conv.bias", NAN), r"'conv\.bias' holds a NaN"),
    "infinite weight": (tensor("conv.bias", INF), r"'conv\.bias' holds a NaN or an inf"),
    "integer weights": (tensor("fc.weight", torch.ones(3, 32, dtype=torch.int8)), "quantised"),
    "complex weights": (tensor("fc.weight", torch.ones(3, 32, dtype=torch.complex64)), "complex"),
    "bad activation parameter": (layer(1, type="softplus", beta=-1), "'act'"),
    "activation parameter of a wrong type": (layer(1, type="softplus", beta="5"), "beta must be a finite number"),
    "infinite parameter": (layer(1, type="softplus", beta=float("inf")), "finite"),
    "endless integer": (layer(1, type="softplus", beta=10**400), "finite"),
    "one threshold of two": (layer(1, type="MaxMin", low=0), "'act'.*low and high come together"),
    "threshold of a wrong type": (layer(1, type="MaxMin", low=0, high="\x1b[31m"), "high must be a finite number"),
    "add of two shapes": (insert(4, type="add", name="sum", inputs=["flat", "fc"]), "'sum'.*cannot add"),
    "concat of no axis": (insert(2, type="concat", name="cat", inputs=["conv", "act"], axis=3), "axis 3"),
    "std zero": (insert(0, type="Normalise", name="norm", std=0), "'norm'.*positive"),
    "mean of wrong length": (insert(0, type="Normalise", name="norm", mean=[1, 2]), "'norm'.*2 values"),
    "odd padding": (insert(0, type="Pad", name="pad", padding=[1]), "'pad'.*two numbers an axis"),
    "reflection past the image": (insert(0, type="Pad", name="pad", padding=[9, 9], mode="reflect"), "'pad'"),
    "reshape to other sizes": (insert(2, type="reshape", name="shape", shape=[5]), "'shape'.*cannot reshape"),
    "output of two axes": (lambda spec, _: spec["layers"].pop(2), "'fc'.*32 inputs"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_architectures_that_are_wrong(name: str, tmp_path: Path) -> None:
    change, what = CHANGES[name]
    spec, held = copy.deepcopy(SPEC), tensors()
    change(spec, held)
    path = tmp_path / "bad.safetensors"
    save_file(held, path, {"curvcert": json.dumps(spec)})
    refused(path, what)


def test_one_logit_is_told_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    held = {**tensors(), "fc.weight": torch.zeros(1, 32), "fc.bias": torch.zeros(1)}
    save_file(held, path, {"curvcert": json.dumps(SPEC)})
    refused(path, "two logits")


PRIMITIVES: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "index past the end": ({"type": "select", "size": 4}, {"p.index": torch.tensor([0, 4])}, "between -1 and 3"),
    "index below -1": ({"type": "select", "size": 4}, {"p.index": torch.tensor([0, -2])}, "between -1 and 3"),
    "index of floats": ({"type": "select", "size": 4}, {"p.index": torch.tensor([0.0, 1.0])}, "int64"),
    "size that lies": ({"type": "select", "size": 9}, {"p.index": torch.tensor([0, 8])}, "9 entries"),
    "scale that enlarges": ({"type": "scale"}, {"p.weight": torch.ones(2, 4)}, "scale constant"),
    "dense of three axes": ({"type": "dense"}, {"p.weight": torch.ones(2, 2, 4)}, "2 dimensions"),
    "dense with a wide offset": (
        {"type": "dense"},
        {"p.weight": torch.ones(2, 4), "p.offset": torch.ones(2, 2)},
        "offset of shape",
    ),
    "conv of no axes": (
        {"type": "conv", "stride": [1], "padding": [0], "dilation": [1]},
        {"p.weight": torch.ones(2, 4)},
        "no convolution",
    ),
    "conv of other axes": (
        {"type": "conv", "stride": [1, 1], "padding": [0], "dilation": [1]},
        {"p.weight": torch.ones(2, 4, 1)},
        "stride must hold 1",
    ),
}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitives_that_are_wrong(name: str, tmp_path: Path) -> None:
    entry, held, what = PRIMITIVES[name]
    spec = {"format": FORMAT, "input": [4], "layers": [{"name": "p", **entry}]}
    path = tmp_path / "bad.safetensors"
    save_file(held, path, {"curvcert": json.dumps(spec)})
    refused(path, f"layer 'p'.*{what}")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "[" * 100_000, '{"format": NaN}'])
def test_an_architecture_that_is_no_object(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    save_file(tensors(), path, {"curvcert": text})
    refused(path, "architecture")


def test_no_architecture_says_how_to_give_one(tmp_path: Path) -> None:
    path = tmp_path / "bare.safetensors"
    save_file(tensors(), path)
    refused(path, "bare.json.*--activation")
    path.with_suffix(".json").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"bare\.json: not a readable text"):
        load_model(path)


# what is no model at all


def test_files_that_are_no_model(tmp_path: Path) -> None:
    refused(tmp_path / "missing.onnx", "no such file")
    refused(tmp_path, "a folder")
    empty = tmp_path / "empty.safetensors"
    empty.touch()
    refused(empty, "empty; export or copy")


def test_a_header_whose_length_begins_like_a_pickle_is_none(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    contents = (save(tensors(), {"curvcert": json.dumps(SPEC) + " " * padding}) for padding in range(256))
    path.write_bytes(next(content for content in contents if content.startswith(b"\x80")))
    assert load_model(path).info.classes == 3


class Bomb:
    def __reduce__(self) -> Any:
        return pytest.fail, ("the pickle was opened",)


@pytest.mark.parametrize(
    "name",
    ["model.pt", "model.pth", "model.pkl", "model.bin", "model.ckpt", "model.onnx", "model", "model.safetensors"],
)
def test_pickles_are_refused_unopened(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Bomb()))
    refused(path, "a pickle.*torch.onnx.export.*safetensors")
    torch.save({"a": torch.zeros(2)}, path)
    refused(path, "a zip archive.*torch.onnx.export.*safetensors")


def test_activation_is_for_safetensors_only(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x07")
    refused(path, "--activation", UsageError, activation="tanh")
