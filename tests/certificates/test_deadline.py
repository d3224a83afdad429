"""Time that ends at any moment leaves what was proved before it, whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch

from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.certificates.certificates import Certificates
from certify_cli.certificates.methods import certify_batch, select
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from certify_cli.numerics.deadline import Deadline, OutOfTime, check, present
from tests.networks import PIECEWISE, SMOOTH, points

NETWORKS = {"three layers, softplus": SMOOTH["three layers, softplus"], "relu": PIECEWISE["relu"]}


class After:
    """Ends the work at its `count`-th question."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self) -> str | None:
        self.left -= 1
        return "questions" if self.left < 0 else None


def certificates(network: Network, method: str, outer: Callable[[], str | None]) -> tuple[Certificates, Deadline]:
    """Of a few samples, whose model bounds and evaluation no deadline ends."""
    point, bounds = EvaluatedPoints(network, points(network, 3)), ModelBounds(network)
    methods = select(method, network)
    for each in methods:
        each.prepare(bounds, point.prediction)
    assert point.finite.all()
    with Deadline(outer=outer).in_force() as deadline:
        return certify_batch(methods, bounds, point, True), deadline


def moments(network: Network, method: str) -> Iterator[int]:
    """Some counts of questions, from none up to more than there are."""
    counter = After(10**9)
    certificates(network, method, counter)
    asked = 10**9 - counter.left
    assert asked > 50
    yield from {0, 1, 2, 5, *(int(asked * k / 12) for k in range(1, 12)), asked - 1, asked + 1}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("three layers, softplus", method) for method in ("auto", "dual", "local")),
        *(("relu", method) for method in ("auto", "linear", "local-lipschitz")),
    ],
)
def test_every_moment_leaves_what_was_proved(name: str, method: str) -> None:
    """Radii only grow with the time, and end at those of a run without an end; attacks only come to be."""
    network = NETWORKS[name]
    with exact_kernels():
        whole, _ = certificates(network, method, lambda: None)
        before = torch.zeros_like(whole.radius)
        for count in sorted(moments(network, method)):
            try:
                found, deadline = certificates(network, method, After(count))
            except OutOfTime:
                assert not before.any()  # once something is proved it is kept
                continue
            assert (found.radius >= before * (1 - 1e-12)).all(), count
            assert (found.radius <= whole.radius * (1 + 1e-12)).all(), count
            assert (found.attack.isnan() | (found.attack > found.radius)).all()
            before = found.radius
        assert deadline.ended is None
        assert torch.equal(before, whole.radius)


@pytest.mark.smoke
def test_a_cut_run_is_marked() -> None:
    with exact_kernels():
        _, deadline = certificates(NETWORKS["relu"], "auto", After(40))
    assert deadline.ended == "questions"


def test_seconds_that_are_over() -> None:
    with Deadline("seconds", 0.02).in_force() as deadline:
        check()
        with deadline.clock_stopped():
            time.sleep(0.03)
            check()
        check()
        assert deadline.ended is None
        time.sleep(0.03)
        assert deadline.passed() == "seconds"
        assert deadline.ended is None  # nothing was given up for it
        with pytest.raises(OutOfTime):
            check()
        assert deadline.ended == "seconds"
    check()
    assert present().ended is None


def test_what_ends_the_whole_ends_a_part_whose_clock_is_stopped() -> None:
    ended: list[str] = []
    with Deadline("seconds", 60, lambda: ended[0] if ended else None).in_force() as deadline:
        check()
        ended.append("signal")
        with deadline.clock_stopped(), pytest.raises(OutOfTime):
            check()
        assert deadline.ended == "signal"


def test_steps_are_told_with_their_work() -> None:
    said: list[str] = []
    network = NETWORKS["relu"]
    with exact_kernels(), Deadline(tell=said.append).in_force():
        certify_batch(
            select("linear", network), ModelBounds(network), EvaluatedPoints(network, points(network, 2)), False
        )
    assert said[:2] == ["global bounds for linear", "linear"]
    assert "linear, ball 1" in said
