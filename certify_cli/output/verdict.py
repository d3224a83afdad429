"""A verdict on a policy: as a table, JSON, Markdown, and in the formats of test tools."""

from __future__ import annotations

from collections.abc import Callable

from certify_cli.audit.judge import Finding, Verdict
from certify_cli.output import blocks, github, junit, sarif
from certify_cli.output.blocks import Block, Table
from certify_cli.output.cases import MOST_SAMPLES, of_verdict, threshold_text, value_text
from certify_cli.output.console import Column, class_name
from certify_cli.output.document import View
from certify_cli.output.json import pretty
from certify_cli.output.numbers import DOWN, UP, number
from certify_cli.records import SCHEMA, Run, Sample

REQUIREMENTS = (
    Column("figure", wraps=True),
    Column("asked", right=True),
    Column("found", right=True),
    Column("verdict"),
    Column("because", wraps=True),
)
DECIDING = (
    Column("decides", wraps=True),
    *(Column(name, right=True) for name in ("sample", "label", "prediction", "certified radius", "attack radius")),
)

Renderer = Callable[[Verdict, Run, View], str]


def as_table(verdict: Verdict, run: Run, view: View) -> str:
    """The verdict as text with tables."""
    return blocks.as_text(_blocks(verdict, run, view), view)


def as_markdown(verdict: Verdict, run: Run, view: View) -> str:
    """The verdict as Markdown."""
    return blocks.as_markdown("policy met" if verdict.met else "policy not met", _blocks(verdict, run, view))


def as_json(verdict: Verdict, run: Run, view: View) -> str:
    """The verdict as JSON, with the run that it is about."""
    return pretty({"schema": SCHEMA, "run": run.to_dict(), "check": verdict.to_dict()}) + "\n"


RENDERED: dict[str, Renderer] = {
    "table": as_table,
    "json": as_json,
    "markdown": as_markdown,
    "junit": lambda verdict, run, view: junit.of_cases(of_verdict(verdict, run), view),
    "sarif": lambda verdict, run, view: sarif.of_cases(of_verdict(verdict, run), view),
    "github": lambda verdict, run, view: github.of_cases(of_verdict(verdict, run), view),
}


def sentence(verdict: Verdict, run: Run) -> str:
    """One sentence: whether the policy is met, by which model on which data, after how many samples."""
    met = sum(bool(finding.met) for finding in verdict.findings)
    known = "met" if verdict.met else f"not met: {met} of {len(verdict.findings)} requirements hold"
    where = f"{run.model.path} on {run.data.name}"
    if verdict.done < verdict.total:
        return f"{where}: policy {known}, certain after {verdict.done} of {verdict.total} samples (--exact goes on)"
    return f"{where}, {verdict.total} samples: policy {known}"


def _blocks(verdict: Verdict, run: Run, view: View) -> list[Block]:
    rows = [_requirement(finding) for finding in verdict.findings]
    styles = [{True: "green", False: "red", None: None}[finding.met] for finding in verdict.findings]
    deciding = Table(DECIDING, _deciding(verdict, run, view))
    return [sentence(verdict, run), Table(REQUIREMENTS, rows, styles), *([deciding] if deciding.rows else [])]


def _requirement(finding: Finding) -> tuple[str, ...]:
    return (
        finding.requirement.title,
        threshold_text(finding),
        value_text(finding),
        {True: "met", False: "not met", None: "open"}[finding.met],
        finding.requirement.because,
    )


def _deciding(verdict: Verdict, run: Run, view: View) -> list[tuple[str, ...]]:
    rows = []
    for finding in verdict.failed:
        shown = finding.samples if view.all_rows else finding.samples[:MOST_SAMPLES]
        rows += [(finding.requirement.title, *_sample(sample, run)) for sample in shown]
    return rows


def _sample(sample: Sample, run: Run) -> tuple[str, ...]:
    return (
        str(sample.index),
        class_name(sample.label, run),
        class_name(sample.prediction, run),
        number(sample.certified_radius, DOWN),
        number(sample.attack_radius, UP),
    )
