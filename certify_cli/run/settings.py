"""The options of a run: plain data, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from certify_cli.efforts import EFFORTS
from certify_cli.errors import UsageError, quoted
from certify_cli.records import parse_eps

ATTACKS = ("certificate", "search", "none")
LAYOUTS = ("nchw", "nhwc", "flat")


@dataclass(frozen=True)
class Settings:
    """Options of a run.

    None and "auto" leave the choice to the engine.   eps: radii as typed.   memory: bytes.
    seconds: that each sample may take (a batch takes those of its samples together).   total_seconds: of the run.
    Raises UsageError, naming the option, for a value that cannot be used.
    """

    method: str = "auto"
    effort: str = "normal"
    attack: str = "certificate"
    eps: tuple[str, ...] = ()
    device: str = "auto"
    batch_size: int | None = None
    threads: int | None = None
    memory: int | None = None
    seed: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    layout: str | None = None
    seconds: float | None = None
    total_seconds: float | None = None

    def __post_init__(self) -> None:
        _among("--effort", self.effort, tuple(EFFORTS))
        _among("--attack", self.attack, ATTACKS)
        if self.layout is not None:
            _among("--layout", self.layout, LAYOUTS)
        for option, value in (
            ("--batch-size", self.batch_size),
            ("--threads", self.threads),
            ("--memory", self.memory),
        ):
            if value is not None and value < 1:
                raise UsageError(f"{option} {value} must be at least 1")
        for option, time in (("--seconds", self.seconds), ("--total-seconds", self.total_seconds)):
            if time is not None and not 0 < time < math.inf:
                raise UsageError(f"{option} {time} must be a positive number of seconds")
        for text in self.eps:
            parse_eps(text)

    @property
    def levels(self) -> tuple[float, ...]:
        """The radii `eps` as numbers."""
        return tuple(parse_eps(text) for text in self.eps)


def _among(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{option} {quoted(value)} is not one of {', '.join(choices)}")
