"""Objectives: their gradients are those of their values, and their values never exceed the verified bounds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from certify_cli.bounds.global_bounds.curvature import Curvature
from certify_cli.bounds.global_bounds.expansion import weight_blocks
from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.bounds.on_ball.interval_ranges import interval_ranges
from certify_cli.bounds.remainder.tangent_bound import tangent_losses
from certify_cli.errors import ModelError, UsageError
from certify_cli.network import convolution
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from certify_cli.network.propagate import vjp
from certify_cli.numerics import estimates
from certify_cli.training import CRT, CurvaturePenalty, LocalCurvature, Objective, Plain, objectives
from certify_cli.training.attack_points import attack_points
from certify_cli.training.differentiable import DifferentiableNetwork
from certify_cli.training.objectives import BUDGET, TRAINED_RULES, global_curvature, rivals_of
from tests.training.modules import (
    CLASSES,
    SHAPE,
    Residual,
    assert_gradients_fit,
    batch,
    convolutional,
    dense,
    pooled,
    prepared,
)

SMOOTH = [dense, convolutional, Residual]
ACTIVATIONS = [nn.Softplus, nn.Tanh]
OBJECTIVES: dict[str, Callable[[nn.Module], Objective]] = {
    "curvature": lambda m: CurvaturePenalty(m, SHAPE, weight=0.1, temperature=0.5, offset=0.2),
    "crt": lambda m: CRT(m, SHAPE, radius=0.0, weight=0.1, steps=1),  # no attack: its point moves with the weights
    "crt of every rival": lambda m: CRT(m, SHAPE, radius=0.0, weight=0.1, steps=1, every_rival=True),
    "local": lambda m: LocalCurvature(m, SHAPE, radius=0.3, weight=0.7),
    "local of the runner-up": lambda m: LocalCurvature(m, SHAPE, radius=0.3, weight=0.7, every_rival=False),
}


@pytest.fixture
def converged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Singular vectors that have converged at every step."""
    monkeypatch.setattr(estimates, "STEPS", 300)
    monkeypatch.setattr(estimates, "FIRST_STEPS", 600)


