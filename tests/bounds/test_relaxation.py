"""Linear relaxation and local Lipschitz bounds: nothing sampled leaves them; exact where the network is linear."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.bounds.on_ball.interval_ranges import Ranges, interval_ranges
from certify_cli.bounds.on_ball.lipschitz import linearised_on_balls, matrix_norms
from certify_cli.bounds.on_ball.max_pooling import DecidedGroups, MaxPoolRelaxation
from certify_cli.bounds.relaxation import backward
from certify_cli.bounds.relaxation.backward import LinearRelaxation, relax_all
from certify_cli.bounds.relaxation.intermediate_bounds import RangeLimits, intermediate_bounds, narrows
from certify_cli.bounds.relaxation.optimise import has_slopes, optimised_loss, slope_tables
from certify_cli.bounds.relaxation.supporting_lines import SlopeTable
from certify_cli.network.activations import ACTIVATIONS, from_name
from certify_cli.network.activations.interval_bounds import ActivationOnInterval
from certify_cli.network.affine import Dense
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Builder, Network
from certify_cli.network.linear_forms import WholeForms
from certify_cli.network.movement import Reshape
from certify_cli.network.pooling import GroupMap, MaxMin, MaxPool
from certify_cli.network.propagate import Vectors, pre_activations, vjp_cost
from tests.adversary import attacked, directions
from tests.networks import CURVED, PIECEWISE, QUICK_CURVED, mlp, points, pooled_net

D = torch.float64
NETWORKS = CURVED | PIECEWISE | {"max pooling": pooled_net(), "deep relu": mlp((6, 9, 9, 9, 9, 3), "relu", seed=2)}
EACH = [
    name if name in QUICK_CURVED or name not in CURVED else pytest.param(name, marks=pytest.mark.slow)
    for name in NETWORKS
]
RADII = (1e-9, 0.05, 0.5, 3.0, 100.0)
MEMORY = 2**26
ROWS = {"celu": "celu:0.7", "centred_softplus": "centred_softplus:2", "clip": "clip:-0.5,1"}


def known(network: Network, count: int, radius: float) -> tuple[EvaluatedPoints, Ranges]:
    point = EvaluatedPoints(network, points(network, count))
    radii = torch.full((count,), radius, dtype=D)
    return point, interval_ranges(point, ModelBounds(network).weights, radii)


@pytest.mark.parametrize("name", EACH)
def test_no_sampled_offset_leaves_the_relaxed_ranges(name: str) -> None:
    network = NETWORKS[name]
    with exact_kernels():
        for radius in RADII:
            point, fast = known(network, 5, radius)
            found, _ = intermediate_bounds(point, fast, MEMORY)
            climbed_for, _ = intermediate_bounds(point, fast, MEMORY, steps=3)
            before = network.values(point.x)
            for d in directions(network, point.x, 8):
                after = network.values(point.x + d * radius * (1 - 1e-14))
                for target in pre_activations(network)[:-1]:
                    offset = (after[target] - before[target]).flatten(1)
                    slack = 1e-13 * (1 + before[target].flatten(1).abs() + offset.abs())
                    for ranges in (found, climbed_for):
                        assert bool((offset >= ranges.low[target] - slack).all())
                        assert bool((offset <= ranges.high[target] + slack).all())
            for target in found.low:
                assert bool((found.low[target] >= fast.low[target]).all())
                assert bool((found.high[target] <= fast.high[target]).all())


def climbing(point: EvaluatedPoints, fast: Ranges, rows: Tensor, steps: int = 6) -> Tensor:
    """The bound with lines chosen for each row, on ranges with lines of their own."""
    ranges, relaxed = intermediate_bounds(point, fast, MEMORY, steps=3)
    item = torch.arange(len(rows)).repeat_interleave(rows.shape[1])
    mine, changes = relaxed.lines, {k: norm[item] for k, norm in relaxed.changes.items()}
    choice = {k: e.at(item) for k, e in slope_tables(point, ranges, mine).items()}
    slopes = {k: line.slopes[:, item] for k, line in mine.items()}
    found = optimised_loss(point.network, changes, choice, slopes, rows.flatten(0, 1), steps)
    return found.on(fast.radius[item]).reshape(rows.shape[:2])


def bounds_of(point: EvaluatedPoints, fast: Ranges) -> dict[str, Callable[[Tensor], Tensor]]:
    more = {"climbed": lambda rows: climbing(point, fast, rows)} if has_slopes(point) else {}
    return more | {
        "lines": lambda rows: relax_all(point, fast).loss(WholeForms(rows)).on(fast.radius),
        "relaxed": lambda rows: intermediate_bounds(point, fast, MEMORY)[1].loss(WholeForms(rows)).on(fast.radius),
        "slopes": lambda rows: linearised_on_balls(point, fast).loss(rows).on(fast.radius),
        "slopes, no Jacobian": lambda rows: linearised_on_balls(point, fast, budget=0.0).loss(rows).on(fast.radius),
    }


@pytest.mark.parametrize("name", EACH)
def test_no_attack_in_the_ball_loses_more(name: str) -> None:
    """Random directions of the logits; somewhere an attack gets near the bound, or the test would show little."""
    network = NETWORKS[name]
    g = torch.Generator().manual_seed(5)
    nearest = 0.0
    with exact_kernels():
        for radius in RADII:
            point, fast = known(network, 4, radius)
            rows = torch.randn(4, 3, network.classes, generator=g, dtype=D)
            start = (network(point.x).unsqueeze(1) * rows).sum(2)
            lowest = [attacked(network, point.x, row, fast.radius) for row in rows.unbind(1)]
            fall = start - torch.stack(lowest, dim=1)
            for bound in bounds_of(point, fast).values():
                loss = bound(rows)
                assert bool((fall <= loss * (1 + 1e-9) + 1e-12 * (1 + start.abs())).all())
                nearest = max(nearest, float((fall / loss).amax()))
    assert nearest > 0.9


@pytest.mark.parametrize("name", ["relu", "leaky relu, residual", "relu6", "max pooling"])
def test_exact_where_the_network_is_linear_on_the_ball(name: str) -> None:
    """On a ball in which no unit changes its piece, what is lost is ||g|| e."""
    network = PIECEWISE[name] if name in PIECEWISE else max_of_dense()
    with exact_kernels():
        point, fast = known(network, 6, 1e-5)
        rows = torch.eye(network.classes, dtype=D).expand(6, -1, -1)
        x = point.x.clone().requires_grad_(True)
        with torch.enable_grad():
            logits = network(x)
            gradients = torch.stack([torch.autograd.grad(z.sum(), x, retain_graph=True)[0] for z in logits.T], 1)
        exact = gradients.flatten(2).norm(dim=2) * 1e-5
        everything = bounds_of(point, fast)
        for kind in ("relaxed", "lines") if name == "max pooling" else everything:
            assert torch.allclose(everything[kind](rows), exact, rtol=1e-6, atol=1e-18)


def max_of_dense() -> Network:
    g = torch.Generator().manual_seed(6)
    b = Builder((5,))
    z = b.add("fc0", Dense(torch.randn(8, 5, generator=g, dtype=D)), 0)
    pooled = b.add("pool", MaxPool((2,), (2,), (0,), (1,)), b.add("rows", Reshape((2, 4)), z))
    flat = b.add("flat", Reshape((4,)), pooled)
    return b.build(b.add("fc1", Dense(torch.randn(3, 4, generator=g, dtype=D)), flat))


def some_ranges(g: torch.Generator, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pre-activations, and ranges around them of widths from 1e-3 to 10."""
    z = 3 * torch.randn(*shape, generator=g, dtype=D)
    width = 10 ** (4 * torch.rand(*shape, generator=g, dtype=D) - 3)
    return z, -width * torch.rand(*shape, generator=g, dtype=D), width * torch.rand(*shape, generator=g, dtype=D)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_lines_hold_the_activation(name: str) -> None:
    """On a fine grid of ranges of every width; they touch: some line misses phi by next to nothing somewhere."""
    phi = from_name(ROWS.get(name, name))
    g = torch.Generator().manual_seed(7)
    z, lo, hi = some_ranges(g, 1, 400)
    found = LinearRelaxation.of(ActivationOnInterval(phi, z, 1e-15, lo, hi), (400,))
    t = lo + (hi - lo) * torch.linspace(0, 1, 2001, dtype=D).reshape(-1, 1)
    rise = phi.value(z + t) - phi.value(z)
    slack = 1e-12 * (1 + rise.abs() + phi.value(z).abs() + t.abs())
    below, above = found.below[0] * t - found.below[1], found.above[0] * t + found.above[1]
    assert bool((below <= rise + slack).all())
    assert bool((above >= rise - slack).all())
    assert bool((found.below[1] >= 0).all())
    assert bool((found.above[1] >= 0).all())
    spread = rise.amax(0) - rise.amin(0) + 1e-9
    for gap in ((rise - below).amin(0) / spread, (above - rise).amin(0) / spread):
        assert float(gap.quantile(0.9)) < 2e-2
    steepest = torch.maximum(found.below[0].abs(), found.above[0].abs())
    assert bool((steepest <= phi.lipschitz * (1 + 1e-9) + 1e-9).all())


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_line_of_an_envelope_holds(name: str) -> None:
    """Slopes between the table's, at them, and beyond its ends, for items that are samples in any order."""
    phi = from_name(ROWS.get(name, name))
    g = torch.Generator().manual_seed(8)
    z, lo, hi = some_ranges(g, 3, 200)
    here, item = ActivationOnInterval(phi, z, 1e-15, lo, hi), torch.tensor([2, 0, 0, 1])
    found = SlopeTable.of(here, LinearRelaxation.of(here, (200,))).at(item)
    t = (lo + (hi - lo) * torch.linspace(0, 1, 801, dtype=D).reshape(-1, 1, 1))[:, item]
    rise = phi.value(z[item] + t) - phi.value(z[item])
    slack = 1e-12 * (1 + rise.abs() + phi.value(z[item]).abs() + t.abs())
    spread = rise.amax(0) - rise.amin(0) + 1e-9
    for side, ends in enumerate(zip(*found.ends, strict=True)):
        above = torch.full((4, 200), bool(side))
        for part in (0.0, 1.0, 7 / 15, torch.rand(4, 200, generator=g, dtype=D), -0.3, 1.4):
            slope = ends[0] + part * (ends[1] - ends[0])
            constant, touch = found.needed(above, slope)
            left = (slope * t + constant - rise) if side else (rise - slope * t + constant)
            assert bool((left >= -slack).all())
            if isinstance(part, Tensor) or 0 <= part <= 1:
                assert float((left.amin(0) / spread).quantile(0.9)) < 2e-2
                assert bool((touch.abs() <= found.magnitude).all())
        line = found.lines(torch.stack([ends[0] - 1.0, ends[1] + 1.0])).slopes
        assert torch.equal(line[side], ends[side])


