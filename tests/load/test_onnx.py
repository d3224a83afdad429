"""Exports of both of torch's exporters, loaded and held to the torch module on a batch of three."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from certify_cli.errors import ModelError
from certify_cli.load.loaded_model import LoadedModel
from certify_cli.load.onnx.loader import load_onnx
from certify_cli.network.graph import Concat
from tests.files import save_onnx
from tests.load.exports import (
    ACTIVATIONS,
    DEFAULT,
    EXPORTERS,
    LEGACY,
    NETWORKS,
    Case,
    Export,
    build,
    mlp,
    write,
)

LEGACY_EXPORTERS = [("legacy", opset) for opset in LEGACY]
DEFAULT_EXPORTERS = [("default", opset) for opset in DEFAULT]
SHARED = Path(__file__).parents[2].parent / "shared" / "models"
TRANSFORMER = "vnn23_cifar_vit_ibp_3_3_8.onnx"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*legacy TorchScript.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _quiet_exporter() -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)


def product(names: dict[str, Any], always: tuple[tuple[str, int], ...] = ()) -> list[Any]:
    """Every name with every exporter; what the default run leaves out is marked slow. In the default run each name
    meets two exporters, in turn, and those of `always`."""
    rows = []
    for i, name in enumerate(names):
        chosen = {LEGACY_EXPORTERS[i % 3], DEFAULT_EXPORTERS[i % 3], *always}
        for exporter in EXPORTERS:
            marks = () if exporter in chosen else (pytest.mark.slow,)
            rows.append(pytest.param(name, exporter, marks=marks, id=f"{name}-{exporter[0]}{exporter[1]}"))
    return rows


def load_and_compare(case: Case, export: Export, folder: Path) -> LoadedModel:
    """Write, load, compare."""
    module, path = build(case), folder / "model.onnx"
    write(module, case.shape, path, export)
    loaded = load_onnx(path)
    compare(loaded, case, module)
    return loaded


def compare(loaded: LoadedModel, case: Case, module: nn.Module) -> None:
    """With the module in float64: the same logits (softmax: the same after softmax)."""
    assert loaded.input_shape == case.shape
    x = torch.rand(3, *case.shape, dtype=torch.float64)
    with torch.no_grad():
        expected = module.double()(x)
        found = loaded.network(x)
    if case.softmax:
        logarithmic = bool((expected < 0).any())
        found = found.log_softmax(1) if logarithmic else found.softmax(1)
        assert any("oftmax" in note for note in loaded.notes)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


EXPECTED = {"softplus_beta": "softplus", "softplus_threshold": "softplus", "relu6": "clip", "prelu": "leaky_relu"}


@pytest.mark.parametrize("exporter", EXPORTERS, ids=lambda e: f"{e[0]}{e[1]}")
def test_activations_come_back_as_one_node_each(exporter: tuple[str, int], tmp_path: Path) -> None:
    """Of a branch of its own each, with two of it; everything between them must be affine."""
    loaded = load_and_compare(Case(Branches, (6,)), Export(*exporter), tmp_path)
    found = [node.op.name for node in loaded.network.nodes if hasattr(node.op, "slope_range")]
    assert found == [EXPECTED.get(name, name) for name in ACTIVATIONS for _ in range(2)]


class Branches(nn.Module):
    """A small network of every activation on one input: their outputs one behind another."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(mlp(activation).build() for activation in ACTIVATIONS.values())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


@pytest.mark.parametrize(("name", "exporter"), product(NETWORKS, always=(("legacy", 17),)))
def test_network(name: str, exporter: tuple[str, int], tmp_path: Path) -> None:
    load_and_compare(NETWORKS[name], Export(*exporter), tmp_path)


SLOWLY = {"convolutional", "residual", "max_pooled"}
FIXED = [
    *((name, ("legacy", 13)) for name in NETWORKS),
    *(pytest.param(n, ("default", 18), marks=pytest.mark.slow if n in SLOWLY else ()) for n in NETWORKS),
]


@pytest.mark.parametrize(("name", "exporter"), FIXED)
def test_fixed_batch_is_made_free(name: str, exporter: tuple[str, int], tmp_path: Path) -> None:
    load_and_compare(NETWORKS[name], Export(*exporter, free_batch=False), tmp_path)


@pytest.mark.parametrize("opset", LEGACY)
@pytest.mark.parametrize("name", ["convolutional", "residual"])
def test_batch_norm_and_dropout_left_in(name: str, opset: int, tmp_path: Path) -> None:
    load_and_compare(NETWORKS[name], Export("legacy", opset, unfolded=True), tmp_path)


def test_external_data_and_its_digest(tmp_path: Path) -> None:
    case = NETWORKS["column"]
    folders = tmp_path / "one", tmp_path / "other"
    digests, modules = [], [build(case), build(case)]
    for i, (folder, module) in enumerate(zip(folders, modules, strict=True)):
        folder.mkdir()
        with torch.no_grad():
            next(module.parameters()).add_(i)
        write(module, case.shape, folder / "model.onnx", Export("default", 20, external=True))
        assert (folder / "model.onnx.data").is_file()
        digests.append(load_onnx(folder / "model.onnx").info.sha256)
    same = (folders[0] / "model.onnx").read_bytes() == (folders[1] / "model.onnx").read_bytes()
    assert same
    assert digests[0] != digests[1]
    compare(load_onnx(folders[0] / "model.onnx"), case, modules[0])


@pytest.mark.smoke
def test_info_of_a_plain_file(tmp_path: Path) -> None:
    loaded = load_and_compare(mlp(nn.Tanh), Export("legacy", 13), tmp_path)
    assert (loaded.info.format, loaded.info.opset, loaded.info.classes) == ("onnx", 13, 3)
    assert loaded.stored_dtype == "float32"
    assert loaded.notes == ()
    names = [node.name for node in loaded.network.nodes]
    assert "/0/Gemm" in names, "nodes are named as in the file"


