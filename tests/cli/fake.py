"""A stand-in for loading and certifying, so that the command line's own duties are tested fast and alone.

`install()` puts it in place of the real modules: the model "two.onnx" has three classes, the data "N" (a number) holds
N samples, and certifying takes no time. The tests in `test_road.py` walk the real road.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from certify_cli.errors import DataError, MethodError, ModelError
from certify_cli.records import DataInfo, ModelInfo, Run, Sample

INFO = ModelInfo("two.onnx", "ab" * 32, "onnx", 18, 3)


def run(arguments: dict[str, Any], settings: Any, samples: int, notes: list[str]) -> Run:
    return Run(
        tool="curvcert",
        version="0.0.0",
        libraries={"torch": "0"},
        arguments=arguments,
        method=settings.method,
        effort=settings.effort,
        attack=settings.attack,
        device="cpu",
        dtype="float64",
        threads=1,
        batch_size=2,
        seed=settings.seed,
        started="2030-01-01T00:00:00+00:00",
        model=INFO,
        data=DataInfo("N", samples, "cd" * 32),
        preprocessing={},
        classes=["cat", "dog", "eel"],
        notes=notes,
    )


def sample(index: int, label: int | None = 0, radius: float | None = 0.123456789, **changes: Any) -> Sample:
    values: dict[str, Any] = {
        "index": index,
        "label": label,
        "prediction": 0,
        "correct": None if label is None else label == 0,
        "margin": 1.5,
        "runner_up": 1,
        "rival": 2,
        "gradient_norm": 2.0,
        "curvature_lower": 0.1,
        "curvature_upper": 0.2,
        "lipschitz": 3.0,
        "certified_radius": radius,
        "attack_radius": None if radius is None else 1.0000123,
        "attack_kind": None if radius is None else "certificate",
        "attack_in_range": None if radius is None else False,
        "method": None if radius is None else "curvature",
        "status": "certified" if radius else "not_certified",
        "reason": None if radius else "the two largest logits cannot be told apart",
    }
    return Sample(**(values | changes))


@dataclass
class FakeJob:
    run: Run
    total: int
    labels: list[int | None]
    pause: float
    witnesses: list[Any] = field(default_factory=list)
    search_seconds: float | None = None

    @property
    def indices(self) -> range:
        return range(self.total)

    def model_bounds(self) -> dict[str, float]:
        return {"largest_lipschitz": 3.0, "largest_curvature": 0.5}

    def samples(self, first: int = 0) -> Iterator[Sample]:
        for index in range(first, self.total):
            time.sleep(self.pause)
            self.witnesses.append(SimpleNamespace(index=index, x=np.full((2, 3), 0.5), d=np.full((2, 3), 0.1)))
            yield sample(index, self.labels[index])


def load_model(path: str, *, activation: str | None = None, **rest: Any) -> Any:
    if path == "two.onnx":
        return SimpleNamespace(info=INFO, notes=("a trailing softmax was dropped",))
    if path == "bug.onnx":
        raise ZeroDivisionError("a bug\nin two lines")
    raise ModelError(f"{path}: no such file")


def load_data(source: str, *, samples: str | None = None, notify: Any = None, **rest: Any) -> Any:
    """ "N" samples of class 0; "wrong:N" all of class 1; "unlabelled:N"; "slow:N" takes a second a sample."""
    kind, _, count = source.rpartition(":")
    if not count.isdecimal():
        raise DataError(f"{source}: no such data")
    label = {"wrong": 1, "unlabelled": None}.get(kind, 0)
    labels = [label] * int(count)
    return SimpleNamespace(x=np.zeros((int(count), 2, 3)), labels=labels, pause=float(kind == "slow"), notes=())


def prepare(
    model: Any, data: Any, settings: Any, arguments: dict[str, Any], largest_batch: int | None = None
) -> FakeJob:
    if settings.method == "curvature" and settings.effort == "max":
        raise MethodError("--method curvature does not apply: node relu has no curvature")
    return FakeJob(run(arguments, settings, len(data.x), list(model.notes)), len(data.x), data.labels, data.pause)


def modules() -> dict[str, ModuleType]:
    """The replaced modules by name."""
    made = {
        "certify_cli.run.engine": {"prepare": prepare},
    }
    result = {}
    for name, members in made.items():
        result[name] = ModuleType(name)
        vars(result[name]).update(members)
    return result


def install() -> None:
    """For a process of its own; tests in this process use the fixture `fake`."""
    import certify_cli

    sys.modules.update(modules())
    vars(certify_cli).update(load_model=load_model, load_data=load_data)
