"""Checkpoints of training: the whole state of a run as one safetensors file, checked before any of it is used.

Tensors are named by group: `module`, `average`, `best` (weights), `moments` (of the optimiser), `vectors` (of the
objective) and `run` (random state, history). The metadata hold numbers and texts. What follows from these, such as the
learning rate, is not stored: a file cannot contradict itself.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from certify_cli.errors import ModelError, UsageError
from certify_cli.load.convert import write_safetensors
from certify_cli.load.safetensors.loader import read_declared
from certify_cli.training.loop import MOST_SKIPPED, Epoch, Training
from certify_cli.training.recipe import Recipe

FORMAT = "curvcert-checkpoint/1"
MOMENTS = {"adam": ("step", "exp_avg", "exp_avg_sq"), "adamw": ("step", "exp_avg", "exp_avg_sq")}
"""What the optimiser keeps of each parameter; for the others it is `momentum_buffer`."""
COLUMNS = 5
"""Of the history: those of `Epoch` but its number; not a number stands for None."""


class _Unfit(Exception):
    """The file holds what no run of this recipe leaves."""


def write_checkpoint(path: Path, training: Training) -> None:
    """Write it so that the file is always a whole one, the last or the one before. UsageError where it cannot be."""
    objective = training.objective.state_dict()
    groups: dict[str, Mapping[str, Tensor]] = {
        "module": training.module.state_dict(),
        "average": {} if training.average is None else training.average.state_dict(),
        "best": training.best_state,
        "moments": {
            f"{number}.{name}": moment
            for number, moments in training.optimiser.state_dict()["state"].items()
            for name, moment in moments.items()
        },
        "vectors": objective.pop("vectors"),
        "run": {"random": torch.get_rng_state(), "history": _rows(training.history)},
    }
    facts = {
        "format": FORMAT,
        "recipe": training.recipe.values(),
        "data": training.data.sha256,
        "threads": torch.get_num_threads(),
        "skipped_in_row": training.skipped_in_row,
        "objective": objective,
    }
    tensors = {f"{group}/{name}": t.detach().cpu() for group, held in groups.items() for name, t in held.items()}
    write_safetensors(path, facts, tensors)


def resume(path: Path, training: Training) -> int:
    """Bring a new run to where the file's one was, and return the number of threads that it had.

    UsageError for a file of another recipe, or of other data, or that is no checkpoint; the run is then not usable.
    """
    try:
        tensors, facts = read_declared(path)
    except ModelError as error:
        raise UsageError(f"{path}: not a checkpoint of curvcert train; remove it to begin anew") from error
    try:
        _demand(isinstance(facts, dict) and facts.get("format") == FORMAT and isinstance(facts.get("recipe"), dict))
        differs = Recipe().with_values(facts["recipe"]).difference(training.recipe)
        if differs is not None:
            raise UsageError(f"{path}: is of another recipe: {differs}")
        if facts.get("data") != training.data.sha256:
            raise UsageError(f"{path}: is of other data; remove it to begin anew")
        _restore(training, tensors, facts)
        _demand(_is_count(facts.get("threads"), 2**20))
        return int(facts["threads"])
    except _Unfit as error:
        raise UsageError(f"{path}: not a checkpoint that this run has left; remove it to begin anew") from error


def _restore(training: Training, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    groups: dict[str, dict[str, Tensor]] = {
        name: {} for name in ("module", "average", "best", "moments", "vectors", "run")
    }
    for name, tensor in tensors.items():
        group, _, rest = name.partition("/")
        _demand(group in groups)
        groups[group][rest] = tensor
    _demand(groups["run"].keys() == {"random", "history"})
    training.history = _history(groups["run"]["history"], training)

    weights = training.module.state_dict()
    _demand_alike(groups["module"], weights)
    training.module.load_state_dict(groups["module"])
    _demand_alike(groups["average"], {} if training.average is None else training.average.state_dict())
    if training.average is not None:
        training.average.load_state_dict(groups["average"])
    _demand_alike(groups["best"], {} if training.best is None else weights)
    training.best_state = groups["best"]

    _demand(_is_count(facts.get("skipped_in_row"), MOST_SKIPPED - 1))
    training.skipped_in_row = facts["skipped_in_row"]
    numbers = training.objective.state_dict()
    del numbers["vectors"]
    found = facts.get("objective")
    _demand(isinstance(found, dict) and found.keys() == numbers.keys())
    _demand(all(isinstance(value, float) and math.isfinite(value) for value in facts["objective"].values()))
    try:
        training.objective.load_state_dict({**facts["objective"], "vectors": groups["vectors"]})
    except ValueError as error:
        raise _Unfit from error

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch expects a step of the optimiser before each of the schedule
        for _ in range(len(training.history) * training.steps):
            training.schedule.step()
    moments = _moments(groups["moments"], training)
    training.optimiser.load_state_dict({**training.optimiser.state_dict(), "state": moments})
    random = groups["run"]["random"]
    _demand_alike({"random": random}, {"random": torch.get_rng_state()})
    try:
        torch.set_rng_state(random)
    except RuntimeError as error:  # numbers that are no state of the generator
        raise _Unfit from error


def _moments(found: Mapping[str, Tensor], training: Training) -> dict[int, dict[str, Tensor]]:
    """The moments by parameter: none, or all that the optimiser keeps of it, of its shape."""
    names = MOMENTS.get(training.recipe.optimiser, ("momentum_buffer",))
    parameters = [p for group in training.optimiser.param_groups for p in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for number, parameter in enumerate(parameters):
        held = {name: found[f"{number}.{name}"] for name in names if f"{number}.{name}" in found}
        if held:
            like = {name: torch.zeros((), dtype=torch.float32) if name == "step" else parameter for name in names}
            _demand_alike(held, like)
            _demand(not bool((held.get("exp_avg_sq", parameter.new_zeros(1)) < 0).any()))
            steps = float(held.get("step", 1.0))
            _demand(1 <= steps <= len(training.history) * training.steps)
            moments[number] = held
    _demand(sum(map(len, moments.values())) == len(found))
    return moments


def _rows(history: list[Epoch]) -> Tensor:
    rows = [[math.nan if value is None else float(value) for value in astuple(epoch)[1:]] for epoch in history]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, COLUMNS)


def _history(rows: Tensor, training: Training) -> list[Epoch]:
    _demand(rows.dtype == torch.float64 and rows.dim() == 2 and rows.shape[1] == COLUMNS)
    _demand(len(rows) <= training.recipe.epochs)
    history = []
    for number, (loss, skipped, accuracy, certified, seconds) in enumerate(rows.tolist(), start=1):
        _demand(skipped in range(training.steps + 1) and 0 <= seconds < math.inf)
        if training.compares(number):
            _demand(0 <= accuracy <= 1 and 0 <= certified <= 1)
            history.append(Epoch(number, loss, int(skipped), accuracy, certified, seconds))
        else:
            history.append(Epoch(number, loss, int(skipped), None, None, seconds))
    return history


def _demand_alike(found: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """The same names, shapes and types, and finite numbers."""
    _demand(found.keys() == like.keys())
    for name, tensor in found.items():
        _demand(tensor.shape == like[name].shape and tensor.dtype == like[name].dtype)
        _demand(bool(tensor.isfinite().all()))


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _demand(holds: bool) -> None:
    if not holds:
        raise _Unfit