def test_half_precision_is_upcast_exactly(tmp_path: Path) -> None:
    weight = np.array([[1.0009765625, 2.0], [0.333251953125, -1.0]], dtype=np.float16)
    path = save_onnx(
        tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight}, (2,), TensorProto.FLOAT16
    )
    loaded = load_onnx(path)
    assert loaded.stored_dtype == "float16"
    assert any("float16" in note for note in loaded.notes)
    x = torch.eye(2, dtype=torch.float64)
    assert torch.equal(loaded.network(x), torch.from_numpy(weight.astype(np.float64)))


def gelu() -> list[Any]:
    """y = x (1 + erf(x c)) / 2 in an order that no exporter uses."""
    return [
        helper.make_node("Mul", ["c", "x"], ["scaled"]),
        helper.make_node("Erf", ["scaled"], ["erf"]),
        helper.make_node("Add", ["one", "erf"], ["sum"]),
        helper.make_node("Mul", ["sum", "half"], ["share"]),
        helper.make_node("Mul", ["share", "x"], ["y"]),
    ]


def test_a_rounded_constant_becomes_the_activations_deviation(tmp_path: Path) -> None:
    weights = {"one": np.float32(1), "half": np.float32(0.5), "c": np.float32(0.70710678)}
    network = load_onnx(save_onnx(tmp_path, gelu(), {k: np.array(v) for k, v in weights.items()}, (3,))).network
    (node,) = network.nodes[1:]
    assert node.op.name == "gelu"
    z = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    stored = z * 0.5 * (1 + torch.erf(z * float(weights["c"])))
    worst = float((stored - node.op.value(z)).abs().max())
    assert 0 < worst <= node.op.deviation < 1e-7


def test_a_wrong_constant_is_not_fused(tmp_path: Path) -> None:
    weights = {"one": np.array(np.float32(1)), "half": np.array(np.float32(0.5)), "c": np.array(np.float32(0.7072))}
    with pytest.raises(ModelError, match=r"\(Mul\): a product of two values"):
        load_onnx(save_onnx(tmp_path, gelu(), weights, (3,)))


def test_softplus_of_a_low_threshold_is_refused(tmp_path: Path) -> None:
    write(build(mlp(lambda: nn.Softplus(1, 5))), (6,), tmp_path / "model.onnx", Export("default", 18))
    with pytest.raises(ModelError, match="threshold"):
        load_onnx(tmp_path / "model.onnx")


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_gemm_in_every_form(alpha: float, transposed: int, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    b = random.normal(size=(3, 4) if transposed else (4, 3)).astype(np.float32)
    node = helper.make_node("Gemm", ["x", "b", "c"], ["y"], alpha=alpha, beta=0.7, transB=transposed)
    loaded = load_onnx(save_onnx(tmp_path, [node], {"b": b, "c": random.normal(size=(1, 3)).astype(np.float32)}, (4,)))
    assert loaded.network.classes == 3  # the parity check has compared the values


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("operator", ["Conv", "AveragePool"])
def test_automatic_padding(operator: str, mode: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weights = {"w": random.normal(size=(2, 2, 2, 3)).astype(np.float32)} if operator == "Conv" else {}
    nodes = [
        helper.make_node(operator, ["x", *weights], ["z"], auto_pad=mode, kernel_shape=[2, 3], strides=[2, 1]),
        helper.make_node("Flatten", ["z"], ["y"]),
    ]
    load_onnx(save_onnx(tmp_path, nodes, weights, (2, 5, 6)))


def test_a_file_that_mixes_the_batch_is_refused(tmp_path: Path) -> None:
    """x - (first sample): every sample by itself gives zero, a batch does not."""
    nodes = [
        helper.make_node("Slice", ["x", "zero", "one", "zero"], ["first"]),
        helper.make_node("Sub", ["x", "first"], ["y"]),
    ]
    weights = {"zero": np.array([0]), "one": np.array([1])}
    with pytest.raises(ModelError, match=r"differs from the file evaluated by onnxruntime"):
        load_onnx(save_onnx(tmp_path, nodes, weights, (3,)))


def shared_models() -> list[Path]:
    return sorted(SHARED.glob("*.onnx"))


@pytest.mark.skipif(not shared_models(), reason="the shared models are not beside this repository")
def test_every_shared_model_but_the_transformer_loads() -> None:
    for path in shared_models():
        if path.name == TRANSFORMER:
            with pytest.raises(ModelError, match=r"node .*MatMul.* is not supported: it is part of an attention block"):
                load_onnx(path)
        else:
            assert load_onnx(path).network.classes == 10


def test_max_and_min_of_a_split_are_one_node(tmp_path: Path) -> None:
    """MaxMin as torch writes it, and nothing around it: its norm is 1."""
    case, file = NETWORKS["sorted"], tmp_path / "sorted.onnx"
    write(case.build(), case.shape, file, Export("default", 18))
    ops = [node.op for node in load_onnx(file).network.nodes]
    assert [op.title for op in ops].count("max_min") == 3
    assert not any(isinstance(op, Concat) for op in ops[:-4])


@pytest.mark.smoke
def test_max_of_three_is_refused(tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    parts = [helper.make_node("Identity", ["x"], [name]) for name in names]
    file = save_onnx(tmp_path, [*parts, helper.make_node("Max", names, ["y"])], {}, (4,))
    with pytest.raises(ModelError, match=r"Max.*two values of one shape"):
        load_onnx(file)
