"""A torch.nn.Module as a model: exported to ONNX in memory, then loaded with every check that a file meets."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn
from torch.nn.utils import parametrize

from certify_cli.errors import ModelError, UsageError, first_line, quoted, shown
from certify_cli.load.loaded_model import LoadedModel
from certify_cli.load.onnx.loader import load_onnx


def load_module(module: nn.Module, input_shape: Sequence[int] | None, output: str | None = None) -> LoadedModel:
    """The classifier that `module` computes in evaluation mode on samples of `input_shape`, without the batch.

    The module itself is left as it is. Raises UsageError without a shape, ModelError where the module cannot be
    exported or certified, UsageError for anything that is no module.
    """
    if not isinstance(module, nn.Module):
        kind = quoted(type(module).__name__)
        raise UsageError(f"a model is the path of a file or a torch.nn.Module, not an object of type {kind}")
    name = f"{shown(type(module).__name__)} (a torch module)"
    if input_shape is None:
        raise UsageError(f"{name}: the shape of a sample is not known; give input_shape, such as (1, 28, 28)")
    shape = tuple(input_shape)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "module.onnx"
        try:
            own = copy.deepcopy(module).cpu().eval()
            write_parametrizations_out(own)
            dtype = next((p.dtype for p in own.parameters() if p.is_floating_point()), torch.float32)
            export(own, torch.zeros(1, *shape, dtype=dtype), path)
        except Exception as error:  # exporters raise whatever the module's own code raises
            why = f"cannot be exported to ONNX on samples of shape {shape}: {first_line(error)}"
            raise ModelError(f"{name}: {why}") from error
        try:
            model = load_onnx(path, output=output, sample_shape=lambda: shape)
        except ModelError as error:
            raise ModelError(str(error).replace(str(path), name)) from error
    return replace(model, info=replace(model.info, path=name))


def write_parametrizations_out(module: nn.Module) -> None:
    """Make plain weights of parametrised ones, such as spectrally normalised ones, in place: those of evaluation mode.

    The module must be in evaluation mode: in training mode torch moves the vectors of a spectral norm on. ONNX has no
    name for some of the operators that make such weights.
    """
    for part in list(module.modules()):
        if parametrize.is_parametrized(part):
            # not by torch's function: it takes the weight away from the class, which copies of the part have in common
            plain = {name: getattr(part, name).detach().clone() for name in part.parametrizations}  # type: ignore[union-attr]
            del part.parametrizations
            part.__class__ = type(part).__bases__[0]
            for name, weight in plain.items():
                part.register_parameter(name, nn.Parameter(weight))


def export(module: nn.Module, sample: torch.Tensor, file: Path | BinaryIO) -> None:
    """Write the module as ONNX with a free batch, by the exporter that needs no further package.

    The newer one writes source paths of the machine into the file as well.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # on exporters to come; what is wrong with the module is an error
        torch.onnx.export(
            module,
            (sample,),
            file,  # type: ignore[arg-type]  # streams are taken, too
            dynamo=False,
            input_names=["input"],
            output_names=["logits"],
            dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
        )
