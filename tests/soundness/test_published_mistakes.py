"""Each defect of published code that applies here (theory section 11): its recipe over-claims, curvcert does not.

`flips` is the proof of an over-claim: a point nearer than the recipe's radius with another prediction. The defects of
the published dual are in test_published_dual.py, those of earlier versions of the theory in test_earlier_mistakes.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, fx, nn

from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.certificates.methods import METHODS
from certify_cli.data.datasets import Dataset
from certify_cli.errors import ModelError
from certify_cli.load.loaded_model import LoadedModel
from certify_cli.network.activations import from_name
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.lowering.fx_graph import lower
from certify_cli.numerics.norms import matrix_norm
from certify_cli.records import ModelInfo
from certify_cli.run.library import certify as run
from tests.soundness.common import certify, dense_stack, every_radius, flips, tensor


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
        assert flips(network, x, x * (1 - (1 + published) / 2), published)
    assert matrix_norm(weight) >= 1.0
    assert all(radius <= 1.0 for radius in every_radius(network, x).values())


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
    assert flips(network, x, moved, published)
    assert all(radius < float(moved.norm()) for radius in every_radius(network, x).values())
    assert every_radius(network, x)["curvature"] > 0.99 * math.sqrt(2 * excess / 0.5)


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
            curvature = float(ModelBounds(network).curvature_pairs.rows(torch.tensor([0]))[0, 1])
        published = 2 * margin / (0.1 + math.sqrt(0.01 + 2 * curvature * margin))
        assert flips(network, x, tensor([0.0, 0.21]), published)
        for method in METHODS:
            found = certify(network, x, method)
            assert float(found.radius) < 0.21
            assert int(found.rival) == 2


def test_margins_and_gradients_of_different_rivals() -> None:
    """The least margin over the least gradient, or one rival's margin with another's gradient: of no function."""
    network = dense_stack((tensor([0.0, 0.0], [-1.0, 0.0], [0.0, 10.0]), tensor(2.0, 1.0, 0.0)))
    x = torch.zeros(1, 2, dtype=torch.float64)
    margins, gradients = (1.0, 2.0), (1.0, 10.0)
    for published in (min(margins) / min(gradients), margins[1] / gradients[0]):
        assert flips(network, x, tensor([0.0, 0.21]), published)
    for radius in every_radius(network, x).values():
        assert 0.2 * (1 - 1e-9) < radius <= min(f / g for f, g in zip(margins, gradients, strict=True))


@pytest.mark.smoke
def test_ties_are_not_certified() -> None:
    """`margin >= eps L` holds for a tie at eps = 0: the smallest step changes the prediction."""
    network = dense_stack((tensor([1.0], [-1.0]), None))
    x = tensor([0.0])
    logits = network(x)[0]
    assert float(logits[0] - logits[1]) >= 0.0 * 2.0  # "certified"
    assert int(network(tensor([-1e-300])).argmax()) != int(logits.argmax())
    assert all(radius == 0.0 for radius in every_radius(network, x).values())


def test_square_root_of_two_for_pairs() -> None:
    """A constant for each logit times sqrt 2 is too little where two rows are opposite, too much where they agree."""
    opposite = dense_stack((tensor([1.0, 0.0], [-1.0, 0.0]), None))
    x = tensor([1.0, 0.0])
    published = 2.0 / (math.sqrt(2.0) * 1.0)
    assert flips(opposite, x, tensor([-1e-9, 0.0]), published)
    assert all(radius <= 1.0 for radius in every_radius(opposite, x).values())
    alike = dense_stack((tensor([1.0, 0.1], [1.0, -0.1]), None))
    x = tensor([0.0, 1.0])
    assert float(certify(alike, x).radius) > 0.2 / (math.sqrt(2.0) * math.hypot(1.0, 0.1)) * 5


def _steepest_secant(z: float) -> tuple[float, float]:
    """(s, S): S = sup_t |tanh(z - t) - tanh z| / |t| and the t = s > 0 that attains it, for z > 0."""
    t = torch.linspace(1e-3, 4 * z, 400_001, dtype=torch.float64)
    secants = (math.tanh(z) - (z - t).tanh()) / t
    best = int(secants.argmax())
    return float(t[best]), float(secants[best])


@pytest.mark.parametrize("z", [0.8051, 1.2351, 2.3451])
def test_anchored_tables_looked_up_by_rounding(z: float) -> None:
    """The table of tanh's steepest secants falls with |z|: the entry of the next hundredth above is too small."""
    s, _ = _steepest_secant(z)
    network = dense_stack(
        (tensor([1.0]), None), from_name("tanh"), (tensor([1.0], [0.0]), tensor(0.0, math.tanh(z - s)))
    )
    x = tensor([z])
    _, looked_up = _steepest_secant(round(z, 2))
    published = (math.tanh(z) - math.tanh(z - s)) / looked_up
    assert flips(network, x, x - s - 1e-9, published)
    found = every_radius(network, x)
    assert all(0 < radius <= s for radius in found.values())