def frozen(module: nn.Module) -> Network:
    """The network of a module without gradients: that of the verified bounds."""
    return DifferentiableNetwork(copy.deepcopy(module).requires_grad_(False), SHAPE).network()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("make", SMOOTH)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_those_of_the_values(name: str, make: Any, activation: Any, converged: None) -> None:
    module, (x, y) = prepared(make, activation), batch()
    assert_gradients_fit(OBJECTIVES[name](module), x, y, rel=2e-3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("make", SMOOTH)
def test_curvature_never_exceeds_the_verified_bound(make: Any, activation: Any, converged: None) -> None:
    module, (_, y) = prepared(make, activation), batch()
    objective = CRT(module, SHAPE, radius=0.1)
    rivals = rivals_of(y, CLASSES)[:, 0]
    with objective.kept.step():
        value = objective.curvatures(y, rivals).detach()
    with exact_kernels():
        curvature: Curvature = global_curvature(frozen(module))
        verified = curvature.lower(torch.stack([y, rivals], 1), TRAINED_RULES)
    assert bool((value <= verified * (1 + 1e-12)).all())
    assert bool((value >= 0.999 * verified).all())


@pytest.mark.parametrize("make", SMOOTH)
def test_worst_margins_never_fall_below_the_verified_ones(make: Any, converged: None) -> None:
    """The loss must not claim less than the bound: its margins are at least the verified lower bounds."""
    module, (x, y) = prepared(make, nn.Softplus), batch()
    objective = LocalCurvature(module, SHAPE, radius=0.2)
    with objective.kept.step():
        value = objective.worst_margins(x, y, rivals_of(y, CLASSES)).detach()
    with exact_kernels():
        network = frozen(module)
        point = EvaluatedPoints(network, x)
        eye, rivals = torch.eye(CLASSES, dtype=torch.float64), rivals_of(y, CLASSES)
        adjoints = vjp(network, eye[y].unsqueeze(1) - eye[rivals], point.slopes)
        ranges = interval_ranges(point, weight_blocks(network, BUDGET), torch.full((len(x),), 0.2, dtype=torch.float64))
        logits = point.evaluation.logits
        margin = logits.gather(1, y.unsqueeze(1)) - logits.gather(1, rivals)
        verified = margin - tangent_losses(point, ranges, adjoints, sharp=False)
    assert bool((value >= verified - 1e-9).all())
    assert bool((value <= verified + 1e-3 * (margin - verified)).all())


@pytest.mark.parametrize("make", [convolutional, dense])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_operators_in_place_of_matrices(name: str, make: Any, converged: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions that are not written out: the same first term and Lipschitz constants, and the same gradients."""
    monkeypatch.setattr(convolution, "PATCH_ENTRIES", 1)  # as images of many pixels are convolved: part by part
    found = []
    for writing in (1e9, 0.0):
        monkeypatch.setattr(objectives, "BUDGET", replace(BUDGET, writing=writing))
        module, (x, y) = prepared(lambda activation: single(make, activation), nn.Softplus), batch()
        loss = OBJECTIVES[name](module)(x, y)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in module.parameters())])
    if name.startswith("local"):  # whose ranges are wider without rows
        assert float(found[1][0]) >= float(found[0][0]) - 1e-9
        return
    for written, by_operators in zip(*found, strict=True):
        assert torch.allclose(written, by_operators, rtol=1e-4, atol=1e-7)


def single(make: Any, activation: Any) -> nn.Module:
    """The first layers of a module up to its first activation, and a head."""
    layers = list(make(activation))
    end = next(i for i, layer in enumerate(layers) if isinstance(layer, activation)) + 1
    width = nn.Sequential(*layers[:end], nn.Flatten())(torch.zeros(1, *SHAPE)).shape[1]
    return nn.Sequential(*layers[:end], nn.Flatten(), nn.Linear(width, CLASSES))


def test_worst_margins_hold_at_sampled_points() -> None:
    module, (x, y) = prepared(dense, nn.Tanh), batch()
    objective = LocalCurvature(module, SHAPE, radius=0.25)
    with objective.kept.step():
        worst = objective.worst_margins(x, y, rivals_of(y, CLASSES)).detach()
    directions = torch.randn(200, *x.shape, dtype=torch.float64)
    directions /= directions.flatten(2).norm(dim=2).reshape(200, -1, 1, 1, 1)
    with torch.no_grad():
        logits = module((x + 0.25 * directions).flatten(0, 1)).reshape(200, len(x), CLASSES)
    rivals = rivals_of(y, CLASSES)
    margins = logits.gather(2, y.reshape(1, -1, 1).expand(200, -1, 1)) - logits.gather(2, rivals.expand(200, -1, -1))
    assert bool((margins.amin(0) >= worst - 1e-9).all())


def test_plain_is_cross_entropy() -> None:
    module, (x, y) = prepared(dense, nn.ReLU), batch()
    assert torch.equal(Plain(module, SHAPE)(x, y), nn.functional.cross_entropy(module(x), y))


def test_training_mode_is_left_as_it_was() -> None:
    module, (x, y) = prepared(convolutional, nn.Tanh), batch()
    module.train()
    module[1].eval()  # a frozen batch norm
    statistics = module[1].running_mean.clone()
    CRT(module, SHAPE, radius=0.1)(x, y).backward()
    assert [module.training, module[1].training] == [True, False]
    assert torch.equal(module[1].running_mean, statistics)


def test_float32_modules_train() -> None:
    module, (x, y) = prepared(convolutional, nn.Softplus).float(), batch()
    for name, make in OBJECTIVES.items():
        module.zero_grad()
        make(module)(x.float(), y).backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters()), name


def test_vectors_survive_a_checkpoint() -> None:
    module, (x, y) = prepared(dense, nn.Tanh), batch()
    first = CRT(module, SHAPE, radius=0.0, weight=0.1, steps=1)
    for _ in range(5):
        first(x, y)
    second = CRT(module, SHAPE, radius=0.0, weight=0.1, steps=1)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x, y), second(x, y))


def test_the_multiplier_follows_accuracy() -> None:
    module, (x, y) = prepared(dense, nn.Tanh), batch()
    objective = CurvaturePenalty(module, SHAPE, weight=0.1, step=0.5, target=0.0, floor=0.05, memory=0.0)
    y = module(x).argmax(1)
    objective(x, y)
    assert objective.multiplier == pytest.approx(0.6)
    objective.target = 1.0
    objective(x, (y + 1) % CLASSES)
    assert objective.multiplier == pytest.approx(0.1)
    objective(x, (y + 1) % CLASSES)
    assert objective.multiplier == 0.05


def test_what_cannot_be_trained_is_refused_in_a_sentence() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) if x.sum() > 0 else -x.flatten(1)

    with pytest.raises(ModelError, match=r"cannot be traced.*must not branch"):
        LocalCurvature(Branching(), SHAPE, radius=0.1)
    with pytest.raises(ModelError, match=r"no bounded second derivative; curvature objectives need smooth"):
        CRT(prepared(dense, nn.ReLU), SHAPE, radius=0.1)
    with pytest.raises(ModelError, match="no bounded second derivative"):
        LocalCurvature(prepared(pooled, nn.Tanh), SHAPE, radius=0.1)
    with pytest.raises(ModelError, match="this operator is not supported"):
        CRT(nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.LayerNorm(4)), SHAPE, radius=0.1)
    with pytest.raises(ModelError, match=r"cannot be traced"):
        CRT(nn.Linear(5, 4), SHAPE, radius=0.1)
    with pytest.raises(UsageError, match=r"takes a torch\.nn\.Module"):
        Plain("model.onnx", SHAPE)  # type: ignore[arg-type]


def test_nothing_is_claimed_of_weights_that_carry_a_gradient() -> None:
    network = DifferentiableNetwork(prepared(dense, nn.Tanh), SHAPE).network()
    with pytest.raises(ValueError, match="weights that carry a gradient are for training"):
        ModelBounds(network)


def test_claims_carry_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module whose parameters require gradients is certified without: every rounding is done."""
    from certify_cli import certify, load_model
    from certify_cli.numerics import rounding

    module, (x, y) = prepared(dense, nn.Tanh), batch()
    loaded = load_model(module.float(), input_shape=SHAPE)
    tensors = [t for node in loaded.network.nodes for t in vars(node.op).values() if isinstance(t, Tensor)]
    assert {t.requires_grad for t in tensors} == {False}
    seen = []
    above = rounding.next_above

    def watched(value: Tensor) -> Tensor:
        seen.append(value.requires_grad)
        return above(value)

    monkeypatch.setattr(rounding, "next_above", watched)
    certify(loaded, x.float(), y, attack="search")
    assert len(seen) > 100
    assert not any(seen)


def test_vectors_that_vanish_begin_anew() -> None:
    torch.manual_seed(0)
    kept, matrix = estimates.KeptVectors(), torch.randn(5, 4, dtype=torch.float64)
    for present in (matrix, torch.zeros_like(matrix), torch.full_like(matrix, torch.nan), *[matrix] * 20):
        maps = estimates.Maps.of(present)
        with kept.step():
            dense = float(estimates.norm_estimate(present))
            mapped = float(estimates.operator_norm_estimate(maps.linear, maps.transpose, maps.shape, present))
    largest = pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-6)
    assert dense == largest
    assert mapped == largest


def test_rows_that_stand_for_others_begin_anew() -> None:
    torch.manual_seed(0)
    kept, maps = estimates.KeptVectors(), estimates.Maps.of(torch.randn(6, 5, dtype=torch.float64))
    weights = torch.rand(20, 6, dtype=torch.float64)
    gram = maps.like.T @ (weights[:, :, None] * maps.like)
    exact = torch.linalg.eigvalsh(gram)[:, -1]
    for rows in (torch.arange(8), torch.arange(8, 16), torch.arange(5), torch.arange(5)):
        with kept.step():
            kept.stands_for(rows)
            assert torch.allclose(estimates.weighted_gram_estimates(maps, weights[rows]), exact[rows], rtol=1e-6)
    assert len(kept.state_dict()) == 2
    for wrong in ({}, {"rows": torch.arange(2), "3": torch.ones(1)}, {"rows": torch.arange(2), "0": torch.arange(2)}):
        with pytest.raises(ValueError, match="vector"):
            kept.load_state_dict(wrong)


def test_softsign_is_one_operator() -> None:
    """torch writes x / (1 + |x|), of which no part has a bound."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(nn.functional.softsign(self.first(x)))

    x, y = torch.rand(6, 4), torch.arange(6) % 3
    for module in (Functional(), nn.Sequential(nn.Linear(4, 5), nn.Softsign(), nn.Linear(5, 3))):
        CRT(module, (4,), radius=0.1)(x, y).backward()
        assert all(p.grad is not None for p in module.parameters())
        network = DifferentiableNetwork(module, (4,)).network()
        assert torch.allclose(network(x.double()).float(), module(x), rtol=0, atol=1e-6)


def test_an_attack_moves_where_the_loss_is_rounded_to_zero() -> None:
    module = nn.Linear(2, 2, bias=False)
    module.weight.data = torch.tensor([[1e4, 0.0], [-1e4, 0.0]])
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    found = attack_points(module, x, y, 0.5, 5)
    assert torch.allclose(found, torch.tensor([[0.5, 0.0]]), atol=1e-5)


def test_tied_weights() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 6), nn.Softplus(), nn.Linear(6, 6), nn.Softplus(), nn.Linear(6, 3)).double()
    apart = copy.deepcopy(module)
    module[2].weight = module[0].weight
    apart[2].load_state_dict(module[2].state_dict())
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.arange(5) % 3
    losses = [CurvaturePenalty(m, (6,), weight=0.1)(x, y) for m in (module, apart)]
    for loss in losses:
        loss.backward()
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=1e-12)
    shared = apart[0].weight.grad + apart[2].weight.grad
    assert torch.allclose(module[0].weight.grad, shared, rtol=1e-9, atol=1e-12)
