"""Imports torchvision even where its compiled operators do not match the installed torch.

torchvision registers shape functions for its operators at import. With a torch build that its binary was not made for
(a CPU-only torch beside a CUDA torchvision) the operators are missing and the import fails, although data sets and
onnx2torch's modules need none of them. The import succeeds once their schemas are declared.
"""

from __future__ import annotations

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
