"""curvcert: certified robustness radii of image classifiers, with proof.

    from certify_cli import load_model, load_data, certify

    result = certify(load_model("model.onnx"), load_data("mnist", samples="100"), eps=0.5)
    print(result.summary.certified_accuracy, result.samples[0].certified_radius)

Nothing heavy is imported before one of these names is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from certify_cli.version import __version__

if TYPE_CHECKING:
    from certify_cli.bounds.global_bounds.layer_report import bound
    from certify_cli.data.datasets import load_data
    from certify_cli.load.model import load_model
    from certify_cli.run.library import certify

__all__ = ["__version__", "bound", "certify", "load_data", "load_model"]

_HOMES = {
    "bound": "certify_cli.bounds.global_bounds.layer_report",
    "certify": "certify_cli.run.library",
    "load_data": "certify_cli.data.datasets",
    "load_model": "certify_cli.load.model",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'certify_cli' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
