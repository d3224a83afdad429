"""Loads a model file: tells the format from the file, and calls the format's loader."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from certify_cli.errors import ModelError, UsageError
from certify_cli.load.loaded_model import LoadedModel
from certify_cli.records import Run

if TYPE_CHECKING:
    from torch.nn import Module

PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt")
_ZIP, _PICKLE, _HDF5 = b"PK\x03\x04", b"\x80", b"\x89HDF"


def load_model(
    model: str | Path | Module,
    *,
    activation: str | None = None,
    output: str | None = None,
    input_shape: Sequence[int] | Callable[[], Sequence[int] | None] | None = None,
    layout: str | None = None,
) -> LoadedModel:
    """Load a classifier from an ONNX or a safetensors file, or a torch.nn.Module.

    activation: stands between the layers of a safetensors file that declares none, such as "softplus:5".
    output: name of the output of an ONNX file that holds the logits, where it has several and no choice is plain.
    input_shape: a sample's shape, channels first, without the batch; or a function that returns it when it is needed.
    A module needs it; a file where it leaves sizes free.
    layout: "nhwc" where the model reads samples with the channels last.
    A module is exported to ONNX in memory, in evaluation mode, and meets the same checks as a file. Raises ModelError
    where a file is missing or unreadable and where the model cannot be certified, UsageError for the arguments.
    """

    def sample_shape() -> tuple[int, ...] | None:
        shape = input_shape() if callable(input_shape) else input_shape
        return None if shape is None else tuple(shape)

    if not isinstance(model, str | os.PathLike):
        from certify_cli.load.torch_module import load_module

        if activation is not None or layout is not None:
            raise UsageError("activation and layout are for files; a torch module says itself what it computes")
        return load_module(model, sample_shape(), output)
    file = Path(model)
    if os.path.isdir(file):
        raise ModelError(f"{file}: a folder; name the model file itself (.onnx or .safetensors)")
    if not os.path.isfile(file):
        raise ModelError(f"{file}: no such file")
    try:
        with file.open("rb") as opened:
            start = opened.read(16)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror})") from error
    if not start:
        raise ModelError(f"{file}: the file is empty; export or copy the model again")
    if _is_safetensors(file, start):
        if output is not None:
            raise UsageError(f"an output can be chosen in ONNX files only, and {file} is not one")
        from certify_cli.load.safetensors.loader import load_safetensors

        return load_safetensors(file, activation=activation)
    _refuse_pickle(file, start)
    if start.startswith(_HDF5):
        raise ModelError(f"{file}: an HDF5 file, which is not supported; export the model to ONNX")
    if activation is not None:
        raise UsageError(f"--activation is for safetensors files without a declared architecture; {file} is not one")
    from certify_cli.load.onnx.loader import load_onnx

    return load_onnx(file, output=output, sample_shape=sample_shape, layout=layout)


def of_run(run: Run) -> dict[str, Any]:
    """The arguments of `load_model` with which the model of a run was loaded; malformed ones are left out."""
    arguments, shape = run.arguments, run.preprocessing.get("input_shape")
    sizes = isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)
    return {
        "activation": arguments.get("activation") if isinstance(arguments.get("activation"), str) else None,
        "output": arguments.get("output") if isinstance(arguments.get("output"), str) else None,
        "input_shape": shape if sizes else None,
    }


def _is_safetensors(file: Path, start: bytes) -> bool:
    """By the header (eight bytes of length, then a JSON object), or by the name unless the content is a pickle."""
    header = start[8:9] == b"{"
    if file.suffix.lower() == ".safetensors":
        return header or not start.startswith((_ZIP, _PICKLE))
    return header and file.suffix.lower() != ".onnx"


def _refuse_pickle(file: Path, start: bytes) -> None:
    if file.suffix.lower() not in PICKLES and not start.startswith((_ZIP, _PICKLE)):
        return
    kind = "a zip archive as torch.save writes" if start.startswith(_ZIP) else "a pickle"
    raise ModelError(
        f"{file}: {kind}, which can run any code when it is opened and is never loaded; write the model with "
        "torch.onnx.export, or its weights with safetensors"
    )
