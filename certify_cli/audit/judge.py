"""A verdict on a policy, from the samples so far: as soon as it is certain the rest need not be certified."""

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
    """What became of a requirement after the samples `done`: the figure's least and largest possible value. `met` is
    None while it is open."""

    requirement: Requirement
    least: float
    largest: float
    done: tuple[Sample, ...]

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        """Those that count against the figure, those that nearly do not first: sorted only where they are asked for."""
        order, level = self.requirement.figure.against, self.requirement.level
        ranked = [(rank, sample.index, sample) for sample in self.done if (rank := order(sample, level)) is not None]
        return tuple(sample for _, _, sample in sorted(ranked, key=lambda item: item[:2]))

    @property
    def met(self) -> bool | None:
        ends = self.requirement.holds(self.least), self.requirement.holds(self.largest)
        return ends[0] if ends[0] == ends[1] else None

    def to_dict(self) -> dict[str, Any]:
        asked = self.requirement
        return {
            "figure": asked.key,
            "eps": asked.eps,
            "asked": asked.asked,
            "at": "least" if asked.figure.least else "most",
            "because": asked.because,
            "found": _finite(self.least) if self.least == self.largest else None,
            "found_at_least": _finite(self.least),
            "found_at_most": _finite(self.largest),
            "met": self.met,
            "samples": [sample.index for sample in self.samples],
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Verdict:
    """On all requirements, after `done` of `total` samples."""

    findings: tuple[Finding, ...]
    done: int
    total: int

    @property
    def met(self) -> bool:
        """Whether all are met for certain."""
        return all(finding.met for finding in self.findings)

    @property
    def certain(self) -> bool:
        """Whether the samples that are missing can change nothing."""
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
    """On the first of `total` samples. model: the bounds of the model that are asked for, by key."""
    findings, done = [], tuple(samples)
    for asked in requirements:
        figure = asked.figure
        span = (model[asked.key],) * 2 if figure.of_model else figure.span(samples, total, asked.level)
        findings.append(Finding(asked, *span, done))
    return Verdict(tuple(findings), len(samples), total)
