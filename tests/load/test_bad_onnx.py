"""A corpus of bad ONNX files: each gives one sentence that names the file and the place, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from certify_cli.errors import ModelError
from certify_cli.load.onnx.loader import load_onnx

FLOAT = TensorProto.FLOAT


def model(
    nodes: list[Any] | None = None,
    weights: dict[str, np.ndarray] | None = None,
    inputs: tuple[str, ...] = ("x",),
    outputs: tuple[str, ...] = ("y",),
    shape: tuple[Any, ...] = ("N", 4),
    opset: int = 13,
    domains: tuple[str, ...] = (),
) -> onnx.ModelProto:
    """Four inputs, three logits, one matrix, unless told otherwise."""
    nodes = nodes if nodes is not None else [helper.make_node("MatMul", ["x", "w"], ["y"], name="head")]
    weights = weights if weights is not None else {"w": np.ones((4, 3), dtype=np.float32)}
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, FLOAT, shape) for name in inputs],
        [helper.make_tensor_value_info(name, FLOAT, ["N", "K"]) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def external(location: str, length: int = 48, offset: int = 0) -> onnx.ModelProto:
    """The weight in another file."""
    made = model()
    tensor = made.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return made


def weight(change: Callable[[TensorProto], None]) -> onnx.ModelProto:
    made = model()
    change(made.graph.initializer[0])
    return made


def with_number(value: float) -> onnx.ModelProto:
    array = np.ones((4, 3), dtype=np.float32)
    array[1, 2] = value
    return model(weights={"w": array})


def branch() -> Any:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["z"])], "b", [], [helper.make_tensor_value_info("z", FLOAT, None)]
    )
    return helper.make_node("If", ["c"], ["y"], name="choice", then_branch=graph, else_branch=graph)


def loop() -> Any:
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, [])],
    )
    return helper.make_node("Loop", ["m", "c"], [], name="again", body=body)


def huge(tensor: TensorProto) -> None:
    tensor.dims[:] = [2**40, 2**20]


def node(operator: str, *inputs: str, **attributes: Any) -> Any:
    return helper.make_node(operator, list(inputs), ["y"], name="place", **attributes)


W = {"w": np.ones((4, 3), dtype=np.float32)}
CYCLE = [helper.make_node("Add", ["x", "b"], ["a"], name="place"), helper.make_node("Add", ["x", "a"], ["b"])]
STEP = np.array(0.1, dtype=np.float32)
ZERO = np.array(0, dtype=np.uint8)

MODELS: dict[str, tuple[onnx.ModelProto, str]] = {
    "outside": (external("../secret.bin"), "'../secret.bin'"),
    "absolute": (external("/etc/hostname"), "'/etc/hostname'"),
    "folder": (external("sub/data.bin"), "'sub/data.bin'"),
    "link": (external("link.bin"), "is a link"),
    "missing data": (external("nowhere.bin"), "'nowhere.bin' is missing"),
    "short data": (external("short.bin"), "lies outside its data file"),
    "negative offset": (external("short.bin", 8, -4), "lies outside its data file"),
    "wrong length": (external("long.bin", 40), "declares 12 numbers"),
    "fifo": (external("pipe"), "'pipe' is missing"),
    "nan": (with_number(np.nan), "the weight 'w' holds NaN"),
    "infinite": (with_number(np.inf), "the weight 'w' holds NaN or infinite"),
    "huge": (weight(huge), "the weight 'w' declares"),
    "negative size": (weight(lambda t: t.dims.__setitem__(0, -4)), "the weight 'w' has a negative size"),
    "short raw": (weight(lambda t: setattr(t, "raw_data", t.raw_data[:-4])), "the weight 'w' declares 12 numbers"),
    "no type": (weight(lambda t: setattr(t, "data_type", 0)), "the weight 'w' has the type undefined"),
    "odd type": (weight(lambda t: setattr(t, "data_type", 999)), "the weight 'w' has the type number 999"),
    "float8": (weight(lambda t: setattr(t, "data_type", TensorProto.FLOAT8E5M2)), "the weight 'w' has the type float8"),
    "missing weight": (model(weights={}), "'head' (MatMul) reads the tensor 'w', which is nowhere"),
    "misfit": (model(weights={"w": np.ones((5, 3), dtype=np.float32)}), "'head' (MatMul) cannot be computed"),
    "if": (model([branch()], W | {"c": np.array(True)}), "'choice' (If) is control flow"),
    "loop": (model([loop(), node("MatMul", "x", "w")], W | {"c": np.array(True)}), "'again' (Loop) is control flow"),
    "two inputs": (model([node("Add", "x", "z")], {}, inputs=("x", "z")), "2 inputs (x, z)"),
    "no input": (model([node("Neg", "w")], W, inputs=()), "0 inputs"),
    "two outputs": (
        model([*model().graph.node, helper.make_node("MatMul", ["x", "w"], ["z"])], outputs=("y", "z")),
        "2 outputs ('y', 'z'), and not all derive from one",
    ),
    "map of logits": (model([node("Neg", "x")], {}, shape=("N", 3, 2)), "a vector of at least two logits"),
    "constant output": (model([node("Neg", "w")], W), "does not depend on the input"),
    "identity": (model([node("Identity", "x")], {}), "computes nothing"),
    "free size": (model(shape=("N", "M")), "leaves sizes of a sample free (['free'])"),
    "batch alone": (model(shape=("N",)), "or has the batch's alone"),
    "huge input": (model([node("Neg", "x")], {}, shape=("N", 2**30, 2**30)), "too large"),
    "qlinear": (
        model([node("DynamicQuantizeLinear", "x")], {}),
        "'place' (DynamicQuantizeLinear) is quantised",
    ),
    "quantize": (model([node("QuantizeLinear", "x", "s", "o")], {"s": STEP, "o": ZERO}), "'place' (QuantizeLinear)"),
    "cycle": (model(CYCLE, {}, outputs=("b",)), "'place' (Add) reads the tensor 'b', which is computed only later"),
    "written twice": (model([node("Neg", "x"), node("Abs", "x")], {}), "a second time"),
    "output nowhere": (model(outputs=("q",)), "'q' is computed nowhere"),
    "foreign": (
        model([helper.make_node("Fancy", ["x"], ["y"], name="place", domain="com.acme")], {}, domains=("com.acme",)),
        "'place' (Fancy) comes from the operator set 'com.acme'",
    ),
    "unknown": (model([node("NoSuchOperator", "x")], {}), "NoSuchOperator"),
    "opset too old": (model(opset=6), "opset 6 is not supported"),
    "opset too new": (model(opset=999), "opset 999 is not supported"),
    "attention": (model([node("MatMul", "x", "x")], {}, shape=("N", 3, 3)), "'place' (MatMul)"),
    "square": (model([node("Mul", "x", "x")], {}), "'place' (Mul): a product of two values"),
    "reciprocal": (model([node("Div", "w", "x")], {"w": np.ones(4, dtype=np.float32)}), "'place' (Div)"),
    "divided by zero": (model([node("Div", "x", "w")], {"w": np.zeros(4, dtype=np.float32)}), "'place' (Div)"),
    "batch mean": (model([node("ReduceMean", "x", axes=[0])], {}), "'place' (ReduceMean) reduces over the batch"),
    "batch reshape": (
        model([node("Reshape", "x", "s")], {"s": np.array([4, 1])}),
        "'place' (Reshape) turns one sample into a value of shape [4, 1]",
    ),
    "batch in front": (
        model([node("Add", "x", "w")], {"w": np.ones((2, 4), dtype=np.float32)}),
        "'place' (Add) turns one sample",
    ),
    "norm": (model([node("ReduceL2", "x", axes=[1])], {}), "'place' (ReduceL2) is not supported"),
    "layer norm": (
        model([node("LayerNormalization", "x", "w")], {"w": np.ones(4, dtype=np.float32)}, opset=17),
        "'place' (LayerNormalization) is not supported",
    ),
    "softmax inside": (
        model([helper.make_node("Softmax", ["x"], ["p"], name="place"), node("MatMul", "p", "w")]),
        "'place' (Softmax) is not supported",
    ),
    "training": (
        model(
            [node("BatchNormalization", "x", *"abcd", training_mode=1)],
            {key: np.ones(4, dtype=np.float32) for key in "abcd"},
            opset=15,
        ),
        "'place' (BatchNormalization) is in training mode",
    ),
    "dropout training": (
        model([node("Dropout", "x", "r", "t")], {"r": STEP, "t": np.array(True)}),
        "'place' (Dropout)",
    ),
    "bomb": (
        model(
            [helper.make_node("ConstantOfShape", ["s"], ["big"], name="place"), node("Add", "x", "big")],
            {"s": np.array([2**20, 2**20])},
        ),
        "'place' (ConstantOfShape) makes a value of",
    ),
    "rounding": (
        model(
            [helper.make_node("Cast", ["x"], ["i"], name="place", to=TensorProto.INT32), node("Cast", "i", to=FLOAT)],
            {},
        ),
        "'place' (Cast)",
    ),
}


def fill(folder: Path) -> None:
    """The surroundings that the corpus points to."""
    (folder / "short.bin").write_bytes(bytes(16))
    (folder / "long.bin").write_bytes(bytes(48))
    (folder.parent / "secret.bin").write_bytes(bytes(48))
    (folder / "sub").mkdir()
    (folder / "sub" / "data.bin").write_bytes(bytes(48))
    (folder / "link.bin").symlink_to(folder / "long.bin")
    os.mkfifo(folder / "pipe")


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_onnx(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: "), text
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", MODELS)
def test_bad_model(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    fill(folder)
    made, place = MODELS[name]
    (folder / "bad.onnx").write_bytes(made.SerializeToString())
    assert place in refusal(folder / "bad.onnx")


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda good: b"", "the file is empty"),
    "random": (lambda good: np.random.default_rng(0).bytes(5000), "not an ONNX model"),
    "text": (lambda good: b"this is no model\n" * 40, "not an ONNX model"),
    "pickle": (lambda good: b"\x80\x04\x95" + bytes(100), "not an ONNX model"),
    "zeros": (lambda good: bytes(1000), "not an ONNX model"),
}


@pytest.mark.parametrize("name", BYTES)
def test_bad_bytes(name: str, tmp_path: Path) -> None:
    make, place = BYTES[name]
    (tmp_path / "bad.onnx").write_bytes(make(b""))
    assert place in refusal(tmp_path / "bad.onnx")


def test_truncated_at_every_length(tmp_path: Path) -> None:
    good = model().SerializeToString()
    path = tmp_path / "bad.onnx"
    path.write_bytes(good)
    load_onnx(path)
    for length in range(1, len(good)):
        path.write_bytes(good[:length])
        assert refusal(path)


def test_every_byte_flipped_loads_or_is_refused(tmp_path: Path) -> None:
    """Nothing but a ModelError may come out of a damaged file."""
    good = model().SerializeToString()
    path = tmp_path / "bad.onnx"
    refusals = []
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1 :])
        try:
            load_onnx(path)
        except ModelError as error:
            refusals.append(str(error))
    assert all(text.startswith(f"{path}: ") and "\n" not in text for text in refusals)
    assert len(refusals) > len(good) // 4


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "none.onnx")
    assert "not a file" in refusal(tmp_path)


def test_nothing_outside_the_folder_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """External data that is refused is refused before it is opened."""
    folder = tmp_path / "models"
    folder.mkdir()
    fill(folder)
    opened: list[str] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda file, *rest, **more: opened.append(str(file)) or real(file, *rest, **more))
    for name in ("outside", "absolute", "folder", "link", "fifo"):
        (folder / "bad.onnx").write_bytes(MODELS[name][0].SerializeToString())
        refusal(folder / "bad.onnx")
    assert opened == []
