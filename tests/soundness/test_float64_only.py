"""Nothing that ends in a claim is computed in less than float64 (`tests.float64_only`), and sources say every dtype."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from certify_cli.attacks.ddn import nearest_attacks
from certify_cli.bounds.global_bounds.layer_report import layer_table
from certify_cli.certificates.methods import METHODS
from certify_cli.efforts import EFFORTS
from certify_cli.names import AUTO
from certify_cli.network.activations.table import ACTIVATIONS, from_name
from certify_cli.network.affine import Dense
from certify_cli.network.convolution import Conv, ConvTranspose
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Builder, Network
from certify_cli.network.movement import Reshape, Select
from certify_cli.network.pooling import MaxMin, MaxPool
from certify_cli.numerics import batched
from tests.float64_only import ALLOWED, ESTIMATES, PACKAGE, PROPOSING, Float64Only, NarrowError, Place
from tests.networks import PIECEWISE, SMOOTH, mlp, points
from tests.soundness.common import certify

MODELS = Path(__file__).parents[2] / "models"
D = torch.float64


# --- the watch itself ----------------------------------------------------------------------------------------------

NARROW: dict[str, Callable[[], object]] = {
    "integers over an integer": lambda: torch.arange(5) / 7,
    "integers over integers": lambda: torch.arange(5) / torch.arange(1, 6),
    "integers times a number": lambda: torch.arange(5) * 0.1,
    "a root of integers": lambda: torch.arange(5).sqrt(),
    "a mean of truth values": lambda: torch.ones(3, dtype=torch.bool).float().mean(),
    "one of two numbers": lambda: torch.where(torch.arange(5) > 2, 0.1, 0.2),
    "a number as a tensor": lambda: torch.as_tensor(0.1) * torch.ones(3, dtype=D),
    "a list as a tensor": lambda: torch.tensor([0.1, 0.2]).to(D),
    "a factory": lambda: torch.linspace(0, 1, 3),
    "an identity": lambda: torch.eye(2) @ torch.eye(2),
    "a complex number": lambda: torch.polar(torch.ones(3), torch.ones(3)).to(torch.complex128),
    "half": lambda: torch.ones(3, dtype=D).half(),
}


@pytest.mark.parametrize("name", NARROW)
def test_the_watch_sees_it(name: str) -> None:
    with pytest.raises(NarrowError, match=r"float32|float16|complex64"), Float64Only():
        NARROW[name]()


def test_the_watch_sees_what_the_backward_pass_computes_and_what_was_caught() -> None:
    narrow = torch.ones(3, requires_grad=True)
    value = narrow.to(D).square().sum()
    with pytest.raises(NarrowError, match="float32"), Float64Only():
        torch.autograd.grad(value, narrow)
    with pytest.raises(NarrowError, match="div"), Float64Only(), suppress(AssertionError):
        torch.arange(5) / 7


def test_the_watch_lets_float64_pass() -> None:
    data = torch.rand(3)
    with Float64Only():
        wide = data.to(D)
        total = (wide / 3).sum() * torch.arange(5) + torch.tensor(0.1, dtype=D)
        assert torch.fft.fft(total).dtype == torch.complex128


@pytest.mark.parametrize("place", [*ALLOWED, *PROPOSING, *ESTIMATES], ids=".".join)
def test_places_that_are_allowed_exist(place: Place) -> None:
    """A function that was moved or renamed takes its permission along, or loses it."""
    file, name = place
    body: list[ast.stmt] = ast.parse((PACKAGE / file).read_text(encoding="utf-8")).body
    for part in name.split("."):
        (found,) = [n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == part]
        body = found.body


# --- the roads -----------------------------------------------------------------------------------------------------


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(sum(shape)))


def pooled_net(activation: str) -> Network:
    """Strided convolution, max pooling, transposed convolution, max pooling in one dimension, GroupSort, padding by
    copies, grouped and dilated convolution: what the networks of `tests.networks` do not have."""
    b = Builder((1, 7, 7))
    last = b.add("conv", Conv(_randn(2, 1, 3, 3), _randn(2), (2, 2), (1, 1), (1, 1)), 0)
    last = b.add("act", from_name(activation), last)
    last = b.add("pool", MaxPool((3, 2), (2, 2), (1, 0), (1, 1)), last)
    last = b.add("up", ConvTranspose(_randn(2, 2, 2, 2), _randn(2), (2, 2), (0, 0), (1, 1), (1, 1)), last)
    last = b.add("rows", Reshape((2, 25)), last)
    last = b.add("lines", MaxPool((4,), (3,), (0,), (1,), ceil_mode=True), last)
    last = b.add(
        "circle", Select.of(lambda t: torch.nn.functional.pad(t, (1, 1), mode="circular"), b.shape(last)), last
    )
    last = b.add("groups", Conv(_randn(4, 1, 2), None, (2,), (1,), (2,), 2), last)
    last = b.add("sort", MaxMin(), last)
    last = b.add("flat", Reshape((20,)), last)
    return b.build(b.add("fc", Dense(_randn(3, 20) / 5), last))


ROADS: dict[str, Network] = {
    **{
        f"{name}, smooth": SMOOTH[name]
        for name in ("convolutional", "residual", "concatenating", "batch norms, silu", "residual around an activation")
    },
    **{name: PIECEWISE[name] for name in ("leaky relu, residual", "relu, concatenating", "relu, convolutional")},
    "max min": PIECEWISE["max min"],
    "pooled, relu": pooled_net("relu"),
    "pooled, tanh": pooled_net("tanh"),
    "linear": SMOOTH["linear"],
}
SMALL = {"smooth": mlp((3, 4, 3), "tanh"), "relu": mlp((3, 4, 3), "relu")}


def applying(network: Network) -> Iterator[str]:
    yield from (name for name, method in METHODS.items() if method.applies(network) is None)
    yield AUTO


def walk(network: Network, effort: str, methods: Iterator[str] | tuple[str, ...]) -> None:
    """Layer table, certificates with the attacks that they promise, and the search for attacks."""
    x = points(network, 1)
    with Float64Only(), exact_kernels():
        layer_table(network, effort)
        for method in methods:
            found = certify(network, x, method, effort)
        nearest_attacks(EvaluatedPoints(network, x), found.near, found.radius, EFFORTS[effort])


@pytest.mark.parametrize("effort", ["fast", pytest.param("normal", marks=pytest.mark.slow), "max"])
@pytest.mark.parametrize("name", SMALL)
def test_every_method_and_effort(name: str, effort: str) -> None:
    walk(SMALL[name], effort, applying(SMALL[name]))


@pytest.mark.parametrize("name", ROADS)
def test_every_kind_of_network(name: str) -> None:
    """`auto` runs every method that applies, the last two as one search."""
    walk(ROADS[name], "fast", ("linear", AUTO))


@pytest.mark.slow
@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("name", ROADS)
def test_every_kind_of_network_and_effort(name: str, effort: str) -> None:
    walk(ROADS[name], effort, applying(ROADS[name]))


@pytest.mark.parametrize("name", ["clip:-1,1" if name == "clip" else name for name in ACTIVATIONS])
def test_every_activation(name: str) -> None:
    walk(mlp((2, 3, 2), name), "fast", (AUTO,))


@pytest.mark.parametrize("name", ["smooth", "relu"])
def test_single_precision_proposes_and_nothing_else(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """With matrices of any size in single precision where they only propose: nothing of it comes further."""
    monkeypatch.setattr(batched, "SMALL", 0)
    x = points(SMALL[name], 1)
    watch = Float64Only(proposing=True)
    with watch:
        for effort in list(EFFORTS)[:2]:
            certify(SMALL[name], x, AUTO, effort)
    assert (watch.proposed > 0) == (name == "smooth")


@pytest.mark.parametrize(
    ("model", "method"),
    [("digits_mlp.onnx", "curvature"), ("digits_mlp.safetensors", "auto"), ("digits_conv.onnx", "local-lipschitz")],
)
def test_the_road_from_files_to_a_checked_run(tmp_path: Path, model: str, method: str) -> None:
    from certify_cli.cli.app import main

    file, run, witnesses, points_of = (str(p) for p in (MODELS / model, *(tmp_path / n for n in ("r.json", "w", "c"))))
    kept = [f"{witnesses}.npz", f"{points_of}.npz"]
    wanted = ["--data", "digits", "--samples", "2", "--method", method, "--effort", "fast", "--attack", "search", "-q"]
    with Float64Only():
        made = ["-o", run, "--witnesses", kept[0], "--certificate", kept[1]]
        assert main(["certify", file, *wanted, *made]) == 0
        assert main(["verify", run, file, "--witnesses", kept[0], "--certificate", kept[1], "--share", "1", "-q"]) == 0
        assert main(["bounds", file, "-q"]) == 0


# --- the sources ---------------------------------------------------------------------------------------------------

FACTORIES = {
    "zeros", "ones", "full", "empty", "eye", "rand", "randn", "linspace", "logspace", "tensor", "scalar_tensor",
    "as_tensor",
}  # fmt: skip
"""Functions of torch whose result is float32 where no dtype is named and they are given Python floats, or nothing."""
SINGLE = {"float32", "float16", "bfloat16", "complex64", "float", "half", "cfloat", "FloatTensor"}
"""Names of narrower types, and methods that turn a tensor into one."""
SPEAK_OF_SINGLE = {"data", "load", "training", "cli/selftest.py", "numerics/batched.py", "audit/verify/replay.py"}
"""Files, or folders, with narrower numbers: stored weights and data, what only proposes, training, onnxruntime's."""

