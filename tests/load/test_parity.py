"""A reading that is wrong is found wherever it is: sabotaged rewritings, sleeping units, logits beside a huge one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import NodeProto, TensorProto, helper

from certify_cli.errors import ModelError
from certify_cli.load.onnx import interpret, max_min_rewrites, normalise, operators, patterns, probes, subgraph_checks
from certify_cli.load.onnx.loader import load_onnx
from certify_cli.load.onnx.rewriting import REWRITES, RewrittenGraph
from tests.files import save_onnx

FLOAT = TensorProto.FLOAT


def refused(path: Path, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        load_onnx(path)


def network(folder: Path, nodes: list[NodeProto], weights: dict[str, Any], shape: tuple[int, ...] = (4,)) -> Path:
    """The nodes from x to h, and a head of three logits behind the flattened h."""
    random = np.random.default_rng(0)
    arrays = {key: np.asarray(value, np.float32) for key, value in weights.items()}
    ends = [helper.make_node("Flatten", ["h"], ["f"]), helper.make_node("MatMul", ["f", "head"], ["y"])]
    path = save_onnx(folder, [*nodes, ends[0]], arrays, shape)  # to learn the width
    width = load_width(path)
    return save_onnx(
        folder, [*nodes, *ends], arrays | {"head": random.normal(size=(width, 3)).astype(np.float32)}, shape
    )


def load_width(path: Path) -> int:
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(path)
    model.graph.output[0].name = "f"
    shape = [1, *(dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:])]
    return int(ReferenceEvaluator(model).run(None, {"x": np.zeros(shape, np.float32)})[0].shape[1])


# --- rewritings ---------------------------------------------------------------------------------------------------


def conv_net(folder: Path) -> Path:
    """Behind a unit that sleeps on every image: nothing that the whole file shows tells of what follows it."""
    nodes = [
        helper.make_node("Sub", ["x", "far"], ["s"]),
        helper.make_node("Relu", ["s"], ["r"]),
        helper.make_node("BatchNormalization", ["r", *"abcd"], ["n"], epsilon=0.5),
        helper.make_node("Clip", ["n", "low", "high"], ["h"]),
    ]
    weights = {key: np.full(2, value) for key, value in zip("abcd", (1.3, 0.2, 0.1, 2.0), strict=True)}
    return network(folder, nodes, weights | {"far": 1e9, "low": -1.0, "high": 3.0}, (2, 3, 3))


def test_the_sleeping_network_loads_untouched(tmp_path: Path) -> None:
    assert load_onnx(conv_net(tmp_path)).network.classes == 3


@pytest.mark.smoke
def test_a_wrong_epsilon_behind_a_sleeping_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(rewritten: RewrittenGraph, node: NodeProto) -> None:
        rewritten.emit(node, "BatchNormalization", list(node.input), node.output[0], epsilon=0.4999)

    monkeypatch.setitem(REWRITES, "BatchNormalization", wrong)
    refused(conv_net(tmp_path), r"'n' \(BatchNormalization\) computes something else")


def test_a_clip_that_is_dropped_behind_a_sleeping_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drop_clips(monkeypatch)
    refused(conv_net(tmp_path), r"'h' \(Clip\) computes something else")


def drop_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Clip is taken for none."""
    read = normalise.from_onnx
    monkeypatch.setattr(normalise, "from_onnx", lambda name, values: None if name == "Clip" else read(name, values))


def test_a_clip_with_a_far_bound_taken_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Affine in all that is near."""
    path = network(tmp_path, [helper.make_node("Clip", ["x", "low"], ["h"])], {"low": -5000.0})
    load_onnx(path)
    drop_clips(monkeypatch)
    refused(path, r"\(Clip\) computes something else")


def test_a_pattern_that_matches_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        helper.make_node("Sub", ["x", "far"], ["z"]),
        helper.make_node("Sigmoid", ["z"], ["s"]),
        helper.make_node("Mul", ["z", "s"], ["h"]),
    ]
    path = network(tmp_path, nodes, {"far": 1e6})
    load_onnx(path)
    rows = tuple(patterns.Row("gelu", row.formula) if row.activation == "silu" else row for row in patterns.ROWS)
    monkeypatch.setattr(patterns, "ROWS", rows)
    refused(path, r"'h' \(Mul\) computes something else")


def test_max_and_min_that_are_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        helper.make_node("Neg", ["x"], ["a"]),
        helper.make_node("Max", ["x", "a"], ["h"]),
    ]
    path = network(tmp_path, nodes, {})
    load_onnx(path)
    split = np.split

    def swapped(array: np.ndarray, count: int, axis: int = 0) -> list[np.ndarray]:
        return split(array, count, axis)[::-1]

    monkeypatch.setattr(max_min_rewrites.np, "split", swapped)
    refused(path, r"\(Max\) computes something else")


def test_pooling_windows_that_are_off_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the evaluation and the rewriting err alike, onnxruntime does not."""
    path = network(tmp_path, [helper.make_node("MaxPool", ["x"], ["h"], kernel_shape=[2], strides=[1])], {}, (1, 6))
    load_onnx(path)
    right = operators.windows_of

    def wrong(node: NodeProto, sizes: Any) -> operators.Windows:
        at = right(node, sizes)
        return operators.Windows(at.kernel, at.stride, at.dilation, (1,), (at.count[0] - 1,), at.padded)

    monkeypatch.setattr(operators, "windows_of", wrong)
    monkeypatch.setattr("certify_cli.load.onnx.pool_rewrites.windows_of", wrong)
    with pytest.raises(ModelError):
        load_onnx(path)


