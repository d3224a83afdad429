"""The table of figures that a policy can bound, and their values after part of the samples.

After part of the samples a figure has a lower and an upper bound, whatever the others turn out to be. Where both are on
one side of a policy's threshold the verdict is certain; after all samples they are equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from certify_cli.records import Sample, Summary, attacked_at, certified_at, counted_radius, counts, withstands

Bounds = tuple[float, float]
BoundsOf = Callable[[Sequence[Sample], int, float], Bounds]
"""(samples so far, number of all samples, radius or 0) -> lower and upper bound of the figure over all samples."""
Rank = Callable[[Sample, float], float | None]
"""(sample, radius) -> None for a sample that does not count against the figure; lower ranks decide it first."""


@dataclass(frozen=True)
class Figure:
    """One row of the table.

    at_least: a policy's threshold is a lower bound of it, else an upper bound.   by_radius: one value a radius.
    radius: a radius itself; it falls by a part of its value, others by points.   labelled: needs labels.
    of_model: a bound of the model, known before any sample.
    """

    title: str
    bounds: BoundsOf
    rank: Rank
    at_least: bool = True
    by_radius: bool = False
    radius: bool = False
    labelled: bool = False
    of_model: bool = False

    def at(self, eps: str | None) -> str:
        """Its title, with the radius (as typed) that it is taken at, if any."""
        return self.title + ("" if eps is None else f" at {eps}")

    @property
    def share(self) -> bool:
        """Whether it is a share of the samples, from 0 to 1."""
        return not self.radius and not self.of_model


def unknown(sample: Sample, level: float) -> bool:
    """Neither certified at the radius nor attacked within it, nor misclassified."""
    return counts(sample) and not certified_at(sample, level) and not attacked_at(sample, level)


def _share(holds: Callable[[Sample, float], bool]) -> BoundsOf:
    def bounds(samples: Sequence[Sample], total: int, level: float) -> Bounds:
        found = sum(holds(sample, level) for sample in samples)
        return found / total, (found + total - len(samples)) / total

    return bounds


def _mean(samples: Sequence[Sample], total: int, level: float) -> Bounds:
    found = math.fsum(map(counted_radius, samples)) / total
    return found, found if len(samples) == total else math.inf


def _median(samples: Sequence[Sample], total: int, level: float) -> Bounds:
    radii, missing = [counted_radius(sample) for sample in samples], total - len(samples)
    return median([*radii, *[0.0] * missing]), median([*radii, *[math.inf] * missing])


def _mean_correct(samples: Sequence[Sample], total: int, level: float) -> Bounds:
    radii, missing = [counted_radius(sample) for sample in samples if sample.correct], total - len(samples)
    found = math.fsum(radii) / max(1, len(radii) + missing)
    return found, math.inf if missing else found


def _not_of_samples(samples: Sequence[Sample], total: int, level: float) -> Bounds:
    raise ValueError("a bound of the model is no figure of samples")


def _misclassified(sample: Sample, level: float) -> float | None:
    return None if counts(sample) else 0.0


def _uncertified(sample: Sample, level: float) -> float | None:
    """Samples nearest to the radius first, misclassified ones last."""
    if certified_at(sample, level):
        return None
    return level - counted_radius(sample) if counts(sample) else math.inf


def _broken(sample: Sample, level: float) -> float | None:
    if not counts(sample):
        return math.inf
    return level - (sample.attack_radius or 0.0) if attacked_at(sample, level) else None


def _undecided(sample: Sample, level: float) -> float | None:
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
        "share neither certified nor attacked",
        _share(unknown),
        _undecided,
        at_least=False,
        by_radius=True,
        labelled=True,
    ),
    "mean_certified_radius": Figure("mean certified radius", _mean, _smallest, radius=True),
    "median_certified_radius": Figure("median certified radius", _median, _smallest, radius=True),
    "mean_certified_radius_correct": Figure(
        "mean certified radius, correct samples", _mean_correct, _smallest_correct, radius=True, labelled=True
    ),
    "largest_lipschitz": Figure("Lipschitz bound of the model", _not_of_samples, _none, at_least=False, of_model=True),
    "largest_curvature": Figure("curvature bound of the model", _not_of_samples, _none, at_least=False, of_model=True),
}
"""Figure by its key in a policy."""


def values_of(summary: Summary) -> dict[tuple[str, str | None], float]:
    """The value of every figure in a summary, by key and radius (as typed, or None)."""
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
