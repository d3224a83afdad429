"""What cannot matter, does not: units, origins, orders, idle pixels, how samples are cut into batches, the device.

Every method of the table is held to every change of `CHANGES`; a new one of either is covered at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from certify_cli.bounds.global_bounds.curvature import RULES
from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.certificates.methods import METHODS, certify_batch, select
from certify_cli.names import AUTO
from certify_cli.network.activations import from_name
from certify_cli.network.affine import Dense, Scale, Shift
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Builder, Network
from certify_cli.network.movement import Reshape, Select
from tests.networks import PIECEWISE, SMOOTH, points
from tests.soundness.common import certify, dense_stack, searches

ROUNDING = 1e-9
"""Relative, beyond the rounding that a method itself allows for in the margin. The eigenvalue proofs are sharp to
`eigen.FIRST_GAP` = 1e-9 at these sizes, and reproduced closer; where `dual` stops (`tangent.GAIN`) depends on gains
that are equal to 1e-12."""
SEARCH = 1e-6
"""The same for a search: its hundred and more steps on small networks make up to 1e-8 of roundings."""
ACTIVATIONS = ("tanh", "sigmoid", "softplus:3", "gelu", "silu", "elu", "sin", "relu")
seeds = st.integers(0, 2**31)


def resolved(method: str) -> float:
    """How closely a radius is reproduced, relatively."""
    return SEARCH if searches(method) else ROUNDING


def few(method: str) -> settings:
    """How many examples: a searched method takes its time."""
    return settings(max_examples=2 if searches(method) else 8)


Layers = list[tuple[Tensor, Tensor] | object]


@dataclass(frozen=True, eq=False)
class Changed:
    """The changed network and samples, the factor by which radii grow, and each new class's old number."""

    network: Network
    x: Tensor
    factor: float = 1.0
    classes: Tensor = field(default_factory=lambda: torch.arange(4))


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed % 2**31))


def _layers(seed: int, name: str) -> Layers:
    """Three dense layers 4-6-5-3 and their two activations."""
    return [
        (_random(seed, 6, 4), _random(seed + 1, 6)),
        from_name(name),
        (_random(seed + 2, 5, 6) / 2, _random(seed + 3, 5)),
        from_name(name),
        (_random(seed + 4, 3, 5), _random(seed + 5, 3)),
    ]


def _behind(fronts: list[object], layers: Layers, shape: tuple[int, ...] = (4,)) -> Network:
    """The layers behind some operations."""
    builder, last = Builder(shape), 0
    for op in (*fronts, *layers):
        last = builder.add("n", Dense(*op) if isinstance(op, tuple) else op, last)  # type: ignore[arg-type]
    return builder.build(last)


def _order(random: Random, size: int) -> Tensor:
    return torch.tensor(random.sample(range(size), size))


def _units_of_the_input(layers: Layers, x: Tensor, random: Random) -> Changed:
    (weight, bias), *rest = layers
    c = 10.0 ** random.uniform(-12, 12)
    return Changed(dense_stack((weight / c, bias), *rest), x * c, c)


def _units_in_a_layer_of_their_own(layers: Layers, x: Tensor, random: Random) -> Changed:
    c = 10.0 ** random.uniform(-12, 12)
    return Changed(_behind([Scale(torch.full((4,), 1 / c, dtype=torch.float64), 1)], layers), x * c, c)


def _units_of_the_logits(layers: Layers, x: Tensor, random: Random) -> Changed:
    *rest, (weight, bias) = layers
    c = 10.0 ** random.uniform(-12, 12)
    return Changed(dense_stack(*rest, (weight * c, bias * c)), x)


def _origin_of_the_logits(layers: Layers, x: Tensor, random: Random) -> Changed:
    *rest, (weight, bias) = layers
    return Changed(dense_stack(*rest, (weight, bias + random.uniform(-1e3, 1e3))), x)


