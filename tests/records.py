"""Records of a run that never was, rendered and saved as `certify` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from certify_cli.output.document import View
from certify_cli.output.formats import FORMATS
from certify_cli.records import DataInfo, ModelInfo, Record, Run, Sample, summarise

INFO = ModelInfo("two.onnx", "ab" * 32, "onnx", 18, 3)


def run(arguments: dict[str, Any], settings: Any, samples: int, notes: list[str]) -> Run:
    return Run(
        tool="curvcert",
        version="0.0.0",
        libraries={"torch": "0"},
        arguments=arguments,
        method=settings.method,
        effort=settings.effort,
        attack=settings.attack,
        device="cpu",
        dtype="float64",
        threads=1,
        batch_size=2,
        seed=settings.seed,
        started="2030-01-01T00:00:00+00:00",
        model=INFO,
        data=DataInfo("N", samples, "cd" * 32),
        preprocessing={},
        classes=["cat", "dog", "eel"],
        notes=notes,
    )


def sample(index: int, label: int | None = 0, radius: float | None = 0.123456789, **changes: Any) -> Sample:
    values: dict[str, Any] = {
        "index": index,
        "label": label,
        "prediction": 0,
        "correct": None if label is None else label == 0,
        "margin": 1.5,
        "runner_up": 1,
        "rival": 2,
        "gradient_norm": 2.0,
        "curvature_lower": 0.1,
        "curvature_upper": 0.2,
        "lipschitz": 3.0,
        "certified_radius": radius,
        "attack_radius": None if radius is None else 1.0000123,
        "attack_kind": None if radius is None else "certificate",
        "attack_in_range": None if radius is None else False,
        "method": None if radius is None else "curvature",
        "status": "certified" if radius else "not_certified",
        "reason": None if radius else "the two largest logits cannot be told apart",
    }
    return Sample(**(values | changes))


SETTINGS = SimpleNamespace(method="auto", effort="normal", attack="certificate", seed=0)


def records(*samples: Sample, eps: tuple[str, ...] = ("0.1", "36/255")) -> list[Record]:
    rows = samples or (sample(3), sample(4, label=1), sample(5, radius=None))
    return [run({"model": "two.onnx"}, SETTINGS, len(rows), ["a note"]), *rows, summarise(rows, eps, 1.25)]


def render(name: str, given: list[Record], view: View | None = None) -> str:
    return "".join(FORMATS[name].render(iter(given), view or View()))


def save_records(
    path: Path, samples: Sequence[Sample], eps: tuple[str, ...] = ("0.15",), sha256: str = "cd" * 32
) -> str:
    made = run({"model": "two.onnx"}, SETTINGS, len(samples), [])
    made = replace(made, data=replace(made.data, sha256=sha256))
    records = [made, *samples, summarise(samples, eps, 1.0)]
    path.write_text("".join(FORMATS[path.suffix[1:]].render(iter(records), View())), encoding="utf-8")
    return str(path)
