"""Sample records before and after a change: which bits it moved.

    python benchmarks/golden.py before.json [--models DIR] [--data-root DIR]     # at the old commit
    python benchmarks/golden.py after.json --against before.json ...             # at the new one

Certifies a few samples of the shipped models, and of three others where --models is given, by every method at every
effort, and compares the records with those of an earlier run: byte for byte, and where they differ by how much.
A commit that only moves, renames or regroups must say "equal"; one that changes the order of floating-point operations
may move last bits, and must say so. Exit status 1 where anything differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

import certify_cli
from certify_cli.efforts import EFFORTS
from certify_cli.errors import MethodError
from certify_cli.names import AUTO, METHOD_NAMES

ROOT = Path(__file__).parent.parent
SHIPPED = (("digits_mlp", "digits", "0:6"), ("digits_conv", "digits", "0:3"))
SHARED = (
    ("marabou_mnist2x5_sigmoid", "mnist", "0:4"),
    ("act_small_sigmoid_mnist_cnn", "mnist", "0:2"),
    ("vnn21_verivital_mnist_Convnet_maxpool", "mnist", "0:2"),
)


def records(models: Path | None, data_root: Path | None) -> dict[str, list[dict[str, Any]]]:
    """Sample records by "model method effort"; a method that cannot apply has none."""
    found: dict[str, list[dict[str, Any]]] = {}
    cases = [(ROOT / "models" / f"{name}.onnx", data, samples) for name, data, samples in SHIPPED]
    if models is not None:
        cases += [(models / f"{name}.onnx", data, samples) for name, data, samples in SHARED]
    for path, data, samples in cases:
        model = certify_cli.load_model(str(path))
        chosen = certify_cli.load_data(data, root=data_root, samples=samples)
        for method, effort in itertools.product((*METHOD_NAMES, AUTO), EFFORTS):
            attack = "search" if method == AUTO else "certificate"
            try:
                result = certify_cli.certify(model, chosen, method=method, effort=effort, attack=attack, device="cpu")
            except MethodError:
                continue
            key = f"{path.stem} {method} {effort}"
            found[key] = [sample.to_dict() for sample in result.samples]
            print(key, file=sys.stderr)
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line a field that differs, with the largest relative difference of the run's samples."""
    lines = [f"{key}: only in one of the two" for key in sorted(before.keys() ^ after.keys())]
    for key in before.keys() & after.keys():
        moved: dict[str, float] = {}
        for old, new in zip(before[key], after[key], strict=True):
            for field in old.keys() | new.keys():
                if old.get(field) != new.get(field):
                    moved[field] = max(moved.get(field, 0.0), _relative(old.get(field), new.get(field)))
        lines += [f"{key}: {field} differs by {size:.1e} of itself" for field, size in sorted(moved.items())]
    return lines


def _relative(old: Any, new: Any) -> float:
    if not isinstance(old, float) or not isinstance(new, float):
        return math.inf
    return abs(new - old) / max(abs(old), abs(new))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--models", type=Path, help="folder of the three other models")
    parser.add_argument("--data-root", type=Path, help="where MNIST lies")
    options = parser.parse_args()
    torch.set_num_threads(1)
    after = records(options.models, options.data_root)
    options.out.write_text(json.dumps(after, indent=1, sort_keys=True) + "\n")
    if options.against is None:
        return 0
    lines = differences(json.loads(options.against.read_text()), json.loads(options.out.read_text()))
    print("\n".join(lines) or f"equal: {len(after)} runs, {sum(map(len, after.values()))} records")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
