"""Residual blocks that are 1-Lipschitz by design: recognised whatever wrote them, and never below a true slope."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d

from certify_cli import load_model
from certify_cli.bounds.global_bounds.chain import Chain, between, bottlenecks
from certify_cli.bounds.global_bounds.curvature import Curvature
from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.bounds.global_bounds.one_layer_sdp import OneLayer
from certify_cli.bounds.global_bounds.residual_blocks import recognised
from certify_cli.efforts import NORMAL, Budget
from certify_cli.load.torch_module import load_module
from certify_cli.network.activations import from_name
from certify_cli.network.affine import Dense, Scale
from certify_cli.network.convolution import Conv, ConvTranspose
from certify_cli.network.graph import Add, Builder, Network
from tests.networks import PIECEWISE, SMOOTH, all_pairs

D = torch.float64
WIDTH = 64
NONE = Budget(norm=0.0, eigenvalues=0.0)
"""No general block is tried."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def gershgorin(v: Tensor) -> Tensor:
    """T of an SLL block with q = 1: sum_j |V V^T|_ij."""
    products = (v @ v.T).abs() if v.dim() == 2 else conv2d(v, v, padding=v.shape[-1] - 1).abs().sum((2, 3))
    return products.sum(1)


def rows(vector: Tensor, like: Tensor) -> Tensor:
    return vector.reshape(-1, *[1] * (like.dim() - 1))


class DenseBlock(nn.Module):
    """x - 2 V^T T^-1 phi(V x + b), as a user's module writes it: one parameter, used twice."""

    def __init__(self, width: int, seed: int, phi: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.v, self.b = nn.Parameter(random(width, width, seed=seed)), nn.Parameter(random(width, seed=seed + 1))
        self.phi = phi

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.phi(nn.functional.linear(x, self.v, self.b))
        return x - 2 * ((hidden / gershgorin(self.v)) @ self.v)


class ConvBlock(nn.Module):
    """The same with convolutions; CPL: the diagonal is one number."""

    def __init__(self, channels: int, seed: int, phi: Callable[[Tensor], Tensor], cpl: bool = False) -> None:
        super().__init__()
        self.v, self.cpl, self.phi = nn.Parameter(random(channels, channels, 3, 3, seed=seed)), cpl, phi

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.phi(conv2d(x, self.v, padding=1))
        t = gershgorin(self.v)
        scale = (2 / t.max()) if self.cpl else (2 / t)[:, None, None]
        return x - conv_transpose2d(scale * hidden, self.v, padding=1)


@pytest.mark.parametrize("depth", [1, 3, 6, 12])
def test_a_stack_of_dense_blocks_has_constant_1(depth: int, tmp_path: Path) -> None:
    """From ONNX in float32, as an exporter leaves it, and in float64: the head's norm is the network's constant."""
    blocks = [DenseBlock(WIDTH, 10 * k, (torch.relu, torch.tanh)[k % 2]) for k in range(depth)]
    module = nn.Sequential(*blocks, nn.Linear(WIDTH, 4, dtype=D)).eval()
    path = tmp_path / "stack.onnx"
    torch.onnx.export(module.float(), (torch.zeros(1, WIDTH),), path, dynamo=False, opset_version=17)
    for network in (load_module(module.double(), (WIDTH,)).network, load_model(path).network):
        head = network.nodes[-1].op
        assert isinstance(head, Dense)
        exact = torch.linalg.matrix_norm(head.weight[:1] - head.weight[1:2], 2)
        bound = ModelBounds(network).lipschitz.of_margins(torch.tensor([[0, 1]]))
        assert float(exact) * (1 - 1e-12) <= float(bound) <= float(exact) * (1 + 1e-6)


@pytest.mark.parametrize("cpl", [False, True])
def test_a_stack_of_convolutional_blocks_has_constant_1(cpl: bool, tmp_path: Path) -> None:
    blocks = [ConvBlock(5, 10 * k, (torch.relu, torch.tanh)[k % 2], cpl) for k in range(4)]
    module = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(5 * 6 * 6, 3, dtype=D)).eval()
    path = tmp_path / "stack.onnx"
    torch.onnx.export(module.float(), (torch.zeros(1, 5, 6, 6),), path, dynamo=False, opset_version=17)
    for network in (load_module(module.double(), (5, 6, 6)).network, load_model(path).network):
        weight = network.nodes[-1].op.weight  # type: ignore[attr-defined]
        exact = float((weight[0] - weight[1]).norm())
        bound = float(ModelBounds(network).lipschitz.of_margins(torch.tensor([[0, 1]])))
        assert exact * (1 - 1e-12) <= bound <= exact * (1 + 1e-6)


