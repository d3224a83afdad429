"""Writes a model of any format as safetensors with its architecture declared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from certify_cli.errors import ModelError, UsageError
from certify_cli.load.model import load_model
from certify_cli.load.safetensors.architecture import build, declare
from certify_cli.load.safetensors.loader import METADATA_KEY
from certify_cli.whole_file import write_whole

if TYPE_CHECKING:
    from torch.nn import Module


def convert(
    source: str | Path | Module,
    target: str | Path,
    *,
    output: str | None = None,
    input_shape: Sequence[int] | None = None,
) -> None:
    """Write the model in `source`, a file or a torch.nn.Module, to `target` (.safetensors): the lowered network.

    Weights are stored in the source's type or float32 where that is exact, else in float64. `target` is replaced
    atomically.   output, input_shape: see `load_model`.   ModelError for the source, UsageError for the target.
    """
    path = Path(target)
    if path.suffix.lower() != ".safetensors":
        raise UsageError(f"{target}: the converted file's name must end in .safetensors")
    loaded = load_model(source, output=output, input_shape=input_shape)
    spec, exact = declare(loaded.network)
    narrow = [getattr(torch, loaded.stored_dtype, torch.float32), torch.float32]
    tensors = {name: _narrowed(tensor, narrow) for name, tensor in exact.items()}
    build(spec, tensors)  # the file must load
    write_safetensors(path, spec, tensors)


def write_safetensors(path: Path, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and spec to one file, atomically."""
    from safetensors.torch import save

    # a single metadata key: the order of several, and so the file's digest, would differ from run to run
    content = save({name: t.clone().contiguous() for name, t in tensors.items()}, {METADATA_KEY: json.dumps(spec)})
    write_whole(path, content)


def _narrowed(tensor: Tensor, narrow: list[torch.dtype]) -> Tensor:
    """The tensor in the first of these types that holds it exactly, else unchanged; integers unchanged."""
    if not tensor.is_floating_point():
        return tensor
    if not bool(torch.isfinite(tensor).all()):
        raise ModelError("a weight is not finite and cannot be written")
    for dtype in narrow:
        narrowed = tensor.to(dtype)
        if torch.equal(narrowed.to(torch.float64), tensor):
            return narrowed
    return tensor
