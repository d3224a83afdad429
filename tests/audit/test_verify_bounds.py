"""The arithmetic of `verify`, part by part, against sampled points, an oracle or an attack."""

from __future__ import annotations

import ast
import math
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

import certify_cli.audit.verify as package
from certify_cli.audit.verify import reading
from certify_cli.audit.verify import reference as reference_module
from certify_cli.audit.verify.functions import FUNCTIONS, Function
from certify_cli.audit.verify.proof import proved, stays_positive, stays_positive_capped
from certify_cli.audit.verify.prover import Prover
from certify_cli.audit.verify.reading import INPUT, UnreadableError, read, spectral
from certify_cli.audit.verify.reference import Reference
from certify_cli.audit.verify.remainders import remainders
from certify_cli.audit.verify.search import attacked
from certify_cli.network.activations import ACTIVATIONS, from_name
from certify_cli.network.graph import Network
from certify_cli.network.pooling import MaxMin
from tests import networks
from tests.networks import mlp
from tests.soundness.common import certify, dense_stack, tensor

SPELLED = {
    name: {"clip": "clip:-1,1.5", "elu": "elu:1", "hard_sigmoid": "hard_sigmoid:0.2,0.5"}.get(name, name)
    for name in ACTIVATIONS
}
SMOOTH = [name for name in ACTIVATIONS if from_name(SPELLED[name]).curvature_range is not None]
NETS = networks.SMOOTH


