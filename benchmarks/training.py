"""Training objectives compared: one network, one seed, each objective; certified on test samples, all rivals.

    python benchmarks/training.py --data-root DIR [--recipes FOLDER] [--samples 1000] [--only NAME]

The folder's recipes are for MNIST; by default they are those of models/recipes/compared.

Every recipe (TOML) of the folder is trained by `curvcert train` and certified by `curvcert certify`, in a folder that
keeps the models, so that a second run only does what is missing. Prints a Markdown table: clean accuracy, certified at
the radii asked for, mean radius over correct samples, accuracy under attack (the search's), and the seconds of a step:
the median over STEPS of them, measured one recipe after the other when all else is done.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

RADII = ("0.5", "1.58")
COLUMNS = ("recipe", "clean", *(f"certified {r}" for r in RADII), "mean radius", "under attack", "s/step")
STEPS = 20


def curvcert(*words: str) -> Any:
    """The JSON that a command prints; its stderr is passed on."""
    done = subprocess.run([sys.executable, "-m", "certify_cli", *words], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def records_of(recipe: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The run of a recipe's model: trains and certifies what is not there yet."""
    model, records = (options.folder / f"{recipe.stem}{end}" for end in (".safetensors", ".json"))
    root = ["--data-root", options.data_root, "--offline"]
    if not model.exists():
        curvcert("train", "--recipe", str(recipe), "-o", str(model), "--resume", "--format", "json", *root)
    data = tomllib.loads(recipe.read_text())["data"]
    if not records.exists():
        eps = [word for radius in RADII for word in ("--eps", radius)] if options.verdicts else []
        words = ["certify", str(model), "--data", data, "--method", options.method, *root, *eps]
        words += ["--samples", str(options.samples), "--attack", "search", "--format", "json"]
        records.write_text(json.dumps(curvcert(*words)))
    return json.loads(records.read_text())


def row(recipe: Path, run: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a finished recipe."""
    samples = run["samples"]
    share = {r: sum(s["correct"] and (s["certified_radius"] or 0) > float(r) for s in samples) for r in RADII}
    last = float(RADII[-1])
    stands = sum(s["correct"] and not (s["attack_radius"] or float("inf")) <= last for s in samples)
    values = [run["summary"]["accuracy"], *(share[r] / len(samples) for r in RADII)]
    values += [run["summary"]["mean_certified_radius_correct"], stands / len(samples)]
    return dict(zip(COLUMNS, [recipe.stem, *values, step_seconds(recipe, options)], strict=True))


def step_seconds(recipe: Path, options: argparse.Namespace) -> float:
    """The median time of a step of the recipe, at its full radius and share."""
    import torch

    from certify_cli import load_data
    from certify_cli.cli.train import recipe_of
    from certify_cli.training.loop import Training, TrainingData

    chosen = recipe_of(str(recipe), {}, ("epochs=1", "checked=1", "ramp=0", "validation=1"))
    data = load_data(chosen.data, root=options.data_root, split="train", samples=str(STEPS * chosen.batch + 1))
    training = Training(chosen, TrainingData.of(data.x, data.y, chosen), torch.device("cpu"))
    ends = [time.monotonic()]
    list(training.epochs(lambda loss: ends.append(time.monotonic())))
    return statistics.median(after - before for before, after in pairwise(ends))


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
    recipes = [r for r in sorted(options.recipes.glob("*.toml")) if not options.only or r.stem in options.only]
    runs = [records_of(recipe, options) for recipe in recipes]
    print(f"| {' | '.join(COLUMNS)} |\n|---|{'---:|' * (len(COLUMNS) - 1)}")
    for recipe, run in zip(recipes, runs, strict=True):
        found = row(recipe, run, options)
        print(f"| {found['recipe']} | {' | '.join(f'{found[c]:.4g}' for c in COLUMNS[1:])} |", flush=True)


if __name__ == "__main__":
    main()
