"""Mistakes that earlier versions of the theory made (its section 11): each once certified what is false.

Both factors of the composition anchored: tests/bounds/test_anchored.py. Dropped halves of MaxMin: test_attacks.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.network.activations import from_name
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.graph import Network
from certify_cli.numerics.norms import matrix_norm
from tests.networks import mlp, points
from tests.soundness.common import dense_stack, every_radius, flips, tensor


def test_the_bound_of_a_pre_activation_is_not_the_output_s() -> None:
    """GELU's slope reaches 1.129: LipLT bounds what goes in, not what comes out."""
    phi = from_name("gelu")
    level = float(phi.value(tensor(1.0)))
    network = dense_stack((tensor([1.0]), None), phi, (tensor([1.0], [0.0]), tensor(0.0, level)))
    x = tensor([1.8])
    margin = float(network(x)[0, 0]) - level
    published = margin / 1.0  # m_0 = ||W_0|| = 1, times the last row
    assert flips(network, x, tensor([1.0 - 1e-9]), published)
    assert all(radius <= 0.8 for radius in every_radius(network, x).values())
    last = dense_stack((torch.eye(2, dtype=torch.float64), None), phi)  # a nonlinear node that holds the logits
    with exact_kernels():
        pair = torch.tensor([[0, 1]])
        assert float(ModelBounds(last).lipschitz.of_margins(pair)) >= 1.1289 * math.sqrt(2.0)


def test_signs_taken_at_the_sample() -> None:
    """Three layers of softplus: with v at the sample the Hessian sum is violated elsewhere; with intervals never."""
    violated = 0
    for seed in range(6):
        network = mlp((3, 4, 4, 2), "softplus:4", seed=seed, gain=2.0)
        x = points(network, 1, seed=seed)
        w0, w1, w2 = (network.nodes[i].op.weight for i in (1, 3, 5))  # type: ignore[union-attr]
        y = int(network(x).argmax())
        c = w2[y] - w2[1 - y]
        values = network.values(x)
        slope = torch.sigmoid(4 * values[3])[0]
        v0, v1 = w1.T @ (slope * c), c  # adjoints at the two layers' outputs, at the sample

        def part(w: Tensor, v: Tensor) -> float:
            return float(torch.linalg.eigvalsh(w.T @ ((-v).clamp(min=0.0).unsqueeze(1) * w))[-1])

        recipe = part(w0, v0) + part(w1, v1) * matrix_norm(w0) ** 2  # phi'' in [0, 1], slopes at most 1

        def margin(flat: Tensor, network: Network = network, y: int = y) -> Tensor:
            logits = network(flat.unsqueeze(0))[0]
            return logits[y] - logits[1 - y]

        around = points(network, 3000, seed=seed + 100, spread=1.0)
        met = float(-torch.linalg.eigvalsh(torch.func.vmap(torch.func.hessian(margin))(around)).min())
        violated += met > recipe
        with exact_kernels():
            assert met <= float(ModelBounds(network).curvature_pairs.rows(torch.tensor([y]))[0, 1 - y])
    assert violated > 0


def test_a_formula_for_convex_activations_on_tanh() -> None:
    """Only v < 0 counts where phi'' >= 0. tanh bends both ways: saturated, its margin falls faster than its slope."""
    network = dense_stack((tensor([1.0]), None), from_name("tanh"), (tensor([1.0], [0.0]), None))
    x = tensor([3.0])
    margin, slope = math.tanh(3.0), 1 - math.tanh(3.0) ** 2
    published = margin / slope  # v = 1 > 0, so M = 0
    assert flips(network, x, tensor([-1e-3]), published)
    assert all(radius <= 3.0 for radius in every_radius(network, x).values())


def test_an_anchored_constant_inside_the_integral() -> None:
    """f - int min(||g|| + M t, L_x) dt: L_x bounds secants from x, not slopes on the way, and the integral needs those.

    f is the bump tanh(x+1) - tanh(x-1) less its value where the secant from the top is steepest: there f = 0 exactly
    at the radius f / L_x, while the integrand lay below L_x until then.
    """
    t = torch.linspace(1e-3, 6.0, 600_001, dtype=torch.float64)
    bump = (t + 1).tanh() - (t - 1).tanh()
    top = 2 * math.tanh(1.0)
    secants = (top - bump) / t
    anchored, zero = float(secants.max()), float(t[secants.argmax()])
    network = dense_stack(
        (tensor([1.0], [1.0]), tensor(1.0, -1.0)),
        from_name("tanh"),
        (tensor([1.0, -1.0], [0.0, 0.0]), tensor(0.0, float(bump[secants.argmax()]))),
    )
    x = tensor([0.0])
    with exact_kernels():
        curvature = float(ModelBounds(network).curvature_pairs.rows(torch.tensor([0]))[0, 1])
    margin, turn = float(network(x)[0, 0] - network(x)[0, 1]), anchored / curvature
    published = turn + (margin - curvature * turn**2 / 2) / anchored  # g = 0
    assert published > 1.05 * zero
    assert flips(network, x, tensor([zero + 1e-9]), published)
    assert all(0 < radius <= zero for radius in every_radius(network, x).values())


def test_the_ball_s_radius_in_deeper_boxes() -> None:
    """z_l +- e ||W_l,i|| is a box of the first layer only: deeper ones take R_l, what the layers before made of e."""
    network = dense_stack(
        (tensor([10.0]), None),
        from_name("relu"),
        (tensor([1.0]), tensor(-5.0)),
        from_name("relu"),
        (tensor([0.0], [10.0]), tensor(1.0, 0.0)),
    )
    x = tensor([0.1])
    deep = 10 * 0.1 - 5.0  # this unit's pre-activation, its row of norm 1
    published = -deep  # below it the box deep +- e * 1 stays negative: "dead, so the margin is constant"
    assert flips(network, x, tensor([0.52]), published)
    assert all(0 < radius <= 0.41 for radius in every_radius(network, x).values())
