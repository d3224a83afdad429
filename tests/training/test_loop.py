"""The training loop: the same weights whether or not it was stopped, selection, steps that are taken back."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from certify_cli.errors import DataError, TrainingError, UsageError
from certify_cli.training.loop import (
    MOST_SKIPPED,
    Training,
    TrainingData,
    objective_of,
    read_checkpoint,
    write_checkpoint,
)
from certify_cli.training.objectives import CRT, CurvaturePenalty, LocalCurvature, Plain
from certify_cli.training.recipe import Recipe

RECIPE = Recipe(
    data="memory", arch="mlp:16-12-3", radius=0.1, epochs=4, batch=16, rotate=5.0, noise=0.01, average=0.9, checked=8
)
CPU = torch.device("cpu")


def data(count: int = 72) -> TrainingData:
    """Three classes of images that differ in their brightest row."""
    generator = torch.Generator().manual_seed(7)
    y = torch.arange(count) % 3
    x = 0.2 * torch.rand(count, 1, 4, 4, generator=generator)
    x[torch.arange(count), 0, y] += 0.7
    return TrainingData.of(x, y, RECIPE)


def trained(recipe: Recipe = RECIPE) -> Training:
    training = Training(recipe, data(), CPU)
    assert len(list(training.epochs())) == recipe.epochs
    return training


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())


@pytest.mark.parametrize("objective", ["plain", "curvature", "crt", "local"])
def test_a_resumed_run_gives_the_same_weights(objective: str, tmp_path: Path) -> None:
    recipe = RECIPE.with_values({"objective": objective, "dual_step": 0.1})
    whole = trained(recipe)
    begun = Training(recipe, data(), CPU)
    epochs = begun.epochs()
    next(epochs), next(epochs)
    write_checkpoint(tmp_path / "checkpoint", begun.state())
    torch.manual_seed(99)
    resumed = Training(recipe, data(), CPU)
    resumed.restore(read_checkpoint(tmp_path / "checkpoint"))
    list(resumed.epochs())
    assert same(whole.present().declared(), resumed.present().declared())
    assert same(whole.best_state, resumed.best_state)
    assert [epoch.loss for epoch in whole.history] == [epoch.loss for epoch in resumed.history]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_another_seed_gives_other_weights() -> None:
    assert not same(trained().best_state, trained(RECIPE.with_values({"seed": 1})).best_state)


def test_training_learns_and_keeps_the_best_model() -> None:
    training = trained(RECIPE.with_values({"epochs": 25, "rate": 0.02, "average": 0.0, "every": 5}))
    compared = [epoch for epoch in training.history if epoch.certified is not None]
    assert [epoch.number for epoch in compared] == [5, 10, 15, 20, 25]
    assert training.best is not None
    assert training.best.certified == max(epoch.certified or 0.0 for epoch in compared) > 0.8
    assert training.history[training.best_epoch - 1].certified == training.best.certified


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
    ("name", "kind"), [("plain", Plain), ("curvature", CurvaturePenalty), ("crt", CRT), ("local", LocalCurvature)]
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


def test_checkpoints_are_read_without_running_what_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UsageError, match="not a checkpoint of curvcert train"):
        read_checkpoint(path)
    torch.save({"recipe": {}}, path)
    with pytest.raises(UsageError, match="not a checkpoint of curvcert train; remove it"):
        read_checkpoint(path)


def test_a_checkpoint_of_other_data_and_one_class_are_refused() -> None:
    x, y = torch.rand(40, 1, 4, 4), torch.arange(40) % 3
    first, second = TrainingData.of(x, y, RECIPE), TrainingData.of(x, (y + 1) % 3, RECIPE)
    assert first.sha256 != second.sha256
    with pytest.raises(DataError, match="all of one class"):
        TrainingData.of(x, torch.full((40,), 5, dtype=torch.int64), RECIPE)


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
