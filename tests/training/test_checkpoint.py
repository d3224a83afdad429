"""Checkpoints: a resumed run is the same run, and no file makes one fail but by a sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from certify_cli.errors import CurvcertError, UsageError
from certify_cli.load.safetensors.loader import read_declared
from certify_cli.training.checkpoint import resume, write_checkpoint
from certify_cli.training.loop import Training
from certify_cli.training.recipe import OBJECTIVES, OPTIMISERS, SCHEDULES
from tests.training.runs import CPU, RECIPE, STYLE, data, same, trained

RUN = RECIPE.with_values({"every": 2})


def begun(path: Path, epochs: int = 2, **values: Any) -> None:
    """A checkpoint after some epochs."""
    training = Training(RUN.with_values(values), data(), CPU)
    going = training.epochs()
    for _ in range(epochs):
        next(going)
    write_checkpoint(path, training)


@pytest.mark.parametrize(
    ("objective", "optimiser", "schedule"),
    [
        *((objective, "adam", "one-cycle") for objective in OBJECTIVES),
        *(("plain", optimiser, schedule) for optimiser in OPTIMISERS for schedule in SCHEDULES),
    ],
)
def test_a_resumed_run_gives_the_same_weights(objective: str, optimiser: str, schedule: str, tmp_path: Path) -> None:
    values = {"objective": objective, "dual_step": 0.1, "optimiser": optimiser, "schedule": schedule}
    recipe = RECIPE.with_values(values)
    whole = trained(recipe)
    begin = Training(recipe, data(), CPU)
    epochs = begin.epochs()
    next(epochs), next(epochs)
    write_checkpoint(tmp_path / "checkpoint", begin)
    torch.manual_seed(99)
    resumed = Training(recipe, data(), CPU)
    assert resume(tmp_path / "checkpoint", resumed) == torch.get_num_threads()
    assert len(list(resumed.epochs())) == 2
    assert same(whole.present().declared(), resumed.present().declared())
    assert same(whole.best_state, resumed.best_state)
    assert [epoch.loss for epoch in whole.history] == [epoch.loss for epoch in resumed.history]
    assert whole.best == resumed.best
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_resumed_low_curvature_run_has_the_same_statistics_and_vectors(tmp_path: Path) -> None:
    recipe = RUN.with_values({**STYLE, "objective": "lcnn"})
    begun(tmp_path / "checkpoint", **{**STYLE, "objective": "lcnn"})
    resumed = Training(recipe, data(), CPU)
    resume(tmp_path / "checkpoint", resumed)
    assert len(list(resumed.epochs())) == 2
    whole = trained(recipe)
    assert same(whole.present().declared(), resumed.present().declared())
    assert same(dict(whole.module.named_buffers()), dict(resumed.module.named_buffers()))
    assert whole.present().spec == resumed.present().spec
    assert whole.best == resumed.best


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    torch.save({"recipe": {}}, path)
    pickle = path.read_bytes()
    for content in (b"", b"\x80\x04cos\nsystem\n(S'true'\ntR.", pickle, b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="not a checkpoint of curvcert train; remove it to begin anew"):
            resume(path, Training(RUN, data(), CPU))
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(UsageError, match="not a checkpoint that this run has left"):
        resume(path, Training(RUN, data(), CPU))


def test_another_recipe_and_other_data_are_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    begun(path)
    with pytest.raises(UsageError, match=r"is of another recipe: rate is 0\.008 here and 0\.1 there"):
        resume(path, Training(RUN.with_values({"rate": 0.1}), data(), CPU))
    with pytest.raises(UsageError, match="is of other data"):
        resume(path, Training(RUN, data(75), CPU))


Change = Callable[[Tensor], Tensor]
TENSORS: dict[str, Change] = {
    "another shape": lambda t: torch.cat([t.reshape(-1), t.reshape(-1)]) if t.numel() else t.new_zeros(3),
    "another type": lambda t: t.to(torch.float64 if t.dtype == torch.float32 else torch.float32),
    "not numbers": lambda t: torch.full_like(t, torch.nan if t.is_floating_point() else 77),
    "huge": lambda t: torch.full_like(t, 1e30 if t.is_floating_point() else 127),
    "negative": lambda t: -t - 1,
    "empty": lambda t: t.reshape(-1)[:0],
}
VALUES = (None, True, -1, 10**30, "\x1b[2J", [], {"multiplier": "x"})


@pytest.mark.parametrize("values", [{"objective": "curvature"}, {"optimiser": "sgd", "average": 0.0}])
def test_a_changed_checkpoint_is_refused_or_trained_on(values: dict[str, Any], tmp_path: Path) -> None:
    """Every tensor and every value in turn is left out or changed: a sentence, or a run with all its epochs."""
    path = tmp_path / "checkpoint"
    begun(path, **values)
    _, facts = read_declared(path)
    tensors = load_file(path)
    changed: list[tuple[dict[str, Tensor], Any]] = [({**tensors, "run/more": torch.zeros(1)}, facts)]
    changed += [({**tensors, "other/more": torch.zeros(1)}, facts), (tensors, []), (tensors, None)]
    for name in tensors:
        changed.append(({key: tensor for key, tensor in tensors.items() if key != name}, facts))
        changed += [({**tensors, name: change(tensors[name])}, facts) for change in TENSORS.values()]
    for name in facts:
        changed.append((tensors, {key: value for key, value in facts.items() if key != name}))
        changed += [(tensors, {**facts, name: value}) for value in VALUES]
    assert_refused_or_trained_on(path, values, changed)


def test_changed_vectors_and_statistics_are_refused_or_trained_on(tmp_path: Path) -> None:
    """Of a low-curvature network: spectral norms, running statistics, betas and gammas that no run leaves."""
    path, values = tmp_path / "checkpoint", {**STYLE, "objective": "lcnn", "average": 0.0, "every": 4}
    begun(path, **values)
    _, facts = read_declared(path)
    tensors = load_file(path)
    names = [n for n in tensors if n.startswith("module/") and re.search(r"\.(0\._[uv]|running_\w+|log_\w+)$", n)]
    assert len(names) == 8
    changed = [({**tensors, n: change(tensors[n])}, facts) for n in names for change in TENSORS.values()]
    assert_refused_or_trained_on(path, values, changed)


def assert_refused_or_trained_on(
    path: Path, values: dict[str, Any], changed: list[tuple[dict[str, Tensor], Any]]
) -> None:
    """Each changed checkpoint, tensors and facts, ends in a sentence or in a run with all its epochs."""
    refused, went_on = 0, 0
    for held, said in changed:
        save_file(held, path, metadata={"curvcert": json.dumps(said)})
        training = Training(RUN.with_values(values), data(), CPU)
        said_no = ""
        try:
            resume(path, training)
            list(training.epochs())
        except CurvcertError as error:
            said_no = str(error)
        assert said_no.isprintable()
        assert said_no or training.best is not None
        refused, went_on = refused + bool(said_no), went_on + (not said_no)
    assert refused > went_on > 0


def test_a_history_that_no_run_has_is_refused(tmp_path: Path) -> None:
    """Comparisons after the wrong epochs, more epochs than the recipe has, parts of steps."""
    path = tmp_path / "checkpoint"
    begun(path)
    _, facts = read_declared(path)
    tensors = load_file(path)
    rows = tensors["run/history"]
    none, wrong, part = rows.clone(), rows.clone(), rows.clone()
    none[:, 2:4] = torch.nan
    wrong[:, 2:4] = 2.0
    part[:, 1] = 0.5
    for history in (none, wrong, part, rows.repeat(3, 1), rows[:, :3], rows[:1]):
        save_file({**tensors, "run/history": history.contiguous()}, path, metadata={"curvcert": json.dumps(facts)})
        with pytest.raises(UsageError, match="not a checkpoint that this run has left"):
            resume(path, Training(RUN, data(), CPU))


def test_steps_that_were_taken_back_count_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint"
    training = Training(RUN, data(), CPU)
    whole = type(training.objective).__call__
    monkeypatch.setattr(type(training.objective), "__call__", lambda self, x, y: whole(self, x, y) * torch.nan)
    next(training.epochs())
    assert training.skipped_in_row == training.steps
    write_checkpoint(path, training)
    resumed = Training(RUN, data(), CPU)
    resume(path, resumed)
    assert resumed.skipped_in_row == training.steps