def samples(network: Network, count: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(count, *network.input_shape, generator=draw, dtype=torch.float64)


def function(name: str) -> Function:
    made = from_name(SPELLED[name])
    return FUNCTIONS[made.name](**made.parameters)


def in_ball(x: Tensor, radius: Tensor, count: int, seed: int) -> Tensor:
    """(count, batch, inputs): perturbations within each sample's radius, a third on its edge."""
    draw = torch.Generator().manual_seed(seed)
    d = torch.randn(count, *x.shape, generator=draw, dtype=torch.float64)
    size = torch.rand(count, len(x), 1, generator=draw, dtype=torch.float64) ** 0.2
    size[::3] = 1.0
    return d / d.norm(dim=2, keepdim=True) * size * radius[:, None]


def test_it_shares_no_arithmetic_with_the_bounds() -> None:
    """Only the model's form, loading, the names and the records may be imported."""
    allowed = (
        "audit.verify", "data", "load", "names", "records", "errors",
        "network.activations", "network.affine", "network.convolution", "network.graph", "network.movement",
    )  # fmt: skip
    for path in Path(package.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("certify_cli"):
                name = (node.module or "").removeprefix("certify_cli.")
                assert name.startswith(allowed), f"{path.name} imports {name}"


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (7, 3), (40, 40), (5, 60)])
@pytest.mark.parametrize("by_powers", [False, True])
def test_a_spectral_norm_is_never_too_small(
    shape: tuple[int, int], by_powers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_powers:
        monkeypatch.setattr(reading, "SVD_WORK", 0.0)
    draw = torch.Generator().manual_seed(sum(shape))
    for scale in (1.0, 1e-120, 1e90):
        a = torch.randn(*shape, generator=draw, dtype=torch.float64) * scale
        exact = float(torch.linalg.matrix_norm(a / scale, 2)) * scale
        assert exact * (1 - 1e-14) <= spectral(a) <= exact * (1.02 if by_powers else 1 + 1e-8)
    one = torch.outer(torch.ones(6), torch.ones(4)).double()  # all in one singular value
    assert math.sqrt(24) <= spectral(one) <= math.sqrt(24) * (1 + 1e-8)
    assert spectral(torch.zeros(3, 4, dtype=torch.float64)) == 0.0


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_have_ranges_that_hold(name: str) -> None:
    """Against a dense grid of values, slopes and second derivatives, and against the table of the bounds."""
    f, row = function(name), from_name(SPELLED[name])
    z = torch.linspace(-6, 6, 4001, dtype=torch.float64) + 1e-7
    assert torch.allclose(f.value(z), row.value(z), atol=1e-12)
    assert torch.allclose(f.slope(z), row.slope(z), atol=1e-9)
    low = torch.tensor([-6.0, -3.1, -1.4, -0.3, -1e-3, 0.0, 0.2, 1.3, 2.9], dtype=torch.float64)
    for width in (1e-4, 0.3, 1.7, 5.0):
        places = low + torch.linspace(0, width, 801, dtype=torch.float64)[:, None]
        slopes = f.slope(places)
        assert f.slopes[0] <= float(slopes.min())
        assert float(slopes.max()) <= f.slopes[1]
        if f.smooth:
            least, most = f.curvature_range(low, low + width)
            assert bool((row.curvature(places) >= least).all() and (row.curvature(places) <= most).all())  # type: ignore[misc]
    assert f.smooth == (row.curvature_range is not None)
    if f.smooth:
        assert f.curvatures[0] <= row.curvature_range[0]
        assert row.curvature_range[1] <= f.curvatures[1]


@pytest.mark.parametrize("name", SMOOTH)
def test_remainders_lie_between_their_bends(name: str) -> None:
    f = function(name)
    if not math.isfinite(f.third):
        pytest.skip("its second derivative jumps, so its range is used as it is")
    z = torch.linspace(-4, 4, 81, dtype=torch.float64)
    for low, high in ((-0.5, 0.2), (-2.0, 3.0), (-0.01, 0.0), (0.0, 4.0)):
        least, most = f.quotient_range(z, torch.full_like(z, low), torch.full_like(z, high))
        t = torch.linspace(low, high, 1201, dtype=torch.float64)[:, None]
        q = f.value(z + t) - f.value(z) - f.slope(z) * t
        assert bool((q >= least * t.square() / 2 - 1e-14).all() and (q <= most * t.square() / 2 + 1e-14).all())


@pytest.mark.parametrize("name", sorted(NETS))
def test_the_dense_reading_is_the_network(name: str) -> None:
    network = NETS[name]
    prover = Prover(read(network))
    x = samples(network, 20)
    values = prover.values(x.flatten(1))
    exact = network(x)
    assert bool(((values.logits.value - exact).norm(dim=1) <= values.logits.error + 1e-12).all())
    assert float(values.logits.error.max()) < 1e-9
    prediction = exact.argmax(1)
    adjoints = prover.adjoints(values, prover.margin_rows(prediction))
    with torch.enable_grad():
        moving = x.clone().requires_grad_()
        logits = network(moving)
        for i in range(network.classes):
            margin = logits.gather(1, prediction[:, None])[:, 0] - logits[:, i]
            (gradient,) = torch.autograd.grad(margin.sum(), moving, retain_graph=True)
            assert torch.allclose(adjoints[INPUT].value[:, i], gradient.flatten(1), atol=1e-10)


def test_what_is_not_written_as_a_matrix_is_said() -> None:
    with pytest.raises(UnreadableError, match="none that is written as a matrix"):
        read(dense_stack((torch.eye(4).double(), None), MaxMin(), (torch.eye(4).double(), None)))


@pytest.mark.parametrize(("name", "size"), list(product(sorted(NETS), (0.03, 0.4, 2.0))))
def test_margins_stay_above_what_is_proved(name: str, size: float) -> None:
    """Sampled points, and steps down the margins, inside the balls: Lipschitz, curvature everywhere, remainders."""
    network = NETS[name]
    prover = Prover(read(network))
    x = samples(network, 6, seed=7)
    flat, radius = x.flatten(1), torch.full((6,), size, dtype=torch.float64)
    values, prediction = prover.values(flat), network(x).argmax(1)
    adjoints = prover.adjoints(values, prover.margin_rows(prediction))
    g, f = adjoints[INPUT].norm, prover.margins(values, prediction)
    lost, slope = remainders(prover, values, adjoints, radius), prover.lipschitz[prediction]
    bend = torch.tensor(
        [[prover.curvature(int(y), i) if i != int(y) else 0.0 for i in range(network.classes)] for y in prediction]
    )
    for d in [*in_ball(flat, radius, 200, 1), *_descents(network, x, prediction, radius)]:
        logits = network((flat + d).reshape(x.shape))
        margin = logits.gather(1, prediction[:, None]) - logits
        length = d.norm(dim=1, keepdim=True)
        along = (adjoints[INPUT].value * d[:, None]).sum(2)
        for bound in (f - slope * length, f + along - bend * length**2 / 2, f + along - lost):
            rivals = f.isfinite()
            assert bool((margin[rivals] >= bound[rivals] - 1e-9).all())
    assert bool((g >= adjoints[INPUT].value.norm(dim=2)).all())


def _descents(network: Network, x: Tensor, prediction: Tensor, radius: Tensor) -> list[Tensor]:
    found = []
    for i in range(network.classes):
        d = torch.zeros_like(x.flatten(1))
        for _ in range(15):
            with torch.enable_grad():
                moved = (x.flatten(1) + d).requires_grad_()
                logits = network(moved.reshape(x.shape))
                margin = logits.gather(1, prediction[:, None])[:, 0] - logits[:, i]
                (gradient,) = torch.autograd.grad(margin.sum(), moved)
            d = d - 0.3 * radius[:, None] * gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1e-12)
            d = d * (radius / d.norm(dim=1).clamp(min=1e-12)).clamp(max=1.0)[:, None]
        found.append(d)
    return found


