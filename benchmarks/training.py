"""Training objectives compared: one network, one seed, each objective; certified on test samples, all rivals.

    python benchmarks/training.py --data-root DIR [--recipes FOLDER] [--samples 1000] [--only NAME]

The folder's recipes are for MNIST; by default they are those of models/recipes/compared.

Every recipe (TOML) of the folder is trained by `curvcert train` and certified by `curvcert certify`, in a folder that
keeps the models, so that a second run only does what is missing. Prints a Markdown table: clean accuracy, certified at
the radii asked for, mean radius over correct samples, accuracy under attack (the search's), seconds a step and in all.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

RADII = ("0.5", "1.58")
COLUMNS = ("recipe", "clean", *(f"certified {r}" for r in RADII), "mean radius", "under attack", "s/step", "s")


def curvcert(*words: str) -> Any:
    """The JSON that a command prints; its stderr is passed on."""
    done = subprocess.run([sys.executable, "-m", "certify_cli", *words], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def measured(recipe: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One row: trains and certifies what is not there yet."""
    model, made, records = (options.folder / f"{recipe.stem}{end}" for end in (".safetensors", ".train.json", ".json"))
    root = ["--data-root", options.data_root, "--offline"]
    if not made.exists():
        start = time.monotonic()
        words = ["train", "--recipe", str(recipe), "-o", str(model), "--resume", "--format", "json", *root]
        made.write_text(json.dumps({**curvcert(*words), "wall": time.monotonic() - start}))
    data = tomllib.loads(recipe.read_text())["data"]
    if not records.exists():
        eps = [word for radius in RADII for word in ("--eps", radius)] if options.verdicts else []
        words = ["certify", str(model), "--data", data, "--method", options.method, *root, *eps]
        words += ["--samples", str(options.samples), "--attack", "search", "--format", "json"]
        records.write_text(json.dumps(curvcert(*words)))
    return row(recipe.stem, json.loads(made.read_text()), json.loads(records.read_text()))


def row(name: str, made: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """The figures of a finished recipe."""
    samples = run["samples"]
    share = {r: sum(s["correct"] and (s["certified_radius"] or 0) > float(r) for s in samples) for r in RADII}
    last = float(RADII[-1])
    stands = sum(s["correct"] and not (s["attack_radius"] or float("inf")) <= last for s in samples)
    training, kept = made["recipe"], made["recipe"]["validation"]
    steps = -(-(60_000 - (kept or 5_000)) // training["batch"])
    seconds = sorted(e["seconds"] for e in made["epochs"] if e["certified"] is None) or [made["epochs"][0]["seconds"]]
    values = [run["summary"]["accuracy"], *(share[r] / len(samples) for r in RADII)]
    values += [run["summary"]["mean_certified_radius_correct"], stands / len(samples)]
    values += [seconds[len(seconds) // 2] / steps, sum(e["seconds"] for e in made["epochs"])]
    return dict(zip(COLUMNS, [name, *values], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--recipes", type=Path, default=Path(__file__).parents[1] / "models" / "recipes" / "compared")
    parser.add_argument("--folder", type=Path, default=Path("training-benchmark"))
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--method", default="auto")
    parser.add_argument(
        "--verdicts", action="store_true", help="stop at a verdict for each radius: faster, no mean radius"
    )
    parser.add_argument("--only", action="append")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print(f"| {' | '.join(COLUMNS)} |\n|---|{'---:|' * (len(COLUMNS) - 1)}")
    for recipe in sorted(options.recipes.glob("*.toml")):
        if options.only and recipe.stem not in options.only:
            continue
        found = measured(recipe, options)
        print(f"| {found['recipe']} | {' | '.join(f'{found[c]:.4g}' for c in COLUMNS[1:])} |", flush=True)


if __name__ == "__main__":
    main()
