"""Policies: what they say, and that a verdict that is called certain is the one that all samples give."""

from __future__ import annotations

import math
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from certify_cli.audit.figures import FIGURES, values_of
from certify_cli.audit.judge import judge
from certify_cli.audit.policy import Policy, Requirement
from certify_cli.errors import UsageError
from certify_cli.records import Result, Sample, summarise
from tests.records import run, sample

KEYS = [key for key, figure in FIGURES.items() if not figure.of_model]


def policy(text: str) -> Policy:
    return Policy.of(tomllib.loads(text), "curvcert.toml")


def test_what_a_policy_asks() -> None:
    found = policy(
        """
        accuracy = 0.97
        certified-accuracy = { "0.5" = 0.6, "36/255" = 1 }
        largest_unknown = { "0.5" = 0.1 }
        largest_lipschitz = 40
        """
    )
    assert [(r.key, r.eps, r.threshold) for r in found.requirements] == [
        ("accuracy", None, 0.97),
        ("certified_accuracy", "0.5", 0.6),
        ("certified_accuracy", "36/255", 1.0),
        ("largest_unknown", "0.5", 0.1),
        ("largest_lipschitz", None, 40.0),
    ]
    assert found.requirements[2].level == 36 / 255
    assert (found.requirements[0].holds(0.97), found.requirements[0].holds(0.96)) == (True, False)
    assert (found.requirements[3].holds(0.1), found.requirements[3].holds(0.11)) == (True, False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("acuracy = 0.9", ["policy.acuracy", "is not known", "mean_certified_radius"]),
        ("accuracy = '0.9'", ["policy.accuracy", "'0.9'", "not a number"]),
        ("accuracy = true", ["policy.accuracy", "not a number"]),
        ("accuracy = nan", ["policy.accuracy", "not a number"]),
        ("accuracy = -1", ["policy.accuracy", "at least 0"]),
        ("certified_accuracy = 0.6", ["policy.certified_accuracy", "at radii"]),
        ("certified_accuracy = {}", ["policy.certified_accuracy", "at radii"]),
        ('certified_accuracy = { "half" = 0.6 }', ["policy.certified_accuracy.half", "36/255"]),
        ('certified_accuracy = { "0.5" = "x" }', ["policy.certified_accuracy.0.5", "'x'"]),
        ("baseline = 3", ["policy.baseline", "3"]),
        ("fall = 0.1", ["policy.fall", "baseline"]),
        ("baseline = 'a.json'\nfall = { acuracy = 0.1 }", ["policy.fall.acuracy", "accuracy"]),
        ("", ["asks for nothing"]),
    ],
)
def test_a_mistake_is_named_with_its_key(text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        policy(text)
    for word in ["curvcert.toml", *words]:
        assert word in str(error.value)


def test_a_baseline_asks_for_what_it_reached_less_what_may_fall() -> None:
    samples = [sample(0, radius=0.4), sample(1, radius=0.2), sample(2, label=1, radius=0.3), sample(3, radius=None)]
    old = Result(run({}, SETTINGS, 4, []), tuple(samples), summarise(samples, ("0.25",), 1.0))
    asked = policy("baseline = 'old.json'\nfall = { accuracy = 0.25, mean_certified_radius = 0.5 }").against(old)
    found = {(r.key, r.eps): r.threshold for r in asked}
    assert found["accuracy", None] == pytest.approx(0.75 - 0.25)
    assert found["certified_accuracy", "0.25"] == pytest.approx(0.25 - 0.01)
    assert found["mean_certified_radius", None] == pytest.approx(0.15 * 0.5)
    assert found["median_certified_radius", None] == pytest.approx(0.1 * 0.99)
    verdict = judge(asked, samples, 4, {})
    assert verdict.met
    assert len(verdict.findings) == len(values_of(old.summary))


class SETTINGS:
    method, effort, attack, seed = "auto", "normal", "certificate", 0


radii = st.one_of(st.none(), st.sampled_from([0.1, 0.25, 0.3, 0.5, 2.0]))
rows = st.tuples(radii, st.sampled_from([0, 1]), st.one_of(st.none(), st.sampled_from([0.2, 0.3, 0.4, 3.0])))


@given(
    items=st.lists(rows, min_size=1, max_size=8),
    key=st.sampled_from(KEYS),
    eps=st.sampled_from(["0.25", "3/10"]),
    asked=st.sampled_from([0.0, 0.125, 0.25, 1 / 3, 0.5, 0.75, 1.0, 1.5]),
)
def test_a_certain_verdict_is_that_of_all_samples(
    items: list[tuple[float | None, int, float | None]], key: str, eps: str, asked: float
) -> None:
    """The spans hold the final figure, narrow to it, and never change their mind; the figure is the summary's."""
    samples = [
        sample(k, label=label, radius=radius, attack_radius=attack, attack_kind="search" if attack else None)
        for k, (radius, label, attack) in enumerate(items)
    ]
    wanted = [Requirement(key, asked, eps if FIGURES[key].by_radius else None)]
    final = judge(wanted, samples, len(samples), {}).findings[0]
    assert final.lower == final.upper
    assert final.met is not None
    known: Any = values_of(summarise(samples, (eps,), 1.0)).get((key, wanted[0].eps))
    if known is not None:
        assert final.lower == pytest.approx(known)
    for count in range(len(samples)):
        finding = judge(wanted, samples[:count], len(samples), {}).findings[0]
        assert finding.lower <= final.lower + 1e-15
        assert finding.upper >= final.upper - 1e-15
        assert finding.met in (None, final.met)


def test_which_samples_decide() -> None:
    """Those that fail, the nearest to the radius first; what is met is decided by none in particular."""
    samples = [
        sample(0, radius=0.1),
        sample(1, radius=0.6),
        sample(2, label=1, radius=0.9),
        sample(3, radius=0.45),
        sample(4, radius=0.2, attack_radius=0.3, attack_kind="search"),
    ]

    def deciding(key: str, eps: str | None = None) -> list[int]:
        asked = 0.0 if not FIGURES[key].at_least else math.inf
        return [s.index for s in judge([Requirement(key, asked, eps)], samples, 5, {}).findings[0].samples]

    assert deciding("certified_accuracy", "0.5") == [3, 4, 0, 2]
    assert deciding("accuracy") == [2]
    assert deciding("attack_accuracy", "0.5") == [4, 2]
    assert deciding("largest_unknown", "0.5") == [3, 0]
    assert deciding("mean_certified_radius") == [2, 0, 4, 3, 1]
    assert deciding("mean_certified_radius_correct") == [0, 4, 3, 1]


def test_bounds_of_the_model_are_known_before_any_sample() -> None:
    asked = [Requirement("largest_lipschitz", 10.0), Requirement("largest_curvature", 10.0)]
    bounds = {"largest_lipschitz": 12.0, "largest_curvature": math.inf}
    verdict = judge(asked, [], 5, bounds)
    assert (verdict.certain, verdict.met, [f.met for f in verdict.findings]) == (True, False, [False, False])
    assert verdict.to_dict()["requirements"][1]["found"] is None


def unlabelled(radius: float) -> Sample:
    return sample(0, label=None, radius=radius)


def test_samples_without_labels_count_as_they_are() -> None:
    verdict = judge([Requirement("certified_accuracy", 0.5, "0.25")], [unlabelled(0.3), unlabelled(0.1)], 2, {})
    assert verdict.met
