"""Contradictions in records that need no proof to be found.

They lie between a record and the model and data (labels, predictions, margins, gradients), or between the parts of a
record, its run and the summary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from certify_cli.audit.verify.rounding import logit_error
from certify_cli.data.datasets import Dataset
from certify_cli.errors import quoted
from certify_cli.names import AUTO, METHOD_NAMES
from certify_cli.network.graph import Network
from certify_cli.records import CERTIFIED, NOT_CERTIFIED, Result, Run, Sample, seal, summarise

LOGIT_TOLERANCE = 1e-11
"""Relative distance that two evaluations of the same logit may have."""
KINDS = ("certificate", "search")


def run_contradictions(result: Result, data: Dataset, network: Network) -> Iterator[str]:
    """Contradictions of the whole run, a sentence each: of the seal, the counts, the classes, the summary."""
    run, summary = result.run, result.summary
    if summary.seal is not None and summary.seal != seal(run, result.samples, summary):
        yield "the seal does not fit: something was changed after it was written"
    if run.model.classes != network.classes:
        yield f"the run line says {run.model.classes} classes, the model has {network.classes}"
    indices = [sample.index for sample in result.samples]
    expected = list(data.indices) if summary.stopped is None else list(data.indices)[: len(indices)]
    if indices != expected:
        yield f"the records are not those of the data's {len(data.indices)} samples in order"
    eps = tuple(summary.certified_accuracy or summary.certified_share or ())
    if eps != _texts(run.arguments.get("eps")):
        yield "the summary's radii are not those that the run line says were asked for"
    again = summarise(result.samples, eps, summary.seconds, summary.search_seconds, summary.stopped)
    differing = [
        name for name, value in replace(again, seal=summary.seal).to_dict().items() if value != summary.to_dict()[name]
    ]
    for name in differing:
        yield f"the summary's {name} is not what the samples add up to"


def _texts(eps: Any) -> tuple[str, ...]:
    """The radii of `--eps` as texts; a run from Python may hold one number, or several."""
    return tuple(str(level) for level in (eps if isinstance(eps, list | tuple) else [] if eps is None else [eps]))


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A batch of samples, evaluated anew in float64.

    logits, logit_error: (batch, classes); logit_error estimates the rounding of the logits.
    gradient, curvature: (batch,), the norm of the gradient of one margin, and the second derivative along it: the
    margin to the record's rival, or to the runner-up where the record names none.
    gradient_scale: (batch,), the norms of the gradients of that margin's two logits added up, to which the rounding of
    its gradient is relative.
    """

    logits: Tensor
    gradient: Tensor
    curvature: Tensor
    logit_error: Tensor
    gradient_scale: Tensor


