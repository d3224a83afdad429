"""Ranges from columns of the linearised network: no sample leaves them, and norms of rows are the Jacobian's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.bounds.on_ball import columns
from certify_cli.bounds.on_ball.columns import ColumnLimits, bending_radius, column_cost
from certify_cli.bounds.on_ball.interval_ranges import Ranges, interval_ranges
from certify_cli.bounds.on_ball.max_pooling import MaxPoolRelaxation
from certify_cli.bounds.relaxation.intermediate_bounds import RangeLimits, intermediate_bounds
from certify_cli.network.activations import from_name
from certify_cli.network.affine import Dense
from certify_cli.network.convolution import Conv
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Add, Builder, Concat, Network
from certify_cli.network.linear_forms import WholeForms
from certify_cli.network.movement import Reshape
from certify_cli.network.pooling import MaxMin, MaxPool
from certify_cli.network.propagate import Winners, jvp, pre_activation, pre_activations
from certify_cli.network.row_norms import row_norms
from certify_cli.numerics.rounding import UNDERFLOW
from tests.adversary import directions
from tests.networks import CURVED, PIECEWISE, mlp, points, pooled_net

D = torch.float64


def deep_residual() -> Network:
    """Eight residual blocks of ReLUs behind a max pooling."""
    g = torch.Generator().manual_seed(6)
    b = Builder((2, 8, 8))

    def conv(x: int) -> int:
        weight = torch.randn(4, b.shape(x)[0], 3, 3, generator=g, dtype=D) / (9 * b.shape(x)[0]) ** 0.5
        return b.add("conv", Conv(weight, 0.1 * torch.randn(4, generator=g, dtype=D), (1, 1), (1, 1), (1, 1)), x)

    x = b.add("pool", MaxPool((3, 3), (2, 2), (1, 1), (1, 1)), b.add("relu", from_name("relu"), conv(0)))
    for _ in range(8):
        inner = conv(b.add("relu", from_name("relu"), conv(x)))
        x = b.add("relu", from_name("relu"), b.add("add", Add(), x, inner))
    flat = b.add("flat", Reshape((64,)), x)
    return b.build(b.add("fc", Dense(torch.randn(4, 64, generator=g, dtype=D)), flat))


def opposite_branches(join: str) -> Network:
    """Branches of ReLUs whose remainders would cancel if two units shared a column."""
    b = Builder((2,))
    eye = torch.eye(2, dtype=D)
    first = b.add("relu1", from_name("relu"), b.add("fc1", Dense(eye, None), 0))
    second = b.add("relu2", from_name("relu"), b.add("fc2", Dense(eye.flip(0), None), 0))
    if join == "add":
        x = b.add("add", Add(), b.add("plus", Dense(eye, None), first), b.add("minus", Dense(-eye, None), second))
    else:
        x = b.add("mixed", Dense(torch.cat([eye, -eye], 1), None), b.add("cat", Concat(0), first, second))
    x = b.add("relu3", from_name("relu"), x)
    return b.build(b.add("logits", Dense(torch.tensor([[1.0, 1.0], [0.5, -1.0]], dtype=D), None), x))


def inception() -> Network:
    """Three branches of convolutions with signs at random, an activation on the shortcut, joined twice."""
    g = torch.Generator().manual_seed(11)
    b = Builder((2, 5, 5))

    def bent(x: int, out: int) -> int:
        weight = torch.randn(out, b.shape(x)[0], 3, 3, generator=g, dtype=D) / 3
        return b.add("relu", from_name("relu"), b.add("conv", Conv(weight, None, (1, 1), (1, 1), (1, 1)), x))

    x = bent(0, 3)
    pooled = b.add("pool", MaxPool((3, 3), (1, 1), (1, 1), (1, 1)), x)
    x = b.add("cat", Concat(0), bent(x, 2), bent(bent(x, 2), 2), pooled)
    x = b.add("add", Add(), bent(x, 3), bent(bent(x, 3), 3))
    flat = b.add("flat", Reshape((75,)), bent(x, 3))
    return b.build(b.add("fc", Dense(torch.randn(3, 75, generator=g, dtype=D), None), flat))


def fire() -> Network:
    """Poolings of concatenated activations: of two branches from one squeezed value, and of an activation alone."""
    g = torch.Generator().manual_seed(12)
    b = Builder((2, 9, 9))

    def bent(x: int, out: int, size: int, activation: str = "relu") -> int:
        weight = torch.randn(out, b.shape(x)[0], size, size, generator=g, dtype=D) / size
        offset = 0.3 * torch.randn(out, generator=g, dtype=D)
        x = b.add("conv", Conv(weight, offset, (1, 1), (size // 2, size // 2), (1, 1)), x)
        return b.add(activation, from_name(activation), x)

    x = b.add("pool", MaxPool((3, 3), (2, 2), (0, 0), (1, 1)), bent(0, 3, 3))
    for kinds in (("relu", "relu"), ("relu", "leaky_relu")):
        squeezed = bent(x, 2, 1)
        x = b.add("cat", Concat(0), bent(squeezed, 3, 1, kinds[0]), bent(squeezed, 2, 3, kinds[1]))
        x = b.add("pool", MaxPool((2, 2), (1, 1), (0, 0), (1, 1)), x)
    flat = b.add("flat", Reshape((20,)), x)
    return b.build(b.add("fc", Dense(torch.randn(3, 20, generator=g, dtype=D), None), flat))


NETWORKS = (
    CURVED
    | PIECEWISE
    | {
        "max pooling": pooled_net(),
        "deep relu": mlp((6, 9, 9, 9, 9, 3), "relu", seed=2),
        "deep residual": deep_residual(),
        "opposite branches, added": opposite_branches("add"),
        "opposite branches, concatenated": opposite_branches("concat"),
        "inception": inception(),
        "fire": fire(),
    }
)
RADII = (1e-9, 0.02, 0.3, 3.0)


def known(network: Network, count: int, radius: float) -> tuple[EvaluatedPoints, Ranges]:
    point = EvaluatedPoints(network, points(network, count))
    return point, interval_ranges(point, ModelBounds(network).weights, torch.full((count,), radius, dtype=D))


def column_ranges(point: EvaluatedPoints, start: Ranges, operations: float = torch.inf) -> Ranges:
    """Ranges by columns alone, of as many units as may be had for so many operations."""
    limits = RangeLimits(rows=0.0, columns=ColumnLimits(operations, 2**40))
    return intermediate_bounds(point, start, 2**26, limits)[0]


def leaves(network: Network, point: EvaluatedPoints, found: Ranges) -> bool:
    """Whether some sampled point of the balls moves a pre-activation out of its range."""
    before = network.values(point.x)
    for d in directions(network, point.x, 12):
        for part in (1.0, 0.4):
            radius = found.radius.reshape(-1, *[1] * len(network.input_shape))
            after = network.values(point.x + d * (part * (1 - 1e-12)) * radius)
            for target in pre_activations(network):
                offset = (after[target] - before[target]).flatten(1)
                slack = 1e-13 * (1 + before[target].flatten(1).abs() + offset.abs())
                inside = (offset >= found.low[target] - slack) & (offset <= found.high[target] + slack)
                if not bool(inside.all()):
                    return True
    return False


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("most", "negligible"), [(3000, 1e-9), (3000, 0.02), (4, 1e-9)])
@pytest.mark.parametrize("rows", [False, True])
def test_no_sampled_offset_leaves_the_ranges(
    name: str, most: int, negligible: float, rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a column for every remainder; with small remainders counted by their norm; where few columns are allowed.

    By columns alone, and where rows narrow every pre-activation before its columns go on.
    """
    monkeypatch.setattr(columns, "NEGLIGIBLE", negligible)
    network = NETWORKS[name]
    with exact_kernels():
        for radius in RADII:
            point, fast = known(network, 3, radius)
            limits = ColumnLimits(most * column_cost(network, pre_activations(network)[0]), 2**40)
            each = RangeLimits(rows=torch.inf if rows else 0.0, columns=limits)
            found, _ = intermediate_bounds(point, fast, 2**26, each)
            assert not leaves(network, point, found)
            for target in found.low:
                assert bool((found.low[target] >= fast.low[target]).all())
                assert bool((found.high[target] <= fast.high[target]).all())


