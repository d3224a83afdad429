"""What loading a model file gives, whatever the format."""

from __future__ import annotations

from dataclasses import dataclass

from certify_cli.load.onnx.model_input import ModelInput
from certify_cli.network.graph import Network
from certify_cli.records import ModelInfo


@dataclass(frozen=True)
class Deployment:
    """How the file itself is run: what it takes, and the name of the tensor that it ends in.

    threshold: of a model of a single number, above which that means class 1.
    """

    model_input: ModelInput
    output: str
    threshold: float = 0.0


@dataclass(frozen=True)
class LoadedModel:
    """A classifier in the one form, and where it came from.

    `input_shape` is the file's own input without the batch (the network's, before `fit` puts preprocessing in front);
    `stored_dtype` names the type of the weights in the file ("float32", "float16", ...; they are upcast exactly);
    `notes` are sentences for the user (an upcast, a dropped softmax); `deployment` is there for ONNX files.
    """

    network: Network
    info: ModelInfo
    input_shape: tuple[int, ...]
    stored_dtype: str
    notes: tuple[str, ...]
    deployment: Deployment | None = None
