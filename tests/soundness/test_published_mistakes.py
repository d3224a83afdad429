"""Each defect of published code that applies here (theory section 11): its recipe over-claims, curvcert does not.

`_flips` is the proof of an over-claim: a point nearer than the recipe's radius with another prediction.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from certify_cli.bounds.analysis import Analysis
from certify_cli.network.activations import from_name
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.graph import Network
from certify_cli.numerics.norms import matrix_norm
from tests.networks import mlp, points
from tests.soundness.common import certify, dense_stack, tensor


def _flips(network: Network, x: Tensor, moved: Tensor, radius: float) -> bool:
    """Whether `moved` lies strictly inside the ball of `radius` around x and has another prediction."""
    near = float((moved - x).norm()) < radius
    return near and int(network(moved).argmax()) != int(network(x).argmax())


def _power_iteration(a: Tensor, steps: int, seed: int) -> float:
    v = torch.randn(a.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for _ in range(steps):
        v = a.T @ (a @ (v / v.norm()))
    v = v / v.norm()
    return float((a @ v).norm())


def test_power_iteration_is_an_estimate() -> None:
    """Fixed steps stop below the norm where singular values are close: most of the published certificates' norms."""
    n = 400
    weight = torch.diag(torch.linspace(0.97, 1.0, n, dtype=torch.float64))
    out = torch.zeros(2, n, dtype=torch.float64)
    out[0, -1] = 1.0
    network = dense_stack((weight, None), (out, None))
    x = torch.zeros(1, n, dtype=torch.float64)
    x[0, -1] = 1.0
    for steps in (1, 5, 10):
        norm = _power_iteration(weight, steps, steps)
        assert norm < 1.0
        published = 1.0 / norm  # margin 1 over ||W||, the output's row has norm 1
        assert _flips(network, x, x * (1 - (1 + published) / 2), published)
    assert matrix_norm(weight) >= 1.0
    for method in ("lipschitz", "curvature"):
        assert float(certify(network, x, method).radius) <= 1.0


def test_power_iteration_on_the_hessian() -> None:
    """The same for curvature: f = C - sum_j softplus pairs of slightly different steepness, sample at the bottom."""
    n = 60
    scale = torch.diag(torch.linspace(0.6, 1.0, n, dtype=torch.float64))
    first = torch.cat([scale, -scale])
    excess = 1e-3
    out = torch.cat([-torch.ones(1, 2 * n), torch.zeros(1, 2 * n)]).double()
    network = dense_stack((first, None), from_name("softplus"), (out, tensor(2 * n * math.log(2.0) + excess, 0.0)))
    x = torch.zeros(1, n, dtype=torch.float64)
    hessian = 0.5 * scale @ scale
    estimate = _power_iteration(hessian, 3, 1)
    published = math.sqrt(2 * excess / estimate)
    moved = x.clone()
    moved[0, -1] = published * (1 - 1e-6)
    assert _flips(network, x, moved, published)
    radius = float(certify(network, x, "curvature").radius)
    assert radius < float(moved.norm())
    assert radius > 0.99 * math.sqrt(2 * excess / 0.5)


def test_the_runner_up_need_not_be_the_nearest() -> None:
    """Margins 1 and 2, gradients 0.1 and 10: the second rival is fifty times nearer."""
    linear = dense_stack((tensor([0.0, 0.0], [-0.1, 0.0], [0.0, 10.0]), tensor(2.0, 1.0, 0.0)))
    bent = dense_stack(
        (tensor([0.1, 0.0], [0.0, 10.0]), None),
        from_name("tanh"),
        (tensor([0.0, 0.0], [-1.0, 0.0], [0.0, 1.0]), tensor(0.9, 0.5, 0.2)),
    )
    x = torch.zeros(1, 2, dtype=torch.float64)
    for network in (linear, bent):
        logits = network(x)[0]
        order = logits.argsort(descending=True)
        assert order.tolist() == [0, 1, 2]
        margin = float(logits[0] - logits[1])
        with exact_kernels():
            curvature = float(Analysis(network).curvature_pairs.rows(torch.tensor([0]))[0, 1])
        published = 2 * margin / (0.1 + math.sqrt(0.01 + 2 * curvature * margin))
        assert _flips(network, x, tensor([0.0, 0.21]), published)
        for method in ("lipschitz", "curvature", "auto"):
            found = certify(network, x, method)
            assert float(found.radius) < 0.21
            assert int(found.rival) == 2


