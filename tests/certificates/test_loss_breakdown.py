"""Where the local bound loses: the parts add up, the whole is proved, and refusals are sentences."""

from __future__ import annotations

import math

import pytest
import torch

from certify_cli.certificates.loss_breakdown import of_sample
from certify_cli.errors import MethodError
from certify_cli.network.activations import from_name
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.propagate import nonlinear_nodes
from tests.adversary import attacked
from tests.networks import CURVED, PIECEWISE, SMOOTH, points
from tests.soundness.common import certify, dense_stack, tensor

D = torch.float64


@pytest.mark.parametrize("name", ["three layers, gelu", "residual", "saturated", "shared heads"])
def test_the_parts_add_up_to_a_proved_loss(name: str) -> None:
    network = CURVED[name]
    x = points(network, 1)
    found = of_sample(network, x)
    assert len(found.layers) == len(nonlinear_nodes(network))
    parts = found.gradient + sum(row.total for row in found.layers) + found.gap
    assert math.isclose(found.margin - found.left, parts, rel_tol=1e-9)
    assert abs(found.gap) < 0.2 * found.margin  # the account is of nearly all of it
    assert all(row.intercept >= -1e-9 and row.quadratic >= 0 and row.residual >= 0 for row in found.layers)
    cotangent = torch.zeros(1, network.classes, dtype=D)
    cotangent[0, found.prediction], cotangent[0, found.rival] = 1.0, -1.0
    with exact_kernels():
        least = float(attacked(network, x, cotangent, torch.tensor([found.radius], dtype=D), 20))
    assert found.left <= least + 1e-12
    assert found.to_dict()["layers"][0]["total"] == found.layers[0].total


def test_the_first_layer_is_linear_in_the_perturbation() -> None:
    """Its linearised offsets are exact: no part of their width is nonlinear, and no residual is left."""
    rows = of_sample(SMOOTH["three layers, softplus"], points(SMOOTH["three layers, softplus"], 1)).layers
    assert rows[0].nonlinear < 1e-9
    assert rows[0].residual < 1e-9
    assert rows[1].nonlinear > 1e-6


def test_what_cannot_be_shown_says_why() -> None:
    relu = next(iter(PIECEWISE.values()))
    with pytest.raises(MethodError, match="cannot apply to this model"):
        of_sample(relu, points(relu, 1))
    even = dense_stack((torch.eye(2, dtype=D), None), from_name("tanh"), (tensor([1.0, 1.0], [1.0, 1.0]), None))
    with pytest.raises(MethodError, match="not certified at all"):
        of_sample(even, tensor([0.3, -0.2]))
    with pytest.raises(MethodError, match="--memory"):
        of_sample(SMOOTH["two layers, tanh"], points(SMOOTH["two layers, tanh"], 1), memory=1)


def test_an_affine_model_loses_nothing() -> None:
    with pytest.raises(MethodError, match="affine"):
        of_sample(SMOOTH["linear"], points(SMOOTH["linear"], 1))


@pytest.mark.parametrize("name", ["convolutional", "residual, gelu", "batch norms, silu"])
def test_the_account_is_of_the_ball_that_the_search_proved(name: str) -> None:
    network = SMOOTH[name]
    found = of_sample(network, points(network, 1))
    assert found.left > 0
    assert found.radius == pytest.approx(float(certify(network, points(network, 1), "local").radius), rel=1e-9)
