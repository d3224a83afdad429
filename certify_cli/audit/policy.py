"""Policies: thresholds that a model must reach, read from the table `[policy]` of a settings file.

[policy]
accuracy = 0.97
certified_accuracy = { "0.5" = 0.6, "36/255" = 0.8 }
mean_certified_radius = 0.3
largest_unknown = { "0.5" = 0.1 }
baseline = "baseline.json"
fall = 0.01                                  # of every figure against the baseline
# fall = { accuracy = 0.002, mean_certified_radius = 0.05 }
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from certify_cli.audit.figures import FIGURES, Figure, values_of
from certify_cli.errors import UsageError, quoted, shown
from certify_cli.records import Result, parse_eps

FALL = 0.01
"""How far figures may fall against a baseline by default: shares by points, radii by a part of their value."""
POLICY = "policy"
BASELINE_KEYS = ("baseline", "fall")
ROUNDING = 1e-12
"""Slack of a threshold that is computed from a baseline."""


@dataclass(frozen=True)
class Requirement:
    """A threshold that one figure must reach.

    eps: the radius, as typed, of a figure that has one value a radius.   because: where the threshold comes from.
    """

    key: str
    threshold: float
    eps: str | None = None
    because: str = POLICY

    @property
    def figure(self) -> Figure:
        return FIGURES[self.key]

    @property
    def level(self) -> float:
        return 0.0 if self.eps is None else parse_eps(self.eps)

    @property
    def title(self) -> str:
        return self.figure.at(self.eps)

    def holds(self, value: float) -> bool:
        return value >= self.threshold if self.figure.at_least else value <= self.threshold


@dataclass(frozen=True)
class Policy:
    """The requirements of a policy.

    baseline: path of the records to compare with.   fall: by the figure's key ("" for all others), how far it may fall.
    """

    requirements: tuple[Requirement, ...]
    baseline: str | None = None
    fall: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, table: Mapping[str, Any], where: str) -> Policy:
        """From the table `[policy]` of the file `where`. Raises UsageError, naming the key."""
        requirements: list[Requirement] = []
        for key, value in table.items():
            name = key.replace("-", "_")
            if name in FIGURES:
                requirements += _requirements(name, value, f"{where}: policy.{shown(key)}")
            elif name not in BASELINE_KEYS:
                known = ", ".join((*FIGURES, *BASELINE_KEYS))
                raise UsageError(f"{where}: policy.{shown(key)} is not known; a policy has {known}")
        baseline = table.get("baseline")
        if baseline is not None and not isinstance(baseline, str):
            raise UsageError(f"{where}: policy.baseline {quoted(baseline)} is not the name of a file of records")
        fall = _falls(table.get("fall"), f"{where}: policy.fall")
        if fall and baseline is None:
            raise UsageError(f"{where}: policy.fall says how far figures may fall against policy.baseline; name one")
        if not requirements and baseline is None:
            raise UsageError(f"{where}: the policy asks for nothing; it may ask for {', '.join(FIGURES)} or a baseline")
        return cls(tuple(requirements), baseline, fall)

    def against(self, old: Result) -> tuple[Requirement, ...]:
        """The requirements that follow from the baseline `old`: no figure falls further than the policy allows."""
        found = []
        for (key, eps), value in values_of(old.summary).items():
            fall = self.fall.get(key, self.fall.get("", FALL))
            threshold = value * (1 - fall) if FIGURES[key].radius else value - fall
            found.append(Requirement(key, max(0.0, threshold - ROUNDING), eps, f"{self.baseline}: {value:.4g}"))
        return tuple(found)


def _requirements(key: str, value: Any, where: str) -> list[Requirement]:
    if not FIGURES[key].by_radius:
        return [Requirement(key, _threshold(key, value, where))]
    if not isinstance(value, Mapping) or not value:
        raise UsageError(f'{where} is asked at radii: {{ "0.5" = 0.6 }} asks for 0.6 at 0.5')
    found = []
    for eps, threshold in value.items():
        if isinstance(threshold, Mapping):
            raise UsageError(f'{where}: put quotes around the radius, as in {{ "0.5" = 0.6 }}')
        try:
            parse_eps(eps)
        except UsageError:
            raise UsageError(f"{where}.{shown(eps)} is not a radius such as 0.5 or 36/255") from None
        found.append(Requirement(key, _threshold(key, threshold, f"{where}.{shown(eps)}"), eps))
    return found


def _threshold(key: str, value: Any, where: str) -> float:
    number = _number(value, where)
    if FIGURES[key].share and number > 1:
        raise UsageError(f"{where} = {quoted(value)} is a share of the samples, from 0 to 1: 95 percent is 0.95")
    return number


def _falls(value: Any, where: str) -> dict[str, float]:
    """How far figures may fall, by key; "" stands for all that have none of their own."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        return {"": _part(value, where)}
    guarded = [key for key, figure in FIGURES.items() if figure.at_least and not figure.of_model]
    found = {}
    for key, number in value.items():
        name = key.replace("-", "_")
        if name not in guarded:
            raise UsageError(f"{where}.{shown(key)} is no figure of a baseline; choose from {', '.join(guarded)}")
        found[name] = _part(number, f"{where}.{shown(key)}")
    return found


def _part(value: Any, where: str) -> float:
    number = _number(value, where)
    if number >= 1:
        raise UsageError(f"{where} = {quoted(value)} would let everything fall: one percent is 0.01")
    return number


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e300:  # no NaN either
        raise UsageError(f"{where} = {quoted(value)} is not a number of at least 0")
    return float(value)
