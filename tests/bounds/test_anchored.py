"""Anchored bounds against sampled truths; what mixing their two forms claims; never below the global bounds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.anchored import Anchored
from certify_cli.bounds.global_bounds.anchored_network import level_bound
from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.certificates.anchoring import Constants, anchored
from certify_cli.certificates.closed_form import hybrid_radius
from certify_cli.certificates.dual import refined
from certify_cli.certificates.methods import METHODS
from certify_cli.efforts import EFFORTS
from certify_cli.network.activations import from_name
from certify_cli.network.activations.anchored_table import AnchoredTable
from certify_cli.network.affine import Dense
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Builder, Network
from tests.networks import SMOOTH, points
from tests.shared_models import load

BATCH = 12
CURVED = ("tanh", "sigmoid", "softplus:3", "centred_softplus:2", "log_sigmoid", "gelu", "gelu_tanh", "silu", "mish",
          "atan", "erf", "sin", "softsign", "elu", "celu:2")  # fmt: skip


@pytest.mark.parametrize("name", CURVED)
def test_no_offset_leaves_the_tabulated_constants(name: str) -> None:
    """At places inside, at the edges of, and beyond the table; with offsets of every size, towards both sides."""
    activation = from_name(name)
    table = AnchoredTable(activation)
    g = torch.Generator().manual_seed(1)
    z = torch.cat(
        [s * torch.randn(150, dtype=torch.float64, generator=g) for s in (0.01, 1.0, 4.0, 300.0)]
        + [torch.tensor([0.0, -0.0, 1e3, -1e3, 1e8, -1e8, 1.0, -2.0], dtype=torch.float64)]
    )
    units = table(z, torch.full_like(z, 1e-12))
    for size in torch.logspace(-2, 3, 120, dtype=torch.float64).tolist():
        for t in (size, -size):
            z_there = z + t
            moved = z_there - z
            rise = activation.value(z_there) - activation.value(z)
            slack = 1e-12 * (1 + z.abs() + abs(t)) / abs(t)
            assert (rise / moved <= units.secant_high + slack).all()
            assert (rise / moved >= units.secant_low - slack).all()
            bend = (activation.slope(z_there) - activation.slope(z)) / moved
            assert (bend.abs() <= units.slope_lipschitz + slack).all()
            quadratic = 2 * (rise - activation.slope(z) * moved) / moved.square()
            assert (quadratic <= units.curvature_above + 4 * slack / abs(t)).all()
            assert (-quadratic <= units.curvature_below + 4 * slack / abs(t)).all()
    assert (units.slope_lipschitz <= activation.curvature_sup).all()
    assert (units.secant_high <= activation.slope_range[1]).all()


def test_a_pre_activation_that_is_not_known_well_gets_the_constants_of_the_line() -> None:
    activation = from_name("tanh")
    z = torch.full((3,), 3.0, dtype=torch.float64)
    units = AnchoredTable(activation)(z, torch.tensor([1e-13, 0.1, math.inf], dtype=torch.float64))
    assert (
        float(units.slope_lipschitz[0])
        < 0.5
        < float(units.slope_lipschitz[1])
        == float(units.slope_lipschitz[2])
        == activation.curvature_sup
    )


def test_level_bound_against_the_greedy_optimum() -> None:
    """sum w q under 0 <= q <= parts, sum q <= total: filling the largest weights first is optimal."""
    weights, parts = torch.rand(40, 9, dtype=torch.float64) ** 3, torch.rand(1, 9, dtype=torch.float64)
    total = 3 * torch.rand(40, dtype=torch.float64)
    bound = level_bound(weights, total, parts)
    for row in range(40):
        order = weights[row].argsort(descending=True)
        left, best = float(total[row]), 0.0
        for i in order.tolist():
            used = min(left, float(parts[0, i]))
            best, left = best + used * float(weights[row, i]), left - used
        assert best <= float(bound[row]) <= min(float(weights[row].max() * total[row]), 2 * best + 1e-12) * (1 + 1e-9)


def margins_and_gradients(network: Network, x: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
    """Margins (batch, classes) and their gradients (batch, classes, inputs), by autograd."""
    x = x.detach().requires_grad_(True)
    logits = network(x)
    margin = logits.gather(1, prediction.unsqueeze(1)) - logits
    rows = [torch.autograd.grad(margin[:, i].sum(), x, retain_graph=True)[0].flatten(1) for i in range(len(logits.T))]
    return margin.detach(), torch.stack(rows, 1)


def table(bound: str, anchors: Anchored, batch: int, classes: int) -> Tensor:
    """One of the anchored bounds for every sample and class."""
    index = torch.arange(batch)
    return torch.stack([getattr(anchors, bound)(index, torch.full_like(index, c)) for c in range(classes)], dim=1)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("effort", ["fast", "normal"])
def test_no_perturbation_exceeds_an_anchored_bound(name: str, effort: str) -> None:
    network = SMOOTH[name]
    with exact_kernels():
        point = EvaluatedPoints(network, points(network, BATCH))
        anchors = ModelBounds(network, EFFORTS[effort]).anchored_at(point)
        names = ("lipschitz", "adjoint_anchored", "jacobian_anchored", "lower", "upper")
        lipschitz, adjoint, jacobian, lower, upper = (table(n, anchors, BATCH, network.classes) for n in names)
    value, gradient = margins_and_gradients(network, point.x, point.prediction)
    unit = gradient / gradient.norm(dim=2, keepdim=True).clamp(min=1e-300)
    for seed, spread in enumerate((1e-3, 0.1, 0.5, 1.0, 2.0, 5.0, 30.0) * 4):
        d = points(network, BATCH, 100 + seed, spread)
        if seed % 3 == 1:  # back along a gradient, where f moves most
            rival = (point.prediction + 1 + seed) % network.classes
            d = -spread * unit[torch.arange(BATCH), rival].reshape(d.shape)
        elif seed % 3 == 2:  # to where everything is unsaturated
            d = -point.x * torch.rand(1, dtype=torch.float64) + 0.1 * d
        e = d.flatten(1).norm(dim=1, keepdim=True)
        there, gradient_there = margins_and_gradients(network, point.x + d, point.prediction)
        change = (gradient_there - gradient).norm(dim=2)
        rounding = 1e-12 * (1 + there.abs() + value.abs() + lipschitz * e)
        assert ((there - value).abs() <= lipschitz * e + rounding).all()
        assert (change <= adjoint * e + 1e-12 * (1 + gradient.norm(dim=2))).all()
        assert (change <= jacobian * e + 1e-12 * (1 + gradient.norm(dim=2))).all()
        bend = there - value - (gradient * d.flatten(1).unsqueeze(1)).sum(2)
        assert (-bend <= 0.5 * lower * e.square() + rounding).all()
        assert (bend <= 0.5 * upper * e.square() + rounding).all()


def scalar(*weights: float, activation: str = "tanh") -> Network:
    """x -> weights alternating with activations, the last one against a logit that is 0."""
    builder, last = Builder((1,)), 0
    for number, weight in enumerate(weights):
        rows = [[weight], [0.0]] if number == len(weights) - 1 else [[weight]]
        last = builder.add(f"fc{number}", Dense(torch.tensor(rows, dtype=torch.float64)), last)
        if number < len(weights) - 1:
            last = builder.add(f"act{number}", from_name(activation), last)
    return builder.build(last)


def test_anchoring_both_factors_over_claims() -> None:
    """f = tanh(3 tanh x) at x = 3: both layers are saturated there, so the product of both anchored factors is tiny,
    though the gradient at 0 is 3. Each valid form keeps one factor global."""
    network, x = scalar(1.0, 3.0, 1.0), torch.tensor([[3.0]], dtype=torch.float64)
    with exact_kernels():
        point = EvaluatedPoints(network, x)
        anchors = ModelBounds(network).anchored_at(point)
        zero, one = torch.tensor([0]), torch.tensor([1])
        valid = float(anchors.adjoint_anchored(zero, one)), float(anchors.jacobian_anchored(zero, one))
    units = AnchoredTable(from_name("tanh"))
    z1, z2 = x[0], 3 * torch.tanh(x[0])
    slope1, slope2 = (1 - torch.tanh(z).square() for z in (z1, z2))
    bend1, bend2 = (units(z, torch.zeros_like(z)).slope_lipschitz for z in (z1, z2))
    # per unit of |d|: |S' - S| <= bend |D|, |D_1| = 1, |D_2| <= 3; adjoints and Jacobians both at the sample
    mixed = float(slope2 * 3 * bend1 + bend2 * 3 * (3 * slope1))
    _, here = margins_and_gradients(network, x, point.prediction)
    _, there = margins_and_gradients(network, torch.zeros_like(x), point.prediction)
    truth = float((there - here)[0, 1].norm()) / 3.0
    assert truth == pytest.approx(1.0, rel=0.02)
    assert mixed < 0.2 * truth
    assert min(valid) >= truth


@pytest.mark.parametrize("place", [0.0, 0.3, 1.0, 2.0, 4.0])
def test_one_unit_by_construction(place: float) -> None:
    """f = 2 tanh(1.5 x) has nothing to compose: the bounds are the extremes of its secants and bends, up to the width
    of the table's cells (widest, against constants that shrink, where the unit is saturated)."""
    network, x = scalar(1.5, 2.0), torch.tensor([[place]], dtype=torch.float64)
    with exact_kernels():
        point = EvaluatedPoints(network, x)
        anchors = ModelBounds(network).anchored_at(point)
        rival = 1 - point.prediction
        found = [float(getattr(anchors, n)(torch.tensor([0]), rival)) for n in ("lipschitz", "change", "lower")]
    t = torch.cat([s * torch.logspace(-3, 3, 40001, dtype=torch.float64) for s in (-1, 1)])
    sign = 1.0 if int(point.prediction) == 0 else -1.0
    f, f_there = sign * 2 * math.tanh(1.5 * place), sign * 2 * torch.tanh(1.5 * (place + t))
    g = sign * 3 * (1 - math.tanh(1.5 * place) ** 2)
    g_there = sign * 3 * (1 - torch.tanh(1.5 * (place + t)).square())
    truths = [
        float(((f_there - f) / t).abs().max()),
        float(((g_there - g) / t).abs().max()),
        max(0.0, float((-2 * (f_there - f - g * t) / t.square()).max())),
    ]
    for bound, truth in zip(found[1:], truths[1:], strict=True):
        assert truth * (1 - 1e-9) <= bound <= truth * (1.02 + 0.03 * place) + 1e-2
    assert truths[0] * (1 - 1e-9) <= found[0] <= truths[0] * 1.02


