"""Attacks replayed, and the ONNX file itself run in onnxruntime, where that is installed.

Replayed are the witnesses that the run kept or, where it kept none, attacks along the gradients, as certificates
promise them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx.helper import tensor_dtype_to_np_dtype
from torch import Tensor

from certify_cli.load.loaded_model import LoadedModel
from certify_cli.load.onnx.file import read_onnx
from certify_cli.load.onnx.runtime import Runtime
from certify_cli.network.graph import Network
from certify_cli.records import Sample

STRETCH = 1e-4
"""Relative lengthening of a witness before onnxruntime sees it: float32 does not decide what float64 just does."""
FLOAT32_TOLERANCE = 1e-3
"""Margins below this part of their two logits are not decided in float32."""


@dataclass(frozen=True, eq=False)
class Witnesses:
    """The attacks that `certify --witnesses` wrote: sample x and perturbation d (*shape), float64, by index."""

    x: Mapping[int, Tensor]
    d: Mapping[int, Tensor]

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]]) -> Witnesses:
        index = [int(k) for k in arrays["index"]]
        rows = {key: [torch.from_numpy(np.asarray(row, dtype=np.float64)) for row in arrays[key]] for key in ("x", "d")}
        return cls(*(dict(zip(index, rows[key], strict=True)) for key in ("x", "d")))


def replayed(network: Network, sample: Sample, x: Tensor, witnesses: Witnesses | None) -> Iterator[str]:
    """Contradictions of the attack in a record, a sentence each. x: the sample in the data (*shape)."""
    claimed, prediction = sample.attack_radius, sample.prediction
    if claimed is None or prediction is None:
        return
    if witnesses is None:
        if sample.attack_kind == "certificate" and not _along_gradient(network, x, prediction, claimed):
            yield f"no attack along a margin's gradient at {claimed:.9g} changes the prediction"
        return
    if sample.index not in witnesses.d:
        yield "the witnesses hold no attack on it"
        return
    d = witnesses.d[sample.index]
    if d.shape != x.shape or not torch.equal(witnesses.x[sample.index], x):
        yield "its witness is about another image"
        return
    size = float(d.norm())
    if not abs(size - claimed) <= 1e-9 * claimed:
        yield f"its witness lies at {size:.9g}, the record says {claimed:.9g}"
    logits = network((x + d)[None])[0]
    if not (bool(logits.isfinite().all()) and bool(logits.max() > logits[prediction])):
        yield "its witness does not change the prediction"
    inside = bool(((x + d >= 0) & (x + d <= 1)).all())
    if sample.attack_in_range is not None and sample.attack_in_range != inside:
        yield f"attack_in_range is {sample.attack_in_range}, its witness says {inside}"


def _along_gradient(network: Network, x: Tensor, prediction: int, radius: float) -> bool:
    """Whether a step of length `radius` down the gradient of some margin changes the prediction."""
    with torch.enable_grad():
        start = x[None].detach().requires_grad_()
        logits = network(start)[0]
        rivals = [i for i in range(len(logits)) if i != prediction]
        rows = [torch.autograd.grad(logits[prediction] - logits[i], start, retain_graph=True)[0] for i in rivals]
    g = torch.cat(rows)
    size = g.flatten(1).norm(dim=1).clamp(min=1e-300).reshape(-1, *[1] * x.dim())
    moved = x - radius * (1 + 1e-9) * g / size
    there = network(moved)
    return bool((there.isfinite().all(1) & (there.amax(1) > there[:, prediction])).any())


class Deployed:
    """The ONNX file of a model in onnxruntime. prefix: maps a batch of data to the file's own input."""

    def __init__(self, loaded: LoadedModel, output: str | None, prefix: Callable[[Tensor], Tensor]) -> None:
        """Raises NotRunnableError where onnxruntime does not run the file."""
        assert loaded.deployment is not None
        file = read_onnx(Path(loaded.info.path), output)
        self._runtime = Runtime(file.model, [file.output])
        self._prefix, self._deployment = prefix, loaded.deployment

    def logits(self, x: Tensor) -> Tensor:
        """The file's output for x, computed in the file's own type: (batch, classes), logits or probabilities.

        x: (batch, *shape) in data units.
        """
        model_input = self._deployment.model_input
        taken = (
            self._prefix(x).reshape(-1, *model_input.shape).numpy().astype(tensor_dtype_to_np_dtype(model_input.kind))
        )
        rows = []
        for feed in model_input.feeds(taken):
            (array,) = self._runtime.run(feed)
            rows.append(array.astype(np.float64).reshape(1 if model_input.batch == 0 else len(feed), -1))
        joined = np.concatenate(rows)[: len(x)]
        if joined.shape[1] == 1:  # class 1, where it is above the threshold
            joined = np.concatenate([np.full_like(joined, self._deployment.threshold), joined], axis=1)
        return torch.from_numpy(joined)