POOLS = [
    (MaxPool((2, 2), (2, 2), (0, 0), (1, 1)), (2, 4, 4)),
    (MaxPool((3, 3), (2, 2), (1, 1), (1, 1)), (2, 5, 5)),
    (MaxPool((2, 3), (1, 2), (0, 1), (2, 1)), (1, 5, 6)),
    (MaxPool((3,), (2,), (1,), (1,), ceil_mode=True), (2, 6)),
    (MaxPool((2, 2, 2), (2, 1, 2), (0, 0, 0), (1, 1, 1)), (1, 4, 3, 4)),
    (MaxMin(), (6,)),
    (MaxMin(), (4, 3, 3)),
]


@pytest.mark.parametrize(("op", "shape"), POOLS)
def test_groups_are_what_the_operation_takes(op: GroupMap, shape: tuple[int, ...]) -> None:
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(8), dtype=D)
    groups = op.groups(shape)
    lanes = x.reshape(3, groups.channels, -1)
    parts = []
    for sign in groups.signs:
        padded = torch.cat([sign * lanes, torch.full((3, groups.channels, 1), -math.inf, dtype=D)], dim=2)
        parts.append(sign * padded[:, :, groups.members].amax(3))
    assert torch.equal(torch.stack(parts, dim=1).reshape(-1), op.apply(x).reshape(-1))
    moved = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=D)
    assert bool(((op.apply(moved) - op.apply(x)).abs() <= op.largest_change((moved - x).abs()) * (1 + 1e-12)).all())
    assert float((op.apply(moved) - op.apply(x)).norm()) <= op.lipschitz_constant(shape) * float((moved - x).norm())


