"""What the formats of test tools report: cases that pass, fail, break, or stay open.

Of a run: every sample, at every radius asked for with `--eps`. Of a policy: every requirement.
"""

from __future__ import annotations

from dataclasses import dataclass

from certify_cli.audit.judge import Finding, Verdict
from certify_cli.audit.policy import POLICY
from certify_cli.output.console import class_name
from certify_cli.output.numbers import DOWN, UP, number
from certify_cli.records import ERROR, Result, Run, Sample, attacked_at, certified_at, parse_eps

PASS, FAIL, BROKEN, OPEN = "pass", "fail", "error", "open"
MOST_SAMPLES = 10
"""Samples named in one message."""


@dataclass(frozen=True)
class Case:
    """`rule` is what is asked, `name` the case of it; `message` one sentence, "" where there is nothing to say."""

    rule: str
    name: str
    outcome: str
    message: str


@dataclass(frozen=True)
class Cases:
    """About one model; `title` says on what. `rules`: what each asks, by name."""

    model: str
    title: str
    rules: dict[str, str]
    cases: tuple[Case, ...]


def of_result(result: Result) -> Cases:
    """Every sample of a run, at every radius asked for; without one, whether it has a radius at all."""
    levels = tuple(result.summary.certified_accuracy or result.summary.certified_share or ())
    rules = {
        f"certified at {eps}": f"The prediction is right, and no perturbation up to {eps} changes it." for eps in levels
    }
    return Cases(
        model=result.run.model.path,
        title=f"{result.run.data.name}, {result.summary.samples} samples",
        rules=rules or {"certified": "The prediction is right, and has a certified radius."},
        cases=tuple(
            Case(rule, f"sample {sample.index}", *_judged(sample, level, result.run))
            for rule, level in zip(rules or ["certified"], [parse_eps(eps) for eps in levels] or [0.0], strict=True)
            for sample in result.samples
        ),
    )


def _judged(sample: Sample, level: float, run: Run) -> tuple[str, str]:
    if sample.status == ERROR:
        return BROKEN, f"sample {sample.index}: {sample.reason}"
    if sample.correct is False:
        said, label = class_name(sample.prediction, run), class_name(sample.label, run)
        return FAIL, f"sample {sample.index} is classified as {said}, its label is {label}"
    if certified_at(sample, level):
        return PASS, ""
    if attacked_at(sample, level):
        return FAIL, f"sample {sample.index}: an adversarial example is known at {number(sample.attack_radius, UP)}"
    found = sample.reason or f"the certified radius is {number(sample.certified_radius, DOWN)}"
    return OPEN, f"sample {sample.index} is neither certified nor attacked at {level:g}: {found}"


def of_verdict(verdict: Verdict, run: Run) -> Cases:
    """Every requirement of a policy."""
    outcomes = {True: PASS, False: FAIL, None: OPEN}
    return Cases(
        model=run.model.path,
        title=f"policy on {run.data.name}, {verdict.total} samples",
        rules={rule(finding): asks(finding) for finding in verdict.findings},
        cases=tuple(Case(rule(f), f.requirement.title, outcomes[f.met], says(f)) for f in verdict.findings),
    )


def rule(finding: Finding) -> str:
    """What the requirement is called: one figure may be asked for by the policy and by its baseline."""
    asked = finding.requirement
    return asked.title if asked.because == POLICY else f"{asked.title} against the baseline"


def asks(finding: Finding) -> str:
    return f"The {finding.requirement.title} is asked to be {asked(finding)}."


def says(finding: Finding) -> str:
    """What was asked, what was found, and the samples that decide it."""
    text = f"{finding.requirement.title} is {found(finding)}, asked is {asked(finding)}"
    if finding.met is False and finding.samples:
        shown = ", ".join(str(sample.index) for sample in finding.samples[:MOST_SAMPLES])
        more = len(finding.samples) - MOST_SAMPLES
        text += f"; it is decided by samples {shown}" + (f" and {more} more" if more > 0 else "")
    return text


def asked(finding: Finding) -> str:
    return f"at {'least' if finding.requirement.figure.at_least else 'most'} {finding.requirement.threshold:.6g}"


def found(finding: Finding) -> str:
    """One number, or between which two it will end."""
    figure = finding.requirement.figure

    def text(value: float, way: str) -> str:
        return f"{value:.6g}" if figure.share else number(value, UP if figure.of_model else way)

    if finding.lower == finding.upper:
        return text(finding.lower, DOWN)
    if finding.upper == float("inf"):
        return f"{text(finding.lower, DOWN)} or more"
    return f"{text(finding.lower, DOWN)} to {text(finding.upper, UP)}"