def test_a_linear_network_has_its_exact_constants() -> None:
    network = SMOOTH["linear"]
    with exact_kernels():
        point = EvaluatedPoints(network, points(network, 6))
        anchors = ModelBounds(network).anchored_at(point)
        index, rival = torch.arange(6), (point.prediction + 1) % 3
        assert anchors.lipschitz(index, rival) == pytest.approx(point.gradient_norm[index, rival], rel=1e-12)
        assert (anchors.change(index, rival) == 0).all()
        assert (anchors.lower(index, rival) == 0).all()


def everywhere(model_bounds: ModelBounds, point: EvaluatedPoints) -> Constants:
    return Constants(
        model_bounds.curvature_pairs.rows(point.prediction),
        model_bounds.curvature_pairs.columns(point.prediction),
        model_bounds.lipschitz_pairs.rows(point.prediction),
    )


def assert_never_worse(network: Network, x: Tensor) -> float:
    """Every entry of the table, and the methods' radii against those of the global constants. Returns the gain."""
    with exact_kernels():
        model_bounds, point = ModelBounds(network), EvaluatedPoints(network, x)
        constants = everywhere(model_bounds, point)
        closed = hybrid_radius(point.margin_low, point.gradient_norm, constants.lower, constants.lipschitz)
        raised, decided = anchored(model_bounds.anchored_at(point), point, closed, constants)
        assert (raised >= closed)[~point.own].all()
        assert (decided.lower <= constants.lower).all()
        assert (decided.lipschitz <= constants.lipschitz).all()
        without = refined(point, closed, constants.lower, constants.upper, 1).radius
        without = without.masked_fill(point.own, torch.inf).amin(1)
        radius = METHODS["curvature"].certify(model_bounds, point, False, None).radius
        assert (radius >= without).all()
        assert (radius >= raised.masked_fill(point.own, torch.inf).amin(1)).all()
        finite = without.isfinite() & (without > 0)
    return float((radius / without)[finite].mean()) if bool(finite.any()) else 1.0


