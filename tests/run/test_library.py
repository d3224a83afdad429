"""The library: torch modules, tensors, arrays and loaders give the records that files and the command line give."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from certify_cli import certify, load_data, load_model
from certify_cli.errors import CurvcertWarning, DataError, ModelError, UsageError
from certify_cli.records import Result


def classifier(classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Softplus(), nn.Dropout(0.5), nn.Linear(16, classes))


def samples(count: int = 5) -> torch.Tensor:
    return torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(1))


def radii(result: Result) -> list[float | None]:
    return [sample.certified_radius for sample in result.samples]


@pytest.fixture(scope="module")
def reference() -> Result:
    return certify(load_model(classifier(), input_shape=(3, 2, 2)), samples(), method="curvature")


def test_a_module_is_certified_as_its_export(tmp_path: Path, reference: Result) -> None:
    module, x = classifier().eval(), samples()
    torch.onnx.export(module, (x[:1],), tmp_path / "m.onnx", dynamo=False)
    np.savez(tmp_path / "x.npz", x=x.numpy())
    file = certify(load_model(tmp_path / "m.onnx"), load_data(str(tmp_path / "x.npz")), method="curvature")
    assert radii(file) == radii(reference)
    assert all(radius is not None and radius > 0 for radius in radii(reference))
    assert [s.prediction for s in reference.samples] == module(x).argmax(1).tolist()


def test_a_module_is_left_as_it_is() -> None:
    module = classifier().train()
    before = copy.deepcopy(module.state_dict())
    model = load_model(module, input_shape=(3, 2, 2))
    assert module.training
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert model.info.path == "Sequential (a torch module)"
    assert model.info.classes == 3


@pytest.mark.parametrize(
    "x", [torch.tensor([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])], ids=["tensor", "array"]
)
def test_a_radius_that_is_known(x: Any) -> None:
    """Logits (3 x0, 4 x1): the boundary is 3 x0 = 4 x1, at distance |3 x0 - 4 x1| / 5."""
    module = nn.Linear(2, 2, bias=False)
    module.weight.data = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    result = certify(module, x, [0, 1])
    assert [s.correct for s in result.samples] == [True, True]
    for radius, exact in zip(radii(result), (0.6, 0.8), strict=True):
        assert radius is not None
        assert exact * (1 - 1e-9) <= radius <= exact


@pytest.mark.parametrize("kind", ["tensor", "array", "loader", "pairs", "gradient"])
def test_ways_to_give_samples(kind: str, reference: Result) -> None:
    x, y = samples(), torch.tensor([0, 1, 2, 0, 1])
    given: dict[str, tuple[Any, ...]] = {
        "tensor": (x, y),
        "array": (x.numpy(), y.numpy()),
        "loader": (DataLoader(TensorDataset(x, y), batch_size=2),),
        "pairs": ([(x[:3], y[:3]), (x[3:], y[3:])],),
        "gradient": (x.clone().requires_grad_(True), y.to(torch.int32)),
    }
    result = certify(classifier(), *given[kind], method="curvature")
    assert [s.label for s in result.samples] == y.tolist()
    assert radii(result) == radii(reference)
    assert result.run.data.samples == 5


def test_samples_reach_a_module_in_their_own_shape() -> None:
    """(N, channels, length): no axis is put in, as there is for the grey images of an .npz file."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    x = torch.rand(4, 2, 6)
    result = certify(module, x, method="curvature")
    assert [s.prediction for s in result.samples] == module(x).argmax(1).tolist()
    assert all(radius is not None and radius > 0 for radius in radii(result))
    assert radii(result) == radii(certify(load_model(module, input_shape=(2, 6)), x, method="curvature"))


def test_samples_without_labels() -> None:
    for data in (samples(), DataLoader(samples(), batch_size=2)):
        result = certify(classifier(), data, method="lipschitz")
        assert [s.correct for s in result.samples] == [None] * 5
        assert result.summary.accuracy is None


