"""The local bound's parts on every topology: offsets on a ball, weighted sums, and margins under attack in the ball."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.bounds.linear_maps.row_matrices import by_columns
from certify_cli.bounds.linear_maps.row_products import InexactRows
from certify_cli.bounds.on_ball.interval_ranges import activation_on_range, interval_ranges
from certify_cli.bounds.remainder import expansion, tangent_bound
from certify_cli.bounds.remainder.expansion import (
    BallExpansion,
    SourceProducts,
    chosen_slopes,
    expand_on_ball,
    range_of_remainder,
    remainder_sums,
)
from certify_cli.bounds.remainder.margin_bound import Choice, lower_bound
from certify_cli.bounds.remainder.optimise import Problem, optimise, starts
from certify_cli.bounds.remainder.tangent_bound import tangent_losses
from certify_cli.bounds.remainder.weighted_squares import joint
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from certify_cli.network.propagate import nonlinear_nodes, pre_activation
from tests.adversary import attacked, directions, pairs
from tests.networks import (
    CURVED,
    EACH_CURVED,
    points,
)

D = torch.float64


RADII = (1e-9, 0.03, 0.4, 3.0, 100.0)


def around(network: Network, count: int, radius: float | Tensor) -> tuple[EvaluatedPoints, BallExpansion]:
    point = EvaluatedPoints(network, points(network, count))
    radii = torch.zeros(count, dtype=D) + radius
    return point, expand_on_ball(point, interval_ranges(point, ModelBounds(network).weights, radii))


def rounding(point: EvaluatedPoints, target: int) -> Tensor:
    """Of a sampled offset, (batch, size)."""
    return 1e-13 * (1 + point.evaluation.values[target].flatten(1).abs())


@pytest.mark.parametrize("name", CURVED)
def test_no_sampled_offset_leaves_the_ball(name: str) -> None:
    """D_l stays in its range, and within `rest` of A_l d; ranges are never wider than those it began with."""
    network = CURVED[name]
    with exact_kernels():
        for radius in RADII:
            point, found = around(network, 6, radius)
            begin = interval_ranges(point, ModelBounds(network).weights, found.radius)
            before = network.values(point.x)
            for d in directions(network, point.x, 6):
                for part in (1 - 1e-14, 0.6):
                    step = d * (radius * part)
                    after = network.values(point.x + step)
                    for target, rows in found.jacobians.outer.items():
                        offset = (after[target] - before[target]).flatten(1)
                        slack = rounding(point, target) + 1e-13 * offset.abs()
                        assert bool((offset >= found.ranges.low[target] - slack).all())
                        assert bool((offset <= found.ranges.high[target] + slack).all())
                        straight = rows.matrix.times(step.flatten(1))
                        assert bool(((offset - straight).abs() <= found.residual[target] + slack).all())
            for target in found.jacobians.outer:
                assert bool((found.ranges.low[target] >= begin.low[target]).all())
                assert bool((found.ranges.high[target] <= begin.high[target]).all())


@pytest.mark.parametrize("name", CURVED)
def test_jacobians_are_those_of_autograd_where_tangents_are_chosen(name: str) -> None:
    """On a tiny ball every slope is the tangent: A_l is dz_l/dx, and what it leaves is of second order."""
    network = CURVED[name]
    with exact_kernels():
        point, small = around(network, 3, 1e-6)
        _, large = around(network, 3, 1e-5)
    for target, rows in small.jacobians.outer.items():
        for sample in range(3):
            exact = torch.autograd.functional.jacobian(
                lambda x, t=target: network.values(x.unsqueeze(0))[t].flatten(), point.x[sample]
            ).flatten(1)
            found = rows.matrix.dense
            assert torch.allclose(found[min(sample, len(found) - 1)], exact, rtol=1e-9, atol=1e-12)
        if target > small.jacobians.pre_activations[0]:
            ratio = large.residual[target] / small.residual[target]
            moves = small.residual[target] > 1e-16
            assert bool((ratio[moves] < 105).all())
    assert bool((torch.stack([r.amax() for r in small.residual.values()]) < 1e-8).all())


@pytest.mark.parametrize("mixed", [0.0, expansion.MIXED, math.inf])
@pytest.mark.parametrize("name", EACH_CURVED)
def test_weighted_sums_hold_every_sample(name: str, mixed: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """sum_j B_ij q_j(D_j), by tangents alone, by chords alone, and by both: never outside the two ends."""
    monkeypatch.setattr(expansion, "MIXED", mixed)
    network = CURVED[name]
    g = torch.Generator().manual_seed(1)
    with exact_kernels():
        for radius in (0.05, 1.5):
            point, found = around(network, 5, radius)
            before = network.values(point.x)
            steps = [d * (radius * (1 - 1e-14)) for d in directions(network, point.x, 6)]
            moved = [network.values(point.x + d) for d in steps]
            for layer in nonlinear_nodes(network):
                target, phi = pre_activation(network, layer), network.nodes[layer].op
                on = activation_on_range(point, layer, found.ranges)
                slope, flat = chosen_slopes(point, layer, on)
                q = range_of_remainder(point, layer, on, slope, flat, found.residual[target])
                shared = torch.randn(1, 7, network.nodes[layer].size, generator=g, dtype=D)
                own = torch.randn(5, 7, network.nodes[layer].size, generator=g, dtype=D)
                blocks = [
                    InexactRows(by_columns(b), 0.1 * torch.rand(b.shape[:2], generator=g, dtype=D))
                    for b in (shared, own)
                ]
                blocks += [b for (_, source), b in found.jacobians.inner.items() if source == layer]
                outer = found.jacobians.outer[target]
                for block in blocks:
                    count = block.matrix.shape[0]
                    mixed_rows = torch.randn(1, count, outer.matrix.shape[0], generator=g, dtype=D)
                    combined = by_columns(mixed_rows @ outer.matrix.dense[:1])
                    lines = InexactRows(combined, torch.zeros(1, count, dtype=D))
                    sides = remainder_sums(block, q, SourceProducts.of(block, lines, outer))
                    more, less = (side.separate(found.radius) for side in sides)
                    rise, fall = (joint(lines.size, found.radius, [side]) for side in sides)
                    rises = joint(lines.size, found.radius, [sides[0], sides[0]])
                    values = block.matrix.dense
                    off = torch.randn(values.shape, generator=g, dtype=D)
                    off = off / off.norm(dim=2, keepdim=True) * block.error.unsqueeze(2)  # the exact block
                    for step, after in zip(steps, moved, strict=True):
                        z = before[target]
                        left = phi.apply(after[target]) - phi.apply(z) - slope.value * (after[target] - z)
                        total = ((values + off) @ left.flatten(1).unsqueeze(2)).squeeze(2)
                        size = (values.abs() @ rounding(point, target).unsqueeze(2)).squeeze(2)
                        slack = 10 * size * (1 + slope.value.flatten(1).abs().amax(1, keepdim=True))
                        assert bool((total <= more + slack).all())
                        assert bool((-total <= less + slack).all())
                        straight = lines.matrix.times(step.flatten(1))
                        for sign in (1, -1):
                            assert bool((sign * straight + total <= rise + slack).all())
                            assert bool((sign * straight - total <= fall + slack).all())
                            assert bool((sign * straight + 2 * total <= rises + 2 * slack).all())


def random_choice(point: EvaluatedPoints, found: BallExpansion, seed: int) -> Choice:
    """Slopes and weights from sensible to absurd."""
    g = torch.Generator().manual_seed(seed)
    count = len(found.radius)
    slopes, weights = {}, {}
    for k in nonlinear_nodes(point.network):
        shape = (count, point.network.nodes[k].size)
        tangent = point.slopes[k].value.flatten(1)  # type: ignore[union-attr]
        slopes[k] = tangent + 10 ** (2 * torch.rand(1, generator=g) - 2) * torch.randn(shape, generator=g, dtype=D)
        weights[k] = 10 ** (6 * torch.rand(shape, generator=g, dtype=D) - 4) * torch.randint(0, 3, shape, generator=g)
    mu, tau = (10 ** (4 * torch.rand(count, generator=g, dtype=D) - 2) for _ in range(2))
    return Choice(slopes, weights, mu, tau)


@pytest.mark.parametrize("name", EACH_CURVED)
def test_no_attack_in_the_ball_gets_below_the_bound(name: str) -> None:
    """Every rival; tangents, chords, mixtures, random and ascended slopes and weights; hints or none."""
    network = CURVED[name]
    reached = 0.0
    with exact_kernels():
        for radius in (0.1, 1.5):
            here, known = around(network, 3, radius)
            sample, margin, cotangents = pairs(here)
            point, found = here.at(sample), known.at(sample)
            least = attacked(network, point.x, cotangents, found.radius)
            choices = starts(point, found, cotangents)
            best = optimise(point, found, margin, cotangents, None, 6).choice
            choices += [best, Choice(best.slopes, best.weights, best.tau, best.mu)]
            choices += [random_choice(point, found, seed) for seed in range(2)]
            problem = Problem(point, found, margin, cotangents)
            choices += [
                problem.at(choice, None).optimised.choice for choice in choices
            ]  # with the hints that they want
            for choice in choices:
                value = lower_bound(point, found, margin, cotangents, choice)
                assert not bool(value.isnan().any())
                assert bool((value <= least + 1e-12 * (1 + least.abs())).all())
            sharp = lower_bound(point, found, margin, cotangents, best)
            if radius == 0.1:
                reached = float(((margin - least) / (margin - sharp)).mean())
    assert reached > 0.5  # neither the bound nor the attack is idle


@pytest.mark.parametrize("name", EACH_CURVED)
def test_no_attack_in_the_ball_loses_more_than_the_fast_bound(name: str) -> None:
    network = CURVED[name]
    with exact_kernels():
        for radius in (0.05, 0.5, 5.0):
            point, known = around(network, 4, radius)
            sample, margin, cotangents = pairs(point)
            least = attacked(network, point.x[sample], cotangents, known.radius[sample])
            begin = interval_ranges(point, ModelBounds(network).weights, known.radius)
            rival = (-cotangents).argmax(1)
            plain = tangent_losses(point, begin, point.adjoints)
            sharper = tangent_losses(point, known.ranges, point.adjoints, known)
            assert bool((sharper <= plain * (1 + 1e-9) + 1e-280).all())
            for losses in (plain, sharper):
                value = margin - losses[sample, rival]
                assert bool((value <= least + 1e-12 * (1 + least.abs())).all())
                own = losses[torch.arange(4), point.prediction]
                assert bool((own < 1e-200).all())  # a class loses nothing against itself


def test_tiny_balls_lose_the_gradient_and_no_more() -> None:
    for name in ("three layers, gelu", "convolutional", "shared heads"):
        network = CURVED[name]
        with exact_kernels():
            here, known = around(network, 4, 1e-4)
            sample, margin, cotangents = pairs(here)
            point, found = here.at(sample), known.at(sample)
            choice = optimise(point, found, margin, cotangents, None, 0).choice
            value = lower_bound(point, found, margin, cotangents, choice)
            losses = tangent_losses(here, known.ranges, here.adjoints)[sample, (-cotangents).argmax(1)]
            straight = here.gradient_norm[sample, (-cotangents).argmax(1)] * 1e-4
        assert torch.allclose(margin - value, straight, rtol=1e-3)
        assert torch.allclose(losses, straight, rtol=1e-3)


def test_a_choice_of_nonsense_claims_nothing_wrong() -> None:
    """NaN, infinities and negative weights in a choice: no bound, or a true one."""
    network = CURVED["three layers, softplus"]
    with exact_kernels():
        here, known = around(network, 4, 0.5)
        sample, margin, cotangents = pairs(here)
        point, found = here.at(sample), known.at(sample)
        least = attacked(network, point.x, cotangents, found.radius)
        good = optimise(point, found, margin, cotangents, None, 6).choice

        def spoil(table: dict[int, Tensor], change: Callable[[Tensor], Tensor]) -> dict[int, Tensor]:
            return {k: torch.where(torch.arange(t.shape[1]) % 3 == 0, change(t), t) for k, t in table.items()}

        for change in (
            lambda t: t * math.nan,
            lambda t: t + math.inf,
            lambda t: t - math.inf,
            lambda t: -t,
            lambda t: t * 1e200,
            lambda t: t * 1e-200,
        ):
            slopes, weights = spoil(dict(good.slopes), change), spoil(dict(good.weights), change)
            for choice in (
                Choice(slopes, good.weights, good.mu, good.tau),
                Choice(good.slopes, weights, good.mu, good.tau),
                Choice(good.slopes, good.weights, change(good.mu), good.tau),
                Choice(good.slopes, good.weights, good.mu, change(good.tau)),
            ):
                value = lower_bound(point, found, margin, cotangents, choice)
                assert not bool(value.isnan().any())
                assert bool((value <= least + 1e-12).all())


@pytest.mark.parametrize("name", ["shared heads", "a branch that comes back", "convolutional"])
def test_all_layers_together_count_every_activation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """1/2 sum w D^2, w summed over the activations that read a head: never above the bound for any sampled d."""
    network = CURVED[name]
    seen: list[Tensor] = []
    together = tangent_bound.joint_quadratic

    def spied(known: BallExpansion, weights: dict[int, Tensor]) -> Tensor:
        found = together(known, weights)
        assert found is not None
        seen.append(found)
        return found

    monkeypatch.setattr(tangent_bound, "joint_quadratic", spied)
    with exact_kernels():
        for radius in (0.05, 1.0):
            point, known = around(network, 4, radius)
            tangent_losses(point, known.ranges, point.adjoints, known)
            before = network.values(point.x)
            for d in directions(network, point.x, 6):
                after = network.values(point.x + d * (radius * (1 - 1e-14)))
                total = torch.zeros_like(seen[-1])
                for layer in nonlinear_nodes(network):
                    least, most = (
                        end.unsqueeze(1)
                        for end in activation_on_range(point, layer, known.ranges).quadratic_coefficients()
                    )
                    v = point.adjoints[layer].value.flatten(2)
                    w = torch.maximum(-v * least, -v * most).clamp(min=0.0)
                    moved = (
                        (after[pre_activation(network, layer)] - before[pre_activation(network, layer)])
                        .flatten(1)
                        .unsqueeze(1)
                    )
                    total = total + 0.5 * (w * moved.square()).sum(2)
                assert bool((total <= seen[-1] * (1 + 1e-9) + 1e-20).all())


def test_samples_that_are_no_numbers_stay_alone() -> None:
    for name in ("residual, gelu", "convolutional", "shared heads"):
        network = CURVED[name]
        x = points(network, 5)
        spoilt = x.clone()
        spoilt[1], spoilt[3] = torch.nan, 1e308
        radius = torch.tensor([0.1, 0.1, torch.inf, 0.1, 0.2], dtype=D)
        with exact_kernels():
            found = []
            for samples in (x, spoilt):
                point = EvaluatedPoints(network, samples)
                known = expand_on_ball(point, interval_ranges(point, ModelBounds(network).weights, radius))
                rival = (point.prediction + 1) % network.classes
                eye = torch.eye(network.classes, dtype=D)
                cotangents, margin = eye[point.prediction] - eye[rival], point.margin_low[torch.arange(5), rival]
                choice = optimise(point, known, margin, cotangents, None, 4).choice
                found.append(lower_bound(point, known, margin, cotangents, choice))
                losses = tangent_losses(point, known.ranges, point.adjoints, known)
                assert bool(losses[2][rival[2]].isinf() | losses[2][rival[2]].isnan())
        clean, beside = found
        assert float(clean[2]) == -math.inf
        assert bool((beside[[1, 2, 3]] == -math.inf).all())
        assert torch.allclose(clean[[0, 4]], beside[[0, 4]], rtol=1e-6)


def test_a_part_of_a_ball_is_the_ball_of_that_part() -> None:
    network = CURVED["shared heads"]
    with exact_kernels():
        point, found = around(network, 6, torch.linspace(0.1, 2.0, 6, dtype=D))
        index = torch.tensor([5, 0, 0, 3])
        part = point.at(index)
        fresh = expand_on_ball(part, interval_ranges(part, ModelBounds(network).weights, found.radius[index]))
        cut = found.at(index)
    assert torch.equal(cut.radius, fresh.radius)
    for target in cut.jacobians.pre_activations:
        for one, other in (
            (cut.ranges.low[target], fresh.ranges.low[target]),
            (cut.ranges.high[target], fresh.ranges.high[target]),
            (cut.residual[target], fresh.residual[target]),
            (cut.jacobians.outer[target].matrix.dense, fresh.jacobians.outer[target].matrix.dense),
        ):
            assert torch.allclose(one, other, rtol=1e-9, atol=1e-13)