@pytest.mark.parametrize("name", NETWORKS)
def test_norms_of_rows_are_those_of_the_jacobian(name: str) -> None:
    network = NETWORKS[name]
    with exact_kernels():
        x = points(network, 1)
        norms = row_norms(network, network.values(x))
        units = torch.eye(network.nodes[0].size, dtype=D).reshape(-1, *network.input_shape)
        for target, image in jvp(network, 0, units, norms.nodes).items():
            exact = image.value.flatten(1).norm(dim=0)
            assert bool((norms.rows[target] >= exact * (1 - 1e-14)).all())
            assert bool((norms.rows[target] <= exact * (1 + 1e-6) + 1e-6 * exact.max()).all())


def test_the_linearisation_is_the_network_s_own() -> None:
    """Its rows are torch's gradients, max pooling and all."""
    network = deep_residual()
    x = points(network, 1)
    with exact_kernels():
        norms = row_norms(network, network.values(x))
    last = len(network.nodes) - 1
    for unit in range(network.classes):
        inputs = x.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(network(inputs)[0, unit], inputs)
        assert float(norms.rows[last][unit]) == pytest.approx(float(gradient.norm()), rel=1e-6)


def test_exact_where_nothing_bends() -> None:
    network = deep_residual()
    with exact_kernels():
        point, fast = known(network, 2, 1e-5)
        found = column_ranges(point, fast)
        for sample in range(2):
            rows = point.row_norms(sample).rows
            for target in pre_activations(network)[1:]:
                assert torch.allclose(found.high[target][sample], 1e-5 * rows[target], rtol=1e-6, atol=1e-15)