@pytest.mark.parametrize("width", [1e-12, 0.3, 5.0])
@pytest.mark.parametrize(("op", "shape"), POOLS)
def test_planes_hold_max_pooling(op: GroupMap, shape: tuple[int, ...], width: float) -> None:
    """Rows of both signs; offsets at corners of the box, where a maximum is largest, and inside."""
    g = torch.Generator().manual_seed(9)
    z = torch.randn(3, *shape, generator=g, dtype=D)
    error = torch.full_like(z, 1e-13)
    low, high = (-width * torch.rand(z.shape, generator=g, dtype=D), width * torch.rand(z.shape, generator=g, dtype=D))
    found = MaxPoolRelaxation.of(op, shape, z, error, low, high)
    out = op.output_shape(shape)
    rows = torch.randn(3, 4, *out, generator=g, dtype=D)
    back, loss = found.back(WholeForms(rows)), found.loss(WholeForms(rows))
    exact = z + 1e-13 * (2 * torch.rand(z.shape, generator=g, dtype=D) - 1)
    base = op.apply(exact)
    smallest = torch.full((3, 4), math.inf, dtype=D)
    for number in range(300):
        share = torch.rand(z.shape, generator=g, dtype=D)
        share = share.round() if number % 2 else share
        t = low + (high - low) * share
        rise = op.apply(exact + t) - base
        left = (rows * rise.unsqueeze(1)).flatten(2).sum(2) - (back.values * t.unsqueeze(1)).flatten(2).sum(2)
        smallest = torch.minimum(smallest, left)
        assert bool((left >= -loss - 1e-12).all())
    if width < 1e-9:
        assert bool((loss < 1e-8).all())
    else:
        assert float((-smallest / loss).amax()) > 0.3