def evaluate(network: Network, x: Tensor, samples: list[Sample]) -> Evaluation:
    """The model and its derivatives at x (batch, *shape), by automatic differentiation. samples: a record a row."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = network(x)
        top = logits.detach().argmax(1)
        second = logits.detach().scatter(1, top[:, None], -torch.inf).argmax(1)
        rivals = [s.rival if is_class(s.rival, logits) else int(r) for s, r in zip(samples, second, strict=True)]
        rival = torch.tensor(rivals, dtype=torch.int64)
        margin = (logits.gather(1, top[:, None]) - logits.gather(1, rival[:, None])).sum()
        (gradient,) = torch.autograd.grad(margin, x, create_graph=True)
        size = gradient.flatten(1).norm(dim=1)
        curvature = torch.zeros_like(size)
        if gradient.requires_grad:
            u = gradient.detach() / size.detach().clamp(min=1e-300).reshape(-1, *[1] * (x.dim() - 1))
            (along,) = torch.autograd.grad((gradient * u).sum(), x, allow_unused=True)
            if along is not None:
                curvature = (along * u).flatten(1).sum(1)
        moved = x.detach().requires_grad_()
        at = network(moved)
        scale = torch.zeros_like(size)
        for column in (top, rival):
            (own,) = torch.autograd.grad(at.gather(1, column[:, None]).sum(), moved, retain_graph=True)
            scale = scale + own.flatten(1).norm(dim=1)
    return Evaluation(
        logits.detach(), size.detach(), curvature.detach(), logit_error(network, x.detach()), scale.detach()
    )


def is_class(value: int | None, logits: Tensor) -> bool:
    """Whether a record's class is one of the model's."""
    return value is not None and 0 <= value < logits.shape[1]


def record_contradictions(
    sample: Sample, label: int | None, evaluation: Evaluation, row: int, run: Run
) -> Iterator[str]:
    """Contradictions of one record, a sentence each. label: the data's. row: the sample's in the evaluation."""
    logits = evaluation.logits[row]
    if not bool(logits.isfinite().all()):
        if sample.certified_radius is not None or sample.attack_radius is not None:
            yield "the model's logits are not finite, but the record has a radius"
        return
    ordered = logits.sort(descending=True)
    top, second = (int(k) for k in ordered.indices[:2])
    margin = float(ordered.values[0] - ordered.values[1])
    slack = LOGIT_TOLERANCE * float(ordered.values[:2].abs().sum()) + float(
        evaluation.logit_error[row, [top, second]].sum()
    )
    if sample.label != label:
        yield f"the label is {label} in the data, {sample.label} in the record"
    if margin > slack and sample.prediction != top:
        yield f"the model predicts {top}, the record says {sample.prediction}"
    if sample.certified_radius is not None and not is_class(sample.prediction, evaluation.logits):
        yield f"the prediction {sample.prediction} is no class, but the record has a radius"
    if sample.certified_radius is not None and not margin > 0:
        yield "the two largest logits are the same, but the record has a radius"
    if sample.correct != (None if label is None else sample.prediction == label):
        yield f"correct is {sample.correct} for label {label} and prediction {sample.prediction}"
    if sample.margin is not None and abs(sample.margin - margin) > slack:
        yield f"the margin is {margin:.9g}, the record says {sample.margin:.9g}"
    if sample.runner_up is not None and not _nearly_second(evaluation, row, sample.runner_up, top, second):
        yield f"the runner-up is {second}, the record says {sample.runner_up}"
    if sample.rival is not None and (
        sample.rival == sample.prediction or not is_class(sample.rival, evaluation.logits)
    ):
        yield f"the rival {sample.rival} is no other class"
    if sample.status == CERTIFIED and sample.certified_radius is None:
        gradient, scale = float(evaluation.gradient[row]), float(evaluation.gradient_scale[row])
        if gradient > 1e-6 * scale:
            yield (
                f"the margin's gradient is {gradient:.6g}, but the record says that no perturbation changes the "
                "prediction"
            )
    yield from _of_figures(
        sample, float(evaluation.gradient[row]), float(evaluation.curvature[row]), float(evaluation.gradient_scale[row])
    )
    if run.method == "lipschitz" or sample.method == "lipschitz":
        yield from _of_closed_form(sample, logits, slack)
    yield from _of_verdicts(sample, run.method, run.attack)


def _nearly_second(evaluation: Evaluation, row: int, claimed: int, top: int, second: int) -> bool:
    """Whether the class `claimed` may be the runner-up: it has the second logit, up to rounding."""
    logits = evaluation.logits[row]
    if not 0 <= claimed < len(logits) or claimed == top:
        return False
    pair = [second, claimed]
    return float(logits[second] - logits[claimed]) <= LOGIT_TOLERANCE * float(logits[pair].abs().sum()) + float(
        evaluation.logit_error[row, pair].sum()
    )


def _of_closed_form(sample: Sample, logits: Tensor, slack: float) -> Iterator[str]:
    """A radius by a Lipschitz constant is at most the rival's margin over that constant."""
    radius, constant, rival, top = sample.certified_radius, sample.lipschitz, sample.rival, sample.prediction
    if radius is None or constant is None or rival is None or top is None:
        return
    if not (0 <= rival < len(logits) and 0 <= top < len(logits)):
        return
    margin = float(logits[top] - logits[rival])
    if radius * constant > (margin + slack) * (1 + 1e-9):
        yield (
            f"the margin to class {rival}, {margin:.9g}, over the Lipschitz constant {constant:.9g} is less than the "
            f"certified radius {radius:.9g}"
        )


def _of_figures(sample: Sample, gradient: float, along: float, scale: float) -> Iterator[str]:
    """Gradient, curvature and Lipschitz figures are upper bounds for the rival's margin.

    gradient, along, scale: `gradient`, `curvature` and `gradient_scale` of the sample's Evaluation.
    """
    slack = 1e-6 * gradient + 1e-11 * scale
    along_slack = 1e-6 * abs(along) + 1e-9 * scale + 1e-12 * scale * scale
    if sample.gradient_norm is not None and sample.gradient_norm < gradient - slack:
        yield f"the gradient's norm is {gradient:.9g}, the record says {sample.gradient_norm:.9g}"
    if sample.lipschitz is not None and sample.lipschitz < gradient - slack:
        yield f"the Lipschitz constant {sample.lipschitz:.6g} is below the gradient's norm {gradient:.6g}"
    if sample.curvature_lower is not None and sample.curvature_lower < -along - along_slack:
        yield f"the curvature bound {sample.curvature_lower:.6g} is below the curvature {-along:.6g} along the gradient"
    if sample.curvature_upper is not None and sample.curvature_upper < along - along_slack:
        yield f"the curvature bound {sample.curvature_upper:.6g} is below the curvature {along:.6g} along the gradient"


def _of_verdicts(sample: Sample, run_method: str, attack: str) -> Iterator[str]:
    radius = sample.certified_radius
    constant_margins = sample.status == CERTIFIED and radius is None and sample.reason
    if (sample.status == CERTIFIED) != (radius is not None) and not constant_margins:
        yield f"status {sample.status} with the radius {radius}"
    if radius is not None and radius <= 0:
        yield f"the certified radius {radius} is not positive"
    if sample.status == NOT_CERTIFIED and not sample.reason:
        yield "a sample that is not certified has no reason"
    if radius is not None and sample.method not in METHOD_NAMES:
        yield f"the method {quoted(sample.method)} is none of curvcert's"
    elif radius is not None and run_method not in (AUTO, sample.method):
        yield f"the method is {sample.method}, the run was by {run_method}"
    if (sample.attack_radius is None) != (sample.attack_kind is None):
        yield f"an attack radius of {sample.attack_radius} of the kind {sample.attack_kind}"
    if sample.attack_radius is not None:
        if sample.attack_kind not in (KINDS if attack == "search" else KINDS[:1]) or attack == "none":
            yield f"an attack of the kind {sample.attack_kind} in a run with --attack {attack}"
        if radius is not None and sample.attack_radius < radius:
            yield f"an attack at {sample.attack_radius:.9g} lies inside the certified radius {radius:.9g}"