def test_margins_and_gradients_of_different_rivals() -> None:
    """The least margin over the least gradient, or one rival's margin with another's gradient: of no function."""
    network = dense_stack((tensor([0.0, 0.0], [-1.0, 0.0], [0.0, 10.0]), tensor(2.0, 1.0, 0.0)))
    x = torch.zeros(1, 2, dtype=torch.float64)
    margins, gradients = (1.0, 2.0), (1.0, 10.0)
    for published in (min(margins) / min(gradients), margins[1] / gradients[0]):
        assert _flips(network, x, tensor([0.0, 0.21]), published)
    assert float(certify(network, x).radius) <= min(f / g for f, g in zip(margins, gradients, strict=True))
    assert float(certify(network, x).radius) > 0.2 * (1 - 1e-9)


def test_ties_are_not_certified() -> None:
    """`margin >= eps L` holds for a tie at eps = 0: the smallest step changes the prediction."""
    network = dense_stack((tensor([1.0], [-1.0]), None))
    x = tensor([0.0])
    logits = network(x)[0]
    assert float(logits[0] - logits[1]) >= 0.0 * 2.0  # "certified"
    assert int(network(tensor([-1e-300])).argmax()) != int(logits.argmax())
    for method in ("lipschitz", "curvature", "auto"):
        assert float(certify(network, x, method).radius) == 0.0


def test_the_bound_of_a_pre_activation_is_not_the_output_s() -> None:
    """GELU's slope reaches 1.129: LipLT bounds what goes in, not what comes out."""
    phi = from_name("gelu")
    level = float(phi.value(tensor(1.0)))
    network = dense_stack((tensor([1.0]), None), phi, (tensor([1.0], [0.0]), tensor(0.0, level)))
    x = tensor([1.8])
    margin = float(network(x)[0, 0]) - level
    published = margin / 1.0  # m_0 = ||W_0|| = 1, times the last row
    assert _flips(network, x, tensor([1.0 - 1e-9]), published)
    for method in ("lipschitz", "curvature", "auto"):
        assert float(certify(network, x, method).radius) <= 0.8
    last = dense_stack((torch.eye(2, dtype=torch.float64), None), phi)  # a nonlinear node that holds the logits
    with exact_kernels():
        pair = torch.tensor([[0, 1]])
        assert float(Analysis(last).lipschitz.of_margins(pair)) >= 1.1289 * math.sqrt(2.0)


def test_square_root_of_two_for_pairs() -> None:
    """A constant for each logit times sqrt 2 is too little where two rows are opposite, too much where they agree."""
    opposite = dense_stack((tensor([1.0, 0.0], [-1.0, 0.0]), None))
    x = tensor([1.0, 0.0])
    published = 2.0 / (math.sqrt(2.0) * 1.0)
    assert _flips(opposite, x, tensor([-1e-9, 0.0]), published)
    assert float(certify(opposite, x).radius) <= 1.0
    alike = dense_stack((tensor([1.0, 0.1], [1.0, -0.1]), None))
    x = tensor([0.0, 1.0])
    assert float(certify(alike, x).radius) > 0.2 / (math.sqrt(2.0) * math.hypot(1.0, 0.1)) * 5


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
            assert met <= float(Analysis(network).curvature_pairs.rows(torch.tensor([y]))[0, 1 - y])
    assert violated > 0


def test_a_formula_for_convex_activations_on_tanh() -> None:
    """Only v < 0 counts where phi'' >= 0. tanh bends both ways: saturated, its margin falls faster than its slope."""
    network = dense_stack((tensor([1.0]), None), from_name("tanh"), (tensor([1.0], [0.0]), None))
    x = tensor([3.0])
    margin, slope = math.tanh(3.0), 1 - math.tanh(3.0) ** 2
    published = margin / slope  # v = 1 > 0, so M = 0
    assert _flips(network, x, tensor([-1e-3]), published)
    for method in ("lipschitz", "curvature", "auto"):
        assert float(certify(network, x, method).radius) <= 3.0
