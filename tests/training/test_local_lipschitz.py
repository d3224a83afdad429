"""Local Lipschitz training: gradients are those of the values, which are verified bounds with estimated norms."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from certify_cli import certify, load_model
from certify_cli.bounds.global_bounds.expansion import weight_blocks
from certify_cli.bounds.on_ball.interval_ranges import interval_ranges
from certify_cli.bounds.on_ball.lipschitz import linearised_by_norms, linearised_on_balls
from certify_cli.errors import UsageError
from certify_cli.load.safetensors.architecture import build
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.propagate import Vectors
from certify_cli.numerics import estimates
from certify_cli.training import ClippedReLU, LocalLipschitz
from certify_cli.training.derived import Derived
from certify_cli.training.differentiable import DifferentiableNetwork
from certify_cli.training.local_lipschitz import SATURATION, sparsity_loss, worst_margins
from certify_cli.training.loop import Training
from certify_cli.training.objectives import BUDGET, margins_of, rivals_of
from certify_cli.training.recipe import Recipe
from tests.training.kinked import KINKED, deep, images, shallow
from tests.training.modules import CLASSES, SHAPE, Residual, batch, prepared
from tests.training.runs import CPU, RECIPE, data, trained

RADIUS = 0.2
DEEP = [deep, images, Residual]


@pytest.fixture
def converged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Singular vectors that have converged at every step."""
    monkeypatch.setattr(estimates, "STEPS", 100)
    monkeypatch.setattr(estimates, "FIRST_STEPS", 400)


def even(make: Any, name: str) -> nn.Module:
    """The module with this activation; a residual block of an odd width is given ReLUs instead of MaxMins."""
    return prepared(make, nn.ReLU if make is Residual and "maxmin" in name else KINKED[name])


def losses(module: nn.Module, x: Tensor, y: Tensor, how: Any) -> Tensor:
    """Verified bounds (batch, rivals) of the margins' losses."""
    with exact_kernels():
        frozen = copy.deepcopy(module).requires_grad_(False)
        point = EvaluatedPoints(DifferentiableNetwork(frozen, SHAPE).network(), x)
        radius = torch.full((len(x),), RADIUS, dtype=torch.float64)
        sources = how(point, weight_blocks(point.network, BUDGET), radius)
        rivals = rivals_of(y, CLASSES)
        return margins_of(point.evaluation.logits, y, rivals) - worst_margins(sources, y, rivals)


def estimated(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The same as the objective has them."""
    objective = LocalLipschitz(module, SHAPE, radius=RADIUS)
    with objective.kept.step():
        sources = objective.linearised(x)
        rivals = rivals_of(y, CLASSES)
        margins = margins_of(sources.point.evaluation.logits, y, rivals)
        return (margins - worst_margins(sources, y, rivals)).detach()


@pytest.mark.parametrize("name", KINKED)
@pytest.mark.parametrize("make", [deep, images])
def test_gradients_are_those_of_the_values(make: Any, name: str, converged: None) -> None:
    """Along a random direction of all parameters, and along one of the thresholds alone."""
    module, (x, y) = prepared(make, KINKED[name]), batch()
    objective = LocalLipschitz(module, SHAPE, radius=RADIUS, weight=0.7, sparsity=0.1)
    objective(x, y).backward()
    generator, step = torch.Generator().manual_seed(1), 1e-6
    begin = {key: p.detach().clone() for key, p in module.named_parameters()}
    thresholds = {key for key in begin if not key.endswith(("weight", "bias"))}
    assert bool(thresholds) == name.startswith("clipped")
    for moved in filter(None, (begin.keys(), thresholds)):
        along = {key: torch.randn(begin[key].shape, generator=generator, dtype=torch.float64) for key in moved}
        values = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                for key, p in module.named_parameters():
                    p.copy_(begin[key] + (sign * step * along[key] if key in along else 0.0))
            values.append(float(objective(x, y).detach()))
        expected = sum(float((p.grad * along[key]).sum()) for key, p in module.named_parameters() if key in along)
        assert expected == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-7)
        assert expected != 0.0


@pytest.mark.parametrize("name", KINKED)
@pytest.mark.parametrize("make", DEEP)
def test_estimates_are_close_to_the_verified_bounds_and_never_above(make: Any, name: str, converged: None) -> None:
    module, (x, y) = even(make, name), batch()
    estimate, verified = estimated(module, x, y), losses(module, x, y, linearised_by_norms)
    assert bool((estimate <= verified * (1 + 1e-12)).all())
    assert bool((estimate >= 0.99 * verified).all())


@pytest.mark.parametrize("name", ["relu", "clipped relu", "maxmin"])
def test_a_single_hidden_layer_has_the_bound_that_certify_proves(name: str, converged: None) -> None:
    module, (x, y) = prepared(shallow, KINKED[name]), batch()
    proved = losses(
        module, x, y, lambda point, weights, r: linearised_on_balls(point, interval_ranges(point, weights, r))
    )
    estimate = estimated(module, x, y)
    assert bool((estimate <= proved * (1 + 1e-12)).all())
    assert bool((estimate >= 0.99 * proved).all())


@pytest.mark.parametrize("name", KINKED)
@pytest.mark.parametrize("make", DEEP)
def test_the_verified_bounds_hold_at_sampled_points(make: Any, name: str) -> None:
    module, (x, y) = even(make, name), batch()
    bound = losses(module, x, y, linearised_by_norms)
    directions = torch.randn(300, *x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    directions *= RADIUS / directions.flatten(2).norm(dim=2).reshape(300, -1, 1, 1, 1)
    rivals = rivals_of(y, CLASSES)
    with torch.no_grad():
        margins = margins_of(module(x), y, rivals)
        for d in (*directions, *steepest(module, x, y)):
            assert bool((margins - margins_of(module(x + d), y, rivals) <= bound + 1e-12).all())


def steepest(module: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """For each rival the step of length RADIUS against the margin's gradient."""
    found = []
    for index in range(CLASSES - 1):
        at = x.clone().requires_grad_(True)
        with torch.enable_grad():
            margin = margins_of(module(at), y, rivals_of(y, CLASSES))[:, index].sum()
            (gradient,) = torch.autograd.grad(margin, at)
        found.append(-RADIUS * gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-30).reshape(-1, 1, 1, 1))
    return found


