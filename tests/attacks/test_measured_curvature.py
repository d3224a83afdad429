"""Measured curvature: that of the exact Hessian, never above the bound of the same function, whatever the batch."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from certify_cli.attacks import measured_curvature
from certify_cli.attacks.measured_curvature import EPSILON, FIGURES, Measurement, loss_bounds, measured
from certify_cli.bounds.global_bounds.layer_report import layer_table
from certify_cli.network.graph import Network
from certify_cli.training.differentiable import DifferentiableNetwork
from tests.training.modules import SHAPE, Residual, batch, convolutional, dense, pooled, prepared

Make = Callable[[Callable[[], nn.Module]], nn.Module]


def network_of(module: nn.Module) -> Network:
    return DifferentiableNetwork(module.requires_grad_(False), SHAPE).network()


def at_samples(network: Network, x: Tensor, y: Tensor | None, radius: float = 0.1) -> Measurement:
    return measured(network, x, y, tuple(range(10, 10 + len(x))), radius)


@pytest.mark.parametrize("activation", [nn.Softplus, nn.Tanh, nn.GELU, nn.Mish, nn.Softsign])
@pytest.mark.parametrize("make", [dense, convolutional, Residual])
def test_it_is_the_norm_of_the_exact_hessian(make: Make, activation: Callable[[], nn.Module]) -> None:
    module, (x, y) = prepared(make, activation), batch()
    found = at_samples(network_of(module), x, y)
    for sample, point, label in zip(found.samples, x, y, strict=True):

        def loss(z: Tensor, label: Tensor = label) -> Tensor:
            return cross_entropy(module(z.reshape(1, *SHAPE)), label.reshape(1))

        hessian = torch.autograd.functional.hessian(loss, point.flatten())
        exact = float(torch.linalg.eigvalsh(hessian).abs().max())
        assert sample.curvature is not None
        assert 0.99 * exact <= sample.curvature <= exact * (1 + 1e-9)
        gradient = float(torch.autograd.functional.jacobian(loss, point.flatten()).norm())
        assert sample.gradient_norm == pytest.approx(gradient, rel=1e-9)
        assert sample.normalised_curvature == pytest.approx(sample.curvature / (gradient + EPSILON), rel=1e-9)
        assert sample.label == int(label)
    assert [sample.index for sample in found.samples] == list(range(10, 16))
    assert found.note is None


@pytest.mark.parametrize("scale", [0.3, 1.0, 8.0])
@pytest.mark.parametrize("make", [dense, convolutional, Residual])
def test_no_estimate_exceeds_the_bound_of_the_same_function(make: Make, scale: float) -> None:
    module = prepared(make, nn.Tanh)
    for parameter in module.parameters():
        parameter.data *= scale
    network = network_of(module)
    last = layer_table(network)[-1]
    bounds = loss_bounds(last.lipschitz, last.curvature)
    x = torch.randn(40, *SHAPE, dtype=torch.float64)
    for y in (None, torch.arange(40) % 4):
        found = at_samples(network, x, y)
        for figure, bound in bounds.items():
            largest = found.over_samples(figure, max)
            assert bound is not None
            assert largest is not None
            assert 0 < largest <= bound


def test_the_bound_of_the_loss_is_met_by_a_loss() -> None:
    """Two classes whose margin has slope L: curvature L^2 / 4 where both are as likely, and slope up to L."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    module[1].weight.data.zero_()[0, 3] = 6.0
    module[1].bias.data.zero_()
    network = network_of(module.double())
    x = torch.zeros(2, *SHAPE, dtype=torch.float64)
    x[1, 0, 0, 3] = -5.0
    bounds = loss_bounds(6.0, 0.0)
    first, second = at_samples(network, x, torch.zeros(2, dtype=torch.int64)).samples
    assert first.curvature == pytest.approx(9.0, rel=1e-12)
    assert second.gradient_norm == pytest.approx(6.0, rel=1e-9)
    assert bounds["curvature"] is not None
    assert 9.0 <= bounds["curvature"] <= 9.0 * (1 + 1e-12)


