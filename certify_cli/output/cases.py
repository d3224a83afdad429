"""Runs and verdicts as test cases, for the formats of test tools (JUnit, SARIF, GitHub annotations).

A case of a run is a sample at one radius of `--eps`; a case of a policy is a requirement. It passes, fails, has an
error or stays open.
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
"""Samples named in one message at most."""


@dataclass(frozen=True)
class Case:
    """One case of a test report.

    rule: name of the rule it is judged by.   outcome: PASS, FAIL, BROKEN or OPEN.
    message: one sentence, empty where it passes.
    """

    rule: str
    name: str
    outcome: str
    message: str


@dataclass(frozen=True)
class Cases:
    """The cases of one model. title: the data they are on.   rules: by name, a sentence on what each demands."""

    model: str
    title: str
    rules: dict[str, str]
    cases: tuple[Case, ...]


def of_result(result: Result) -> Cases:
    """The samples of a run at every radius of `--eps`; without one, whether each has a certified radius at all."""
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
    """The requirements of a policy."""
    outcomes = {True: PASS, False: FAIL, None: OPEN}
    return Cases(
        model=run.model.path,
        title=f"policy on {run.data.name}, {verdict.total} samples",
        rules={rule(finding): demand(finding) for finding in verdict.findings},
        cases=tuple(Case(rule(f), f.requirement.title, outcomes[f.met], account(f)) for f in verdict.findings),
    )


def rule(finding: Finding) -> str:
    """The name of a requirement; the policy and its baseline may each have one on the same figure."""
    asked = finding.requirement
    return asked.title if asked.because == POLICY else f"{asked.title} against the baseline"


def demand(finding: Finding) -> str:
    """A sentence on what the requirement asks for."""
    return f"The {finding.requirement.title} is asked to be {threshold_text(finding)}."


def account(finding: Finding) -> str:
    """The figure, its threshold, and the samples that decide it."""
    text = f"{finding.requirement.title} is {value_text(finding)}, asked is {threshold_text(finding)}"
    if finding.met is False and finding.samples:
        shown = ", ".join(str(sample.index) for sample in finding.samples[:MOST_SAMPLES])
        more = len(finding.samples) - MOST_SAMPLES
        text += f"; it is decided by samples {shown}" + (f" and {more} more" if more > 0 else "")
    return text


def threshold_text(finding: Finding) -> str:
    """The threshold, as a phrase."""
    return f"at {'least' if finding.requirement.figure.at_least else 'most'} {finding.requirement.threshold:.6g}"


def value_text(finding: Finding) -> str:
    """The figure: one number, or the two between which it will end."""
    figure = finding.requirement.figure

    def text(value: float, way: str) -> str:
        return f"{value:.6g}" if figure.share else number(value, UP if figure.of_model else way)

    if finding.lower == finding.upper:
        return text(finding.lower, DOWN)
    if finding.upper == float("inf"):
        return f"{text(finding.lower, DOWN)} or more"
    return f"{text(finding.lower, DOWN)} to {text(finding.upper, UP)}"
