"""The training loop: the same weights whether or not it was stopped, selection, steps that are taken back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from certify_cli.errors import DataError, TrainingError, UsageError
from certify_cli.training.local_lipschitz import LocalLipschitz
from certify_cli.training.loop import MOST_SKIPPED, Training, TrainingData, objective_of
from certify_cli.training.objectives import CRT, CurvaturePenalty, LocalCurvature, LowCurvature, Plain
from tests.training.runs import CPU, RECIPE, data, same, trained


def test_another_seed_gives_other_weights() -> None:
    assert not same(trained().best_state, trained(RECIPE.with_values({"seed": 1})).best_state)


def test_training_learns_and_keeps_the_best_model() -> None:
    training = trained(RECIPE.with_values({"epochs": 25, "rate": 0.02, "average": 0.0, "every": 5}))
    compared = [epoch for epoch in training.history if epoch.certified is not None]
    assert [epoch.number for epoch in compared] == [5, 10, 15, 20, 25]
    assert training.best is not None
    assert training.best[1].certified == max(epoch.certified or 0.0 for epoch in compared) > 0.8
    assert training.history[training.best[0] - 1].certified == training.best[1].certified


def test_steps_that_are_not_finite_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(RECIPE, data(), CPU)
    whole, calls = type(training.objective).__call__, []

    def sometimes(self: CRT, x: Tensor, y: Tensor) -> Tensor:
        calls.append(None)
        return whole(self, x, y) * (math.nan if len(calls) == 2 else 1.0)

    monkeypatch.setattr(type(training.objective), "__call__", sometimes)
    first = next(training.epochs())
    assert first.skipped == 1
    assert math.isfinite(first.loss)
    assert all(bool(t.isfinite().all()) for t in training.present().declared().values())

    monkeypatch.setattr(type(training.objective), "__call__", lambda self, x, y: whole(self, x, y) * math.nan)
    with pytest.raises(TrainingError, match=f"not finite in {MOST_SKIPPED} steps in a row; lower the recipe's rate"):
        list(Training(RECIPE.with_values({"epochs": 20}), data(), CPU).epochs())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("plain", Plain),
        ("curvature", CurvaturePenalty),
        ("crt", CRT),
        ("local", LocalCurvature),
        ("local-lipschitz", LocalLipschitz),
        ("lcnn", LowCurvature),
    ],
)
def test_every_objective_of_a_recipe(name: str, kind: type) -> None:
    training = Training(RECIPE.with_values({"objective": name}), data(), CPU)
    assert type(objective_of(training.recipe, training.module, (1, 4, 4))) is kind


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "constant"])
@pytest.mark.parametrize("optimiser", ["adam", "adamw", "sgd"])
def test_optimisers_and_schedules(optimiser: str, schedule: str) -> None:
    values = {"optimiser": optimiser, "schedule": schedule, "epochs": 1, "objective": "plain"}
    assert math.isfinite(trained(RECIPE.with_values(values)).history[-1].loss)


def test_data_that_cannot_be_trained_on_is_refused() -> None:
    x, y = torch.rand(30, 1, 4, 4), torch.arange(30) % 3
    with pytest.raises(DataError, match="no labels"):
        TrainingData.of(x, None, RECIPE)
    with pytest.raises(DataError, match="30 training samples are too few where 30 are kept for validation"):
        TrainingData.of(x, y, RECIPE.with_values({"validation": 30}))
    with pytest.raises(DataError, match="all of one class"):
        TrainingData.of(x, torch.zeros_like(y), RECIPE)
    flat = TrainingData.of(x.flatten(1), y, RECIPE)
    with pytest.raises(UsageError, match="shift, rotate, scale and flip are for images"):
        Training(RECIPE, flat, CPU)


def test_labels_are_numbered_from_0_without_gaps() -> None:
    x, y = torch.rand(40, 1, 4, 4), torch.arange(40) % 3
    first, second = TrainingData.of(x, y, RECIPE), TrainingData.of(x, (y + 1) % 3, RECIPE)
    assert first.sha256 != second.sha256
    with pytest.raises(DataError, match="all of one class"):
        TrainingData.of(x, torch.full((40,), 5, dtype=torch.int64), RECIPE)
    for labels, says in (
        (2 * y, "no training sample has the label 1, and one has 2; number the classes from 0 without gaps"),
        (y + 1, "no training sample has the label 0, and one has 1"),
        (y * 10**15, "no training sample has the label 1, and one has 1000000000000000"),
        (y - 1, "no training sample has the label 0, and one has -1"),
    ):
        with pytest.raises(DataError, match=says):
            TrainingData.of(x, labels, RECIPE)


@pytest.mark.parametrize("optimiser", ["adam", "adamw", "sgd"])
def test_momentum_stays_below_1(optimiser: str) -> None:
    training = Training(RECIPE.with_values({"optimiser": optimiser, "momentum": 0.97, "epochs": 2}), data(), CPU)
    largest = []
    for _ in training.epochs(lambda loss: largest.append(_momentum(training))):
        pass
    assert 0.9 < max(largest) < 1.0


def _momentum(training: Training) -> float:
    group = training.optimiser.param_groups[0]
    return float(group["momentum"] if "momentum" in group else group["betas"][0])