def test_far_narrower_than_intervals_in_deep_networks() -> None:
    """And no wider than rows pulled back one by one by much, at a radius at which some units bend."""
    network = deep_residual()
    with exact_kernels():
        point, fast = known(network, 2, 0.02)
        found = column_ranges(point, fast)
        pulled, _ = intermediate_bounds(point, fast, 2**26)
        deepest = pre_activations(network)[-2]
        width = found.high[deepest] - found.low[deepest]
        assert float((width / (fast.high[deepest] - fast.low[deepest])).max()) < 0.2
        assert float((width / (pulled.high[deepest] - pulled.low[deepest])).mean()) < 1.5


def test_a_remainder_that_is_left_out_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(on: object, slope: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(slope).unsqueeze(0), torch.zeros_like(slope).unsqueeze(0)

    monkeypatch.setattr("certify_cli.network.activations.interval_bounds.ActivationOnInterval.remainders", none)
    network = NETWORKS["deep relu"]
    with exact_kernels():
        point, fast = known(network, 3, 0.3)
        assert leaves(network, point, column_ranges(point, fast))


def test_the_radius_at_which_units_bend() -> None:
    """Counted by moving along each row: to first order the columns of these units take that many operations."""
    network = deep_residual()
    dearest = column_cost(network, pre_activations(network)[0])
    with exact_kernels():
        point = EvaluatedPoints(network, points(network, 2))
        for operations in (0.5 * dearest, 5 * dearest, 40 * dearest):
            radius = bending_radius(point, operations)
            for sample in range(2):
                rows = point.row_norms(sample).rows
                spent, before = 0.0, 0.0
                for target in pre_activations(network)[:-1]:
                    if network.nodes[target + 1].op.title == "relu":
                        z = point.evaluation.values[target][sample].flatten().abs()
                        for part in (1 + 1e-9, 1 - 1e-9):
                            crossed = int((z <= radius[sample] * rows[target] * part).sum())
                            spent += crossed * column_cost(network, target) * (part > 1)
                            before += crossed * column_cost(network, target) * (part < 1)
                assert before <= operations < spent
        assert bool(bending_radius(point, torch.inf).isinf().all())


def test_columns_end_where_they_would_take_too_much() -> None:
    """Of operations or of memory: ranges are then those of the start from there on; and rows can go on without."""
    network = deep_residual()
    targets = pre_activations(network)
    with exact_kernels():
        point, fast = known(network, 1, 0.05)
        every = column_ranges(point, fast)
        for limits in (ColumnLimits(column_cost(network, targets[0]), 2**40), ColumnLimits(torch.inf, 2**12)):
            found, _ = intermediate_bounds(point, fast, 2**26, RangeLimits(rows=0.0, columns=limits))
            ended = [t for t in targets if bool((found.high[t] > every.high[t] * (1 + 1e-9)).any())]
            assert targets[-1] in ended
            assert targets[0] not in ended
            asked, _ = intermediate_bounds(point, fast, 2**26, RangeLimits(columns=limits))
            assert bool((asked.high[targets[-2]] < 0.5 * found.high[targets[-2]]).any())
            none, _ = intermediate_bounds(point, fast, 2**26, RangeLimits(row=1e9, columns=limits))
            assert torch.allclose(none.high[targets[-1]], found.high[targets[-1]], rtol=0.5)


def test_what_rows_narrow_serves_the_columns_behind() -> None:
    """Columns and rows by turns are narrower than rows on the ranges that columns alone left."""
    network = deep_residual()
    with exact_kernels():
        point, fast = known(network, 2, 0.1)
        alone = column_ranges(point, fast)
        after, _ = intermediate_bounds(point, alone, 2**26)
        turns, _ = intermediate_bounds(point, fast, 2**26, RangeLimits(columns=ColumnLimits(torch.inf, 2**40)))
        deepest = pre_activations(network)[-2]
        width = turns.high[deepest] - turns.low[deepest]
        assert float((width / (alone.high[deepest] - alone.low[deepest])).mean()) < 0.9
        assert float((width / (after.high[deepest] - after.low[deepest])).mean()) < 1.0


def test_units_of_two_branches_have_columns_of_their_own() -> None:
    """What the branches leave must not cancel, at a sample beside all kinks: relu(x1) - relu(x2) reaches 0.98."""
    for join in ("add", "concat"):
        network = opposite_branches(join)
        with exact_kernels():
            x = torch.tensor([[-0.01, -0.01]], dtype=D)
            point = EvaluatedPoints(network, x)
            fast = interval_ranges(point, ModelBounds(network).weights, torch.ones(1, dtype=D))
            found = column_ranges(point, fast)
            before = network.values(x)
            for part in torch.linspace(-1, 1, 41, dtype=D):
                after = network.values(x + part * (1 - 1e-12) * torch.tensor([[1.0, 0.0]], dtype=D))
                for target in pre_activations(network):
                    offset = (after[target] - before[target]).flatten(1)
                    assert bool((offset <= found.high[target] + 1e-12).all())
                    assert bool((offset >= found.low[target] - 1e-12).all())


def test_a_tie_selects_one_entry_twice() -> None:
    """The selection of MaxMin's winners then has norm sqrt 2, above the map's Lipschitz constant."""
    b = Builder((4,))
    b.add("sort", MaxMin(), 0)
    network = b.build(b.add("fc", Dense(torch.eye(2, 4, dtype=D), None), 1))
    node = row_norms(network, network.values(torch.ones(1, 4, dtype=D))).nodes[1]
    assert isinstance(node, Winners)
    assert node.norm >= 2**0.5


def test_ranges_behind_activations_follow_those_before_them() -> None:
    """Units that are dead on the ball do not move, and a pooling sees it."""
    network = fire()
    with exact_kernels():
        point, fast = known(network, 3, 0.02)
        found = column_ranges(point, fast)
        cats = [k for k, node in enumerate(network.nodes) if isinstance(node.op, Concat)]
        for cat in cats:
            dead = []
            for k in network.nodes[cat].inputs:
                before = pre_activation(network, k)
                z = point.evaluation.values[before].flatten(1)
                dead.append((z + found.high[before] < 0) & (network.nodes[k].op.title == "relu"))
            still = torch.cat(dead, 1)
            assert bool(still.any())
            assert bool((torch.maximum(-found.low[cat], found.high[cat])[still] <= UNDERFLOW).all())


@pytest.mark.parametrize("radius", [0.02, 0.3])
def test_members_that_do_not_contend_need_no_range(radius: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """No sample leaves the ranges, and margins are what they are where every member of every group is bounded."""

    def every(self: MaxPoolRelaxation) -> Tensor:
        return torch.ones(len(self.sides[0].winner), torch.Size(self.shape).numel(), dtype=torch.bool)

    network = fire()
    forms = WholeForms(torch.eye(3, dtype=D).unsqueeze(0))
    with exact_kernels():
        point, fast = known(network, 3, radius)
        asked, relaxed = intermediate_bounds(point, fast, 2**26)
        assert not leaves(network, point, asked)
        loss = relaxed.loss(forms).on(fast.radius)
        monkeypatch.setattr(MaxPoolRelaxation, "contending", property(every))
        everything = intermediate_bounds(point, fast, 2**26)[1].loss(forms).on(fast.radius)
    assert torch.allclose(loss, everything, rtol=1e-9)