def block(v: Tensor, g: Tensor, activation: str, shape: tuple[int, ...]) -> Network:
    """x + G phi(V x); g: G^T as a weight of V's kind."""
    builder = Builder(shape)
    if v.dim() == 2:
        into, back = Dense(v), Dense(g.T.contiguous())
    else:
        pad = (v.shape[-1] // 2,) * 2
        into, back = Conv(v, None, (1, 1), pad, (1, 1)), ConvTranspose(g, None, (1, 1), pad, (0, 0), (1, 1))
    hidden = builder.add("phi", from_name(activation), builder.add("into", into, 0))
    return builder.build(builder.add("sum", Add(), 0, builder.add("back", back, hidden)))


def largest_slope(network: Network, count: int = 40) -> float:
    """Of the Jacobian at random points near the kinks, by its SVD."""
    x = random(count, *network.input_shape, seed=3)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda one: network(one.unsqueeze(0))[0]))(x)
    return float(torch.linalg.matrix_norm(jacobian.reshape(count, network.nodes[-1].size, -1), 2).max())


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu", "softplus:3", "leaky_relu:-0.5", "silu"])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", [(5,), (2, 4, 4)])
def test_no_slope_is_above_the_constant(activation: str, seed: int, shape: tuple[int, ...]) -> None:
    """Blocks near and beyond 1-Lipschitz: too large a diagonal, one of another sign, weights that nearly return."""
    dims = (7, 5) if len(shape) == 1 else (3, 2, 3, 3)
    v = 0.7 * random(*dims, seed=seed)
    d = (2 / gershgorin(v)) * (1 + random(len(v), seed=seed + 1).abs() * (seed % 3))
    noise = (0.0, 1e-8, 1e-6)[seed % 3] * random(*dims, seed=seed + 2)
    for scale in (1.0, 0.1, 3.0):
        network = block(v, -scale * rows(d, v) * v + noise, activation, shape)
        found = recognised(network, NONE)
        assert found is not None
        assert found.constant >= largest_slope(network) * (1 - 1e-9)


def test_the_constant_is_sharp_where_the_diagonal_is_too_large() -> None:
    """|1 - q| for a linear block; the true constant of an export that is not 1-Lipschitz."""
    v = random(6, 6)
    q = 3.7
    g = -q / float(torch.linalg.matrix_norm(v, 2)) ** 2 * v
    found = recognised(block(v, g, "leaky_relu:1", (6,)), NONE)
    assert found is not None
    assert found.constant == pytest.approx(q - 1, rel=1e-6)


def test_what_is_not_such_a_block_is_not_taken_for_one() -> None:
    v = random(6, 6)
    d = 2 / gershgorin(v)
    assert recognised(block(v, -(d[:, None] * v), "relu", (6,)), NONE) is not None
    assert recognised(block(v, d[:, None] * v, "relu", (6,)), NONE) is None  # it adds
    assert recognised(block(v, -random(6, 6, seed=1), "relu", (6,)), NONE) is None
    wrong = -(d[:, None] * v)
    wrong[2] *= -1  # one entry of the diagonal is negative
    assert recognised(block(v, wrong, "relu", (6,)), NONE) is None
    assert recognised(block(torch.full_like(v, math.nan), v, "relu", (6,)), NONE) is None
    assert recognised(block(torch.zeros_like(v), torch.zeros_like(v), "relu", (6,)), NONE) is None


def test_scales_around_the_layers_belong_to_them() -> None:
    v, d = random(6, 5), 2 / gershgorin(random(6, 5))
    before, after, middle = (random(n, seed=n).abs() + 0.5 for n in (5, 6, 6))
    builder = Builder((5,))
    z = builder.add("s2", Scale(after), builder.add("v", Dense(v), builder.add("s1", Scale(before), 0)))
    h = builder.add("s3", Scale(middle), builder.add("phi", from_name("relu"), z))
    whole = after[:, None] * v * before
    back = builder.add("g", Dense(-((d / middle)[:, None] * whole).T.contiguous()), h)
    network = builder.build(builder.add("sum", Add(), 0, back))
    found, plain = recognised(network, NONE), recognised(block(whole, -d[:, None] * whole, "relu", (5,)), NONE)
    assert found is not None
    assert plain is not None
    assert found.constant == pytest.approx(plain.constant, rel=1e-9)


