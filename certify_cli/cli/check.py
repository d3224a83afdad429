"""`curvcert check`: whether a model reaches what a policy asks; exit 1 where it does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from certify_cli.audit.compare import same_samples, unlike
from certify_cli.audit.judge import Verdict, judge
from certify_cli.audit.policy import POLICY, Policy, Requirement
from certify_cli.cli import options as opt
from certify_cli.cli.configuration import OWN_FILE, PROJECT_FILE, PolicyFile, tell
from certify_cli.cli.exit_codes import DONE, NOT_MET
from certify_cli.cli.reporter import Reporter
from certify_cli.cli.run_options import RunOptions, spread
from certify_cli.cli.sink import job_summary, sink
from certify_cli.errors import RecordsError, UsageError
from certify_cli.output.document import View
from certify_cli.output.read import read_document
from certify_cli.output.verdict import RENDERED, as_markdown
from certify_cli.records import Sample
from certify_cli.run.settings import Settings

if TYPE_CHECKING:
    from certify_cli.run.engine import Job

OF_ATTACKS = ("attack_accuracy",)
LARGEST_BATCH = 64
"""Samples between two looks at whether the verdict is certain."""


@spread
def check(
    context: typer.Context,
    run: RunOptions,
    policy: PolicyFile = None,
    exact: opt.Exact = False,
    format: opt.CheckFormat = None,
    output_file: opt.OutputFile = None,
    all_rows: opt.AllRows = False,
    quiet: opt.Quiet = False,
) -> int:
    """Check a model against a policy, such as a certified accuracy to reach.

    Stops as soon as the verdict is certain. Exit 1 where the policy is not met.
    """
    form = opt.format_of(format, output_file, RENDERED)
    asked = _policy(context)
    settings = run.settings()
    with sink(output_file, all_rows) as out, Reporter(quiet) as reporter:
        tell(context, reporter)
        if settings.attack == "none" and any(r.key in OF_ATTACKS for r in asked.requirements):
            raise UsageError("the policy asks about attacks, but --attack none looks for none")
        baseline = None if asked.baseline is None else read_document(asked.baseline)
        requirements = asked.requirements + (() if baseline is None else asked.against(baseline))
        from certify_cli.run.engine import prepare

        loaded, chosen = run.load(settings, reporter)
        reporter.stage("bounding the network")
        job = prepare(
            loaded,
            chosen,
            _levels(settings, requirements, exact),
            run.arguments(),
            largest_batch=None if exact else LARGEST_BATCH,
        )
        reporter.notes(job.run.notes)
        if baseline is not None:
            if baseline.summary.stopped is not None:
                raise RecordsError(f"{asked.baseline}: the run was ended early, and is no baseline for all samples")
            same_samples(baseline.run, job.run)
            for text in unlike(baseline.run, job.run):
                reporter.warning(f"{asked.baseline} is of another kind of run: {text}")
        verdict = _judged(requirements, job, reporter, exact)
        out.last(RENDERED[form](verdict, job.run, out.view))
        if form == "github":
            job_summary(as_markdown(verdict, job.run, View(all_rows=True)))
    return DONE if verdict.met else NOT_MET


def _policy(context: typer.Context) -> Policy:
    found = context.obj
    if found is None:
        raise UsageError(f"there is no policy: name one with --policy FILE, or write {OWN_FILE} here")
    if found.policy is None:
        table = "[tool.curvcert.policy]" if found.path.endswith(PROJECT_FILE) else "[policy]"
        raise UsageError(f"{found.path}: has no table {table}, so there is nothing to check")
    return Policy.of(found.policy, found.path)


def _levels(settings: Settings, requirements: tuple[Requirement, ...], exact: bool) -> Settings:
    """The settings with the policy's radii added to `eps`, or with no `eps` where radii themselves are needed.

    With `eps`, a sample is spared expensive methods once its verdicts are known. Radii are needed if `exact`, or if a
    requirement is about a figure of them.
    """
    if exact or any(asked.figure.radius for asked in requirements):
        return replace(settings, eps=())
    levels = [asked.eps for asked in requirements if asked.eps is not None]
    return replace(settings, eps=tuple(dict.fromkeys([*settings.eps, *levels])))


def _judged(requirements: tuple[Requirement, ...], job: Job, reporter: Reporter, exact: bool) -> Verdict:
    """After every batch, until it is certain."""
    model = _of_model(requirements, job)
    done: list[Sample] = []
    verdict = judge(requirements, done, job.total, model)
    unlabelled = [asked.title for asked in requirements if asked.figure.labelled and asked.because == POLICY]
    if verdict.certain and not exact:
        return verdict
    advance = reporter.counter(job.total, "certifying")
    for sample in job.samples():
        if sample.record.label is None and unlabelled:
            raise UsageError(f"the policy asks for {unlabelled[0]}, but the data has no labels")
        done.append(sample.record)
        advance()
        if len(done) % job.run.batch_size == 0 or len(done) == job.total:
            verdict = judge(requirements, done, job.total, model)
            if verdict.certain and not exact:
                break
    return verdict


def _of_model(requirements: tuple[Requirement, ...], job: Job) -> Mapping[str, float]:
    if not any(asked.figure.of_model for asked in requirements):
        return {}
    return job.model_figures()