@pytest.mark.parametrize("name", sorted(NETS))
def test_curvature_bounds_the_hessians(name: str) -> None:
    network = NETS[name]
    prover = Prover(read(network))
    x = samples(network, 5, seed=3)
    for top, rival in ((0, 1), (2, 0)):
        difference = torch.zeros(network.classes, dtype=torch.float64)
        difference[top], difference[rival] = 1.0, -1.0

        def margin(row: Tensor, difference: Tensor = difference) -> Tensor:
            return (network(row[None])[0] * difference).sum()

        for row in x:
            hessian = torch.autograd.functional.hessian(margin, row).reshape(row.numel(), row.numel())
            assert -float(torch.linalg.eigvalsh(hessian)[0]) <= prover.curvature(top, rival) + 1e-12


@pytest.mark.parametrize("name", sorted(NETS))
def test_adjoints_lie_in_their_ranges_everywhere(name: str) -> None:
    """At 300 places far and near, for every layer; the widest of them come near an end of their range."""
    network = NETS[name]
    prover = Prover(read(network))
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(300, *network.input_shape, generator=draw, dtype=torch.float64)
    x = x * 10 ** torch.linspace(-2, 1.5, 300, dtype=torch.float64).reshape(-1, *[1] * (x.dim() - 1))
    found = prover.adjoints(prover.values(x.flatten(1)), prover.margin_rows(torch.zeros(300, dtype=torch.long)))
    for rival in range(1, network.classes):
        low, high = prover.adjoint_ranges(0, rival)
        for k in low:
            v = found[k].value[:, rival]
            assert bool((v >= low[k] - 1e-9).all() and (v <= high[k] + 1e-9).all())
            middle, spread = prover.linearised_adjoint(k, 0, rival)
            assert bool(((v - middle).abs() <= spread + 1e-9).all())


def test_a_radius_that_is_known_is_proved_and_no_more() -> None:
    """A linear classifier: f / ||c||, exactly."""
    w = tensor([3.0, 0.0], [0.0, 4.0], [0.0, 0.0])
    network = dense_stack((w, None))
    x = tensor([1.0, 0.5])
    prover = Prover(read(network))
    prediction = network(x).argmax(1)
    assert int(prediction) == 0
    least = min(1.0 / 5.0, 3.0 / 3.0)
    for factor, holds in ((1 - 1e-6, True), (1 + 1e-6, False), (2.0, False)):
        assert proved(prover, x, prediction, torch.tensor([least * factor]).double()) == [holds]


