"""A stand-in for loading and certifying, so that the command line's own duties are tested fast and alone.

`install()` puts it in place of the real modules: the model "two.onnx" has three classes, the data "N" (a number) holds
N samples, and certifying takes no time. The tests in `test_road.py` walk the real road.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from certify_cli.errors import DataError, MethodError, ModelError
from certify_cli.records import Record, Run, sealed, summarise
from tests.records import INFO, run, sample


@dataclass
class FakeJob:
    run: Run
    total: int
    labels: list[int | None]
    pause: float
    eps: tuple[str, ...]
    stopped: str | None = None

    @property
    def indices(self) -> range:
        return range(self.total)

    def model_figures(self) -> dict[str, float]:
        return {"largest_lipschitz": 3.0, "largest_curvature": 0.5}

    def samples(
        self, first: int = 0, halted: Callable[[], str | None] = lambda: None, tell: Any = lambda text: None
    ) -> Iterator[Any]:
        for index in range(first, self.total):
            self.stopped = halted()
            if self.stopped is not None:
                return
            tell("linear, ball 4")
            time.sleep(self.pause)
            witness = SimpleNamespace(index=index, x=np.full((2, 3), 0.5), d=np.full((2, 3), 0.1))
            yield SimpleNamespace(record=sample(index, self.labels[index]), witness=witness, tangent=None)

    def records(
        self,
        past: Any = None,
        watch: Any = lambda sample: None,
        halted: Callable[[], str | None] = lambda: None,
        tell: Any = lambda text: None,
    ) -> Iterator[Record]:
        done = [] if past is None else list(past.samples[: past.whole])
        if past is None:
            yield self.run
        for found in self.samples(len(done), halted, tell):
            done.append(found.record)
            yield found.record
            watch(found)
        yield sealed(self.run, done, summarise(done, self.eps, 0.0, stopped=self.stopped))


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
    return FakeJob(
        run(arguments, settings, len(data.x), list(model.notes)), len(data.x), data.labels, data.pause, settings.eps
    )


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