def _order_of_hidden_units(layers: Layers, x: Tensor, random: Random) -> Changed:
    (w0, b0), phi0, (w1, b1), phi1, (w2, b2) = layers
    p, q = _order(random, 6), _order(random, 5)
    return Changed(dense_stack((w0[p], b0[p]), phi0, (w1[q][:, p], b1[q]), phi1, (w2[:, q], b2)), x)


def _order_of_classes(layers: Layers, x: Tensor, random: Random) -> Changed:
    *rest, (weight, bias) = layers
    k = _order(random, 3)
    return Changed(dense_stack(*rest, (weight[k], bias[k])), x, classes=k)


def _order_of_pixels(layers: Layers, x: Tensor, random: Random) -> Changed:
    i = _order(random, 4)
    network = _behind([Reshape((4,)), Select(i.argsort(), 4)], layers, (2, 2))
    return Changed(network, x[:, i].reshape(-1, 2, 2))


def _origin_of_the_input(layers: Layers, x: Tensor, random: Random) -> Changed:
    to = torch.tensor([random.uniform(-4, 4) for _ in range(4)], dtype=torch.float64)
    return Changed(_behind([Shift(-to)], layers), x + to)


def _a_class_out_of_reach(layers: Layers, x: Tensor, random: Random) -> Changed:
    *rest, (weight, bias) = layers
    far = (torch.cat([weight, weight[:1]]), torch.cat([bias, bias[:1] - 1e6]))
    return Changed(dense_stack(*rest, far), x)


def _pixels_that_nobody_looks_at(layers: Layers, x: Tensor, random: Random) -> Changed:
    (weight, bias), *rest = layers
    extra = random.randint(1, 4)
    blind = torch.cat([weight, torch.zeros(6, extra, dtype=torch.float64)], dim=1)
    return Changed(dense_stack((blind, bias), *rest), torch.cat([x, _random(extra, len(x), extra)], dim=1))


CHANGES: dict[str, Callable[[Layers, Tensor, Random], Changed]] = {
    change.__name__.strip("_").replace("_", " "): change
    for change in (
        _units_of_the_input,
        _units_in_a_layer_of_their_own,
        _units_of_the_logits,
        _origin_of_the_logits,
        _order_of_hidden_units,
        _order_of_classes,
        _order_of_pixels,
        _origin_of_the_input,
        _a_class_out_of_reach,
        _pixels_that_nobody_looks_at,
    )
}


def _allowed(network: Network, x: Tensor) -> Tensor:
    """(batch,): the relative error of the margins that the certificates subtract, the worst rival's.

    A radius is concave in the margin and 0 at 0, so it changes by no larger a share than the margin does.
    """
    with exact_kernels():
        point = EvaluatedPoints(network, x)
        share = (point.margin - point.margin_low) / point.margin
    return share.masked_fill(point.own, 0.0).nan_to_num(nan=math.inf).amax(1)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", METHODS)
def test_no_radius_depends_on(method: str, change: str) -> None:
    names = [n for n in ACTIVATIONS if METHODS[method].applies(dense_stack(*_layers(0, n))) is None]

    @few(method)
    @given(seed=seeds, name=st.sampled_from(names))
    def holds(seed: int, name: str) -> None:
        layers, x = _layers(seed, name), _random(seed + 6, 3, 4)
        plain, other = dense_stack(*layers), CHANGES[change](layers, x, Random(seed))
        before, after = certify(plain, x, method), certify(other.network, other.x, method)
        radius = after.radius / other.factor
        tolerance = resolved(method) + 2 * torch.maximum(_allowed(plain, x), _allowed(other.network, other.x))
        assert bool(((radius - before.radius).abs() <= tolerance * torch.maximum(before.radius, radius)).all())
        assert torch.equal(other.classes[after.rival], before.rival)

    holds()