@pytest.mark.parametrize("name", sorted(NETS))
@pytest.mark.parametrize("method", ["lipschitz", "curvature", "dual"])
def test_what_the_bounds_certify_is_proved_anew_and_no_ball_with_an_attack_in_it(name: str, method: str) -> None:
    network = NETS[name]
    x = samples(network, 12, seed=9)
    found = certify(network, x, method)
    prediction = network(x).argmax(1)
    prover = Prover(read(network))
    anew = proved(prover, x.flatten(1), prediction, found.radius * (1 - 1e-6))
    assert sum(anew) >= (12 if method == "lipschitz" else 5)
    radius = found.attack.isfinite().nonzero()[:, 0]
    if len(radius):
        beyond = found.attack[radius] * (1 + 1e-9)
        assert not any(proved(prover, x[radius].flatten(1), prediction[radius], beyond))
        assert bool(attacked(network, x[radius], prediction[radius], 1.3 * beyond, 0).all())


HARD = ("residual around an activation", "three layers, softplus")
"""The bounds climb farther there than the reference does."""


@pytest.mark.parametrize(
    "name", ["relu", "linear", "two layers, tanh", "convolutional", "residual, gelu", "concatenating", *HARD]
)
def test_the_reference_reaches_what_is_certified_and_holds_no_ball_with_an_attack_in_it(name: str) -> None:
    network = mlp((6, 10, 9, 4), "relu", seed=3) if name == "relu" else NETS[name]
    x = samples(network, 5, seed=11)
    found = certify(network, x, "auto")
    prediction = network(x).argmax(1)
    reference = Reference(Prover(read(network)))
    reached = [
        reference.holds(row.flatten(), int(y), float(r) * 0.9)
        for row, y, r in zip(x, prediction, found.radius, strict=True)
    ]
    assert sum(reached) >= (1 if name in HARD else 3)
    hit = attacked(network, x, prediction, 3 * found.radius, 0)
    for row, y, r in zip(x[hit], prediction[hit], found.radius[hit], strict=True):
        assert not reference.holds(row.flatten(), int(y), 3 * float(r))


def test_inequalities_are_exact() -> None:
    """1/3 is no float64: what float arithmetic cannot tell fractions can."""
    third = 1 / 3
    assert stays_positive(1.0, 3.0, 0.0, 0.0, third)  # the float lies below a third
    assert not stays_positive(1.0, 3.0, 0.0, 0.0, math.nextafter(third, 1))
    assert not stays_positive(math.nan, 1.0, 0.0, 0.0, 0.1)
    assert not stays_positive(1.0, math.inf, 0.0, 0.0, 0.1)
    # f = 1, g = 0, M = 2, L = 1: t* = 1/2, 1/4 is used there, the rest lasts for 3/4
    assert stays_positive_capped(1.0, 0.0, 2.0, 1.0, 1.25 - 1e-15)
    assert not stays_positive_capped(1.0, 0.0, 2.0, 1.0, 1.25)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


