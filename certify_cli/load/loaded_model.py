"""The result of loading a model file of any format."""

from __future__ import annotations

from dataclasses import dataclass

from certify_cli.load.onnx.model_input import ModelInput
from certify_cli.network.graph import Network
from certify_cli.records import ModelInfo


@dataclass(frozen=True)
class Deployment:
    """How to run the file itself.

    model_input: what it takes.   output: name of its output tensor.
    threshold: where the output is a single number, class 1 is predicted above this value.
    """

    model_input: ModelInput
    output: str
    threshold: float = 0.0


@dataclass(frozen=True)
class LoadedModel:
    """A classifier as a network, and where it came from.

    input_shape: of the file's own input, without the batch and before preprocessing.
    stored_dtype: type of the weights in the file ("float32", "float16", ...), which are upcast exactly.
    notes: sentences for the user (an upcast, a dropped softmax).   deployment: for ONNX files.
    """

    network: Network
    info: ModelInfo
    input_shape: tuple[int, ...]
    stored_dtype: str
    notes: tuple[str, ...]
    deployment: Deployment | None = None