@pytest.mark.parametrize("method", METHODS)
def test_a_unit_in_two_halves(method: str) -> None:
    """The function is the same, and so are its gradients and its Hessian's sum over units. Norms of single layers are
    not: those in front grow by up to sqrt 2, those behind shrink by up to it. So bounds that multiply norms move by at
    most sqrt 2, curvature by at most 2, and a radius by at most sqrt 2; the sum over units does not move at all."""
    names = [n for n in ACTIVATIONS if METHODS[method].applies(dense_stack(*_layers(0, n))) is None]

    @few(method)
    @given(seed=seeds, name=st.sampled_from(names), unit=st.integers(0, 5))
    def holds(seed: int, name: str, unit: int) -> None:
        (w0, b0), *_, (w1, b1) = _layers(seed, name)[:3]
        x = _random(seed + 6, 3, 4)
        twice = torch.tensor([*range(6), unit])
        share = torch.ones(7, dtype=torch.float64)
        share[[unit, 6]] = 0.5
        plain = dense_stack((w0, b0), from_name(name), (w1, b1))
        halved = dense_stack((w0[twice], b0[twice]), from_name(name), (w1[:, twice] * share, b1))
        before, after = certify(plain, x, method), certify(halved, x, method)
        assert torch.allclose(
            after.radius.log(), before.radius.log(), rtol=0, atol=0.5 * math.log(2) + resolved(method)
        )
        for one, other in ((before, after), (after, before)):
            attacked = one.attack.isfinite()
            assert bool((one.attack > other.radius)[attacked].all())
        if METHODS["curvature"].applies(plain) is None:
            pairs = torch.tensor([[0, 1], [1, 2], [4, 3]])
            with exact_kernels():
                sums = [ModelBounds(network).curvature.lower(pairs, ("weighted Gram",)) for network in (plain, halved)]
            assert torch.allclose(*sums, rtol=ROUNDING, atol=0)

    assert "weighted Gram" in RULES
    holds()


@pytest.mark.parametrize("method", [*METHODS, AUTO])
def test_batches(method: str) -> None:
    """The whole, its parts, in any order: one radius and one attack a sample."""
    networks = SMOOTH | PIECEWISE
    names = [n for n in networks if method == AUTO or METHODS[method].applies(networks[n]) is None]

    @few(method)
    @given(seed=seeds, name=st.sampled_from(names), cut=st.integers(1, 4))
    def holds(seed: int, name: str, cut: int) -> None:
        network = networks[name]
        x = points(network, 5, seed=seed % 1000)
        order = _order(Random(seed), 5)
        methods, model_bounds = select(method, network), ModelBounds(network)
        with exact_kernels():
            parts = [
                certify_batch(methods, model_bounds, EvaluatedPoints(network, x[part]), True)
                for part in order.split([cut, 5 - cut])
            ]
        whole = certify(network, x, method).at(order)
        for item in ("radius", "attack", "gradient", "lipschitz", "curvature_lower", "curvature_upper"):
            joined = torch.cat([getattr(part, item) for part in parts])
            rtol = resolved(method) if item == "radius" else ROUNDING
            assert torch.allclose(joined, getattr(whole, item), rtol=rtol, atol=0, equal_nan=True), item
        assert torch.equal(torch.cat([part.rival for part in parts]), whole.rival)

    holds()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares CPU with CUDA, and there is no CUDA device here")
@pytest.mark.parametrize("method", METHODS)
def test_devices(method: str) -> None:
    for network in (n for n in (SMOOTH | PIECEWISE).values() if METHODS[method].applies(n) is None):
        x = points(network, 8)
        here, there = certify(network, x, method), certify(network.to("cuda"), x.cuda(), method)
        assert there.radius.is_cuda
        tolerance = resolved(method) + 2 * _allowed(network, x)
        assert bool(((there.radius.cpu() - here.radius).abs() <= tolerance * here.radius).all())
        assert torch.equal(there.rival.cpu(), here.rival)
        assert torch.allclose(there.attack.cpu(), here.attack, rtol=1e-6, atol=0, equal_nan=True)