SOURCES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def _of_torch(node: ast.expr) -> str | None:
    """NAME of torch.NAME."""
    named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"
    return node.attr if named and isinstance(node, ast.Attribute) else None


def _number(node: ast.expr) -> bool:
    """Whether an expression is a number as it stands there, and no integer: made of literals, constants of a module,
    infinity."""
    parts = [part for part in ast.walk(node) if isinstance(part, ast.Constant | ast.Name | ast.Attribute)]
    plain = [part for part in parts if not (isinstance(part, ast.Name) and part.id == "torch")]
    return all(map(_constant, plain)) and not all(isinstance(getattr(part, "value", None), int) for part in plain)


def _constant(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float)
    return (isinstance(node, ast.Name) and node.id.isupper()) or _of_torch(node) in ("inf", "nan", "pi")


def faults(source: str, single: bool) -> list[str]:
    """Calls of torch whose dtype is left to torch, by line; not single: and every name of a narrower type."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = _of_torch(node.func)
            if name in FACTORIES and "dtype" not in {keyword.arg for keyword in node.keywords}:
                found.append(f"{node.lineno}: torch.{name} without a dtype")
            if name == "where" and len(node.args) == 3 and all(map(_number, node.args[1:])):
                found.append(f"{node.lineno}: torch.where of two numbers")
        if not single and isinstance(node, ast.Attribute) and node.attr in SINGLE:
            found.append(f"{node.lineno}: {node.attr}")
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_sources_name_every_dtype(name: str) -> None:
    single = name in SPEAK_OF_SINGLE or name.split("/")[0] in SPEAK_OF_SINGLE
    assert faults((PACKAGE / name).read_text(encoding="utf-8"), single) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.zeros(3)",
        "torch.tensor(error)",
        "torch.as_tensor(self.error)",
        "torch.where(a > 0, -1.0, 2 * HALF)",
        "torch.where(a, torch.inf, 0.5)",
        "x.float()",
        "x.to(torch.float32)",
    ],
)
def test_faulty_lines_are_found(line: str) -> None:
    assert faults(line, single=False)
    assert not faults("torch.where(a > 0, x, 0.0) + torch.where(b, 1, -1) + torch.zeros(3, dtype=torch.float64)", False)
