"""What cannot matter, does not: units, order of units and classes, how samples are cut into batches."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from certify_cli.network.activations import from_name
from certify_cli.network.affine import Dense, Reshape, Scale, Select, Shift
from certify_cli.network.graph import Builder, Network
from tests.networks import PIECEWISE, SMOOTH, points
from tests.soundness.common import certify, dense_stack

ACTIVATIONS = ("tanh", "sigmoid", "softplus:3", "gelu", "silu", "elu", "sin", "relu")
seeds = st.integers(0, 2**31)
names = st.sampled_from(ACTIVATIONS)
few = settings(max_examples=15, deadline=None)
ROUNDING = 1e-6
"""Eigenvalue proofs are sharp to a relative 1e-9, or 1e-2 at worst where Lanczos has not converged; small ones do."""


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed % 2**31))


def _parts(seed: int, name: str) -> list[object]:
    return [
        (_random(seed, 6, 4), _random(seed + 1, 6)),
        from_name(name),
        (_random(seed + 2, 5, 6) / 2, _random(seed + 3, 5)),
        from_name(name),
        (_random(seed + 4, 3, 5), _random(seed + 5, 3)),
    ]


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=ROUNDING, atol=0, equal_nan=True)


@few
@given(seed=seeds, name=names, log=st.floats(-12, 12))
def test_units_of_the_input(seed: int, name: str, log: float) -> None:
    """Radii are in data units: x c into W / c multiplies them by c, folded in or as a node in front."""
    c, parts, x = 10.0**log, _parts(seed, name), _random(seed + 6, 3, 4)
    (first, bias), *rest = parts
    plain = certify(dense_stack(*parts), x).radius
    folded = certify(dense_stack((first / c, bias), *rest), x * c).radius
    b = Builder((4,))
    last = b.add("units", Scale(torch.full((4,), 1 / c, dtype=torch.float64), 1), 0)
    for part in parts:
        last = b.add("n", Dense(*part) if isinstance(part, tuple) else part, last)  # type: ignore[arg-type]
    in_front = certify(b.build(last), x * c).radius
    assert _same(folded / c, plain)
    assert _same(in_front / c, plain)


@few
@given(seed=seeds, name=names, log=st.floats(-12, 12), offset=st.floats(-100, 100))
def test_units_and_origin_of_the_logits(seed: int, name: str, log: float, offset: float) -> None:
    c, parts, x = 10.0**log, _parts(seed, name), _random(seed + 6, 3, 4)
    *rest, (last, bias) = parts
    plain = certify(dense_stack(*parts), x).radius
    assert _same(certify(dense_stack(*rest, (last * c, bias * c)), x).radius, plain)
    moved = certify(dense_stack(*rest, (last, bias + offset)), x).radius
    assert torch.allclose(moved, plain, rtol=1e-5, atol=1e-11)  # the margin itself is rounded at the offset


@few
@given(seed=seeds, name=names)
def test_order_of_units_and_classes(seed: int, name: str) -> None:
    (w0, b0), phi, (w1, b1), phi1, (w2, b2) = _parts(seed, name)
    x = _random(seed + 6, 3, 4)
    g = torch.Generator().manual_seed(seed)
    p, q, k, i = (torch.randperm(n, generator=g) for n in (6, 5, 3, 4))
    plain = certify(dense_stack((w0, b0), phi, (w1, b1), phi1, (w2, b2)), x)
    mixed = certify(dense_stack((w0[p][:, i], b0[p]), phi, (w1[q][:, p], b1[q]), phi1, (w2[k][:, q], b2[k])), x[:, i])
    assert _same(mixed.radius, plain.radius)
    decided = (plain.radius > 0) & (plain.radius < 1e100)
    assert bool((k[mixed.rival] == plain.rival)[decided].all())


@few
@given(seed=seeds, name=names)
def test_classes_that_are_out_of_reach_do_not_matter(seed: int, name: str) -> None:
    *rest, (last, bias) = _parts(seed, name)
    x = _random(seed + 6, 3, 4)
    far = dense_stack(*rest, (torch.cat([last, last[:1]]), torch.cat([bias, bias[:1] - 1e6])))
    assert _same(certify(far, x).radius, certify(dense_stack(*rest, (last, bias)), x).radius)


@few
@given(seed=seeds, name=st.sampled_from(list(SMOOTH) + list(PIECEWISE)), cut=st.integers(1, 4))
def test_batches(seed: int, name: str, cut: int) -> None:
    """The whole, its parts, its rows, any order: one radius a sample."""
    network: Network = {**SMOOTH, **PIECEWISE}[name]
    x = points(network, 5, seed=seed % 1000)
    whole = certify(network, x)
    parts = [certify(network, part) for part in (x[:cut], x[cut:])]
    assert torch.allclose(torch.cat([p.radius for p in parts]), whole.radius, rtol=1e-9, atol=0)
    assert torch.allclose(torch.cat([p.attack for p in parts]), whole.attack, rtol=1e-9, atol=0, equal_nan=True)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(certify(network, x[order]).radius, whole.radius[order], rtol=1e-9, atol=0)
    single = certify(network, x[cut : cut + 1])
    assert torch.allclose(single.radius, whole.radius[cut : cut + 1], rtol=1e-9, atol=0)


@few
@given(seed=seeds, name=names)
def test_moving_data_about(seed: int, name: str) -> None:
    """A reshape, a shift given and taken back, pixels in another order: nothing a distance could notice."""
    parts, x = _parts(seed, name), _random(seed + 6, 3, 4)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    b = Builder((2, 2))
    last = b.add("flat", Reshape((4,)), 0)
    last = b.add("there", Shift(torch.full((4,), 0.5, dtype=torch.float64)), last)
    last = b.add("back", Shift(torch.full((4,), -0.5, dtype=torch.float64)), last)
    last = b.add("mix", Select(order.argsort(), 4), last)
    for part in parts:
        last = b.add("n", Dense(*part) if isinstance(part, tuple) else part, last)  # type: ignore[arg-type]
    moved = certify(b.build(last), x[:, order].reshape(3, 2, 2)).radius
    assert torch.allclose(moved, certify(dense_stack(*parts), x).radius, rtol=ROUNDING, atol=1e-12)


@few
@given(seed=seeds, name=names, extra=st.integers(1, 4))
def test_pixels_that_nobody_looks_at(seed: int, name: str, extra: int) -> None:
    parts, x = _parts(seed, name), _random(seed + 6, 3, 4)
    (first, bias), *rest = parts
    blind = torch.cat([first, torch.zeros(6, extra, dtype=torch.float64)], dim=1)
    wider = torch.cat([x, _random(seed + 7, 3, extra)], dim=1)
    assert _same(certify(dense_stack((blind, bias), *rest), wider).radius, certify(dense_stack(*parts), x).radius)
