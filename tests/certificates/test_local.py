"""Local certificates: no attack gets inside, known radii are never passed, and the way of searching does not matter."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from certify_cli import load_data, load_model
from certify_cli.attacks.ddn import nearest_attacks
from certify_cli.bounds.global_bounds.curvature import why_no_curvature
from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.certificates import local
from certify_cli.certificates.local import LocalSearch, local_radii
from certify_cli.certificates.methods import METHODS
from certify_cli.efforts import EFFORTS
from certify_cli.load.preprocessing import fit
from certify_cli.network.activations import from_name
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from tests.adversary import attacked, pairs, pgd
from tests.networks import CURVED, EACH_CURVED, PIECEWISE, SMOOTH, mlp, points, pooled_net
from tests.shared_models import INDEX, load
from tests.soundness.common import certify, dense_stack, tensor

D = torch.float64
MODELS = Path(__file__).parents[2] / "models"
RESOLUTION = 3 * local.FAST_TOLERANCE
"""What two searches of the same bound may differ by, relatively."""


def radii(network: Network, x: Tensor, effort: str = "normal") -> tuple[EvaluatedPoints, Tensor, Tensor]:
    """Samples, what the local bound alone certifies, and the rivals that decide."""
    with exact_kernels():
        point = EvaluatedPoints(network, x)
        radius, rival = local_radii(ModelBounds(network, EFFORTS[effort]), point, torch.zeros(len(x), dtype=D))
    return point, radius, rival


@pytest.mark.parametrize("name", EACH_CURVED)
def test_no_attack_gets_inside(name: str) -> None:
    network = CURVED[name]
    point, radius, _ = radii(network, points(network, 4))
    assert bool((radius > 0).all())
    with exact_kernels():
        sample, _, cotangents = pairs(point)
        least = attacked(network, point.x[sample], cotangents, radius[sample], 20)
        _, norm = nearest_attacks(point, point.x, radius, EFFORTS["fast"])
    assert bool((least > -1e-12).all())
    assert not bool((norm <= radius).any())
    found = norm.isfinite()
    # neither the certificate nor the attack is idle
    assert not bool(found.any()) or float((radius / norm)[found].mean()) > 0.2


def test_effort_pays() -> None:
    """fast <= normal and max up to what the search resolves; a longer ascent may end a little lower for a sample."""
    for name in ("three layers, gelu",):
        network = CURVED[name]
        x = points(network, 4, 3)
        fast, normal, most = (radii(network, x, effort)[1] for effort in ("fast", "normal", "max"))
        assert bool((normal >= fast * (1 - RESOLUTION)).all())
        assert bool((most >= fast * (1 - RESOLUTION)).all())
        assert bool((most >= normal * 0.97).all())
        assert float(normal.mean()) > 1.05 * float(fast.mean())
        assert float(most.mean()) >= 0.98 * float(normal.mean())


@pytest.mark.parametrize("effort", ["fast", "normal"])
@pytest.mark.parametrize("name", ["residual, gelu", "concatenating, softsign", "linear"])
def test_the_method_is_never_below_curvature(name: str, effort: str) -> None:
    network = SMOOTH[name]
    x = points(network, 6, 5)
    assert bool((certify(network, x, "local", effort).radius >= certify(network, x, "curvature", effort).radius).all())


@pytest.mark.parametrize(
    ("name", "apart"),
    [pytest.param("four layers, sigmoid", 1e-6, marks=pytest.mark.slow), ("shared heads", 1e-9)],
)
def test_how_samples_are_cut_into_batches_does_not_matter(name: str, apart: float) -> None:
    """Kernels sum a batch in another order than a sample: small networks, in double precision, feel that alone.

    On four layers the ascent carries it to some 1e-7 of the radius; each radius is proved.
    """
    network = CURVED[name]
    x = points(network, 4, 2)
    for effort in ("fast", "normal"):
        _, whole, rival = radii(network, x, effort)
        parts = [radii(network, part, effort)[1:] for part in (x[:1], x[1:])]
        assert torch.allclose(whole, torch.cat([p[0] for p in parts]), rtol=apart, atol=0)
        assert torch.equal(rival, torch.cat([p[1] for p in parts]))


def test_searches_in_single_precision_may_part_but_end_near_each_other() -> None:
    network = mlp((140, 150, 5), "tanh")
    x = points(network, 6)
    _, whole, rival = radii(network, x)
    parts = [radii(network, part)[1:] for part in (x[:1], x[1:])]
    assert torch.allclose(whole, torch.cat([p[0] for p in parts]), rtol=2e-2)
    assert torch.equal(rival, torch.cat([p[1] for p in parts]))


@pytest.mark.parametrize("memory", [8_000, pytest.param(30_000, marks=pytest.mark.slow)])
def test_little_memory_is_chunks_or_the_fast_tier(memory: int) -> None:
    """Memory for few samples at a time changes nothing; memory for none leaves the fast tier.

    Still less memory leaves no block of weights written out, and smaller radii.
    """
    network = CURVED["residual"]
    x = points(network, 4, 2)
    with exact_kernels():
        point, none = EvaluatedPoints(network, x), torch.zeros(4, dtype=D)
        radius, _ = local_radii(ModelBounds(network, EFFORTS["normal"], memory), point, none)
        plain, _ = local_radii(ModelBounds(network, EFFORTS["fast" if memory < 10_000 else "normal"]), point, none)
        least, _ = local_radii(ModelBounds(network, EFFORTS["normal"], 1), point, none)
    assert torch.allclose(radius, plain, rtol=1e-9)
    assert bool(((least > 0) & (least < radius)).all())


def test_where_the_search_begins_hardly_matters() -> None:
    """Every start ends in proved balls; sensible ones end near the same: an ascent of few steps tells them apart."""
    network = CURVED["three layers, gelu"]
    with exact_kernels():
        point = EvaluatedPoints(network, points(network, 4))
        batch = LocalSearch(ModelBounds(network), point)
        start = 0.5 * (point.margin_low / point.gradient_norm).masked_fill(point.own, torch.inf).amin(1)
        usual, _ = batch.radii(start)
        _, norm = nearest_attacks(point, point.x, usual, EFFORTS["fast"])
        for factor in (0.3, 30.0):
            radius, _ = batch.radii(start * factor)
            assert bool((radius <= norm).all())
            assert torch.allclose(radius, usual, rtol=0.2)
        for start in (0.0, math.inf, math.nan, 1e300, 1e-300):
            radius, _ = batch.radii(torch.full((4,), start, dtype=D))
            assert not bool(radius.isnan().any())
            assert bool((radius <= norm).all())


def test_ties_and_what_is_no_number_are_not_certified() -> None:
    network = SMOOTH["two layers, tanh"]
    x = points(network, 6)
    _, clean, _ = radii(network, x)
    x[1], x[3], x[4] = torch.nan, 1e308, torch.inf
    _, beside, rival = radii(network, x)
    assert bool((beside[[1, 3, 4]] == 0).all())
    assert torch.allclose(beside[[0, 2, 5]], clean[[0, 2, 5]], rtol=1e-9)
    assert bool(((rival >= 0) & (rival < network.classes)).all())
    _, nothing, _ = radii(network, x[[1, 4]])
    assert bool((nothing == 0).all())
    even = dense_stack((torch.eye(2, dtype=D), None), from_name("tanh"), (tensor([1.0, 1.0], [1.0, 1.0]), None))
    assert bool((radii(even, tensor([0.3, -0.2], [5.0, 1.0]))[1] == 0).all())


RISING = ("tanh", "softplus:3", "log_sigmoid", "softsign", "elu")


@pytest.mark.parametrize("effort", ["fast", "normal"])
@pytest.mark.parametrize("name", RISING)
def test_one_rising_activation_flips_where_its_argument_does(name: str, effort: str) -> None:
    """Logits (phi(<w, x>), phi(t)): the distance is |<w, x> - t| / ||w|| whatever phi is."""
    phi = from_name(name)
    w = torch.randn(4, generator=torch.Generator().manual_seed(3), dtype=D)
    size = float(w.norm())
    for t in (-1.3, 0.2):
        level = float(phi.value(tensor(t))[0])
        network = dense_stack((w.unsqueeze(0), None), phi, (tensor([1.0], [0.0]), tensor(0.0, level)))
        gaps = tensor(-3.0, -0.5, -1e-3, 1e-3, 0.5, 3.0, 30.0)
        _, radius, _ = radii(network, (t + gaps).unsqueeze(1) * w / size**2, effort)
        exact = gaps.abs() / size
        assert bool((radius <= exact * (1 + 1e-12)).all())
        assert float((radius / exact)[2:4].min()) > 0.99  # next to the boundary the curve is its tangent
        if effort != "fast":
            # a chord over the ball is the curve's own: what is lost is the search and the minorant's cells
            assert float((radius / exact)[:5].min()) > 0.5


@pytest.mark.parametrize("effort", ["fast", "normal"])
@pytest.mark.parametrize("units", [1, 6])
def test_a_bowl_at_its_bottom(units: int, effort: str) -> None:
    """f = C - sum_i (s(x_i) + s(-x_i)), s = softplus: at 0 the gradient vanishes and Hess f = -I/2, and the nearest
    zero lies on the diagonal: log(2 + 2 cosh(r/sqrt n)) = C/n."""
    eye = torch.eye(units, dtype=D)
    for excess in (1e-4, 1e-2, 1.0):
        level = units * (2 * math.log(2.0) + excess)
        ones = -torch.ones(1, 2 * units, dtype=D)
        out = torch.cat([ones, torch.zeros_like(ones)])
        network = dense_stack((torch.cat([eye, -eye]), None), from_name("softplus"), (out, tensor(level, 0.0)))
        exact = math.sqrt(units) * math.acosh((math.exp(2 * math.log(2.0) + excess) - 2) / 2)
        radius = float(certify(network, torch.zeros(1, units, dtype=D), "local", effort).radius)
        assert radius <= exact * (1 + 1e-12)
        assert radius > (0.99 if excess < 0.1 else 0.6) * exact


def test_tiny_and_huge_weights_lose_nothing_silently() -> None:
    """f = 1 - 2 c^2 (silu(x/c) + silu(-x/c)) = 1 - x^2 + O(x^4/c^2) for a large c: the radius is just above 1."""
    for c in (1.0, 1e3, 1e140):
        first = (tensor([1 / c], [-1 / c]), None)
        # silu(t) + silu(-t) = t tanh(t/2) has no linear part to cancel
        network = dense_stack(
            first, from_name("silu"), (tensor([-2 * c * c, -2 * c * c], [0.0, 0.0]), tensor(1.0, 0.0))
        )
        exact = 1.2 if c == 1.0 else 1 + 1 / c**2
        assert float(certify(network, tensor([0.0]), "local").radius) <= exact
        with exact_kernels():
            point = EvaluatedPoints(network, tensor([0.0]))
            for begin in (0.9,):  # wherever the search begins
                radius, _ = LocalSearch(ModelBounds(network), point).radii(tensor(begin))
                assert 0 <= float(radius) <= exact
                if c == 1e3:
                    assert float(radius) > 0.9


@pytest.mark.parametrize("name", [*PIECEWISE, "max pooling"])
def test_what_has_no_curvature_is_refused(name: str) -> None:
    network = pooled_net() if name == "max pooling" else PIECEWISE[name]
    assert METHODS["local"].applies(network) == why_no_curvature(network)
    assert METHODS["local"].applies(network) is not None


def test_one_hopeless_rival_among_many_decides() -> None:
    """Ten classes: the ball of the deciding rival is proved for every other one too."""
    network = mlp((6, 20, 15, 10), "tanh", seed=11, gain=2.5)
    point, radius, rival = radii(network, points(network, 8))
    with exact_kernels():
        sample, _, cotangents = pairs(point)
        least = attacked(network, point.x[sample], cotangents, radius[sample], 30)
        # a little further out, the deciding rival is the nearest to flip for most samples
        beyond = attacked(network, point.x[sample], cotangents, 1.3 * radius[sample], 30)
    assert bool((least > -1e-12).all())
    table = torch.full((8, 10), math.inf, dtype=D)
    table[sample, (-cotangents).argmax(1)] = beyond
    assert float((table.argmin(1) == rival).double().mean()) > 0.6


@pytest.mark.parametrize("name", ["digits_mlp", "digits_conv"])
def test_shipped_models_hold_against_attacks(name: str) -> None:
    data = load_data("digits", samples=4)
    network = fit(load_model(MODELS / f"{name}.onnx").network, data.x.shape[1:])
    x = data.x.double()
    point, radius, _ = radii(network, x)
    shape = (-1, *[1] * (x.dim() - 1))
    for factor in (1 - 1e-9, 1.5):
        d = pgd(network, x, point.prediction, radius * factor, 40)
        with torch.no_grad():
            flipped = network(x + d).argmax(1) != point.prediction
        assert not bool((flipped & (d.flatten(1).norm(dim=1) < radius)).any())
    with exact_kernels():
        _, norm = nearest_attacks(
            point, x - point.gradients.value[torch.arange(4), 0] * radius.reshape(shape), radius, EFFORTS["fast"]
        )
    assert bool((norm > radius).all())
    share = float((radius / norm).mean())
    assert share > 0.35, share
    assert float(radius.mean()) > 1.3 * float(certify(network, x, "curvature").radius.mean())


SMOOTH_MODELS = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in sorted(INDEX)
    if any(word in name for word in ("sigmoid", "SIGMOID", "tanh", "softplus"))
] or ["no shared models"]


@pytest.mark.parametrize("name", SMOOTH_MODELS)
def test_shared_models_hold_against_attacks(shared: Path, name: str) -> None:
    network, data, _ = load(shared, name, "100")
    if why_no_curvature(network) is not None:
        pytest.skip("no curvature")
    x = data.x.double()
    point, radius, _ = radii(network, x)
    for factor in (1 - 1e-9, 1.3, 2.0):
        d = pgd(network, x, point.prediction, radius.clamp(min=1e-6) * factor)
        with torch.no_grad():
            flipped = network(x + d).argmax(1) != point.prediction
        assert not bool((flipped & (d.flatten(1).norm(dim=1) < radius)).any())
    with exact_kernels():
        _, norm = nearest_attacks(point, x, radius, EFFORTS["normal"])
    assert not bool((norm <= radius).any())
