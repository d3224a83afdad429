"""Shared by the benchmarks: models of an index and their data, a process for each measurement, Markdown rows."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from certify_cli.data.datasets import Dataset
    from certify_cli.network.graph import Network

Entry = dict[str, Any]
"""A model in index.json: dataset, mean, std (null: none), layout and source."""


def parser(description: str | None, models_required: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    found = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    found.add_argument("--models", type=Path, required=models_required, help="folder of ONNX files and an index.json")
    found.add_argument("--data-root", default=None, help="where the named data sets lie")
    found.add_argument("--samples", type=int, default=None, help="the first so many test samples")
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--data", default=[], action="append", metavar="NAME=SOURCE", help="e.g. cifar10=FILE.npz")
    found.add_argument("--only", metavar="NAME", help="measure this model here, and print JSON (used internally)")
    return found


def read_index(models: Path, data: Sequence[str]) -> dict[str, Entry]:
    """The models of the folder by name, each with its `data`: the source of NAME=SOURCE, else its data set's name."""
    index: dict[str, Entry] = json.loads((models / "index.json").read_text())
    sources = dict(item.split("=", 1) for item in data)
    for entry in index.values():
        entry["data"] = sources.get(entry["dataset"], entry["dataset"])
    return index


def load(path: Path, entry: Entry, root: str | None, samples: int) -> tuple[Network, Dataset]:
    """The model, fitted to its data, and the first `samples` of the test part."""
    from certify_cli import load_data, load_model
    from certify_cli.cli.allocation import keep_freed_memory
    from certify_cli.load.preprocessing import fit

    keep_freed_memory()  # as the command line does
    data = load_data(entry["data"], root=root, samples=samples, offline=True)
    layout = "nhwc" if entry["layout"] == "NHWC" else None
    shape = tuple(data.x.shape[1:])
    return fit(load_model(path).network, shape, mean=entry["mean"], std=entry["std"], layout=layout), data


def in_process(script: str, arguments: Sequence[str]) -> Any:
    """The last line that `script` prints with these arguments, as JSON; None, with its error on stderr, if it fails."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        print(f"{' '.join(arguments[-4:])}: {lines[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def peak_mib() -> float:
    """The peak memory of this process in MiB, of which Python and the libraries take some 350."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def cell(value: Any) -> str:
    """A value as text: three digits of a number, a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)


def row(values: Sequence[Any]) -> str:
    return "| " + " | ".join(cell(value) for value in values) + " |"


def header(columns: Sequence[str], text: Sequence[str] = ("model", "source")) -> str:
    """The head of a table; the columns in `text` are aligned left."""
    return row(columns) + "\n|" + "|".join("---" if c in text else "---:" for c in columns) + "|"
