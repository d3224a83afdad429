"""The tangent form at any point is a proof; the dual is never below the closed form; the search never beats a proof."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from certify_cli.attacks.ddn import nearest_attacks
from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.certificates.certificates import Certificates
from certify_cli.certificates.closed_form import curvature_radius
from certify_cli.certificates.dual import GAIN, refined, tangent
from certify_cli.certificates.exactness import NEAR, nearly_exact
from certify_cli.certificates.methods import METHODS, certify_batch, select
from certify_cli.efforts import EFFORTS
from certify_cli.network.affine import Dense
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Builder, Network
from tests.networks import PIECEWISE, SMOOTH, mlp, points

CURVED = {name: network for name, network in SMOOTH.items() if name != "linear"}


def margin_at(network: Network, x: Tensor, prediction: Tensor, rival: Tensor) -> Tensor:
    logits = network(x)
    return (logits.gather(1, prediction.unsqueeze(1)) - logits.gather(1, rival.unsqueeze(1))).squeeze(1)


@pytest.mark.parametrize("name", CURVED)
def test_any_expansion_point_gives_a_true_radius(name: str) -> None:
    """At random d0, near and far: no sampled perturbation inside the radius reaches a margin of 0."""
    network = CURVED[name]
    model_bounds = ModelBounds(network)
    with exact_kernels():
        x = points(network, 12)
        point = EvaluatedPoints(network, x)
        lower = model_bounds.curvature_pairs.rows(point.prediction)
        positive = 0
        for trial in range(12):
            rival = (point.prediction + 1 + trial % (network.classes - 1)) % network.classes
            moved = x + (0.02, 0.1, 0.5)[trial % 3] * points(network, 12, trial)
            m = lower.gather(1, rival.unsqueeze(1)).squeeze(1)
            radius, _ = tangent(point, rival, moved, m)
            positive += int((radius > 0).sum())
            assert (radius <= 1e6).all()
            for seed in range(20):
                d = points(network, 12, 100 + seed, 1.0)
                # towards the rival, too: the direction in which the margin falls
                if seed % 2:
                    d = -point.gradients.value[torch.arange(12), rival] + 0.1 * d
                d = d / d.flatten(1).norm(dim=1).reshape(-1, *[1] * (d.dim() - 1))
                there = x + d * radius.reshape(-1, *[1] * (d.dim() - 1)) * (1 - 1e-12)
                value = margin_at(network, there, point.prediction, rival)
                assert (value[radius > 0] > -1e-12).all()
        assert positive > 0


@pytest.mark.parametrize("name", CURVED)
def test_more_points_never_lower_a_radius(name: str) -> None:
    network = CURVED[name]
    model_bounds = ModelBounds(network)
    with exact_kernels():
        point = EvaluatedPoints(network, points(network, 30))
        closed = METHODS["curvature"].certify(model_bounds, point, False, None).radius
        dual = METHODS["dual"].certify(model_bounds, point, False, None).radius
        lower, upper = (
            rows(point.prediction) for rows in (model_bounds.curvature_pairs.rows, model_bounds.curvature_pairs.columns)
        )
        table = curvature_radius(point.margin_low, point.gradient_norm, lower)
        by_steps = [refined(point, table, lower, upper, steps).radius for steps in (0, 1, 20)]
    assert (dual >= closed * (1 - 1e-9)).all()
    # the methods' radii may be those of anchored bounds; the tangents' own must grow
    none, one, many = (radius.masked_fill(point.own, torch.inf).amin(1) for radius in by_steps)
    assert (many >= one).all()
    assert (many > one * (1 + 1e-6)).any()
    assert (one > none * (1 + 1e-6)).any()


@pytest.mark.parametrize("name", SMOOTH | PIECEWISE)
def test_the_search_never_gets_inside_and_what_it_finds_is_replayed(name: str) -> None:
    network = (SMOOTH | PIECEWISE)[name]
    with exact_kernels():
        point = EvaluatedPoints(network, points(network, 25))
        found = certify_batch(select("auto", network), ModelBounds(network), point, True)
        witness, norm = nearest_attacks(point, found.near, found.radius, EFFORTS["normal"])
        hit = norm.isfinite()
        assert hit.any()
        assert (norm[hit] > found.radius[hit]).all()
        assert (network(witness[hit]).argmax(1) != point.prediction[hit]).all()
        distance = (witness - point.x).flatten(1).norm(dim=1)
        assert (norm[hit] >= distance[hit]).all()
        assert torch.equal(witness[~hit], point.x[~hit])


def test_the_search_finds_the_nearest_boundary_of_a_linear_classifier() -> None:
    weight = torch.randn(4, 6, dtype=torch.float64)
    builder = Builder((6,))
    network = builder.build(builder.add("fc", Dense(weight), 0))
    with exact_kernels():
        point = EvaluatedPoints(network, points(network, 40))
        _, norm = nearest_attacks(point, point.x, torch.zeros(40, dtype=torch.float64), EFFORTS["max"])
    difference = weight[point.prediction].unsqueeze(1) - weight.unsqueeze(0)
    exact = (point.margin / difference.norm(dim=2)).masked_fill(point.own, torch.inf).amin(1)
    assert (norm >= exact).all()
    assert norm / exact == pytest.approx(torch.ones(40).numpy(), rel=2e-2)


def test_the_gap_closes_on_a_wide_two_layer_network() -> None:
    """Where the curvature bound is sharp, dual and search meet: the certified radius is the robust radius."""
    network = mlp((20, 60, 3), "softplus:1", gain=1.0, seed=11)
    with exact_kernels():
        point = EvaluatedPoints(network, points(network, 40, spread=0.5))
        found = certify_batch(select("dual", network), ModelBounds(network), point, True)
        _, norm = nearest_attacks(point, found.near, found.radius, EFFORTS["max"])
    gap = (norm - found.radius) / norm
    assert (gap > 0).all()
    assert float(gap.mean()) < 0.02


@pytest.mark.parametrize("effort", ["normal", "max"])
def test_auto_searches_balls_only_where_no_example_stands_at_the_certified_radius(effort: str) -> None:
    """On a network whose dual is exact for some samples; what is left out loses at most the search's accuracy."""
    network = mlp((20, 60, 3), "tanh", gain=2.0, seed=11)
    model_bounds = ModelBounds(network, EFFORTS[effort])
    asked: list[Tensor] = []
    dual, local = METHODS["dual"], METHODS["local"]

    def spied(bounds: ModelBounds, point: EvaluatedPoints, attack: bool, given: Certificates | None) -> Certificates:
        asked.append(point.x)
        return local.certify(bounds, point, attack, given)

    with exact_kernels():
        point = EvaluatedPoints(network, points(network, 40, spread=0.5))
        alone = certify_batch((dual,), model_bounds, point, False)
        found = certify_batch((dual, replace(local, certify=spied)), model_bounds, point, False)
        exact = nearly_exact(point, alone, EFFORTS[effort])
        everywhere = local.certify(model_bounds, point, False, alone)
    assert bool(exact.any())
    assert bool((~exact).any())
    assert torch.equal(torch.cat(asked), point.x if effort == "max" else point.x[~exact])
    assert bool((found.radius >= everywhere.radius * (1 - NEAR)).all())
    _, norm = nearest_attacks(point, alone.near, alone.radius, EFFORTS["max"])
    assert bool((norm[exact] <= alone.radius[exact] * (1 + 2 * NEAR)).all())