TINY_RAMPS: dict[str, tuple[tuple[object, ...], float, float, float]] = {
    # what lies between (first layers, then logits phi and `level`), the sample, d that changes the prediction, a claim
    "a clip narrower than any step": (((column(1.0), None), "clip:0,5e-10", 1e9, 0.25), 1e-9, -2e-9, 0.01),
    "a steep ramp": (((column(1.0), None), "hard_sigmoid:1e6,0.5", 1.0, 0.5), 1e-6, -2e-6, 1000.0),
    "a ramp far out": (((column(1.0), None), "hard_sigmoid:1,1e7", 1.0, 0.5), -1e7 + 2, -3.0, 1000.0),
    "a softplus that bends over 1e10": (
        ((column(1.0), tensor(3e11)), "softplus:1e-10", 1.0, 3e11 - 10), 0.0, -12.0, 15.0,
    ),
    "squares that underflow": (((column(1e150, 1e150), None), "relu", 0.5e-163, 0.5e-13), 1.0, -0.9, 100.0),
    "squares that underflow, smooth": (((column(1.0, 1.0), None), "tanh", 0.5e-163, 0.5e-163), 1.0, -0.9, 100.0),
    "a constant that cancels": (
        ((column(1.0), None), "centred_softplus:1e-10", 1.0, 0.0), 6.1618e-7, -6.1619e-7, 7.394e-7,
    ),
    "a second derivative that jumps within 1e-9": (
        ((column(1.0), None), "celu:1e-9", -1.0, 0.0), -5e-11, 5.0001e-11, 5.01e-11,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TINY_RAMPS)
def test_what_is_built_to_deceive_is_not_proved(name: str) -> None:
    """Slopes between the places where a slope is looked up, norms below the least number, sums that cancel."""
    (first, activation, weight, level), at, d, claim = TINY_RAMPS[name]
    size = len(first[0])  # type: ignore[index]
    last = torch.tensor([[weight] * size, [0.0] * size], dtype=torch.float64)
    network = dense_stack(first, from_name(str(activation)), (last, torch.tensor([0.0, level], dtype=torch.float64)))
    x = tensor(at).reshape(1, 1)
    prediction = network(x).argmax(1)
    assert int(network(x + d).argmax()) != int(prediction)
    assert abs(d) < claim
    assert proved(Prover(read(network)), x, prediction, torch.tensor([claim]).double()) == [False]


def test_a_huge_claim_does_not_hide_from_the_attack() -> None:
    for name, radius in product(("two layers, tanh", "convolutional"), (1e4, 1e150, 1e300)):
        network = NETS[name]
        x = samples(network, 12, seed=2)
        claims = torch.full((12,), radius, dtype=torch.float64)
        assert int(attacked(network, x, network(x).argmax(1), claims, 0).sum()) >= 11


def test_the_reference_looks_between_its_places() -> None:
    """sin at multiples of its period, and a kink of relu, hidden from an even grid."""
    wave = dense_stack((column(1.0), None), from_name("sin"), (column(0.0, 1.0), torch.tensor([0.99999, 0.0]).double()))
    assert not Reference(Prover(read(wave))).holds(torch.zeros(1).double(), 0, 63 * math.pi * (1 - 1e-8))
    for place in (0.0254, 0.0222, 0.0857):  # |x - place| - 0.005 as a margin
        both = (column(1.0, -1.0), torch.tensor([-place, place]).double())
        margin = (torch.tensor([[1.0, 1.0], [0.0, 0.0]]).double(), torch.tensor([0.0, 0.005]).double())
        network = dense_stack(both, from_name("relu"), margin)
        assert not Reference(Prover(read(network))).holds(torch.zeros(1).double(), 0, 1.0)


def test_what_the_reference_accepts_rests_on_no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eigenvalue estimated at next to nothing leads the climb astray, but nothing is accepted by it."""
    network = mlp((6, 30, 3), "softplus:3", seed=8, gain=3.0)
    x = samples(network, 6, seed=1)
    prediction = network(x).argmax(1)
    reference = Reference(Prover(read(network)))
    exact = [largest_held(reference, row, int(y)) for row, y in zip(x, prediction, strict=True)]
    estimate = reference_module.largest_eigenvalue
    monkeypatch.setattr(
        reference_module, "largest_eigenvalue", lambda b, w, exact: estimate(b, w, exact) * (1.0 if exact else 1e-6)
    )
    for row, y, radius in zip(x, prediction, exact, strict=True):
        assert not reference.holds(row, int(y), 1.3 * radius)


def largest_held(reference: Reference, x: Tensor, top: int) -> float:
    """The radius that the reference reaches, to some per cent."""
    radius = 1e-3
    while reference.holds(x, top, 1.1 * radius):
        radius *= 1.1
    return radius