@pytest.mark.parametrize("name", ["1-Lipschitz blocks", "relu, 1-Lipschitz blocks"])
def test_the_chain_is_used_for_every_constant(name: str) -> None:
    network = {**SMOOTH, **PIECEWISE}[name]
    bounds = ModelBounds(network)
    chain = bounds.lipschitz.chain
    assert chain is not None
    assert [part.block is not None for part in chain.parts] == [False, True, True, False]
    pairs = all_pairs(network.classes)
    head = network.nodes[-1].op.weight  # type: ignore[attr-defined]
    stem = network.nodes[1].op.weight  # type: ignore[attr-defined]
    direct = (head[pairs[:, 0]] - head[pairs[:, 1]]).norm(dim=1) * torch.linalg.matrix_norm(stem, 2)
    found = bounds.lipschitz.of_margins(pairs)
    assert (found <= direct * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", [*SMOOTH, *PIECEWISE])
def test_parts_are_networks_of_their_own(name: str) -> None:
    network = {**SMOOTH, **PIECEWISE}[name]
    cuts = [0, *bottlenecks(network), len(network.nodes) - 1]
    x = random(3, *network.input_shape)
    values = network.values(x)
    for first in cuts:
        for last in cuts:
            if first < last:
                assert torch.equal(between(network, first, last)(values[first]), values[last])


def test_networks_without_such_blocks_have_no_chain() -> None:
    residual = {name for name in (*SMOOTH, *PIECEWISE) if "residual" in name or "1-Lipschitz" in name}
    for name, network in {**SMOOTH, **PIECEWISE}.items():
        if name not in residual:
            assert Chain.of(network, NORMAL.budget) is None, name


GENERAL = {"fits": (4, 6, 5), "wide": (3, 12, 4), "narrow": (6, 2, 6)}


@pytest.mark.parametrize("slopes", [(0.0, 1.0), (-0.13, 1.13), (0.25, 0.5), (-1.0, 1.0), (0.2, 0.2)])
@pytest.mark.parametrize("name", GENERAL)
@pytest.mark.parametrize("skip", [True, False])
def test_no_choice_of_slopes_is_above_the_general_constant(skip: bool, name: str, slopes: tuple[float, float]) -> None:
    """Slopes at the ends of their range that make the norm large, found by ascent, for weights of several sizes."""
    n, m, p = GENERAL[name]
    low, high = slopes
    for seed, gain in enumerate((1.0, 1e-3, 30.0)):
        h = random(p, n, seed=seed) * skip
        g, v = gain * random(p, m, seed=seed + 10), random(m, n, seed=seed + 20)
        found = OneLayer(h, g, v, (0.0, 0.0, 0.0), slopes).constant()
        for start in range(8):
            s = low + (high - low) * torch.rand(m, dtype=D, generator=torch.Generator().manual_seed(start))
            for _ in range(10):
                u, norms, w = torch.linalg.svd(h + g @ (s[:, None] * v))
                assert found >= float(norms[0]) * (1 - 1e-12)
                s = torch.where((g.T @ u[:, 0]) * (v @ w[0]) > 0, high, low).to(D)
        centre, radius = (low + high) / 2, (high - low) / 2
        lip_lt = float(torch.linalg.matrix_norm(h + centre * g @ v, 2))
        lip_lt += radius * float(torch.linalg.matrix_norm(g, 2) * torch.linalg.matrix_norm(v, 2))
        assert low == high or found <= 1.001 * lip_lt  # equal slopes would take infinite multipliers


def test_errors_of_the_matrices_count() -> None:
    h, g, v = random(4, 4), random(4, 6), random(6, 4)
    exact, rough = (OneLayer(h, g, v, (e, e, e), (0.0, 1.0)).constant() for e in (0.0, 0.01))
    norms = [float(torch.linalg.matrix_norm(matrix, 2)) for matrix in (g, v)]
    assert rough >= exact + 0.01 * (1 + sum(norms)) * (1 - 1e-9)


def test_a_matrix_that_is_no_number_has_no_constant() -> None:
    h, g, v = random(4, 4), random(4, 6), random(6, 4)
    for wrong in (torch.full_like(g, math.nan), torch.full_like(g, math.inf), torch.zeros_like(g)):
        assert OneLayer(h, wrong, v, (0.0, 0.0, 0.0), (0.0, 1.0)).constant() == math.inf


def sandwich(depth: int, width: int = 12) -> Network:
    """Sandwich layers h -> sqrt(2) A^T Psi relu(sqrt(2) Psi^-1 B h + b) with A A^T + B B^T = I: 1-Lipschitz each."""
    builder, node = Builder((width,)), 0
    for number in range(depth):
        q, _ = torch.linalg.qr(random(2 * width, width, seed=number))
        a, b = q[:width].T, q[width:].T
        psi = random(width, seed=number + 50).exp()
        z = builder.add(f"in{number}", Dense(math.sqrt(2) * b / psi[:, None], random(width, seed=number + 90)), node)
        hidden = builder.add(f"relu{number}", from_name("relu"), z)
        node = builder.add(f"out{number}", Dense(math.sqrt(2) * a.T * psi), hidden)
    return builder.build(builder.add("head", Dense(random(3, width, seed=7)), node))


@pytest.mark.parametrize("depth", [1, 3])
def test_sandwich_layers_are_1_lipschitz(depth: int) -> None:
    network = sandwich(depth)
    pairs = all_pairs(3)
    head = network.nodes[-1].op.weight  # type: ignore[attr-defined]
    direct = (head[pairs[:, 0]] - head[pairs[:, 1]]).norm(dim=1)
    bounds = ModelBounds(network).lipschitz
    assert (bounds.of_margins(pairs) <= 1.001**depth * direct).all()
    assert (bounds.expansions[0].sensitivity(0, pairs) > 1.5**depth * direct).all()
    x = random(200, 12, seed=3).requires_grad_(True)
    out = network(x)
    for row, (a, b) in enumerate(pairs.tolist()):
        (slope,) = torch.autograd.grad((out[:, a] - out[:, b]).sum(), x, retain_graph=True)
        assert float(slope.norm(dim=1).max()) <= float(bounds.of_margins(pairs)[row])


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_the_curvature_of_a_stack_is_at_most_the_published_recursion(depth: int) -> None:
    """C(f o g) <= C(f) L(g)^2 + L(f) C(g), with 1 for every block's L and h ||G|| ||V|| max_i ||V_i|| for its C."""
    phi = from_name("tanh")
    module = nn.Sequential(*(DenseBlock(16, 10 * k, torch.tanh) for k in range(depth)), nn.Linear(16, 3, dtype=D))
    network = load_module(module.eval(), (16,)).network
    recursion = 0.0
    for k in range(depth):
        v = random(16, 16, seed=10 * k)
        g = 2 * v.T / gershgorin(v)
        norms = torch.linalg.matrix_norm(g, 2) * torch.linalg.matrix_norm(v, 2)
        recursion += float(phi.curvature_sup * norms * v.norm(dim=1).max())
    head = network.nodes[-1].op.weight  # type: ignore[attr-defined]
    pairs = all_pairs(3)
    direct = recursion * (head[pairs[:, 0]] - head[pairs[:, 1]]).norm(dim=1)
    bounds = ModelBounds(network)
    assert (bounds.curvature.lower(pairs) <= direct * (1 + 1e-5)).all()
    unaware = replace(bounds.lipschitz, chain=None)
    assert (
        Curvature(network, bounds.weights, unaware, bounds.budget).lower(pairs) >= bounds.curvature.lower(pairs)
    ).all()


@pytest.mark.parametrize("exponent", [-200, -120, -40, 0, 40, 120, 200, 300])
def test_sizes_beyond_squares_have_no_constant_rather_than_a_wrong_one(exponent: int) -> None:
    """The constant goes with the weights' size; where nothing can be proved, it is infinite or not there."""
    h, g, v = random(4, 4), random(4, 6), random(6, 4)
    plain = OneLayer(h, g, v, (0.0, 0.0, 0.0), (0.0, 1.0)).constant()
    size = 10.0**exponent
    for scaled in (
        OneLayer(h, g / size, v * size, (0.0,) * 3, (0.0, 1.0)),
        OneLayer(h, g * size, v / size, (0.0,) * 3, (0.0, 1.0)),
    ):
        assert plain * (1 - 1e-6) <= scaled.constant() <= (1.05 * plain if abs(exponent) <= 40 else math.inf)
    whole = OneLayer(h * size, g * size, v, (0.0, 0.0, 0.0), (0.0, 1.0)).constant()
    assert plain * size * (1 - 1e-6) <= whole <= (1.05 * plain * size if abs(exponent) <= 40 else math.inf)
    found = recognised(block(v * size, -v / size / 30, "relu", (4,)), NONE)
    assert found is None or found.constant >= 1.0


def test_a_hidden_unit_that_overflows_is_not_certified() -> None:
    """Its multiplier would overflow to infinity, and its part of the inequality to nothing."""
    g = 2.9e153 * 2.0**100
    builder = Builder((1,))
    first = builder.add("first", Dense(torch.ones(1, 1, dtype=D)), 0)
    hidden = builder.add("relu", from_name("relu"), builder.add("v", Dense(torch.full((1, 1), 1 / g, dtype=D)), first))
    back = builder.add("g", Dense(torch.full((1, 1), g, dtype=D)), hidden)
    network = builder.build(builder.add("head", Dense(torch.tensor([[1.0], [-1.0]], dtype=D)), back))
    assert float(ModelBounds(network).lipschitz.of_margins(torch.tensor([[0, 1]]))) >= 2.0


def test_roundings_of_the_returning_path_count() -> None:
    """x + s (-2 p(x)) for a scale s near 1 with an error of 2^31 units: its constant is that much above 1."""
    builder = Builder((1,))
    hidden = builder.add("p", from_name("leaky_relu:1"), builder.add("v", Dense(torch.ones(1, 1, dtype=D)), 0))
    node = builder.add("g", Dense(torch.full((1, 1), -2.0, dtype=D)), hidden)
    node = builder.add("s", Scale(torch.ones(1, dtype=D), weight_error=2**31 - 1), node)
    network = builder.build(builder.add("sum", Add(), 0, node))
    found = recognised(network, NONE)
    assert found is not None
    assert found.constant >= 1 + 2 * 2.0**-22


def test_scales_that_underflow_on_the_way_are_refused() -> None:
    builder = Builder((1,))
    node = builder.add("s0", Scale(torch.full((1,), 1e-200, dtype=D)), 0)
    node = builder.add("v", Dense(torch.tensor([[1e200], [1e-200]], dtype=D)), node)
    for number in range(2):
        node = builder.add(f"s{number + 1}", Scale(torch.tensor([1.0, 1e300], dtype=D)), node)
    node = builder.add("g", Dense(torch.tensor([[-1.0, 1e-4]], dtype=D)), builder.add("p", from_name("relu"), node))
    assert recognised(builder.build(builder.add("sum", Add(), 0, node)), NONE) is None


@pytest.mark.parametrize("first", ["clip:0,1", "tanh"])
def test_an_activation_on_the_input_itself(first: str) -> None:
    builder = Builder((5,))
    node = builder.add("first", from_name(first), 0)
    v = random(6, 5)
    hidden = builder.add("phi", from_name("tanh"), builder.add("v", Dense(v), node))
    back = builder.add("g", Dense(-2 * (v / gershgorin(v)[:, None]).T), hidden)
    node = builder.add("sum", Add(), node, back)
    network = builder.build(builder.add("head", Dense(random(3, 5, seed=1)), node))
    bounds = ModelBounds(network)
    assert bounds.lipschitz.chain is not None
    assert bounds.lipschitz.to_pre_activation(0) == 1.0
    assert bounds.lipschitz.rows(0) == 1.0
    if first == "tanh":
        assert bool(bounds.curvature.lower(all_pairs(3)).isfinite().all())


def test_the_end_of_a_block_and_logits_that_are_one_have_its_constant() -> None:
    v = random(6, 5)
    builder = Builder((5,))
    hidden = builder.add("phi", from_name("tanh"), builder.add("v", Dense(v), 0))
    node = builder.add("sum", Add(), 0, builder.add("g", Dense(-2 * (v / gershgorin(v)[:, None]).T), hidden))
    logits = builder.build(node)
    assert float(ModelBounds(logits).lipschitz.of_margins(torch.tensor([[0, 1]]))) <= math.sqrt(2) * (1 + 1e-9)
    after = builder.add("after", from_name("tanh"), node)
    network = builder.build(builder.add("head", Dense(random(3, 5, seed=1)), after))
    assert ModelBounds(network).lipschitz.to_pre_activation(node) <= 1 + 1e-9