def test_bytes_are_pixels_and_wide_floats_are_rounded() -> None:
    pixels = (255 * samples()).round().to(torch.uint8)
    by_bytes = certify(classifier(), pixels, method="lipschitz")
    by_floats = certify(classifier(), pixels.float() / 255, method="lipschitz")
    assert radii(by_bytes) == radii(by_floats)
    narrow = certify(classifier(), samples().bfloat16(), method="lipschitz")
    assert radii(narrow) == radii(certify(classifier(), samples().bfloat16().float(), method="lipschitz"))
    wide = certify(classifier(), samples().double() + 1e-12, method="lipschitz")
    assert any("rounded to float32" in note for note in wide.run.notes)


def test_one_logit_is_read_as_two() -> None:
    result = certify(classifier(1), samples(), method="lipschitz")
    assert result.run.model.classes == 2
    assert any("(0, z)" in note for note in result.run.notes)


def test_what_cannot_be_certified_says_why() -> None:
    with pytest.raises(UsageError, match=r"^Sequential \(a torch module\): the shape of a sample is not known"):
        load_model(classifier())
    with pytest.raises(UsageError, match="not an object of type 'int'"):
        load_model(7, input_shape=(3,))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="activation and layout are for files"):
        load_model(classifier(), input_shape=(3, 2, 2), layout="nhwc")
    with pytest.raises(ModelError, match=r"cannot be exported to ONNX on samples of shape \(5,\)"):
        load_model(nn.Linear(4, 2), input_shape=(5,))
    softmax = nn.Sequential(nn.Linear(4, 4), nn.Softmax(dim=1), nn.Linear(4, 2))
    with pytest.raises(ModelError, match=r"^Sequential \(a torch module\): .*Softmax"):
        load_model(softmax, input_shape=(4,))


@pytest.mark.parametrize(
    ("data", "labels", "says"),
    [
        (samples(), torch.tensor([0, 1]), r"y has shape \(2,\)"),
        (samples(), [0.5] * 5, "labels are integers"),
        (samples(), [0, 1, 2, 3, 0], "label 3, but the model has 3 classes"),
        (samples() / 0, None, "NaN or an infinite value"),
        (samples()[:0], None, "at least one sample"),
        ([], None, "no sample is given"),
        ([(samples(), torch.zeros(5), 1)], None, "a batch has 3 parts"),
        ([samples(), (samples(), torch.zeros(5))], None, "some batches have labels"),
        ([samples(), samples()[:, :, :1]], None, "several shapes"),
        (np.array([["a", "b"]]), None, "has type"),
        ([object()], None, "has shape|has type|is expected"),
    ],
    ids=[
        "too few labels", "fractions as labels", "a label too many", "NaN", "no sample", "no batch", "three parts",
        "labels of some", "several shapes", "texts", "an object",
    ],
)  # fmt: skip
def test_what_is_no_data_says_why(data: Any, labels: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        certify(load_model(classifier(), input_shape=(3, 2, 2)), data, labels)


def test_labels_are_given_once() -> None:
    loader = DataLoader(TensorDataset(samples(), torch.zeros(5, dtype=torch.long)))
    for data in (loader, load_data("digits", samples=2)):
        with pytest.raises(UsageError, match="labels are given twice"):
            certify(classifier(), data, [0] * 5)


def test_an_accuracy_at_chance_is_warned_of() -> None:
    model, x = classifier().eval(), samples(40)
    with pytest.warns(CurvcertWarning, match="no better than guessing"):
        certify(model, x, (model(x).argmax(1) + 1) % 3, method="lipschitz")


def test_records_as_a_data_frame(reference: Result) -> None:
    frame = reference.to_pandas()
    assert frame.index.tolist() == [s.index for s in reference.samples]
    assert frame["certified_radius"].tolist() == radii(reference)
    assert set(frame.columns) | {"index"} == set(reference.samples[0].to_dict())


def test_without_pandas_a_sentence(reference: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match=r"pip install 'curvcert\[pandas\]'"):
        reference.to_pandas()
