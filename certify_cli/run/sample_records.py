"""Records of a batch of certificates: numbers instead of tensors, a status, and a reason where it is not certified."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from certify_cli.certificates.certificates import Certificates
from certify_cli.certificates.methods import method_name
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.records import CERTIFIED, ERROR, NOT_CERTIFIED, Sample

TIED = "the two largest logits are equal up to rounding error"
UNRESOLVED = (
    "the largest logit is ahead as computed, but by less than our bound on the error of computing it: "
    "no tie, and no proof either"
)
EQUAL = 1e-9
"""Logits that differ by less than this part of the largest one count as equal."""
NOT_FINITE = "a logit is not a finite number"
TIME_ENDED = "time ended before a bound was proved"
NO_BOUND = "the bound on this network is too large for a positive radius"
HUGE = 1e100
"""A radius larger than this means that, up to rounding, the margins do not depend on the input."""
NEVER = f"no perturbation of norm below {HUGE:g} changes the prediction: its margins do not depend on the input"

COLUMNS = (
    "radius",
    "rival",
    "gradient",
    "curvature_lower",
    "curvature_upper",
    "lipschitz",
    "attack",
    "method",
)
"""Fields of `Certificates` that records take over as numbers."""


def sample_records(
    point: EvaluatedPoints,
    certificates: Certificates,
    by_certificate: Tensor,
    indices: Sequence[int],
    labels: Sequence[int] | None,
    image: bool,
    stopped: Sequence[str | None],
) -> list[Sample]:
    """The records of a batch.

    by_certificate (batch,): whether a certificate gave the attack, and not a search.
    indices: positions in the data set.   labels: None if the data has none.
    image: whether the samples are images, so that records say whether attacks lie in [0, 1].
    stopped: what ended the work on each sample early, None where nothing did.
    """
    margin, runner_up = point.margin.min(1)
    columns = {name: getattr(certificates, name).tolist() for name in COLUMNS}
    columns |= {
        "margin": margin.tolist(),
        "runner_up": runner_up.tolist(),
        "prediction": point.prediction.tolist(),
        "finite": point.finite.tolist(),
        "by_certificate": by_certificate.tolist(),
        "safe": (point.margin_low.min(1).values > 0).tolist(),
        "equal": (margin <= EQUAL * point.evaluation.logits.abs().amax(1)).tolist(),
        "inside": ((certificates.witness >= 0) & (certificates.witness <= 1)).flatten(1).all(1).tolist(),
    }
    return [
        _record(
            index,
            None if labels is None else labels[row],
            {name: column[row] for name, column in columns.items()},
            image,
            stopped[row],
        )
        for row, index in enumerate(indices)
    ]


def _record(index: int, label: int | None, values: dict[str, Any], image: bool, stopped: str | None) -> Sample:
    """One record. values: the sample's entries of COLUMNS and of the further columns of `sample_records`."""
    finite = values["finite"]
    radius = values["radius"]
    reason = None
    if not finite:
        status, reason = ERROR, NOT_FINITE
    elif radius > HUGE:
        status, reason = CERTIFIED, NEVER
    elif radius > 0:
        status = CERTIFIED
    else:
        early = TIME_ENDED if stopped else NO_BOUND
        status, reason = NOT_CERTIFIED, early if values["safe"] else TIED if values["equal"] else UNRESOLVED
    attack = _number(values["attack"]) if finite else None
    prediction = values["prediction"] if finite else None
    return Sample(
        index=index,
        label=label,
        prediction=prediction,
        correct=None if label is None else prediction == label,
        margin=_number(values["margin"]) if finite else None,
        runner_up=values["runner_up"] if finite else None,
        rival=values["rival"] if finite else None,
        gradient_norm=_number(values["gradient"]),
        curvature_lower=_number(values["curvature_lower"]),
        curvature_upper=_number(values["curvature_upper"]),
        lipschitz=_number(values["lipschitz"]),
        certified_radius=radius if reason is None else None,
        attack_radius=attack,
        attack_kind=None if attack is None else "certificate" if values["by_certificate"] else "search",
        attack_in_range=values["inside"] if image and attack is not None else None,
        method=method_name(values["method"]) if status == CERTIFIED else None,
        status=status,
        reason=reason,
        stopped=stopped,
    )


def _number(value: float) -> float | None:
    """The value, or None if it is not finite (an infinite bound, or one that the method lacks), as records require."""
    return value if math.isfinite(value) else None