@pytest.mark.parametrize("name", SMOOTH)
def test_an_anchored_radius_is_never_below_the_global_one(name: str) -> None:
    assert_never_worse(SMOOTH[name], points(SMOOTH[name], 30))


def test_saturated_networks_gain() -> None:
    assert assert_never_worse(SMOOTH["four layers, sigmoid"], points(SMOOTH["four layers, sigmoid"], 30)) > 1.2


GAINS = {
    "o4lc_mnist_tanh_1x200.onnx": 1.5,
    "o4lc_mnist_tanh_200_100.onnx": 1.0,
    "dualapp_mnist_fnn_1x100_sigmoid.onnx": 1.0,
    "dualapp_mnist_cnn_2layer_1_5_sigmoid.onnx": 1.0,
}


@pytest.mark.parametrize("name", GAINS)
def test_published_networks(shared: Path, name: str) -> None:
    network, data, _ = load(shared, name, "20")
    assert assert_never_worse(network, data.x.double()) >= GAINS[name]


def test_samples_out_of_range_and_weights_that_overflow_give_no_claim() -> None:
    """NaN and inf: bounds are inf, never NaN; radii are no larger than the global ones."""
    network = scalar(1e200, 1e200, 1.0)
    with exact_kernels():
        point = EvaluatedPoints(network, torch.tensor([[1e150], [0.1], [math.nan]], dtype=torch.float64))
        model_bounds = ModelBounds(network)
        anchors = model_bounds.anchored_at(point)
        index = torch.arange(3)
        for bound in ("lipschitz", "change", "lower", "upper"):
            value = getattr(anchors, bound)(index, 1 - point.prediction)
            assert not value.isnan().any()
        radius = METHODS["curvature"].certify(model_bounds, point, True, None).radius
    assert not radius.isnan().any()
    assert float(radius[2]) == 0.0
