"""Loads safetensors files, with the architecture from the metadata, a file beside them, or one option."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from certify_cli.errors import ModelError, UsageError, first_line, quoted
from certify_cli.load.loaded_model import LoadedModel
from certify_cli.load.safetensors.architecture import FORMAT, build
from certify_cli.network.activations import from_name
from certify_cli.records import ModelInfo

METADATA_KEY = "curvcert"
MAX_SPEC_BYTES = 4 * 2**20
"""Largest declared architecture; one of MAX_LAYERS layers is smaller."""


def load_safetensors(path: Path, *, activation: str | None = None) -> LoadedModel:
    """Load MODEL.safetensors with the architecture in its metadata or in MODEL.json beside it.

    activation: where there is no architecture, the activation (such as "softplus:5") of a plain stack of Linear layers.
    Floats of 16 bits are upcast exactly. ModelError for the file, UsageError for `activation`.
    """
    tensors, metadata = _read(path)
    beside = path.with_suffix(".json")
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256")
    spec_text = metadata.get(METADATA_KEY)
    if spec_text is None and beside.is_file():
        spec_text = _read_text(beside)
        digest.update(spec_text.encode())
    try:
        if spec_text is not None:
            if activation is not None:
                raise UsageError(f"--activation is for files that declare no architecture, and {path} declares one")
            spec = _parsed(spec_text)
        elif activation is not None:
            spec = linear_stack(tensors, activation)
        else:
            raise ModelError(
                f"no architecture: put it under the metadata key {METADATA_KEY!r} or into {beside.name} beside the "
                "file, or, for a plain stack of Linear layers, name its --activation (such as softplus:5)"
            )
        network = build(spec, tensors)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error

    stored = _stored_dtype(tensors)
    notes = []
    if stored.itemsize < 4:
        notes.append(f"{path.name}: {_dtype_name(stored)} weights are upcast exactly; the claim is about their values")
    return LoadedModel(
        network=network,
        info=ModelInfo(str(path), digest.hexdigest(), "safetensors", None, network.classes),
        input_shape=network.input_shape,
        stored_dtype=_dtype_name(stored),
        notes=tuple(notes),
    )


def linear_stack(tensors: Mapping[str, Tensor], activation: str) -> dict[str, Any]:
    """The spec of Linear layers with one activation between each two, inferred from names and shapes.

    The order is that of the numbers in the names (fc1, fc2 or net.0, net.2) or, for names that differ otherwise, the
    only one in which the shapes fit. ModelError where the order is ambiguous, UsageError for the activation.
    """
    row = from_name(activation)
    prefixes = _prefixes(tensors)
    order = _by_number(prefixes) or _by_shape({prefix: tensors[f"{prefix}.weight"] for prefix in prefixes})
    for first, second in itertools.pairwise(order):
        given, taken = tensors[f"{first}.weight"].shape[0], tensors[f"{second}.weight"].shape[1]
        if given != taken:
            raise ModelError(
                f"layer {quoted(second)} takes {taken} values, but layer {quoted(first)} before it gives {given}"
            )
    layers: list[dict[str, Any]] = []
    for prefix in order:
        if layers:
            layers.append({"type": row.name, "name": f"{row.name} before {prefix}", **row.parameters})
        layers.append({"type": "Linear", "name": prefix})
    return {"format": FORMAT, "input": [tensors[f"{order[0]}.weight"].shape[1]], "layers": layers}


def _prefixes(tensors: Mapping[str, Tensor]) -> list[str]:
    """The layers' names; every tensor must be the weight matrix or the bias of one."""
    prefixes = [n.removesuffix(".weight") for n, t in tensors.items() if n.endswith(".weight") and t.dim() == 2]
    known = {f"{prefix}.{part}" for prefix in prefixes for part in ("weight", "bias")}
    if odd := sorted(set(tensors) - known):
        raise ModelError(f"tensor {quoted(odd[0])} belongs to no Linear layer; declare the architecture in a JSON file")
    if not prefixes:
        raise ModelError("holds no tensors")
    return prefixes


def _by_number(prefixes: list[str]) -> list[str]:
    """The layers in the order of their numbers, if the names differ in these only; else empty."""
    if len(prefixes) > 1 and len({re.sub("[0-9]+", "#", prefix) for prefix in prefixes}) > 1:
        return []
    # by length, then digit by digit: a name may hold more digits than int() takes
    found = {prefix: [n.lstrip("0") for n in re.findall("[0-9]+", prefix)] for prefix in prefixes}
    numbers = {tuple((len(n), n) for n in digits): prefix for prefix, digits in found.items()}
    return [numbers[key] for key in sorted(numbers)] if len(numbers) == len(prefixes) else []


def _by_shape(weights: Mapping[str, Tensor]) -> list[str]:
    """The order in which every layer takes the previous one's output; ModelError unless there is exactly one."""
    widths_in = [weight.shape[1] for weight in weights.values()]
    if len(set(widths_in)) < len(widths_in):
        # two layers of one input width might be exchanged
        raise ModelError("the order of its layers is ambiguous; declare the architecture in a JSON file")
    taking = {weight.shape[1]: prefix for prefix, weight in weights.items()}
    starts = [p for p, w in weights.items() if all(w.shape[1] != o.shape[0] for o in weights.values())]
    order = starts[:1]
    while order and (following := taking.get(weights[order[-1]].shape[0])) and following not in order:
        order.append(following)
    if len(order) < len(weights):
        raise ModelError("its layers' shapes do not fit in one order only; declare the architecture in a JSON file")
    return order


def read_declared(path: Path) -> tuple[dict[str, Tensor], Any]:
    """A file's tensors, and what its metadata declare, as read, unchecked; None without. ModelError for the file."""
    tensors, metadata = _read(path)
    text = metadata.get(METADATA_KEY)
    return tensors, None if text is None else _parsed(text)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({first_line(error)})") from error


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_SPEC_BYTES:
            raise ModelError(f"{path}: the architecture is larger than {MAX_SPEC_BYTES} bytes; no architecture is")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not a readable text ({first_line(error)})") from error


def _parsed(text: str) -> Any:
    if len(text) > MAX_SPEC_BYTES:
        raise ModelError(f"the architecture is larger than {MAX_SPEC_BYTES} bytes; no architecture is")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"the architecture is not JSON ({first_line(error)})") from error


def _stored_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The widest float type among the tensors."""
    kinds = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    return max(kinds, key=lambda kind: (kind.itemsize, str(kind)), default=torch.float32)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
