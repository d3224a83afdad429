"""The comparison of two runs on the same samples: every figure and every sample's radius before and after.

A figure regresses where it falls by more than the tolerance: shares and accuracies in points (0.01 is one percent of
the samples), radii by that part of the old value.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from certify_cli.audit.figures import FIGURES, values_of
from certify_cli.errors import RecordsError
from certify_cli.records import Result, Run, certified_at, parse_eps, summarise


@dataclass(frozen=True)
class FigureChange:
    """A figure of the summary before and after; None where a run has none. regressed: it fell beyond the tolerance."""

    name: str
    old: float | None
    new: float | None
    regressed: bool

    @property
    def change(self) -> float | None:
        return None if self.old is None or self.new is None else self.new - self.old


@dataclass(frozen=True)
class SampleChange:
    """A sample whose prediction or certified radius changed; where it has no radius, that is 0.

    lost, gained: the radii of --eps, as typed, at which it is no longer certified, or newly is.
    """

    index: int
    label: int | None
    old_prediction: int | None
    new_prediction: int | None
    old_radius: float
    new_radius: float
    lost: tuple[str, ...]
    gained: tuple[str, ...]

    @property
    def change(self) -> float:
        return self.new_radius - self.old_radius


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side.

    old, new: the models' names.   count: of all samples.   samples: those that changed, the largest fall first.
    """

    old: str
    new: str
    tolerance: float
    count: int
    figures: tuple[FigureChange, ...]
    samples: tuple[SampleChange, ...]

    @property
    def regressions(self) -> tuple[FigureChange, ...]:
        return tuple(figure for figure in self.figures if figure.regressed)

    @property
    def fallen(self) -> tuple[SampleChange, ...]:
        """Samples whose radius fell by more than the part `tolerance` of it."""
        return tuple(s for s in self.samples if s.new_radius < s.old_radius * (1 - self.tolerance))

    @property
    def risen(self) -> tuple[SampleChange, ...]:
        """Samples whose radius rose by more than the part `tolerance` of the new one."""
        return tuple(s for s in self.samples if s.new_radius * (1 - self.tolerance) > s.old_radius)

    @property
    def relabelled(self) -> tuple[SampleChange, ...]:
        """Samples whose prediction changed."""
        return tuple(s for s in self.samples if s.new_prediction != s.old_prediction)

    def to_dict(self) -> dict[str, Any]:
        return {
            "old": self.old,
            "new": self.new,
            "tolerance": self.tolerance,
            "samples": self.count,
            "regressed": bool(self.regressions),
            "figures": [asdict(figure) | {"change": figure.change} for figure in self.figures],
            "lower": len(self.fallen),
            "higher": len(self.risen),
            "predictions_changed": len(self.relabelled),
            "changed": [asdict(sample) | {"change": sample.change} for sample in self.samples],
        }


def compare(old: Result, new: Result, tolerance: float) -> Comparison:
    """Both runs side by side. Raises RecordsError where they are not about the same samples."""
    same_samples(old.run, new.run)
    if [sample.index for sample in old.samples] != [sample.index for sample in new.samples]:
        raise RecordsError("the two runs are about the same data, but do not have the same samples in the same order")
    names = [result.run.model.path for result in (old, new)]
    if names[0] == names[1]:  # another state of the same file
        names = [f"{result.run.model.path} ({result.run.model.sha256[:8]})" for result in (old, new)]
    return Comparison(
        old=names[0],
        new=names[1],
        tolerance=tolerance,
        count=len(old.samples),
        figures=_figures(old, new, tolerance),
        samples=_samples(old, new),
    )


def of_the_same_samples(old: Result, new: Result) -> tuple[Result, Result]:
    """Both runs up to the end of the shorter one, where one of them was ended early."""
    if old.summary.stopped is None and new.summary.stopped is None:
        return old, new
    count = min(len(old.samples), len(new.samples))
    return _first(old, count), _first(new, count)


def _first(result: Result, count: int) -> Result:
    """The first samples of a run, and the figures of these."""
    summary, samples = result.summary, result.samples[:count]
    levels = tuple(summary.certified_accuracy or summary.certified_share or ())
    return Result(
        result.run, samples, summarise(samples, levels, summary.seconds, summary.search_seconds, summary.stopped)
    )


def same_samples(old: Run, new: Run) -> None:
    """Raises RecordsError where two runs are not about the same samples."""
    if old.data.sha256 != new.data.sha256:
        first, second = (f"{r.data.name}: {r.data.samples}, sha256 {r.data.sha256[:12]}" for r in (old, new))
        raise RecordsError(
            f"the two runs are not about the same samples ({first}, and {second}); certify both models on the same "
            "data and --samples"
        )


def unlike(old: Run, new: Run) -> list[str]:
    """Settings that differ between two runs, a clause each: a change of figures need not be the model's then."""
    pairs = [(f"--{name}", getattr(old, name), getattr(new, name)) for name in ("method", "effort", "attack")]
    pairs += [(f"--{name}", old.preprocessing.get(name), new.preprocessing.get(name)) for name in ("mean", "std")]
    return [f"{name} {before} there, {after} here" for name, before, after in pairs if before != after]


def _figures(old: Result, new: Result, tolerance: float) -> tuple[FigureChange, ...]:
    before, after = (values_of(result.summary) for result in (old, new))
    found = []
    for key, row in FIGURES.items():
        for eps in dict.fromkeys(e for k, e in (*before, *after) if k == key):
            a, b = before.get((key, eps)), after.get((key, eps))
            allowed = tolerance * (a or 0.0) if row.radius else tolerance
            found.append(FigureChange(row.at(eps), a, b, _fell(a, b, allowed)))
    return tuple(found)


def _fell(old: float | None, new: float | None, tolerance: float) -> bool:
    """Whether a figure fell by more than the tolerance and the rounding of a subtraction, or is missing now."""
    return old is not None and (new is None or old - new > tolerance + 1e-12)


def _samples(old: Result, new: Result) -> tuple[SampleChange, ...]:
    levels = {eps: parse_eps(eps) for eps in (old.summary.certified_accuracy or old.summary.certified_share or {})}
    found = []
    for a, b in zip(old.samples, new.samples, strict=True):
        if (a.prediction, a.certified_radius) == (b.prediction, b.certified_radius):
            continue
        was, now = ({eps for eps, level in levels.items() if certified_at(s, level)} for s in (a, b))
        found.append(
            SampleChange(
                index=a.index,
                label=a.label,
                old_prediction=a.prediction,
                new_prediction=b.prediction,
                old_radius=a.certified_radius or 0.0,
                new_radius=b.certified_radius or 0.0,
                lost=tuple(eps for eps in levels if eps in was - now),
                gained=tuple(eps for eps in levels if eps in now - was),
            )
        )
    return tuple(sorted(found, key=lambda s: s.change))
