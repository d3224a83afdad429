"""The provenance of a run: versions, device and hashes, enough to repeat it."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from certify_cli.data.datasets import Dataset
from certify_cli.load.loaded_model import LoadedModel
from certify_cli.records import DataInfo, Run
from certify_cli.run.settings import Settings
from certify_cli.version import __version__

LIBRARIES = ("torch", "numpy", "onnx", "onnx2torch", "onnxruntime", "safetensors", "torchvision")


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries on which the numbers depend."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def describe(
    model: LoadedModel,
    data: Dataset,
    settings: Settings,
    *,
    arguments: dict[str, Any],
    device: str,
    threads: int,
    batch_size: int,
    notes: tuple[str, ...],
) -> Run:
    """The run record.

    arguments: as given by the user.   threads, batch_size: as chosen.   notes: of the model and the data.
    """
    return Run(
        tool="curvcert",
        version=__version__,
        libraries=library_versions(),
        arguments=arguments,
        method=settings.method,
        effort=settings.effort,
        attack=settings.attack,
        device=device,
        dtype="float64",
        threads=threads,
        batch_size=batch_size,
        seed=settings.seed,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        model=model.info,
        data=DataInfo(data.name, len(data.x), data.sha256),
        preprocessing={
            "mean": list(settings.mean) or None,
            "std": list(settings.std) or None,
            "layout": settings.layout,
            "stored_dtype": model.stored_dtype,
            "input_shape": list(model.input_shape),
        },
        classes=list(data.classes) if data.classes else None,
        notes=list(notes),
    )