def test_a_product_by_a_changed_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = network(tmp_path, [helper.make_node("Gemm", ["x", "w"], ["h"], alpha=0.5)], {"w": np.eye(4)})
    load_onnx(path)
    constant = RewrittenGraph.constant

    def off(self: RewrittenGraph, array: np.ndarray) -> str:
        return constant(self, array * (1 + 1e-8) if array.dtype == np.float64 else array)

    monkeypatch.setattr(RewrittenGraph, "constant", off)
    refused(path, r"\(Gemm\) computes something else")


# --- the whole ----------------------------------------------------------------------------------------------------


def leaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every LeakyRelu is read as a Relu."""
    read = normalise.from_onnx
    monkeypatch.setattr(
        normalise, "from_onnx", lambda name, values: read("Relu", {}) if name == "LeakyRelu" else read(name, values)
    )


def without_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subgraph_checks, "check", lambda *arguments: None)


@pytest.mark.parametrize("far", [3.0, 300.0, 3e4, 3e8])
def test_units_that_sleep_are_woken(far: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole-file check alone: a LeakyRelu read as a Relu shows only beyond x = far."""
    nodes = [helper.make_node("Sub", ["far", "x"], ["z"]), helper.make_node("LeakyRelu", ["z"], ["h"], alpha=0.5)]
    path = network(tmp_path, nodes, {"far": far})
    load_onnx(path)
    without_pieces(monkeypatch)
    leaks_nothing(monkeypatch)
    refused(path, "differs from the file evaluated by onnxruntime")


def test_a_huge_logit_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One logit of -1e30, and another one of size 1 that is wrong by half."""
    weights = {"w": np.eye(4, 3, dtype=np.float32), "b": np.array([0, 0, -1e30], np.float32)}
    nodes = [
        helper.make_node("LeakyRelu", ["x"], ["r"], alpha=0.5),
        helper.make_node("Gemm", ["r", "w", "b"], ["y"]),
    ]
    path = save_onnx(tmp_path, nodes, weights, (4,))
    load_onnx(path)
    without_pieces(monkeypatch)
    leaks_nothing(monkeypatch)
    refused(path, "number [01] of its logits")


def test_what_float32_does_to_a_network_is_allowed_for(tmp_path: Path) -> None:
    """Deep, with weights of size 30 that cancel: float32 is far off, and the file loads nevertheless."""
    random = np.random.default_rng(3)
    weights = {f"w{i}": (30 * random.normal(size=(8, 8))).astype(np.float32) for i in range(6)}
    nodes, at = [], "x"
    for i in range(6):
        nodes += [helper.make_node("MatMul", [at, f"w{i}"], [f"z{i}"]), helper.make_node("Sin", [f"z{i}"], [f"h{i}"])]
        at = f"h{i}"
    weights["head"] = random.normal(size=(8, 3)).astype(np.float32)
    path = save_onnx(tmp_path, [*nodes, helper.make_node("MatMul", [at, "head"], ["y"])], weights, (8,))
    assert load_onnx(path).network.classes == 3


def test_units_that_wake_beyond_all_float32_numbers_stop_nothing(tmp_path: Path) -> None:
    """A unit of slope 1e-20: the point that wakes it is infinite in float32."""
    nodes = [
        helper.make_node("Mul", ["x", "tiny"], ["s"]),
        helper.make_node("Mul", ["s", "tiny"], ["t"]),
        helper.make_node("Sub", ["t", "one"], ["z"]),
        helper.make_node("Relu", ["z"], ["h"]),
    ]
    assert load_onnx(network(tmp_path, nodes, {"tiny": 1e-20, "one": 1.0})).network.classes == 3


def test_probes_have_both_signs_and_many_sizes() -> None:
    from tests.networks import mlp

    points = probes.probes(mlp((3, 5, 2), "relu"), probes.images((3,)))
    sizes = np.abs(points).max(1)
    assert all(((sizes > size / 10) & (sizes <= size)).any() for size in probes.SIZES)
    assert (points < 0).any()
    assert (points > 0).any()


def test_waking_reaches_the_other_side() -> None:
    """A unit with a threshold of 1e7 responds at one of the points."""
    from tests.networks import mlp

    network_ = mlp((3, 5, 2), "relu")
    network_.nodes[1].op.offset.fill_(-1e7)
    points = probes.activating_inputs(network_, probes.probes(network_, probes.images((3,)))[:15])
    assert points is not None
    with torch.no_grad():
        assert bool((network_.values(torch.from_numpy(points))[1] > 0).any())


def test_a_constant_that_is_folded_wrongly_behind_a_sleeping_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """exp(c), folded; nothing that is seen of the whole file depends on it."""
    nodes = [
        helper.make_node("Exp", ["c"], ["e"]),
        helper.make_node("Sub", ["x", "far"], ["s"]),
        helper.make_node("Relu", ["s"], ["r"]),
        helper.make_node("Mul", ["r", "e"], ["h"]),
    ]
    path = network(tmp_path, nodes, {"c": [0.1, 0.2, 0.3, 0.4], "far": 1e12})
    load_onnx(path)
    right = interpret.compute

    def wrong(found: Any, node: NodeProto, inputs: list[Any]) -> list[np.ndarray]:
        outputs = right(found, node, inputs)
        return [array * array.dtype.type(1.1) for array in outputs] if node.op_type == "Exp" else outputs

    monkeypatch.setattr(interpret, "compute", wrong)
    refused(path, "the constant 'e' was computed otherwise than onnxruntime does")
