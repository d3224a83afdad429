"""A watch over torch: inside it, an operation that gives floating-point numbers narrower than float64 is an error.

Claims are computed in float64, and torch leaves it without a word: integers over integers, integers times a Python
float, roots and means of integers, `torch.where` of two numbers, tensors made of Python floats or by a factory without
a dtype are float32. The watch sees every operation, those of the backward pass included, below autograd.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import certify_cli

PACKAGE = Path(certify_cli.__file__).parent

Place = tuple[str, str]
"""A file of the package and a function or method in it."""

ALLOWED: Mapping[Place, frozenset[str]] = {
    # samples are float32 numbers by definition; a batch is cut out, and then widened, which is exact
    ("data/datasets.py", "select_samples"): frozenset({"lift_fresh"}),
    ("run/engine.py", "Job._batch"): frozenset({"slice"}),
    ("audit/verify/verify.py", "Verifier._batch"): frozenset({"slice"}),
    # stored weights as their file has them, before they are widened
    ("load/safetensors/loader.py", "_read"): frozenset({"view", "detach"}),
    # onnx2torch makes layers with torch's random weights, and puts the file's in their place
    ("load/onnx/loader.py", "_convert"): frozenset({"empty", "uniform_"}),
    # onnxruntime takes and gives float32; only clear margins are compared
    ("audit/verify/replay.py", "Deployed.logits"): frozenset({"_to_copy", "detach", "lift_fresh"}),
    # torch.optim.Adam counts its steps in float32, exactly
    ("audit/verify/reference.py", "Reference._optimised"): frozenset({"lift_fresh", "add_"}),
}
"""Where something narrower is meant, and by which operations. The innermost function of the package counts."""

ANY = frozenset({"*"})
PROPOSING: Mapping[Place, frozenset[str]] = {
    # approximate factors, of which `eigen._shifted_cholesky` measures in float64 what they leave of the matrix
    ("numerics/eigen.py", "shifted_cholesky"): ANY,
    ("numerics/eigen.py", "_shifted_cholesky"): ANY,
    # answers of any quality: `trust_region_loss` measures in float64 what they leave
    ("bounds/remainder/trust_region.py", "Factor._on_side"): ANY,
    # hints for mu and tau, and directions to climb in
    ("bounds/remainder/trust_region_estimate.py", "estimated_minimiser"): ANY,
    ("bounds/remainder/trust_region_estimate.py", "largest_eigenvalue_estimate"): ANY,
    ("numerics/trees.py", "Batched.where"): ANY,
    ("numerics/trees.py", "select"): ANY,
    # the rows that those two multiply with
    ("bounds/linear_maps/jacobians.py", "Rows.of"): ANY,
}
"""Where matrices of a size above `batched.SMALL` may be float32 because they only propose: in calls of these."""


ESTIMATES: Mapping[Place, frozenset[str]] = {
    # what float32 does to a network is what it is about
    ("load/onnx/parity.py", "noise_of"): ANY,
}
"""Where float32 is asked for, in calls of these; no claim is made of what they give."""


class NarrowError(AssertionError):
    """An operation gave numbers narrower than float64 where none are meant."""


class Float64Only(TorchDispatchMode):
    """`with Float64Only():` raises NarrowError at the first such operation; once more at the end, were it caught."""

    def __init__(self, proposing: bool = False) -> None:
        super().__init__()
        self.outer = {**ESTIMATES, **(PROPOSING if proposing else {})}
        self.proposed = 0
        self.found: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        kinds = sorted({str(part.dtype) for part in tree_leaves(out) if isinstance(part, Tensor) and narrow(part)})
        if kinds and not self._meant(func.overloadpacket.__name__):
            self.found = f"{func} gives {', '.join(kinds)} in {' < '.join(map(str, places()[:4])) or 'a test'}"
            raise NarrowError(self.found)
        return out

    def _meant(self, operation: str) -> bool:
        around = places()
        if around and operation in ALLOWED.get(around[0], ()):
            return True
        if any(place in self.outer for place in around):
            self.proposed += 1
            return True
        return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if kind is None and self.found is not None:
            raise NarrowError(self.found)


def narrow(tensor: Tensor) -> bool:
    """Whether a tensor holds floating-point numbers narrower than float64; those on "meta" hold none."""
    wide = (torch.float64, torch.complex128)
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype not in wide and not tensor.is_meta


def places() -> list[Place]:
    """The package's functions that are being called, innermost first; what is nested in one counts as that one."""
    found: list[Place] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            found.append((path.relative_to(PACKAGE).as_posix(), frame.f_code.co_qualname.split(".<locals>")[0]))
        frame = frame.f_back
    return found
