"""Operators computed here instead of by onnx.reference, and what the loader makes of them, against onnxruntime."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from certify_cli.errors import ModelError
from certify_cli.load.onnx.loader import load_onnx
from certify_cli.load.onnx.operators import OPERATORS
from certify_cli.load.onnx.runtime import NotRunnableError, Runtime

Case = tuple[NodeProto, dict[str, np.ndarray], tuple[int, ...], int]
"""A node of input x and output z, its constants, the shape of x with a batch of one, and the opset."""


def as_model(case: Case, flat: bool = False) -> onnx.ModelProto:
    node, constants, shape, opset = case
    nodes = [node, helper.make_node("Flatten", ["z"], ["y"])] if flat else [node]
    free = ["N", *shape[1:]] if flat else shape
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, free)],
        [helper.make_tensor_value_info("y" if flat else "z", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def window(random: np.random.Generator, space: list[int], pads_below: int = 0) -> dict[str, Any]:
    kernel = [int(random.integers(1, min(4, n) + 1)) for n in space]
    chosen: dict[str, Any] = {"kernel_shape": kernel, "strides": [int(random.integers(1, 4)) for _ in space]}
    way = random.integers(3)
    if way == 0:
        chosen["auto_pad"] = str(random.choice(["SAME_UPPER", "SAME_LOWER", "VALID"]))
    elif way == 1:
        chosen["pads"] = [int(random.integers(0, k)) for k in kernel * 2]
    return chosen


def pooling(random: np.random.Generator, operator: str) -> Case:
    opset = int(random.choice([11, 12, 19, 22]))
    space = [int(n) for n in random.integers(1, 9, size=random.integers(1, 4))]
    chosen = window(random, space)
    if random.random() < 0.5 and chosen.get("auto_pad") is None:
        chosen["ceil_mode"] = 1
    if operator == "AveragePool" and random.random() < 0.5:
        chosen["count_include_pad"] = 1
    if random.random() < 0.3 and (operator == "MaxPool" or opset >= 19):
        chosen["dilations"] = [int(random.integers(1, 3)) for _ in space]
    return helper.make_node(operator, ["x"], ["z"], **chosen), {}, (1, 2, *space), opset


def resizing(random: np.random.Generator, operator: str) -> Case:
    space = [int(n) for n in random.integers(1, 7, size=random.integers(1, 3))]
    scales = [1.0, 1.0, *(float(random.choice([0.5, 1, 2, 3, 1 / 3, 2 / 3, 1.5, 0.4, 2.6])) for _ in space)]
    array = np.array(scales, np.float32)
    if operator == "Upsample":
        array = np.maximum(array, 1)
        return helper.make_node("Upsample", ["x", "s"], ["z"], mode="nearest"), {"s": array}, (1, 2, *space), 9
    opset = int(random.choice([10, 11, 13, 18, 19]))
    if opset == 10:
        return helper.make_node("Resize", ["x", "s"], ["z"], mode="nearest"), {"s": array}, (1, 2, *space), 10
    rules = ["asymmetric", "half_pixel", "pytorch_half_pixel", "align_corners", "tf_crop_and_resize"]
    if opset == 11:
        rules.append("tf_half_pixel_for_nn")
    chosen: dict[str, Any] = {
        "mode": "nearest",
        "coordinate_transformation_mode": str(random.choice(rules)),
        "nearest_mode": str(random.choice(["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"])),
        "extrapolation_value": 5.0,
    }
    rank = 2 + len(space)
    region = np.array([*[0.0] * rank, *[1.0] * rank], np.float32)
    if chosen["coordinate_transformation_mode"] == "tf_crop_and_resize":
        region[2:rank] = random.choice([-0.5, 0.0, 0.25], size=len(space))
        region[rank + 2 :] = random.choice([0.75, 1.0, 1.5], size=len(space))
    if random.random() < 0.4:
        sizes = np.array([1, 2, *(random.integers(1, 9, size=len(space)))], np.int64)
        constants = {"r": region, "s": np.zeros(0, np.float32), "m": sizes}
        return helper.make_node("Resize", ["x", "r", "s", "m"], ["z"], **chosen), constants, (1, 2, *space), opset
    return (
        helper.make_node("Resize", ["x", "r", "s"], ["z"], **chosen),
        {"r": region, "s": array},
        (1, 2, *space),
        opset,
    )


def padding(random: np.random.Generator, operator: str) -> Case:
    space = [int(n) for n in random.integers(2, 6, size=random.integers(1, 3))]
    rank = 2 + len(space)
    half = [[0, 0, *(int(v) for v in random.integers(-2, 3, size=len(space)))] for _ in range(2)]
    mode = str(random.choice(["constant", "reflect", "edge"]))
    widths = np.array(half[0] + half[1], np.int64)
    assert len(widths) == 2 * rank
    constants = {"w": widths} | ({"v": np.array(0.75, np.float32)} if mode == "constant" else {})
    return helper.make_node("Pad", ["x", *constants], ["z"], mode=mode), constants, (1, 2, *space), 13


def normalising(random: np.random.Generator, operator: str) -> Case:
    constants = {name: random.random(3).astype(np.float32) + 0.1 for name in "abcd"}
    opset = int(random.choice([9, 14, 15]))
    node = helper.make_node(operator, ["x", *"abcd"], ["z"], epsilon=float(random.choice([1e-5, 1e-3])))
    return node, constants, (1, 3, 4), opset


def convolving(random: np.random.Generator, operator: str) -> Case:
    space = [int(n) for n in random.integers(2, 8, size=random.integers(1, 3))]
    chosen = window(random, space)
    kernel = chosen["kernel_shape"]
    if random.random() < 0.3:
        chosen["dilations"] = [int(random.integers(1, 3)) for _ in space]
    weights = {"w": random.normal(size=(2, 2, *kernel)).astype(np.float32), "b": np.ones(2, np.float32)}
    if operator == "ConvTranspose":
        chosen["output_padding"] = [int(random.integers(0, max(1, s))) for s in chosen["strides"]]
    return helper.make_node(operator, ["x", "w", "b"], ["z"], **chosen), weights, (1, 2, *space), 13


MAKERS = {
    "MaxPool": (pooling, 150), "AveragePool": (pooling, 150), "Resize": (resizing, 250), "Upsample": (resizing, 40),
    "Pad": (padding, 80), "BatchNormalization": (normalising, 20),
}  # fmt: skip


@pytest.mark.parametrize("operator", MAKERS)
def test_as_onnxruntime_computes_it(operator: str) -> None:
    """Where onnxruntime runs a node and the node is not refused here, both give the same."""
    make, count = MAKERS[operator]
    random = np.random.default_rng(sum(map(ord, operator)))
    same = refused = 0
    for _ in range(count):
        node, constants, shape, opset = case = make(random, operator)
        x = random.normal(size=shape).astype(np.float32)
        try:
            expected = Runtime(as_model(case)).run(x)[0]
        except NotRunnableError:
            continue
        try:
            (found,) = OPERATORS[operator](node, [x, *(constants[name] for name in node.input[1:])], opset)
        except ValueError:
            refused += 1
            continue
        if not np.isfinite(expected).all() or (np.abs(expected) > 1e30).any():
            continue  # a window that lies in the padding alone, which is refused as not finite
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=str((node, constants, shape, opset)))
        same += 1
    assert same > count / 4, (same, refused)


LOADED = {**MAKERS, "Conv": (convolving, 200), "ConvTranspose": (convolving, 200)}


@pytest.mark.parametrize("operator", LOADED)
def test_loads_or_is_refused(operator: str, tmp_path: Path) -> None:
    """Loading compares with onnxruntime itself, so that what it reads wrongly would be refused as such."""
    make, count = LOADED[operator]
    random = np.random.default_rng(1 + sum(map(ord, operator)))
    refusals = []
    for _ in range(count // 5):
        (tmp_path / "model.onnx").write_bytes(as_model(make(random, operator), flat=True).SerializeToString())
        try:
            load_onnx(tmp_path / "model.onnx")
        except ModelError as error:
            refusals.append(str(error))
    assert len(refusals) < count // 5 - 1
    assert [text for text in refusals if "please report it" in text] == []


# --- little that asks for much ----------------------------------------------------------------------------------------


def asking(nodes: list[NodeProto], weights: dict[str, Any], shape: tuple[Any, ...] = ("N", 4)) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def of_constants(node: NodeProto, weights: dict[str, Any]) -> onnx.ModelProto:
    """x plus the sum of a large constant h."""
    ends = [helper.make_node("ReduceSum", ["h"], ["s"], keepdims=0), helper.make_node("Add", ["x", "s"], ["y"])]
    return asking([node, *ends], weights)


def of_data(node: NodeProto, weights: dict[str, Any]) -> onnx.ModelProto:
    return asking([node, helper.make_node("Flatten", ["h"], ["y"])], weights, ("N", 2, 8))


def made(operator: str, inputs: list[str], **attributes: Any) -> NodeProto:
    return helper.make_node(operator, inputs, ["h"], **attributes)


F, INT = np.float32, np.int64
LONG, PAIR = np.ones((10**6, 1), F), np.ones((2, 2, 2), F)
MUCH = {
    "Range": of_constants(made("Range", ["a", "b", "c"]), {"a": F(0), "b": F(1e12), "c": F(1)}),
    "Tile": of_constants(made("Tile", ["a", "t"]), {"a": np.ones(10, F), "t": np.array([10**10], INT)}),
    "Expand": of_constants(made("Expand", ["a", "t"]), {"a": np.ones(1, F), "t": np.array([10**6, 10**6], INT)}),
    "Add": of_constants(made("Add", ["a", "b"]), {"a": LONG, "b": LONG.T.copy()}),
    "MatMul": of_constants(made("MatMul", ["a", "b"]), {"a": LONG, "b": LONG.T.copy()}),
    "Einsum": of_constants(made("Einsum", ["a", "a"], equation="i,j->ij"), {"a": LONG[:, 0]}),
    "OneHot": of_constants(
        made("OneHot", ["a", "d", "v"]), {"a": np.zeros(9, INT), "d": np.array(10**11, INT), "v": np.array([0, 1], F)}
    ),
    "ConstantOfShape": of_constants(made("ConstantOfShape", ["t"]), {"t": np.array([10**6, 10**6], INT)}),
    "Gather": of_constants(made("Gather", ["a", "i"]), {"a": np.ones((4, 10**5), F), "i": np.zeros(10**5, INT)}),
    "Pad": of_data(made("Pad", ["x", "p"]), {"p": np.array([0, 0, 0, 0, 0, 10**10], INT)}),
    "MaxPool": of_data(made("MaxPool", ["x"], kernel_shape=[10**9], pads=[5 * 10**8] * 2), {}),
    "AveragePool": of_data(made("AveragePool", ["x"], kernel_shape=[10**9], auto_pad="SAME_UPPER"), {}),
    "Conv": of_data(made("Conv", ["x", "w"], pads=[10**10] * 2), {"w": PAIR}),
    "Conv, dilated": of_data(made("Conv", ["x", "w"], dilations=[10**9], pads=[10**9] * 2), {"w": PAIR}),
    "ConvTranspose": of_data(made("ConvTranspose", ["x", "w"], strides=[10**9]), {"w": PAIR}),
    "Resize": of_data(made("Resize", ["x", "", "s"], mode="nearest"), {"s": np.array([1, 1, 2**19], F)}),
}


@pytest.mark.parametrize("name", MUCH)
def test_a_small_file_that_asks_for_much_is_refused_before_it_gets_it(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(MUCH[name].SerializeToString())
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=r"too large to certify|which is not supported"):
            load_onnx(tmp_path / "model.onnx")
        assert tracemalloc.get_traced_memory()[1] < 2**28
    finally:
        tracemalloc.stop()
