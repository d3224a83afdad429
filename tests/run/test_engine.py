"""The engine: one record a sample, in order, whatever the sample is like."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from certify_cli.efforts import MAX
from certify_cli.errors import DataError, MethodError, UsageError
from certify_cli.network.affine import Dense
from certify_cli.network.graph import Builder, Network
from certify_cli.run.engine import prepare
from certify_cli.run.library import certify
from certify_cli.run.sample_records import NEVER, NOT_FINITE, TIED, UNRESOLVED
from certify_cli.run.settings import Settings
from tests.networks import PIECEWISE, SMOOTH, mlp, points
from tests.run.common import data_of, model_of


def linear(weight: list[list[float]]) -> Network:
    w = torch.tensor(weight, dtype=torch.float64)
    builder = Builder((w.shape[1],))
    return builder.build(builder.add("fc", Dense(w), 0))


@pytest.mark.parametrize("name", ["three layers, softplus", "convolutional", "residual"])
def test_records_do_not_depend_on_the_batch_size(name: str) -> None:
    network = SMOOTH[name]
    data = data_of(points(network, 5), torch.zeros(5, dtype=torch.int64))
    whole = certify(model_of(network), data, batch_size=5).samples
    parts = certify(model_of(network), data, batch_size=2).samples  # of two, and one alone
    assert [s.index for s in parts] == list(range(10, 15))
    for a, b in zip(whole, parts, strict=True):
        assert (a.prediction, a.rival, a.status) == (b.prediction, b.rival, b.status)
        # a search: rounding decides where it goes
        assert a.certified_radius == pytest.approx(b.certified_radius, rel=1e-5)
        assert (a.attack_radius or 0.0) == pytest.approx(b.attack_radius or 0.0, rel=1e-6)


def test_samples_arrive_batch_by_batch() -> None:
    network = SMOOTH["residual"]
    job = prepare(model_of(network), data_of(points(network, 9)), Settings(method="curvature", batch_size=4))
    stream = job.samples()
    assert next(stream).record.index == 10
    assert job.run.batch_size == 4
    assert job.run.notes == ["a note"]
    assert len(list(stream)) == 8


@pytest.mark.smoke
def test_a_known_radius_and_its_attack() -> None:
    """Two classes, logits (3 x0, 4 x1): the boundary is 3 x0 = 4 x1."""
    network = linear([[3.0, 0.0], [0.0, 4.0]])
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.25]])
    found = certify(model_of(network), data_of(x, torch.tensor([0, 0, 1]), image=True))
    for sample, distance in zip(found.samples, (3 / 5, 4 / 5, 0.5 / 5), strict=True):
        assert sample.certified_radius is not None
        assert sample.certified_radius <= distance
        assert sample.certified_radius == pytest.approx(distance, rel=1e-9)
        assert sample.attack_radius is not None
        assert sample.attack_radius >= distance
        assert sample.attack_radius == pytest.approx(distance, rel=1e-9)
        assert sample.attack_kind == "certificate"
    # the nearest points of the boundary: (0.64, 0.48), (0.48, 0.36), (0.44, 0.33)
    assert [s.attack_in_range for s in found.samples] == [True, True, True]
    assert [s.correct for s in found.samples] == [True, False, False]
    assert found.summary.accuracy == pytest.approx(1 / 3)
    assert found.summary.mean_certified_radius == pytest.approx(0.2, rel=1e-6)


def test_ties_and_nan_are_records_with_a_reason() -> None:
    network = linear([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [math.nan, 0.0]])
    tied, fine, broken = certify(model_of(network), data_of(x)).samples
    assert (tied.status, tied.reason, tied.certified_radius) == ("not_certified", TIED, None)
    assert tied.margin == 0.0
    assert fine.status == "certified"
    assert (broken.status, broken.reason, broken.prediction) == ("error", NOT_FINITE, None)
    assert broken.certified_radius is None
    assert broken.attack_radius is None


@pytest.mark.parametrize(("activation", "reason"), [("gelu", UNRESOLVED), ("relu", None)])
def test_rounding_of_a_deep_network_is_not_called_a_tie(activation: str, reason: str | None) -> None:
    """The norms of forty layers multiply a smooth activation's rounding; a kinked one has none."""
    network = mlp((8,) * 40 + (3,), activation, gain=1.7)
    (sample,) = certify(model_of(network), data_of(points(network, 1)), method="lipschitz").samples
    assert sample.margin is not None
    assert sample.margin > 0.01
    assert (sample.reason == UNRESOLVED) == (reason == UNRESOLVED)
    assert sample.reason != TIED


def test_a_deep_network_with_two_equal_rows_is_tied() -> None:
    network = mlp((8,) * 40 + (3,), "relu", gain=1.7)
    last = network.nodes[-1].op
    assert isinstance(last, Dense)
    assert last.offset is not None
    top = int(network(points(network, 1).float().double()).argmax())
    other = (top + 1) % 3
    last.weight[other], last.offset[other] = last.weight[top], last.offset[top]
    (sample,) = certify(model_of(network), data_of(points(network, 1)), method="lipschitz").samples
    assert (sample.status, sample.reason, sample.margin) == ("not_certified", TIED, 0.0)


