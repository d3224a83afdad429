"""Memory: what does not fit is left out by name, whatever the run would have taken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from certify_cli.certificates.footprints import needed, wanted
from certify_cli.certificates.local import footprint
from certify_cli.certificates.methods import METHODS, select
from certify_cli.errors import UsageError
from certify_cli.plain import binary_size
from certify_cli.run import memory
from certify_cli.run.engine import prepare
from certify_cli.run.library import certify
from certify_cli.run.memory import allowed, available, within_memory
from certify_cli.run.settings import Settings
from tests.networks import PIECEWISE, SMOOTH, mlp, points
from tests.run.common import data_of, model_of

CPU = torch.device("cpu")
WIDE = mlp((20, 30, 400), "tanh")


@pytest.mark.smoke
def test_what_does_not_fit_is_left_out_by_name() -> None:
    room = needed("curvature", WIDE) - 1
    assert needed("lipschitz", WIDE) < room
    found = certify(model_of(WIDE), data_of(points(WIDE, 2)), memory=room)
    notes = [note for note in found.run.notes if "left out" in note]
    assert [note.split(" left out")[0] for note in notes] == [
        "curvature",
        "dual",
        "local",
        "linear and local-lipschitz",
    ]
    assert all(f"more than the {binary_size(room)} allowed" in note for note in notes)
    assert {sample.method for sample in found.samples} == {"lipschitz"}
    assert all(sample.certified_radius for sample in found.samples)


def test_a_method_asked_for_that_does_not_fit_is_refused() -> None:
    room = needed("linear", WIDE) - 1
    with pytest.raises(UsageError, match=r"is too little for --method linear: one sample of this model takes about"):
        prepare(model_of(WIDE), data_of(points(WIDE, 2)), Settings(method="linear", memory=room))


def test_without_jacobians() -> None:
    """Said once a method; the radii are those of the tangent bound."""
    network = SMOOTH["four layers, sigmoid"]
    room = needed("local", network) + 1
    assert room < footprint(network)
    methods, notes = within_memory(select("local", network), network, room, "local")
    assert [method.name for method in methods] == ["local"]
    assert notes[0].startswith("local without Jacobians: one sample's take about")
    assert "its tangent bound alone decides" in notes[0]
    data = data_of(points(network, 3))
    found, whole = (certify(model_of(network), data, method="local", memory=m).samples for m in (room, None))
    assert all((a.certified_radius or 0) <= (b.certified_radius or 0) for a, b in zip(found, whole, strict=True))
    assert any((a.certified_radius or 0) < (b.certified_radius or 0) for a, b in zip(found, whole, strict=True))


@pytest.mark.parametrize("network", [SMOOTH["convolutional"], PIECEWISE["relu"], WIDE])
def test_everything_fits_without_an_option(network: object) -> None:
    job = prepare(model_of(network), data_of(points(network, 2)), Settings())  # type: ignore[arg-type]
    assert job.run.notes == ["a note"]


def test_more_classes_need_more() -> None:
    for name in METHODS:
        small, large = (mlp((20, 30, classes), "tanh") for classes in (10, 1000))
        assert needed(name, small) < needed(name, large)
        assert needed(name, large) <= wanted(name, large)


def test_the_default_follows_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert allowed(CPU, 5, 100) == 5
    for free, expected in ((1000, 100), (150, 75), (None, 100)):
        monkeypatch.setattr(memory, "available", lambda free=free: free)
        assert allowed(CPU, None, 100) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says")
def test_what_is_free_is_at_most_a_containers_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = available()
    assert free is not None
    assert 2**20 < free < 2**50
    files = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(memory, "LIMITS", tuple(map(str, files)))
    files[0].write_text("3000\n")
    files[1].write_text("1000\n")
    assert available() == 2000
    files[0].write_text("max\n")
    assert available() > 2**20  # type: ignore[operator]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (500 * 2**20, "500 MiB"), (2**31, "2.0 GiB"), (2**42, "4.0 TiB")],
)
def test_sizes_as_text(count: int, text: str) -> None:
    assert binary_size(count) == text


PEAK = """
import resource, sys, torch
from torch import nn
from certify_cli import certify
torch.manual_seed(0)
dense, conv = [nn.Flatten(), nn.Linear(784, 64)], [nn.Conv2d(1, 4, 4, 4), nn.Tanh(), nn.Flatten(), nn.Linear(196, 64)]
layers = {"dense": dense, "conv": conv}
net = nn.Sequential(*layers[sys.argv[1]], nn.Tanh(), nn.Linear(64, 1500)).eval()
x = torch.rand(2, 1, 28, 28)
found = certify(net, x, memory=int(sys.argv[2]), total_seconds=60)
assert found.samples and all(sample.certified_radius for sample in found.samples)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_many_outputs_stay_within_the_memory(kind: str) -> None:
    """Within a quarter of a GiB, and what Python and the libraries take."""
    done = subprocess.run([sys.executable, "-c", PEAK, kind, str(2**26)], capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 350 + 256
