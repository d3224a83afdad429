"""Clean and certified accuracy of a model in training: what models are selected by, on samples kept for it."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from certify_cli.errors import CurvcertWarning
from certify_cli.load.loaded_model import LoadedModel
from certify_cli.load.safetensors.architecture import build
from certify_cli.records import ModelInfo
from certify_cli.run.library import certify

METHOD, EFFORT = "auto", "fast"
"""By which models are compared; the final model deserves more."""


@dataclass(frozen=True)
class Score:
    """Shares of the validation samples: predicted correctly, and of those that were certified, so at the radius."""

    accuracy: float
    certified: float

    @property
    def key(self) -> tuple[float, float]:
        """The larger, the better the model."""
        return self.certified, self.accuracy


def loaded(spec: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> LoadedModel:
    """A model in memory, as `load_model` would load it from a file."""
    network = build(dict(spec), {key: tensor.detach().cpu() for key, tensor in tensors.items()})
    info = ModelInfo(name, hashlib.sha256(b"").hexdigest(), "safetensors", None, network.classes)
    return LoadedModel(network, info, network.input_shape, "float32", ())


def score(model: LoadedModel, x: Tensor, y: Tensor, radius: float, checked: int) -> Score:
    """The score on samples (N, ...), of which the first `checked` are certified."""
    with torch.no_grad():
        right = [model.network(part.double()).argmax(1) == labels for part, labels in _parts(x, y)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CurvcertWarning)  # of figures that look wrong: early models are bad
        result = certify(model, x[:checked], y[:checked], method=METHOD, effort=EFFORT, attack="none", eps=str(radius))
    certified = result.summary.certified_accuracy
    assert certified is not None  # there are labels
    return Score(float(torch.cat(right).double().mean()), certified[str(radius)])


def _parts(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(1000), y.split(1000), strict=True))
