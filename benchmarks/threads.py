"""Whether threads that wait should spin or sleep: on an idle machine, and beside a busy process.

    python benchmarks/threads.py --models DIR --data-root DIR [--data cifar10=FILE.npz] [--repetitions 7] [--part 1.0]

DIR holds ONNX files and an index.json (see global_bounds.py). Every case is run by turns with each policy, in a process
of its own; its time is that of the summary, without the start of the process. The table has the median time when
threads spin (the default of the OpenMP runtime, GOMP_SPINCOUNT=300000), and for the others the median of the ratios to
the spinning run of the same turn. The busy process multiplies matrices with as many threads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from common import header, parser, read_index, row
from start import command

POLICIES = {
    "spinning": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "3,000 spins": {"GOMP_SPINCOUNT": "3000"},
}
CASES = (
    ("sdpcrown_mnist_mlp_relu.onnx", "lipschitz", 10000),
    ("crc_mnist_softplus_1x1024.onnx", "curvature", 10000),
    ("act_small_sigmoid_mnist_cnn.onnx", "auto", 4),
)
"""Model, method and number of samples."""
BUSY = "import torch\na = torch.randn(1500, 1500)\nwhile True: a @ a"


@contextmanager
def busy(wanted: bool) -> Iterator[None]:
    """A process that keeps the cores busy, if wanted."""
    if not wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", BUSY], env=_without_policy())
    try:
        time.sleep(4)  # the import of torch
        yield
    finally:
        process.kill()
        process.wait()


def _without_policy() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_", "KMP_"))}


def seconds(words: list[str], policy: dict[str, str]) -> float:
    """The time of one run, as its summary gives it."""
    done = subprocess.run(
        [sys.executable, *words, "--format", "json"],
        env=_without_policy() | policy,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(json.loads(done.stdout)["summary"]["seconds"])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--repetitions", type=int, default=7)
    options.add_argument("--part", type=float, default=1.0, help="of the samples")
    chosen = options.parse_args()
    index = read_index(chosen.models, chosen.data)
    print(header(["model", "method", "samples", "machine", "spinning, s", *list(POLICIES)[1:]], ["model", "method"]))
    for name, method, samples in CASES:
        count = max(1, int(samples * chosen.part))
        words = command(chosen.models / name, index[name], method, chosen.data_root, chosen.threads, count)
        for beside in (False, True):
            with busy(beside):
                turns = [
                    {key: seconds(words, value) for key, value in POLICIES.items()} for _ in range(chosen.repetitions)
                ]
            ratios = [median(turn[key] / turn["spinning"] for turn in turns) for key in list(POLICIES)[1:]]
            machine = "busy" if beside else "idle"
            print(row([name, method, count, machine, median(turn["spinning"] for turn in turns), *ratios]), flush=True)


if __name__ == "__main__":
    main()
