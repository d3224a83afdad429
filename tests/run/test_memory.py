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
from tests.conftest import SHARED
from tests.networks import PIECEWISE, SMOOTH, mlp, points
from tests.run.common import data_of, model_of

CPU = torch.device("cpu")
MODELS = Path(__file__).parents[2] / "models"
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


def test_where_nothing_fits_the_run_says_so() -> None:
    with pytest.raises(UsageError, match=r"--memory 1\.0 KiB is too little for any method: it takes .* at least"):
        prepare(model_of(WIDE), data_of(points(WIDE, 2)), Settings(method="auto", memory=1024))


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


def test_auto_is_no_worse_than_local_lipschitz_alone_where_jacobians_do_not_fit() -> None:
    """On wide layers with ranges of intervals it can be the best of all methods."""
    network = mlp((6, 1000, 1000, 3), "relu", seed=3)
    room = max(needed(name, network) for name in METHODS) + 1
    assert room < footprint(network)
    data = data_of(points(network, 6))
    together, alone, linear = (
        certify(model_of(network), data, method=m, memory=room) for m in ("auto", "local-lipschitz", "linear")
    )
    assert any("local-lipschitz without Jacobians" in note for note in together.run.notes)
    radii = [[sample.certified_radius or 0.0 for sample in run.samples] for run in (together, alone, linear)]
    assert all(a >= max(b, c) * (1 - 2e-3) for a, b, c in zip(*radii, strict=True))


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
from certify_cli import certify, load_data, load_model
from certify_cli.certificates.footprints import of_process, wanted
torch.manual_seed(0)
torch.set_num_threads(1)
name, method, memory = sys.argv[1:4]
dense, conv = [nn.Flatten(), nn.Linear(784, 64)], [nn.Conv2d(1, 4, 4, 4), nn.Tanh(), nn.Flatten(), nn.Linear(196, 64)]
layers = {"dense": dense, "conv": conv}
if name in layers:
    net = nn.Sequential(*layers[name], nn.Tanh(), nn.Linear(64, int(sys.argv[4]))).eval()
    model, data = load_model(net, input_shape=(1, 28, 28)), torch.rand(2, 1, 28, 28)
else:
    model, data = load_model(name), load_data(sys.argv[4], root=sys.argv[5] if sys.argv[5:] else None, samples="1")
found = certify(model, data, method=method, memory=int(memory), total_seconds=120)
assert found.samples and all(sample.certified_radius for sample in found.samples)
limits = [wanted(method, model.network)] if method != "auto" else []
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, of_process(model.network), *limits)
"""


def peak(*arguments: object) -> list[int]:
    """Bytes at the peak of a process of its own, of the program and the model alone, and what the method wants."""
    command = [sys.executable, "-c", PEAK, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.splitlines()[-1].split()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are in KiB on Linux")
@pytest.mark.parametrize(
    ("kind", "method", "classes", "room"),
    [
        ("dense", "auto", 1500, 2**26),
        ("conv", "auto", 1500, 2**26),
        ("dense", "lipschitz", 20_000, 2**27),
        ("conv", "lipschitz", 20_000, 2**27),
        ("dense", "linear", 1500, 2**27),
    ],
)
def test_many_outputs_stay_within_the_memory(kind: str, method: str, classes: int, room: int) -> None:
    """Within what is allowed, besides what the program and the model take."""
    found, program, *_ = peak(kind, method, room, classes)
    assert found < program + room


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are in KiB on Linux")
@pytest.mark.parametrize(
    ("model", "method", "data"),
    [
        ("dense", "lipschitz", (20_000,)),
        (MODELS / "digits_mlp.onnx", "lipschitz", ("digits",)),
        (MODELS / "digits_mlp.onnx", "local", ("digits",)),
        (MODELS / "digits_conv.onnx", "linear", ("digits",)),
        ("vnn21_verivital_mnist_Convnet_maxpool", "linear", ("mnist",)),
        ("act_small_sigmoid_mnist_cnn", "linear", ("mnist",)),
    ],
)
def test_estimates_are_within_a_factor_of_two(model: Path | str, method: str, data: tuple[object, ...]) -> None:
    if data == ("mnist",):
        model, data = SHARED / "models" / f"{model}.onnx", (*data, SHARED / "data")
        if not model.is_file():
            pytest.skip("needs the models of the project")
    found, *parts = peak(model, method, 2**31, *data)
    assert found / 2 < sum(parts) < 2 * found
