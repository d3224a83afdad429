"""`curvcert doctor`: versions, devices, and a self-test on a network whose radius is known."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import typer

from certify_cli.cli import options as opt
from certify_cli.cli.reporter import Reporter
from certify_cli.cli.sink import sink
from certify_cli.output.console import Column, grid, pairs
from certify_cli.output.document import View
from certify_cli.output.json import pretty
from certify_cli.records import SCHEMA, Sample
from certify_cli.version import __version__

if TYPE_CHECKING:
    from certify_cli.load.data import Dataset
    from certify_cli.load.loaded import LoadedModel

LIBRARIES = {
    "numpy": "numpy",
    "torch": "torch",
    "torchvision": "torchvision",
    "onnx": "onnx",
    "onnx2torch": "onnx2torch",
    "safetensors": "safetensors",
    "scikit-learn": "sklearn",
    "rich": "rich",
    "typer": "typer",
}
"""Distribution and module of everything that the package stands on."""

FAULT = 1

WEIGHT, POINT = (3.0, 4.0), (1.0, 1.0)
"""Logits (3 a + 4 b, 0) at (1, 1): margin 7, gradient of norm 5, so the exact radius is 7/5."""

EXACT_RADIUS = Fraction(7, 5)
TIGHTNESS = Fraction(1, 10**6)


@dataclass(frozen=True)
class Check:
    """One thing that was tried; `detail` says what was found, or what is wrong and what to do."""

    name: str
    ok: bool
    detail: str


def doctor(
    device: opt.Device = "auto",
    format: opt.PlainFormat = "table",
    output: opt.OutputFile = None,
    quiet: opt.Quiet = False,
) -> None:
    """Check the installation with a network of known radius.

    Exit code 1 if there is a fault.
    """
    opt.one_of("--format", format, opt.PLAIN_FORMATS)
    with sink(output) as out, Reporter(quiet) as reporter:
        reporter.stage("checking")
        checks = [check_library(name, module) for name, module in LIBRARIES.items()]
        if all(check.ok for check in checks):
            checks.append(self_test(device))
        found = {
            "schema": SCHEMA,
            "version": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            **machine(),
            "checks": [asdict(check) for check in checks],
            "ok": all(check.ok for check in checks),
        }
        out.write(pretty(found) + "\n" if format == "json" else as_text(found, checks, out.view))
    if not found["ok"]:
        faults = "; ".join(f"{check.name}: {check.detail}" for check in checks if not check.ok)
        print(f"curvcert: doctor found a fault: {faults}", file=sys.stderr)
        raise typer.Exit(FAULT)


def check_library(name: str, module: str) -> Check:
    """Import it for real: an installed library may still fail to load."""
    try:
        importlib.import_module(module)
        return Check(name, True, importlib.metadata.version(name))
    except (ImportError, OSError, importlib.metadata.PackageNotFoundError) as error:
        return Check(name, False, f"cannot be imported ({error}); install curvcert again in a fresh environment")


def machine() -> dict[str, Any]:
    """Devices and threads as torch sees them; empty where torch cannot be imported."""
    if not check_library("torch", "torch").ok:
        return {"devices": [], "threads": None, "cores": os.cpu_count()}
    import torch

    cuda = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        memory = torch.cuda.get_device_properties(i).total_memory / 2**30
        cuda.append(f"cuda:{i} ({torch.cuda.get_device_name(i)}, {memory:.0f} GiB)")
    return {"devices": ["cpu", *cuda], "threads": torch.get_num_threads(), "cores": os.cpu_count()}


def self_test(device: str) -> Check:
    """Certify a linear network whose radius is known exactly, through the whole engine."""
    from certify_cli.errors import CurvcertError
    from certify_cli.run.engine import prepare
    from certify_cli.run.settings import Settings

    name = f"self-test ({device})"
    try:
        job = prepare(*known_problem(), Settings(device=device), {})
        (sample,) = job.samples()
    except CurvcertError as error:
        return Check(name, False, str(error))
    fault = fault_of(sample)
    found = f"a radius of exactly {float(EXACT_RADIUS)}: certified {sample.certified_radius!r}"
    return Check(name, fault is None, fault or f"{found}, attacked at {sample.attack_radius!r}")


def known_problem() -> tuple[LoadedModel, Dataset]:
    """The linear two-class network and its one sample, built in code."""
    import torch

    from certify_cli.load.data import Dataset
    from certify_cli.load.loaded import LoadedModel
    from certify_cli.network.affine import Dense
    from certify_cli.network.graph import Builder
    from certify_cli.records import ModelInfo

    builder = Builder((2,))
    output = builder.add("logits", Dense(torch.tensor([WEIGHT, (0.0, 0.0)], dtype=torch.float64)), 0)
    info = ModelInfo(path="self-test", sha256="", format="built in code", opset=None, classes=2)
    model = LoadedModel(builder.build(output), info, (2,), "float64", ())
    data = Dataset(
        name="self-test",
        x=torch.tensor([POINT], dtype=torch.float32),
        y=torch.tensor([0]),
        indices=(0,),
        classes=None,
        image=False,
        sha256="",
        notes=(),
    )
    return model, data


def fault_of(sample: Sample) -> str | None:
    """What is wrong with the self-test's sample, compared in exact arithmetic; None if nothing is."""
    if sample.prediction != 0:
        return f"predicted class {sample.prediction} where class 0 is right"
    if sample.certified_radius is None:
        return f"certified nothing ({sample.reason})"
    certified = Fraction(sample.certified_radius)
    if certified > EXACT_RADIUS:
        return f"certified {sample.certified_radius!r}, more than the exact {float(EXACT_RADIUS)}: do not trust results"
    if certified < EXACT_RADIUS * (1 - TIGHTNESS):
        return f"certified {sample.certified_radius!r}, less than the exact {float(EXACT_RADIUS)}"
    if sample.attack_radius is None:
        return "found no attack on a linear network"
    attacked = Fraction(sample.attack_radius)
    if not EXACT_RADIUS <= attacked <= EXACT_RADIUS * (1 + 1000 * TIGHTNESS):
        return f"claims an attack at {sample.attack_radius!r} where the exact radius is {float(EXACT_RADIUS)}"
    return None


def as_text(found: dict[str, Any], checks: list[Check], view: View) -> str:
    head = pairs(
        [
            ("curvcert", found["version"]),
            ("python", f"{found['python']} on {found['platform']}"),
            ("devices", ", ".join(found["devices"])),
            ("threads", f"{found['threads']} of {found['cores']} cores"),
        ]
    )
    rows = [(check.name, "ok" if check.ok else "FAULT", check.detail) for check in checks]
    return f"{head}\n{grid((Column('check'), Column(''), Column('found', wraps=True)), rows, view)}"