@pytest.mark.parametrize("make", [dense, pooled])
def test_kinks_have_no_curvature_but_gradients_change_over_them(make: Make) -> None:
    activation = nn.ReLU if make is dense else nn.Tanh
    network, (x, y) = network_of(prepared(make, activation)), batch()
    found = at_samples(network, x, y, radius=0.5)
    assert found.note is not None
    assert "has no bounded second derivative: curvature is not measured" in found.note
    assert all(sample.curvature is sample.normalised_curvature is None for sample in found.samples)
    assert all(sample.largest_gradient_change for sample in found.samples)
    assert found.over_samples("curvature", max) is None
    assert found.to_dict()["mean"]["curvature"] is None
    assert loss_bounds(layer_table(network)[-1].lipschitz, None)["curvature"] is None


def test_change_of_gradients_is_what_it_says() -> None:
    module, (x, y) = prepared(dense, nn.Tanh), batch()
    found = at_samples(network_of(module), x, y, radius=0.3)
    _, *directions = measured_curvature._directions(network_of(module), 1 + measured_curvature.DIRECTIONS)
    assert all(float(d.norm()) == pytest.approx(1) for d in directions)

    def gradient(z: Tensor) -> Tensor:
        z = z.clone().requires_grad_(True)
        return torch.autograd.grad(cross_entropy(module(z), y, reduction="sum"), z)[0]

    at = gradient(x)
    changes = torch.stack([(gradient(x + 0.3 * d) - at).flatten(1).norm(dim=1) for d in directions])
    changes /= at.flatten(1).norm(dim=1)
    for sample, column in zip(found.samples, changes.T, strict=True):
        assert sample.gradient_change == pytest.approx(float(column.mean()), rel=1e-6)
        assert sample.largest_gradient_change == pytest.approx(float(column.max()), rel=1e-6)


def test_the_batch_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    network, (x, y) = network_of(prepared(convolutional, nn.Softplus)), batch()
    whole = at_samples(network, x, y)
    monkeypatch.setattr(measured_curvature, "ENTRIES_AT_ONCE", 1)
    monkeypatch.setattr(measured_curvature, "CONVERGED", 1e-12)
    for one, other in zip(whole.samples, at_samples(network, x, y).samples, strict=True):
        for figure in FIGURES:
            assert getattr(one, figure) == pytest.approx(getattr(other, figure), rel=1e-3)


def test_slopes_are_exact_where_the_probability_rounds_to_1() -> None:
    """Margins of 60: a loss of 1e-26 has a gradient, and its relative change, as any other."""
    module = prepared(dense, nn.Tanh)
    x, _ = batch()
    module[-1].weight.data *= 500
    network = network_of(module)
    logits = module(x)
    y = logits.argmax(1)
    top = logits.topk(2).values
    assert float((top[:, 0] - top[:, 1]).max()) > 60
    for sample, point, label in zip(at_samples(network, x, y).samples, x, y, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda z: module(z.unsqueeze(0))[0], point).flatten(1)
        z = module(point.unsqueeze(0))[0]
        others = [i for i in range(4) if i != int(label)]
        weights = torch.stack([torch.exp(z[i] - torch.logsumexp(z, 0)) for i in others])
        gradient = float((weights @ (jacobian[others] - jacobian[label])).norm())
        assert sample.gradient_norm == pytest.approx(gradient, rel=1e-6)


def test_what_is_not_finite_is_left_out() -> None:
    module, (x, y) = prepared(dense, nn.Tanh), batch()
    found = at_samples(network_of(module), torch.cat([x[:1], torch.full_like(x[:1], torch.nan)]), y[:2])
    assert all(value is None for value in dataclasses.astuple(found.samples[1])[2:])
    assert all(math.isfinite(value) for value in dataclasses.astuple(found.samples[0])[2:])
    assert found.over_samples("gradient_norm", statistics.fmean) == found.samples[0].gradient_norm


def test_a_loss_without_slope_has_no_relative_change() -> None:
    module = prepared(dense, nn.Tanh)
    module[-1].weight.data.zero_()
    (sample, *_) = at_samples(network_of(module), *batch()).samples
    assert (sample.gradient_norm, sample.curvature, sample.normalised_curvature) == (0.0, 0.0, 0.0)
    assert sample.gradient_change is sample.largest_gradient_change is None