def test_slope_ends_swapped_on_positive_intervals() -> None:
    """On [l, u] with l > 0 the slopes of tanh run from phi'(u) to phi'(l). Swapped, the far end bounds the near one."""
    phi = from_name("tanh")
    x, level = 3.0, math.tanh(1.0)
    network = dense_stack((tensor([1.0]), None), phi, (tensor([1.0], [0.0]), tensor(0.0, level)))
    published = 0.0
    for e in torch.linspace(0.01, 2.9, 290).tolist():
        most = float(phi.slope(tensor(x + e)))  # "the slopes of [x - e, x + e] lie in [phi'(l), phi'(u)]"
        if math.tanh(x) - level > e * most:
            published = e
    assert flips(network, tensor([x]), tensor([0.99]), published)
    assert all(0 < radius <= 2.0 for radius in every_radius(network, tensor([x])).values())
    low, high = phi.slope_on(tensor(0.5, -1.0, -2.0), tensor(2.0, 3.0, -0.5))
    inside = [torch.linspace(a, b, 99, dtype=torch.float64) for a, b in ((0.5, 2.0), (-1.0, 3.0), (-2.0, -0.5))]
    sampled = phi.slope(torch.stack(inside))
    assert bool((low <= sampled.amin(1)).all())
    assert bool((high >= sampled.amax(1)).all())


def test_radii_multiplied_by_the_correctness_mask() -> None:
    """radius * correct, then `>= eps`: at eps = 0 the wrong samples' zeros count as certified, as no label allows."""
    network = dense_stack((tensor([1.0], [-1.0]), None))
    x, y = tensor([0.5], [0.25], [-0.125]), torch.tensor([0, 1, 0])
    radius = certify(network, x).radius
    correct = network(x).argmax(1) == y
    published = float((radius * correct >= 0.0).double().mean())
    assert published == 1.0
    assert published > float(correct.double().mean())
    info = ModelInfo("m.onnx", "0" * 64, "onnx", 17, 2)
    model = LoadedModel(network, info, (1,), "float32", ())
    data = Dataset("made", x.float(), y, (0, 1, 2), None, False, "0" * 64, ())
    result = run(model, data, eps=["1e-300", "0.1"])
    assert result.summary.certified_accuracy == {"1e-300": 1 / 3, "0.1": 1 / 3}
    # the wrong predictions are stable all the same, and their records say so
    assert [s.certified_radius for s in result.samples] == pytest.approx([0.5, 0.25, 0.125], rel=1e-9)


def test_batch_statistics_beside_the_running_variance() -> None:
    """A constant from running_var says nothing of a layer that divides by the batch's own deviation."""
    module = nn.Sequential(nn.BatchNorm1d(1, affine=False, eps=0.0), nn.Linear(1, 2, bias=False)).double()
    module[1].weight.data = tensor([1.0], [-1.0])
    batch = tensor([0.01], [-0.02], [0.01])
    module.train()
    logits = module[1](nn.functional.batch_norm(batch, None, None, training=True)).detach()
    published = float(logits[0, 0] - logits[0, 1]) / (2.0 / 1.0)  # 2 = ||W_0 - W_1||, 1 = sqrt(running_var)
    moved = batch - tensor([0.03], [0.0], [0.0])
    assert float((moved - batch).norm()) < published
    after = module[1](nn.functional.batch_norm(moved, None, None, training=True))
    assert int(after[0].argmax()) != int(logits[0].argmax())
    with pytest.raises(ModelError, match="training mode"):
        lower(fx.symbolic_trace(module), (1,))
    network = lower(fx.symbolic_trace(module.eval()), (1,))
    assert all(0.01 * (1 - 1e-9) < r <= 0.01 for r in every_radius(network, batch[:1]).values())