def test_units_that_are_constant_add_nothing() -> None:
    """A ReLU that is off on the ball, and a clipped one beyond its threshold: as if they were not there."""
    x, y = batch()
    module = prepared(shallow, nn.ReLU)
    with torch.no_grad():
        module[1].bias[:6] = -100.0
    smaller = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, CLASSES)).double()
    with torch.no_grad():
        smaller[1].weight.copy_(module[1].weight[6:]), smaller[1].bias.copy_(module[1].bias[6:])
        smaller[3].weight.copy_(module[3].weight[:, 6:]), smaller[3].bias.copy_(module[3].bias)
    full, without = (losses(m, x, y, linearised_by_norms) for m in (module, smaller))
    assert bool((full >= without * (1 - 1e-9)).all())  # the norm of the first layer counts all of its rows
    sure = prepared(shallow, lambda: ClippedReLU(0.5))
    with torch.no_grad():
        sure[1].bias[:] = torch.tensor([100.0, -100.0], dtype=torch.float64).repeat(6)
    assert float(losses(sure, x, y, linearised_by_norms).max()) < 1e-9
    objective = LocalLipschitz(sure, SHAPE, radius=RADIUS)
    objective(x, y).backward()  # intervals of no width, at which quotients have no gradient
    assert all(bool(p.grad.isfinite().all()) for p in sure.parameters() if p.grad is not None)


def test_the_sparsity_loss_is_what_it_says() -> None:
    x, _ = batch()
    for module, high in ((prepared(shallow, nn.ReLU), None), (prepared(shallow, lambda: ClippedReLU(0.4)), 0.4)):
        objective = LocalLipschitz(module, SHAPE, radius=RADIUS)
        with objective.kept.step():
            found = float(sparsity_loss(objective.linearised(x)).detach())
        z = module[1](x.flatten(1))
        reach = RADIUS * module[1].weight.norm(dim=1)
        expected = (z + reach).clamp(min=0).mean()
        if high is not None:
            expected = expected + SATURATION * (high - z + reach).clamp(min=0).mean()
        assert found == pytest.approx(float(expected.detach()), rel=1e-5)
    sorting = LocalLipschitz(prepared(shallow, KINKED["maxmin"]), SHAPE, radius=RADIUS)
    with sorting.kept.step():
        assert float(sparsity_loss(sorting.linearised(x))) == 0.0


def test_a_group_map_made_linear_is_pushed_as_it_is_pulled() -> None:
    module, (x, _) = prepared(deep, KINKED["maxmin"]).requires_grad_(False), batch()
    point = EvaluatedPoints(DifferentiableNetwork(module, SHAPE).network(), x)
    radius = torch.full((len(x),), RADIUS, dtype=torch.float64)
    sources = linearised_by_norms(point, weight_blocks(point.network, BUDGET), radius)
    for layer, part in sources.linear.items():
        size, none = point.network.nodes[layer].size, torch.zeros(len(x), dtype=torch.float64)
        v, u = torch.randn(2, len(x), size, dtype=torch.float64)
        pushed, pulled = part.push(Vectors(v, none)).value, part.back(Vectors(u.unsqueeze(1), none.unsqueeze(1))).value
        assert torch.allclose((pushed * u).sum(1), (pulled.squeeze(1) * v).sum(1), rtol=1e-12)
        assert bool((pushed != 0).any())


