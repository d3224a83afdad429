"""The options of a run, declared once for `certify` and `check`, and the model and data that they name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any, get_type_hints

from certify_cli.cli import options as opt
from certify_cli.cli.reporter import Reporter
from certify_cli.names import AUTO
from certify_cli.run.settings import Settings

if TYPE_CHECKING:
    from certify_cli.data.datasets import Dataset
    from certify_cli.load.loaded_model import LoadedModel


@dataclass(frozen=True)
class RunOptions:
    """The options as typed, or their defaults."""

    model: opt.ModelFile
    data: opt.DataSource
    data_root: opt.DataRoot = None
    split: opt.Split = "test"
    samples: opt.Samples = None
    shuffle: opt.Shuffle = False
    seed: opt.Seed = 0
    data_layout: opt.DataLayout = "nchw"
    resize: opt.Resize = None
    offline: opt.Offline = False
    mean: opt.Mean = None
    std: opt.Std = None
    layout: opt.Layout = None
    activation: opt.ActivationName = None
    output: opt.ModelOutput = None
    method: opt.Method = AUTO
    effort: opt.Effort = "normal"
    attack: opt.Attack = "certificate"
    eps: opt.Eps = None
    device: opt.Device = "auto"
    batch_size: opt.BatchSize = "auto"
    threads: opt.Threads = "auto"
    memory: opt.Memory = "auto"
    seconds: opt.Seconds = None
    total_seconds: opt.TotalSeconds = None

    def settings(self) -> Settings:
        """The options as checked settings. Raises UsageError, naming the option."""
        opt.one_of("--split", self.split, opt.SPLITS)
        opt.one_of("--data-layout", self.data_layout, opt.DATA_LAYOUTS)
        return Settings(
            method=self.method,
            effort=self.effort,
            attack=self.attack,
            eps=tuple(self.eps or ()),
            device=self.device,
            batch_size=opt.count_or_auto("--batch-size", self.batch_size),
            threads=opt.count_or_auto("--threads", self.threads),
            memory=opt.memory_size("--memory", self.memory),
            seed=self.seed,
            mean=opt.numbers("--mean", self.mean),
            std=opt.numbers("--std", self.std),
            layout=self.layout,
            seconds=self.seconds,
            total_seconds=self.total_seconds,
        )

    def load(self, settings: Settings, reporter: Reporter) -> tuple[LoadedModel, Dataset]:
        """The model and the data; raises ModelError, DataError, UsageError."""
        from certify_cli import load_model
        from certify_cli.data.datasets import named_shape

        opt.one_of("--method", self.method, opt.METHODS)

        @cache
        def chosen() -> Dataset:
            """The data, loaded once: before the model is lowered where its input sizes are the data's, else after."""
            return self._data(reporter)

        shape = named_shape(self.data)
        loaded = load_model(
            self.model,
            activation=self.activation,
            output=self.output,
            input_shape=shape or (lambda: tuple(chosen().x.shape[1:])),
            layout=self.layout,
        )
        reporter.notes(loaded.notes)
        if shape is not None:
            from certify_cli.load.preprocessing import fit

            # a set that does not fit is refused before it is downloaded
            fit(loaded.network, shape, mean=settings.mean or None, std=settings.std or None, layout=self.layout)
        return loaded, chosen()

    def _data(self, reporter: Reporter) -> Dataset:
        from certify_cli import load_data

        chosen = load_data(
            self.data,
            root=self.data_root,
            split=self.split,
            samples=self.samples,
            shuffle=self.shuffle,
            seed=self.seed,
            data_layout=self.data_layout,
            resize=self.resize,
            offline=self.offline,
            notify=None if reporter.quiet else reporter.note,
        )
        reporter.notes(chosen.notes)
        return chosen

    def arguments(self) -> dict[str, Any]:
        """The options by name, for the run line."""
        return {item.name: getattr(self, item.name) for item in sorted(fields(self), key=lambda f: f.name)}


SETTABLE = frozenset(item.name for item in fields(RunOptions)) - {"model"}
"""Parameters that a settings file and CURVCERT_* variables may set."""


def spread(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with the fields of RunOptions as parameters in place of `run`: Typer reads a signature."""
    own, hints = inspect.signature(command).parameters, get_type_hints(command, include_extras=True)
    run_hints = get_type_hints(RunOptions, include_extras=True)
    parameters = []
    for name, parameter in own.items():
        if hints[name] is RunOptions:
            for item in fields(RunOptions):
                default = inspect.Parameter.empty if item.default is MISSING else item.default
                parameters.append(parameter.replace(name=item.name, default=default, annotation=run_hints[item.name]))
        else:
            parameters.append(parameter.replace(annotation=hints[name]))

    def spread_out(**given: Any) -> Any:
        return command(run=RunOptions(**{item.name: given.pop(item.name) for item in fields(RunOptions)}), **given)

    spread_out.__name__, spread_out.__doc__ = command.__name__, command.__doc__
    spread_out.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread_out.__annotations__ = {p.name: p.annotation for p in parameters}
    return spread_out
