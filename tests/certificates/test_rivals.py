"""Rivals that a ball needs no row for: each is proved all the same, and no radius is smaller for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.bounds.on_ball.affine_loss import AffineLoss
from certify_cli.bounds.on_ball.interval_ranges import Ranges, interval_ranges
from certify_cli.certificates import ball_search
from certify_cli.certificates.ball_bounds import BallBound, linear_bound, lipschitz_bound
from certify_cli.certificates.ball_search import search_balls
from certify_cli.certificates.closed_form import lipschitz_radius
from certify_cli.certificates.rivals import Losses, ProvedRivals, Rivals, settled_by_ranges
from certify_cli.efforts import EFFORTS
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from tests.networks import PIECEWISE, conv_net, mlp, points

D = torch.float64
BOTH: tuple[BallBound, ...] = (linear_bound, lipschitz_bound)
NETWORKS = {
    "3 classes, max min": PIECEWISE["max min"],
    "4 classes, convolutional": conv_net("relu", seed=3),
    "10 classes": mlp((8, 20, 20, 10), "relu", seed=4),
    "10 classes, tanh": mlp((8, 20, 20, 10), "tanh", seed=5),
    "60 classes": mlp((10, 30, 30, 60), "relu", seed=6),
    "60 classes, four layers": mlp((10, 20, 20, 20, 60), "sigmoid", seed=7),
}


def prepared(network: Network, count: int = 5, effort: str = "normal") -> tuple[ModelBounds, EvaluatedPoints]:
    return ModelBounds(network, EFFORTS[effort]), EvaluatedPoints(network, points(network, count))


def found_by(bounds: tuple[BallBound, ...], model_bounds: ModelBounds, point: EvaluatedPoints) -> Tensor:
    """Radii (batch,) of a search from nothing."""
    fresh = EvaluatedPoints(point.network, point.x)
    return search_balls(bounds, model_bounds, fresh, torch.zeros(len(point.x), dtype=D)).radius


@pytest.fixture
def asks_all(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes every ball ask for every rival."""

    def every(self: ProvedRivals, index: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        known = self.radius[index]
        return ~known.isinf(), known.argmin(1)

    def switch() -> None:
        monkeypatch.setattr(ball_search, "settled_by_ranges", lambda point, ranges: torch.zeros_like(point.own))
        monkeypatch.setattr(ProvedRivals, "unproved", every)

    return switch


@pytest.mark.parametrize("name", NETWORKS)
def test_no_radius_is_smaller_than_where_every_rival_is_asked_for(name: str, asks_all: Callable[[], None]) -> None:
    with exact_kernels():
        model_bounds, point = prepared(NETWORKS[name], effort="fast")
        pruned = [found_by(bounds, model_bounds, point) for bounds in (BOTH[:1], BOTH[1:], BOTH)]
        asks_all()
        for radius, bounds in zip(pruned, (BOTH[:1], BOTH[1:], BOTH), strict=True):
            assert bool((radius > 0).all())
            assert bool((radius >= found_by(bounds, model_bounds, point) * (1 - 1e-12)).all())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_rival_of_a_claimed_ball_is_proved(name: str) -> None:
    """By the losses that the bounds gave on balls at least as large, the ranges there, or the Lipschitz constant."""
    with exact_kernels():
        model_bounds, point = prepared(NETWORKS[name])
        proofs = lipschitz_radius(point.margin_low, model_bounds.lipschitz_pairs.rows(point.prediction))
        asked = torch.zeros_like(proofs)

        def watched(bound: BallBound) -> BallBound:
            def recording(bounds: ModelBounds, some: EvaluatedPoints, start: Ranges) -> tuple[Ranges, Losses]:
                ranges, losses = bound(bounds, some, start)
                rows = [int((point.x == x).flatten(1).all(1).nonzero()) for x in some.x]
                for row, sample in enumerate(rows):
                    last = len(some.network.nodes) - 1
                    drop = ranges.high[last][row] - ranges.low[last][row, some.prediction[row]]
                    settled = torch.where(drop < point.margin_low[sample], ranges.radius[row], 0.0)
                    proofs[sample] = torch.maximum(proofs[sample], settled)

                def kept(rivals: Rivals) -> AffineLoss:
                    loss = losses(rivals)
                    for row, sample in enumerate(rows):
                        for column, rival in enumerate(rivals.classes[row].tolist()):
                            margin, e = float(point.margin_low[sample, rival]), float(ranges.radius[row])
                            rate, rest = float(loss.rate[row, column]), float(loss.constant[row, column])
                            asked[sample, rival] += 1
                            if rest < margin:
                                proved = min(e, (margin - rest) / rate) if rate else e
                                proofs[sample, rival] = max(float(proofs[sample, rival]), proved)
                    return loss

                return ranges, kept

            return recording

        radius = found_by(tuple(watched(bound) for bound in BOTH), model_bounds, point)
        proofs = proofs.masked_fill(point.own, torch.inf)
        assert bool((radius > 0).all())
        assert bool((proofs >= radius.unsqueeze(1) * (1 - 1e-12)).all())
        if point.network.classes == 60:
            assert float(asked.sum(1).mean()) < 0.5 * 60 * float(asked.amax(1).mean())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_settled_rival_stays_below_on_the_whole_ball(name: str) -> None:
    """At points of the sphere towards the rival, and at random."""
    network, g = NETWORKS[name], torch.Generator().manual_seed(1)
    with exact_kernels():
        model_bounds, point = prepared(network)
        settled_ever, found = 0, found_by(BOTH[1:], model_bounds, point)
        for part in (0.05, 0.3, 1.0, 3.0):
            radius = part * found
            settled = settled_by_ranges(point, interval_ranges(point, model_bounds.weights, radius))
            settled_ever += int(settled.sum())
            for sample, rival in settled.nonzero().tolist():
                x = point.x[sample : sample + 1]
                with torch.enable_grad():
                    moved = x.clone().requires_grad_(True)
                    z = network(moved)[0]
                    (slope,) = torch.autograd.grad(z[rival] - z[point.prediction[sample]], moved)
                ways = torch.cat([slope, torch.randn(16, *x.shape[1:], generator=g, dtype=D)])
                ways = ways / ways.flatten(1).norm(dim=1).clamp(min=1e-300).reshape(-1, *[1] * (x.dim() - 1))
                z = network(x + radius[sample] * ways)
                assert bool((z[:, point.prediction[sample]] > z[:, rival]).all())
        assert settled_ever


def test_a_proof_holds_on_smaller_balls_and_on_no_larger_one() -> None:
    with exact_kernels():
        model_bounds, point = prepared(NETWORKS["10 classes"], 2)
        proved, index = ProvedRivals(model_bounds, point), torch.tensor([1])
        entry = torch.full((1, 10), 5.0, dtype=D)
        entry[0, 3], entry[0, 4] = torch.nan, 0.0
        before = proved.radius.clone()
        known = proved.enter(index, entry)
        assert torch.equal(proved.radius[0], before[0])  # no other sample's
        assert torch.equal(known[0, 3:5], before[1, 3:5])  # what is no number proves nothing
        for radius, others in ((4.999, False), (5.0, False), (5.001, True)):
            mask, nearest = proved.unproved(index, torch.tensor([radius], dtype=D))
            assert bool(mask[0, 3]) == bool(before[1, 3] < radius) or int(nearest) == 3
            assert bool(mask[0, int(nearest)])
            rest = [k for k in range(10) if k not in (3, 4, int(nearest), int(point.prediction[1]))]
            assert mask[0, rest].tolist() == [others and float(known[0, k]) < radius for k in rest]
            assert not bool(mask[0, point.prediction[1]])
        assert bool(proved.unproved(index, torch.tensor([torch.nan], dtype=D))[0][0, 3])


def test_ties_and_what_is_no_number_settle_nothing() -> None:
    network = NETWORKS["10 classes"]
    with exact_kernels():
        point = EvaluatedPoints(network, torch.cat([points(network, 1), torch.full((1, 8), torch.inf, dtype=D)]))
        last = len(network.nodes) - 1
        none = torch.zeros(2, 10, dtype=D)
        for value in (torch.nan, torch.inf):
            ranges = Ranges(torch.ones(2, dtype=D), {last: none - value}, {last: none + value}, {last: none[:, 0]})
            assert not bool((settled_by_ranges(point, ranges) & ~point.own).any())
        still = Ranges(torch.ones(2, dtype=D), {last: -none}, {last: none}, {last: none[:, 0]})
        settled = settled_by_ranges(point, still) & ~point.own
        assert int(settled[0].sum()) == 9
        assert not bool(settled[1].any())  # its logits are no numbers
        drop = Ranges(still.radius, {last: -none}, {last: point.margin_low.masked_fill(point.own, 0.0)}, still.norm)
        assert not bool((settled_by_ranges(point, drop) & ~point.own).any())  # a tie is no proof
    twin = mlp((4, 6, 3), "relu")
    dense = twin.nodes[-1].op
    dense.weight[1], dense.offset[1] = dense.weight[0], dense.offset[0]  # type: ignore[union-attr]
    with exact_kernels():
        model_bounds, point = prepared(twin, 20)
        tied = point.prediction < 2
        assert bool(tied.any())
        assert bool((found_by(BOTH, model_bounds, point)[tied] == 0).all())


def test_rivals_as_rows_and_in_parts() -> None:
    network = NETWORKS["60 classes"]
    with exact_kernels():
        model_bounds, point = prepared(network, 3)
        asked = torch.zeros(3, 60, dtype=torch.bool)
        asked[0, [7, 3]], asked[1, 59], asked[2, [0, 1, 2, 30]] = True, True, True
        rivals = Rivals.of(asked)
        assert rivals.classes.tolist() == [[3, 7, 3, 3], [59, 59, 59, 59], [0, 1, 2, 30]]
        eye = torch.eye(60, dtype=D)
        expected = eye[point.prediction].unsqueeze(1) - eye[rivals.classes]
        assert torch.equal(rivals.cotangents(point), expected)
        whole = found_by(BOTH, model_bounds, point)
        small = ModelBounds(network, EFFORTS["normal"], memory=2**14)  # so that no ball's rows are taken together
        assert torch.allclose(found_by(BOTH[:1], small, point), found_by(BOTH[:1], model_bounds, point), rtol=1e-9)
        assert bool((whole > 0).all())


def test_rivals_that_are_repeated_have_one_row_with_slopes() -> None:
    rivals = Rivals.of(torch.tensor([[True, False, True, True], [False, True, False, False]]))
    assert rivals.classes.tolist() == [[0, 2, 3], [1, 1, 1]]
    assert rivals.repeated.tolist() == [[False, False, False], [False, True, True]]
