"""How long one sample takes, the start of the process included, for every model of a folder.

    python benchmarks/start.py --models DIR --data-root DIR [--data cifar10=FILE.npz] [--method auto]

DIR holds ONNX files and an index.json (see global_bounds.py). One Markdown row a model: seconds of
`python -m certify_cli certify MODEL --samples 1` and of its processor time, the medians of --times processes, and
whether torchvision, the compiler of torch and scikit-learn were imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from common import Entry, header, parser, read_index, row

HEAVY = {"torchvision": "torchvision", "compiler": "torch._dynamo", "scikit-learn": "sklearn"}


def command(path: Path, entry: Entry, method: str, root: str | None, threads: int, samples: int = 1) -> list[str]:
    """The words behind `python` that certify the first samples of the entry's data."""
    words = ["-m", "certify_cli", "certify", str(path), "--samples", str(samples), "--quiet", "--method", method]
    words += ["--data", entry["data"], "--offline", "--threads", str(threads)]
    words += ["--data-root", root] if root else []
    for option in ("mean", "std"):
        words += [f"--{option}", ",".join(map(str, entry[option]))] if entry[option] else []
    return words + (["--layout", "nhwc"] if entry["layout"] == "NHWC" else [])


def seconds(words: list[str]) -> tuple[float, float]:
    """Of the clock, and of the processors."""
    start, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, spent


def imported(words: list[str]) -> set[str]:
    """The modules of HEAVY that the command imports."""
    done = subprocess.run([sys.executable, "-X", "importtime", *words], capture_output=True, text=True, check=True)
    names = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    return {title for title, name in HEAVY.items() if name in names}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--method", default="auto")
    options.add_argument("--times", type=int, default=3)
    chosen = options.parse_args()
    print(header(["model", "seconds", "processor, s", *HEAVY]))
    for name, entry in sorted(read_index(chosen.models, chosen.data).items()):
        words = command(chosen.models / name, entry, chosen.method, chosen.data_root, chosen.threads)
        heavy = imported(words)
        taken = [median(column) for column in zip(*(seconds(words) for _ in range(chosen.times)), strict=True)]
        print(row([name, *taken, *("yes" if title in heavy else "" for title in HEAVY)]), flush=True)


if __name__ == "__main__":
    main()
