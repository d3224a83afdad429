"""The figures that a policy can ask for: what they are of the samples so far, and what they can still become.

A figure of part of the samples lies between two bounds, whatever the rest will be; where both are on one side of what
is asked for the verdict is certain. They agree once every sample is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from certify_cli.records import Sample, Summary, attacked_at, certified_at, counted_radius, counts, withstands

Span = tuple[float, float]
Spans = Callable[[Sequence[Sample], int, float], Span]
"""(samples so far, samples in all, radius asked at or 0) -> the figure's least and largest value at the end."""
Order = Callable[[Sample, float], float | None]
"""(sample, radius) -> None where the sample does not count against the figure; those with the least decide it."""


@dataclass(frozen=True)
class Figure:
    """One row of the table.

    least: asked for at least so much, else at most. by_radius: asked at radii. radius: a radius itself, which falls by
    parts of itself and not by points. labelled: needs labels. of_model: a bound of the model, known before any sample.
    """

    title: str
    span: Spans
    against: Order
    least: bool = True
    by_radius: bool = False
    radius: bool = False
    labelled: bool = False
    of_model: bool = False

    def at(self, eps: str | None) -> str:
        """Its title, at a radius (as typed) where it has one."""
        return self.title + ("" if eps is None else f" at {eps}")

    @property
    def share(self) -> bool:
        """Whether it lies between 0 and 1."""
        return not self.radius and not self.of_model


def unknown(sample: Sample, level: float) -> bool:
    """Neither certified at the radius nor attacked within it, nor misclassified."""
    return counts(sample) and not certified_at(sample, level) and not attacked_at(sample, level)


def _share(has: Callable[[Sample, float], bool]) -> Spans:
    def span(samples: Sequence[Sample], total: int, level: float) -> Span:
        found = sum(has(sample, level) for sample in samples)
        return found / total, (found + total - len(samples)) / total

    return span


def _mean(samples: Sequence[Sample], total: int, level: float) -> Span:
    found = math.fsum(map(counted_radius, samples)) / total
    return found, found if len(samples) == total else math.inf


def _median(samples: Sequence[Sample], total: int, level: float) -> Span:
    radii, missing = [counted_radius(sample) for sample in samples], total - len(samples)
    return median([*radii, *[0.0] * missing]), median([*radii, *[math.inf] * missing])


def _mean_correct(samples: Sequence[Sample], total: int, level: float) -> Span:
    radii, missing = [counted_radius(sample) for sample in samples if sample.correct], total - len(samples)
    found = math.fsum(radii) / max(1, len(radii) + missing)
    return found, math.inf if missing else found


def _nobody(samples: Sequence[Sample], total: int, level: float) -> Span:
    raise ValueError("a bound of the model is no figure of samples")


def _misclassified(sample: Sample, level: float) -> float | None:
    return None if counts(sample) else 0.0


def _uncertified(sample: Sample, level: float) -> float | None:
    """The nearest to the radius first, misclassified ones last."""
    if certified_at(sample, level):
        return None
    return level - counted_radius(sample) if counts(sample) else math.inf


def _broken(sample: Sample, level: float) -> float | None:
    if not counts(sample):
        return math.inf
    return level - (sample.attack_radius or 0.0) if attacked_at(sample, level) else None


def _open(sample: Sample, level: float) -> float | None:
    return level - counted_radius(sample) if unknown(sample, level) else None


def _smallest(sample: Sample, level: float) -> float | None:
    return counted_radius(sample)


def _smallest_correct(sample: Sample, level: float) -> float | None:
    return counted_radius(sample) if sample.correct else None


def _none(sample: Sample, level: float) -> float | None:
    return None


FIGURES: dict[str, Figure] = {
    "accuracy": Figure("accuracy", _share(lambda s, _: bool(s.correct)), _misclassified, labelled=True),
    "certified_accuracy": Figure(
        "certified accuracy", _share(certified_at), _uncertified, by_radius=True, labelled=True
    ),
    "attack_accuracy": Figure(
        "accuracy under attack",
        _share(withstands),
        _broken,
        by_radius=True,
        labelled=True,
    ),
    "largest_unknown": Figure(
        "share neither certified nor attacked", _share(unknown), _open, least=False, by_radius=True, labelled=True
    ),
    "mean_certified_radius": Figure("mean certified radius", _mean, _smallest, radius=True),
    "median_certified_radius": Figure("median certified radius", _median, _smallest, radius=True),
    "mean_certified_radius_correct": Figure(
        "mean certified radius, correct samples", _mean_correct, _smallest_correct, radius=True, labelled=True
    ),
    "largest_lipschitz": Figure("Lipschitz bound of the model", _nobody, _none, least=False, of_model=True),
    "largest_curvature": Figure("curvature bound of the model", _nobody, _none, least=False, of_model=True),
}
"""By key in a policy."""


def reached(summary: Summary) -> dict[tuple[str, str | None], float]:
    """Every figure that a summary has, by key and radius (as typed)."""
    found: dict[tuple[str, str | None], float] = {}
    for key in FIGURES:
        value = getattr(summary, key, None)
        if key == "certified_accuracy" and value is None:
            value = summary.certified_share
        if isinstance(value, dict):
            found |= {(key, eps): number for eps, number in value.items()}
        elif value is not None:
            found[key, None] = value
    return found