def test_a_constant_classifier_says_so() -> None:
    builder = Builder((2,))
    bias = torch.tensor([1.0, 0.0], dtype=torch.float64)
    network = builder.build(builder.add("fc", Dense(torch.zeros(2, 2, dtype=torch.float64), bias), 0))
    (sample,) = certify(model_of(network), data_of(torch.zeros(1, 2))).samples
    assert (sample.status, sample.reason) == ("certified", NEVER)
    assert sample.certified_radius is None


def test_one_rival_that_cannot_flip_leaves_the_minimum() -> None:
    """Class 2's logit moves with class 0's: only class 1 decides."""
    network = linear([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    object.__setattr__(network.nodes[1].op, "offset", torch.tensor([0.0, 0.0, -0.1], dtype=torch.float64))
    (sample,) = certify(model_of(network), data_of(torch.tensor([[1.0, 0.0]]))).samples
    assert sample.runner_up == 2
    assert sample.rival == 1
    assert sample.certified_radius == pytest.approx(1 / math.sqrt(2), rel=1e-9)


def test_auto_is_never_below_a_single_method() -> None:
    network = SMOOTH["four layers, sigmoid"]
    data = data_of(points(network, 30))
    best = certify(model_of(network), data, method="auto").samples
    for method in ("lipschitz", "curvature"):
        for a, b in zip(best, certify(model_of(network), data, method=method).samples, strict=True):
            assert (a.certified_radius or 0.0) >= (b.certified_radius or 0.0)
            assert b.method == method


def test_effort_never_lowers_a_radius_by_more_than_where_a_search_stops() -> None:
    """A search starts from what is certified already, so that a better start may end a little lower."""
    assert MAX.local is not None
    network = SMOOTH["three layers, gelu"]
    data = data_of(points(network, 6))
    radii = [
        [s.certified_radius or 0.0 for s in certify(model_of(network), data, effort=effort).samples]
        for effort in ("fast", "normal", "max")
    ]
    for less, more in pairwise(radii):
        assert all(b >= a * (1 - MAX.local.tolerance) for a, b in zip(less, more, strict=True))


def test_radii_and_normalisation_as_a_caller_would_write_them() -> None:
    network = mlp((4, 5, 3))
    data = data_of(points(network, 6), torch.zeros(6, dtype=torch.int64))
    for eps, keys in ((0.5, ["0.5"]), ("36/255", ["36/255"]), ([0.25, "1/2"], ["0.25", "1/2"])):
        assert list(certify(model_of(network), data, eps=eps).summary.certified_accuracy or {}) == keys
    image = certify(model_of(SMOOTH["convolutional"]), data_of(points(SMOOTH["convolutional"], 2)), mean=0.5, std=[2])
    assert image.run.preprocessing["mean"] == [0.5]
    with pytest.raises(UsageError, match="numbers"):
        certify(model_of(network), data, mean="none")  # type: ignore[arg-type]


def test_no_attack_when_none_is_asked_for() -> None:
    network = SMOOTH["two layers, tanh"]
    found = certify(model_of(network), data_of(points(network, 5)), attack="none")
    assert all(s.attack_radius is None for s in found.samples)


def test_a_piecewise_network_gets_the_radius_of_a_ball() -> None:
    network = PIECEWISE["relu"]
    data = data_of(points(network, 5))
    found, plain = (certify(model_of(network), data, method=method).samples for method in ("auto", "lipschitz"))
    assert {s.method for s in found if s.certified_radius} <= {"linear", "local-lipschitz"}
    assert all((s.certified_radius or 0) >= (p.certified_radius or 0) for s, p in zip(found, plain, strict=True))
    with pytest.raises(MethodError, match="act0"):
        certify(model_of(network), data, method="curvature")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"method": "magic"}, "--method 'magic'"),
        ({"effort": "huge"}, "--effort 'huge'"),
        ({"attack": "magic"}, "--attack 'magic'"),
        ({"device": "cuda:77"}, "--device 'cuda:77'"),
        ({"batch_size": 0}, "--batch-size"),
        ({"eps": ("zero",)}, "--eps 'zero'"),
        ({"layout": "chwn"}, "--layout"),
    ],
)
def test_options_that_cannot_be_used_are_named(options: dict[str, Any], error: str) -> None:
    network = SMOOTH["linear"]
    with pytest.raises(UsageError, match=error):
        certify(model_of(network), data_of(points(network, 2)), **options)


def test_data_that_cannot_belong_to_the_model_is_refused() -> None:
    network = mlp((4, 5, 3))
    with pytest.raises(DataError, match="label 7"):
        certify(model_of(network), data_of(points(network, 1), torch.tensor([7])))
    with pytest.raises(DataError, match="no sample"):
        certify(model_of(network), data_of(torch.zeros(0, 4)))
