"""Records: what they refuse, that they survive their dictionaries, and how they add up."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest

from certify_cli.errors import UsageError
from certify_cli.records import Run, Sample, Summary, parse_eps, summarise
from tests.records import SETTINGS, run, sample


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["margin", "certified_radius", "attack_radius", "lipschitz", "curvature_lower"])
def test_samples_hold_finite_numbers(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"sample 7: {name} is"):
        sample(7, **{name: value})


@pytest.mark.parametrize("reason", [None, ""])
def test_no_radius_without_a_reason(reason: str | None) -> None:
    with pytest.raises(ValueError, match="needs a reason"):
        sample(7, radius=None, reason=reason)


@pytest.mark.parametrize(
    "record",
    [sample(1), sample(2, radius=None), run({"eps": ["0.5"]}, SETTINGS, 3, ["a note"]), summarise([], (), 0.5)],
    ids=["certified", "not certified", "run", "summary"],
)
def test_dictionaries_give_the_record_back_and_unknown_fields_are_ignored(record: Run | Sample | Summary) -> None:
    kind: Any = type(record)
    data = record.to_dict()
    assert list(data) == [item.name for item in fields(record)]
    assert kind.from_dict(data | {"a_later_field": 1}) == record


@pytest.mark.parametrize(("text", "value"), [("0.5", 0.5), ("36/255", 36 / 255), ("1e-3", 0.001), ("2", 2.0)])
def test_eps(text: str, value: float) -> None:
    assert parse_eps(text) == value


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "1/0", "1/", "/2", "1/2/3", "half", "0/5"])
def test_eps_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--eps"):
        parse_eps(text)


def four() -> list[Sample]:
    """Two correct ones, one misclassified with the largest radius of all, one correct without a radius."""
    return [
        sample(0, radius=0.5, attack_radius=1.0),
        sample(1, radius=0.25, attack_radius=None, attack_kind=None, attack_in_range=None),
        sample(2, label=1, radius=8.0),
        sample(3, radius=None),
    ]


def test_summary_figures() -> None:
    found = summarise(four(), ("0.25", "1/4", "0.1"), 2.0)
    assert found.samples == 4
    assert found.accuracy == 0.75
    assert found.mean_certified_radius == 0.75 / 4  # the misclassified one and the one without a radius count as 0
    assert found.median_certified_radius == 0.125
    assert found.mean_certified_radius_correct == 0.25
    # certified at eps is a strict inequality; the keys are the texts, in their order
    assert list((found.certified_accuracy or {}).items()) == [("0.25", 0.25), ("1/4", 0.25), ("0.1", 0.5)]
    assert found.certified_share is None
    assert found.seconds == 2.0


def test_an_attack_at_eps_counts_as_one() -> None:
    levels = summarise(four(), ("0.999", "1", "1.1"), 0.0).attack_accuracy
    assert levels == {"0.999": 0.75, "1": 0.5, "1.1": 0.5}


def test_without_labels_radii_count_as_they_are() -> None:
    rows = [sample(0, label=None, radius=0.5), sample(1, label=None, radius=1.5)]
    found = summarise(rows, ("1",), 0.0)
    assert found.accuracy is found.certified_accuracy is found.attack_accuracy is None
    assert found.mean_certified_radius_correct is None
    assert found.certified_share == {"1": 0.5}
    assert found.mean_certified_radius == found.median_certified_radius == 1.0


def test_without_eps_there_are_no_levels() -> None:
    found = summarise(four(), (), 0.0)
    assert found.certified_accuracy == found.attack_accuracy == {}


def test_no_samples() -> None:
    found = summarise([], ("1",), 0.0)
    assert found.samples == 0
    assert found.accuracy is found.mean_certified_radius is found.median_certified_radius is None