@pytest.mark.parametrize(("op", "shape"), POOLS)
def test_bounds_of_pooling_are_those_of_its_contending_members(op: GroupMap, shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(13)
    z = torch.randn(3, *shape, generator=g, dtype=D)
    low, high = (-torch.rand(z.shape, generator=g, dtype=D), torch.rand(z.shape, generator=g, dtype=D))
    wide = MaxPoolRelaxation.of(op, shape, z, torch.zeros_like(z), low, high)
    part = torch.where(wide.contending.reshape(z.shape), 1.0, 0.3)
    narrow = MaxPoolRelaxation.of(op, shape, z, torch.zeros_like(z), part * low, part * high)
    assert bool((part < 1).any()), "some member cannot win"
    forms = WholeForms(torch.randn(3, 4, *op.output_shape(shape), generator=g, dtype=D))
    assert torch.allclose(narrow.loss(forms), wide.loss(forms), rtol=1e-12)
    assert torch.equal(narrow.back(forms).values, wide.back(forms).values)
    assert torch.equal(narrow.undecided, wide.undecided)


def test_a_decided_pool_passes_back_no_more_than_it_says() -> None:
    op, shape = POOLS[1]
    g = torch.Generator().manual_seed(10)
    z = torch.randn(2, *shape, generator=g, dtype=D)
    narrow = torch.full_like(z, 1e-3)
    found = DecidedGroups(
        MaxPoolRelaxation.of(op, shape, z, torch.zeros_like(z), -narrow, narrow), op.output_shape(shape)
    )
    rows = torch.randn(2, 3, *op.output_shape(shape), generator=g, dtype=D)
    change = torch.randn(rows.shape, generator=g, dtype=D)
    change = 1e-3 * change / change.flatten(2).norm(dim=2).reshape(2, 3, *[1] * len(shape))
    near = found.back(Vectors(rows, torch.full((2, 3), 1e-3, dtype=D)))
    moved = found.back(Vectors(rows + change, torch.zeros(2, 3, dtype=D)))
    assert bool(((moved.value - near.value).flatten(2).norm(dim=2) <= near.error).all())


@pytest.mark.parametrize("name", ["deep relu", "saturated", "residual", "relu6"])
def test_an_ascent_gains_and_never_loses(name: str) -> None:
    network = NETWORKS[name]
    g = torch.Generator().manual_seed(12)
    with exact_kernels():
        point, fast = known(network, 4, 0.5)
        rows = torch.randn(4, 3, network.classes, generator=g, dtype=D)
        plain = bounds_of(point, fast)["relaxed"](rows)
        better = climbing(point, fast, rows, 20)
    assert bool((better <= plain * (1 + 1e-9)).all())
    assert float((better / plain).amin()) < 0.99


def test_what_is_beyond_the_budget_stays_as_it_is() -> None:
    network = NETWORKS["deep relu"]
    with exact_kernels():
        point, fast = known(network, 3, 0.4)
        none, _ = intermediate_bounds(point, fast, MEMORY, RangeLimits(0.0))
        first, *_, last = pre_activations(network)[1:-1]
        some, _ = intermediate_bounds(point, fast, MEMORY, RangeLimits(2 * 9 * vjp_cost(network, first)))
        every, _ = intermediate_bounds(point, fast, MEMORY)
    assert all(torch.equal(none.low[target], fast.low[target]) for target in fast.low)
    assert torch.equal(some.low[first], every.low[first])
    assert bool((some.low[first] > fast.low[first]).any())
    assert torch.equal(some.low[last], fast.low[last])


def test_ranges_are_narrowed_behind_a_second_layer_alone() -> None:
    """Of a network that says it has none to narrow, the ranges stay as they are."""
    assert narrows(mlp((6, 8, 8, 3), "relu", seed=1))
    for network in (mlp((6, 8, 3), "tanh", seed=1), pooled_net()):
        assert not narrows(network)
        point, start = known(network, 3, 0.1)
        narrowed, _ = intermediate_bounds(point, start, MEMORY)
        for target in pre_activations(network)[:-1]:
            torch.testing.assert_close(narrowed.low[target], start.low[target], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(narrowed.high[target], start.high[target], rtol=1e-9, atol=1e-12)


def test_rows_in_chunks_are_the_same_rows() -> None:
    network = PIECEWISE["relu, convolutional"]
    with exact_kernels():
        point, fast = known(network, 3, 0.4)
        whole, chunks = (intermediate_bounds(point, fast, memory)[0] for memory in (MEMORY, 1))
    for target in whole.low:
        assert torch.allclose(whole.low[target], chunks.low[target], rtol=1e-12, atol=1e-15)
        assert torch.allclose(whole.high[target], chunks.high[target], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (4, 1), (5, 9), (9, 5), (600, 520)])
def test_norms_of_matrices(rows: int, columns: int) -> None:
    """Never below the largest singular value of anything within the errors; near it where a proof is affordable."""
    g = torch.Generator().manual_seed(11)
    value = torch.randn(2, rows, columns, generator=g, dtype=D)
    error = torch.rand(2, rows, generator=g, dtype=D) * 1e-3
    found = matrix_norms(Vectors(value, error))
    largest = torch.linalg.matrix_norm(value, 2)
    jvp = value / torch.linalg.vector_norm(value, dim=2, keepdim=True) * error.unsqueeze(2)
    assert bool((found >= largest).all())
    assert bool((found >= torch.linalg.matrix_norm(value + jvp, 2)).all())
    if min(rows, columns) <= 512:
        assert bool((found <= 1.2 * largest + error.norm(dim=1)).all())


def test_an_overflow_is_its_own_sample_alone() -> None:
    network = PIECEWISE["relu"]
    with exact_kernels():
        x = points(network, 3)
        x[1] = 1e300
        point = EvaluatedPoints(network, x)
        fast = interval_ranges(point, ModelBounds(network).weights, torch.tensor([0.1, 1e300, 0.1], dtype=D))
        rows = torch.eye(3, dtype=D).expand(3, -1, -1)
        alone, ranges = EvaluatedPoints(network, x[:1]), fast.at(torch.tensor([0]))
        for kind, bound in bounds_of(point, fast).items():
            loss = bound(rows)
            assert not bool(loss.isnan().any())
            assert torch.allclose(loss[:1], bounds_of(alone, ranges)[kind](rows[:1]), rtol=1e-9)


@pytest.mark.parametrize(("mutant", "line"), list(itertools.product(("below", "above"), ("slope", "constant"))))
def test_a_wrong_line_would_be_noticed(mutant: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampling above sees a constant left out or a slope of the other side."""
    right = LinearRelaxation.of

    def wrong(here: ActivationOnInterval, shape: tuple[int, ...]) -> LinearRelaxation:
        found = right(here, shape)
        slope, constant = getattr(found, mutant)
        other = found.above if mutant == "below" else found.below
        pair = (slope, 0 * constant) if line == "constant" else (other[0], constant)
        parts = {"below": found.below, "above": found.above, mutant: pair}
        return LinearRelaxation(parts["below"], parts["above"])

    monkeypatch.setattr(backward.LinearRelaxation, "of", wrong)
    with pytest.raises(AssertionError):
        test_no_attack_in_the_ball_loses_more("saturated")


def test_lines_of_every_range_s_own_narrow_the_ranges() -> None:
    """Never wider, and narrower by more on every further layer."""
    network = mlp((6, 20, 20, 20, 20, 3), "sigmoid", seed=4, gain=4.0)
    with exact_kernels():
        point, fast = known(network, 3, 0.3)
        plain, _ = intermediate_bounds(point, fast, MEMORY)
        climbed_for, _ = intermediate_bounds(point, fast, MEMORY, steps=8)
        shares = []
        for target in pre_activations(network)[1:-1]:
            assert bool((climbed_for.low[target] >= plain.low[target]).all())
            assert bool((climbed_for.high[target] <= plain.high[target]).all())
            width, narrower = (r.high[target] - r.low[target] for r in (plain, climbed_for))
            shares.append(float(narrower.sum() / width.sum()))
        assert sorted(shares, reverse=True) == shares
        assert shares[0] < 0.99
        assert shares[-1] < 0.9


def test_a_constant_that_is_too_small_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SlopeTable.needed

    def wrong(self: SlopeTable, above: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        constant, touch = right(self, above, slope)
        return 0.5 * constant, touch

    monkeypatch.setattr(SlopeTable, "needed", wrong)
    with pytest.raises(AssertionError):
        test_no_attack_in_the_ball_loses_more("saturated")
