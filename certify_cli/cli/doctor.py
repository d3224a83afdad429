"""`curvcert doctor`: versions, devices, and a self-test on networks whose radius is known."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from dataclasses import asdict, dataclass
from typing import Any

import typer

from certify_cli.cli import options as opt
from certify_cli.cli.exit_codes import NOT_MET
from certify_cli.cli.reporter import Reporter
from certify_cli.cli.selftest import PROBLEMS, Known
from certify_cli.cli.sink import sink
from certify_cli.errors import CurvcertError, UsageError, first_line
from certify_cli.output.console import Column, grid, pairs, printable
from certify_cli.output.document import View
from certify_cli.output.json import pretty
from certify_cli.records import SCHEMA
from certify_cli.run.settings import Settings
from certify_cli.version import __version__

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
"""Distribution and module of every library that the package needs."""

NEED_TORCHVISION = {"torchvision", "onnx2torch"}


@dataclass(frozen=True)
class Check:
    """One check. detail: the finding, or the fault and its remedy."""

    name: str
    ok: bool
    detail: str


def doctor(
    device: opt.Device = "auto",
    format: opt.PlainFormat = None,
    output: opt.OutputFile = None,
    quiet: opt.Quiet = False,
) -> None:
    """Check the installation with networks of known radius.

    Exit code 1 if there is a fault.
    """
    form = opt.format_of(format, output, opt.PLAIN_FORMATS)
    with sink(output) as out, Reporter(quiet) as reporter:
        reporter.stage("checking")
        checks = [check_library(name, module) for name, module in LIBRARIES.items()]
        if all(check.ok for check in checks):
            checks += [self_test(known, device) for known in PROBLEMS]
        found = {
            "schema": SCHEMA,
            "version": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            **machine(),
            "checks": [asdict(check) for check in checks],
            "ok": all(check.ok for check in checks),
        }
        out.write(pretty(found) + "\n" if form == "json" else as_text(found, checks, out.view))
    if not found["ok"]:
        faults = "; ".join(f"{check.name}: {check.detail}" for check in checks if not check.ok)
        print(printable(f"curvcert: doctor found a fault: {faults}"), file=sys.stderr)
        raise typer.Exit(NOT_MET)


def check_library(name: str, module: str) -> Check:
    """Import the library: one that is installed may still fail to load."""
    try:
        if module in NEED_TORCHVISION:
            from certify_cli.torchvision_schemas import import_torchvision

            import_torchvision()
        importlib.import_module(module)
        return Check(name, True, importlib.metadata.version(name))
    except Exception as error:  # a broken library may raise anything; its error is the finding
        return Check(
            name, False, f"cannot be imported ({first_line(error)}); install curvcert again in a fresh environment"
        )


def machine() -> dict[str, Any]:
    """Devices and threads as torch reports them; none where torch cannot be imported."""
    if not check_library("torch", "torch").ok:
        return {"devices": [], "threads": None, "cores": os.cpu_count()}
    import torch

    cuda = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        memory = torch.cuda.get_device_properties(i).total_memory / 2**30
        cuda.append(f"cuda:{i} ({torch.cuda.get_device_name(i)}, {memory:.0f} GiB)")
    return {"devices": ["cpu", *cuda], "threads": torch.get_num_threads(), "cores": os.cpu_count()}


def self_test(known: Known, device: str) -> Check:
    """Certify a network whose radius is known, through the whole engine."""
    from certify_cli.run.engine import prepare

    name = f"self-test: {known.name}, {device}"
    try:
        (certified,) = prepare(*known.problem(), Settings(device=device), {}).samples()
    except UsageError:
        raise  # the device asked for does not exist: no fault of the installation
    except (CurvcertError, RuntimeError) as error:  # torch raises RuntimeError for broken kernels
        return Check(name, False, first_line(error))
    sample = certified.record
    fault = known.fault(sample)
    figures = f"certified {sample.certified_radius!r}, attacked {sample.attack_radius!r}, exact {float(known.exact)}"
    return Check(name, fault is None, fault or figures)


def as_text(found: dict[str, Any], checks: list[Check], view: View) -> str:
    """What doctor found, as text: the installation, then a table of the checks."""
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
