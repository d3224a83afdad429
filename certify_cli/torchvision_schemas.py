"""Imports torchvision late, and even where its compiled operators do not match the installed torch.

torchvision registers shape functions for its operators at import. With a torch build that its binary was not made for
(a CPU-only torch beside a CUDA torchvision) the operators are missing and the import fails, although data sets and
onnx2torch's modules need none of them. The import succeeds once their schemas are declared.

It also imports the compiler of torch, which takes a second. onnx2torch asks for it at its own import, for two operators
that no classifier has (NonMaxSuppression, RoiAlign): `deferred_torchvision` defers that to their first use.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_declared: list[torch.library.Library] = []
"""References to the libraries: their declarations vanish with them."""


def import_torchvision() -> None:
    """Import torchvision; where that fails for missing schemas, declare them and import again."""
    try:
        import torchvision
    except RuntimeError as error:
        if _declared or "operator torchvision::nms does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            library.define(schema)
        _declared.append(library)
        import torchvision  # noqa: F401


class _Deferred(ModuleType):
    """A module that is imported when something of it is used; a function of it, when it is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        import_torchvision()
        return getattr(import_module(self.__name__), name)


class _DeferredOperators(_Deferred):
    """torchvision.ops, of which onnx2torch takes this function by name."""

    @staticmethod
    def roi_align(*arguments: Any, **named: Any) -> Any:
        import_torchvision()
        return import_module("torchvision.ops").roi_align(*arguments, **named)


@contextmanager
def deferred_torchvision() -> Iterator[None]:
    """Within the block, `import torchvision` imports nothing yet, unless it is imported already."""
    if "torchvision" in sys.modules:
        yield
        return
    stand_ins = {"torchvision": _Deferred("torchvision"), "torchvision.ops": _DeferredOperators("torchvision.ops")}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]