@pytest.mark.parametrize("name", KINKED)
@pytest.mark.parametrize("make", [deep, images])
def test_a_module_is_the_network_that_is_trained_and_the_one_that_is_certified(make: Any, name: str) -> None:
    module, x = prepared(make, KINKED[name]).float(), 2 * torch.randn(40, *SHAPE)
    expected = module(x)
    for network in (DifferentiableNetwork(module, SHAPE).network(), load_model(module, input_shape=SHAPE).network):
        assert torch.allclose(network(x.double()).float(), expected, rtol=0, atol=1e-5)
    kept = [layer for layer in module if isinstance(layer, Derived)]
    z = torch.randn(5, 4, 3, 3)
    assert all(torch.allclose(layer.written_out()(z), layer(z), rtol=0, atol=1e-6) for layer in kept)
    assert not any(list(layer.written_out().state_dict()) for layer in kept)


def test_vectors_survive_a_checkpoint() -> None:
    module, (x, y) = prepared(deep, nn.ReLU), batch()
    first = LocalLipschitz(module, SHAPE, radius=RADIUS)
    for _ in range(3):
        first(x, y)
    second = LocalLipschitz(module, SHAPE, radius=RADIUS)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x[:4], y[:4]), second(x[:4], y[:4]))  # batches may differ in size


@pytest.mark.parametrize("activation", ["relu", "maxmin"])
def test_a_trained_network_certifies_more_than_a_plain_one(activation: str) -> None:
    samples, found = data(144), {}
    values = {"activation": activation, "weight": 0.9, "rate": 0.02, "average": 0.0, "radius": 0.6, "ramp": 0.5}
    for objective in ("plain", "local-lipschitz"):
        recipe = RECIPE.with_values({**values, "objective": objective, "epochs": 12, "arch": "mlp:16-12-12-3"})
        module = trained(recipe, samples).best_module()
        summary = certify(module, samples.x, samples.y, method="local-lipschitz", eps=0.6).summary
        found[objective] = summary.certified_accuracy["0.6"]
    assert found["local-lipschitz"] > found["plain"] + 0.1


def test_learned_thresholds_are_in_the_file() -> None:
    for activation, keys in (("clip:0,1", ["high"]), ("maxmin:-1,1", ["high", "low"])):
        values = {"objective": "local-lipschitz", "activation": activation, "learned_thresholds": True, "rate": 0.05}
        training = trained(RECIPE.with_values({**values, "weight": 0.5, "epochs": 2}))
        module = training.best_module()
        (entry,) = (layer for layer in module.spec["layers"] if layer["type"] in ("clip", "MaxMin"))
        begin = dict(zip(("low", "high"), map(float, activation.partition(":")[2].split(",")), strict=True))
        assert all(abs(entry[key] - begin[key]) > 1e-4 for key in keys)
        network = build(module.spec, module.state_dict())
        x = 3 * torch.randn(20, 1, 4, 4)
        assert torch.allclose(network(x.double()).float(), module(x), rtol=0, atol=1e-5)
        learning = copy.deepcopy(training.module).cpu().eval()
        learning.load_state_dict(training.best_state)
        assert torch.allclose(learning(x), module(x), rtol=0, atol=1e-5)
        assert learning.spec == module.spec


def test_recipes_that_cannot_be_trained() -> None:
    with pytest.raises(UsageError, match=r"weight = 2\.0 is a share in `local-lipschitz`"):
        Recipe(objective="local-lipschitz", weight=2.0)
    for activation, says in (
        ("tanh", "has none that can be learned; use clip:0,1 or maxmin:-1,1"),
        ("clip:-1,1", "has none that can be learned"),
        ("maxmin", "maxmin has none; write where they begin"),
        ("maxmin:1", "after the colon come two thresholds"),
        ("maxmin:1,\x1b[31m", "after the colon come two thresholds"),
        ("maxmin:-1,1e9", "cannot be trained in float32"),
    ):
        with pytest.raises(UsageError, match=says) as refusal:
            Training(RECIPE.with_values({"activation": activation, "learned_thresholds": True}), data(), CPU)
        assert "\x1b" not in str(refusal.value)
    with pytest.raises(UsageError, match="choose even widths"):
        Training(RECIPE.with_values({"activation": "maxmin", "arch": "mlp:16-11-3"}), data(), CPU)