def test_auto_with_levels_reaches_every_verdict_that_all_methods_reach() -> None:
    network = SMOOTH["three layers, softplus"]
    model_bounds = ModelBounds(network)
    with exact_kernels():
        point = EvaluatedPoints(network, points(network, 60))
        everything = certify_batch(select("auto", network), model_bounds, point, True)
        level = float(everything.radius.sort().values[29:31].mean())  # between two, not the radius of one
        decided = certify_batch(select("auto", network), model_bounds, point, True, (level,))
    assert torch.equal(decided.radius > level, everything.radius > level)
    # in a batch of other samples roundings differ, and a search of `dual` may stop up to its GAIN elsewhere
    assert (decided.radius <= everything.radius * (1 + GAIN)).all()
    assert bool((decided.radius < everything.radius).any())


def test_sharpening_leaves_uncertifiable_samples_alone() -> None:
    network = SMOOTH["two layers, tanh"]
    with exact_kernels():
        point = EvaluatedPoints(network, points(network, 5))
        table = torch.zeros(5, network.classes, dtype=torch.float64).masked_fill(point.own, torch.inf)
        ones = torch.ones_like(table)
        sharp = refined(point, table, ones, ones, 5)
    assert torch.equal(sharp.radius[~point.own], table[~point.own])
    assert torch.equal(sharp.ends, point.x)
