"""The verdict on a policy after part of the samples: once it is certain the others need not be certified."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from certify_cli.audit.policy import Requirement
from certify_cli.records import Sample


@dataclass(frozen=True)
class Finding:
    """A requirement after the samples `done`, with a lower and an upper bound of its figure over all samples."""

    requirement: Requirement
    lower: float
    upper: float
    done: tuple[Sample, ...]

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        """The samples that count against the figure, the nearest to not doing so first."""
        rank_of, level = self.requirement.figure.rank, self.requirement.level
        ranked = [(rank, sample.index, sample) for sample in self.done if (rank := rank_of(sample, level)) is not None]
        return tuple(sample for _, _, sample in sorted(ranked, key=lambda item: item[:2]))

    @property
    def met(self) -> bool | None:
        """Whether the requirement holds; None as long as that depends on the other samples."""
        ends = self.requirement.holds(self.lower), self.requirement.holds(self.upper)
        return ends[0] if ends[0] == ends[1] else None

    def to_dict(self) -> dict[str, Any]:
        requirement = self.requirement
        return {
            "figure": requirement.key,
            "eps": requirement.eps,
            "asked": requirement.threshold,
            "at": "least" if requirement.figure.at_least else "most",
            "because": requirement.because,
            "found": _finite(self.lower) if self.lower == self.upper else None,
            "found_at_least": _finite(self.lower),
            "found_at_most": _finite(self.upper),
            "met": self.met,
            "samples": [sample.index for sample in self.samples],
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Verdict:
    """The verdict on all requirements after `done` of `total` samples."""

    findings: tuple[Finding, ...]
    done: int
    total: int

    @property
    def met(self) -> bool:
        """Whether all are met for certain."""
        return all(finding.met for finding in self.findings)

    @property
    def certain(self) -> bool:
        """Whether the other samples cannot change the verdict."""
        known = [finding.met for finding in self.findings]
        return False in known or None not in known

    @property
    def failed(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.met is False)

    def to_dict(self) -> dict[str, Any]:
        return {
            "met": self.met,
            "samples": self.total,
            "certified_samples": self.done,
            "requirements": [finding.to_dict() for finding in self.findings],
        }


def judge(
    requirements: Sequence[Requirement], samples: Sequence[Sample], total: int, model: Mapping[str, float]
) -> Verdict:
    """The verdict after `samples`, the first of `total`. model: by key, the bounds of the model in the requirements."""
    findings, done = [], tuple(samples)
    for requirement in requirements:
        figure = requirement.figure
        bounds = (model[requirement.key],) * 2 if figure.of_model else figure.bounds(samples, total, requirement.level)
        findings.append(Finding(requirement, *bounds, done))
    return Verdict(tuple(findings), len(samples), total)
