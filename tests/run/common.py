"""What the tests of runs share: a network as a loaded model, and tensors as a data set."""

from __future__ import annotations

import torch

from certify_cli.data.datasets import Dataset
from certify_cli.load.loaded_model import LoadedModel
from certify_cli.network.graph import Network
from certify_cli.records import ModelInfo


def model_of(network: Network) -> LoadedModel:
    return LoadedModel(
        network, ModelInfo("m.onnx", "0" * 64, "onnx", 17, network.classes), network.input_shape, "float32", ()
    )


def data_of(x: torch.Tensor, y: torch.Tensor | None = None, image: bool = False) -> Dataset:
    return Dataset("made", x.float(), y, tuple(range(10, 10 + len(x))), None, image, "0" * 64, ("a note",))
