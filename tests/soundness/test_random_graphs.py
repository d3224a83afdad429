"""Random graphs, with every coincidence that a bound might overlook, against autograd and hill climbing.

Activations straight on the input, one behind another, two on one pre-activation, a pre-activation that also flows on
linearly, a value joined with itself, a nonlinear node that holds the logits.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.curvature import RULES, why_no_curvature
from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.network.activations import from_name
from certify_cli.network.affine import Dense, Scale
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.graph import Add, Builder, Concat, Network
from certify_cli.network.movement import Select
from certify_cli.network.propagate import is_nonlinear, nonlinear_nodes, pre_activation
from tests.networks import points
from tests.soundness.common import certify, margins

SMOOTH = ("tanh", "sigmoid", "softplus:2", "gelu", "silu", "mish", "atan", "erf", "sin", "softsign", "elu")
CORNERED = ("relu", "leaky_relu:0.3", "clip:-1,1", "hard_swish")


def random_graph(seed: int, names: tuple[str, ...], size: int = 14) -> Network:
    g = torch.Generator().manual_seed(seed)

    def pick(count: int) -> int:
        return int(torch.randint(count, (1,), generator=g))

    b = Builder((3,))
    nodes = [0]
    for _ in range(size):
        recent = nodes[-5:]
        x = recent[pick(len(recent))]
        width = b.shape(x)[0]
        alike = [n for n in nodes if b.shape(n) == b.shape(x)]
        kind = pick(10)
        if kind < 3:
            weight = torch.randn(2 + pick(4), width, dtype=torch.float64, generator=g) / width**0.5
            node = b.add("fc", Dense(weight, torch.randn(len(weight), dtype=torch.float64, generator=g) * 0.5), x)
        elif kind < 7:
            node = b.add("act", from_name(names[pick(len(names))]), x)
        elif kind == 7:
            node = b.add("add", Add(), x, alike[pick(len(alike))])
        elif kind == 8 and width < 9:
            node = b.add("cat", Concat(0), x, recent[pick(len(recent))])
        elif kind == 8:
            node = b.add("scale", Scale(torch.randn(width, dtype=torch.float64, generator=g)), x)
        else:
            index = torch.randint(-1, width, (3,), generator=g)
            index[0] = 0
            node = b.add("select", Select(index, width), x)
        nodes.append(node)
    joined = b.add("all", Concat(0), *nodes[-4:])
    out = torch.randn(3, b.shape(joined)[0], dtype=torch.float64, generator=g)
    last = b.add("out", Dense(out), joined)
    if pick(3) == 0:
        last = b.add("top", from_name(names[pick(len(names))]), last)
    return b.build(last)


def _steepest(network: Network, pair: tuple[int, int], samples: int = 400) -> tuple[float, float]:
    """The largest gradient norm and the largest -lambda_min of the Hessian of z_a - z_b met at random points."""
    a, b = pair

    def margin(flat: Tensor) -> Tensor:
        logits = network(flat.unsqueeze(0))[0]
        return logits[a] - logits[b]

    slope, bend = 0.0, 0.0
    for scale in (0.3, 1.0, 3.0):
        x = scale * points(network, samples // 3, seed=1)
        gradient = torch.func.vmap(torch.func.grad(margin))(x)
        hessian = torch.func.vmap(torch.func.hessian(margin))(x)
        slope = max(slope, float(gradient.norm(dim=1).max()))
        bend = max(bend, float(-torch.linalg.eigvalsh(hessian).min()))
    return slope, bend


@pytest.mark.parametrize("seed", range(24))
def test_smooth_graphs(seed: int) -> None:
    network = random_graph(seed, SMOOTH)
    assert why_no_curvature(network) is None
    pairs = torch.tensor([[0, 1], [2, 0], [1, 2]])
    with exact_kernels():
        model_bounds = ModelBounds(network)
        lipschitz = model_bounds.lipschitz.of_margins(pairs)
        curvature = model_bounds.curvature.lower(pairs)
        # every rule is a bound by itself, wherever it applies
        alone = {name: model_bounds.curvature.lower(pairs, (name,)) for name in RULES}
    for row, pair in enumerate(pairs.tolist()):
        slope, bend = _steepest(network, (pair[0], pair[1]), 60)
        assert slope <= float(lipschitz[row]) * (1 + 1e-9)
        assert bend <= float(curvature[row]) * (1 + 1e-9) + 1e-12
        for name, values in alone.items():
            assert bend <= float(values[row]) * (1 + 1e-9) + 1e-12, name


@pytest.mark.parametrize("names", [SMOOTH, CORNERED], ids=["smooth", "cornered"])
@pytest.mark.parametrize("seed", range(40, 52))
def test_no_flip_inside(seed: int, names: tuple[str, ...]) -> None:
    network = random_graph(seed, names)
    x = points(network, 6, seed=seed, spread=1.0)
    found = certify(network, x)
    prediction = network(x).argmax(1)
    directions = torch.nn.functional.normalize(points(network, 400, seed=2), dim=1)
    radius = torch.where(found.radius < 1e100, found.radius, torch.ones_like(found.radius)).reshape(-1, 1, 1)
    for factor in (0.5, 1 - 1e-9):
        around = x.unsqueeze(1) + factor * radius * directions
        worst = margins(network, around.reshape(-1, 3), prediction.repeat_interleave(400)).amin(1).reshape(6, -1)
        assert bool((worst.amin(1)[found.radius > 0] > 0).all())


def test_the_coincidences_do_occur() -> None:
    """The generator would prove nothing if it avoided the cases it is for."""
    graphs = [random_graph(seed, SMOOTH) for seed in range(60)]

    def count(happens: object) -> int:
        return sum(bool(happens(n)) for n in graphs)  # type: ignore[operator]

    def shared(n: Network) -> bool:
        found = [pre_activation(n, k) for k in nonlinear_nodes(n)]
        return len(found) > len(set(found))

    def flows_on(n: Network) -> bool:
        found = {pre_activation(n, k) for k in nonlinear_nodes(n)}
        return any(i in found for node in n.nodes if node.inputs and not is_nonlinear(node) for i in node.inputs)

    assert count(shared) > 5
    assert count(flows_on) > 5
    assert count(lambda n: any(pre_activation(n, k) in nonlinear_nodes(n) for k in nonlinear_nodes(n))) > 5
    assert count(lambda n: any(pre_activation(n, k) == 0 for k in nonlinear_nodes(n))) > 5
    assert count(lambda n: is_nonlinear(n.nodes[-1])) > 5
    assert count(lambda n: any(len(set(node.inputs)) < len(node.inputs) for node in n.nodes)) > 2
