"""The README's table: ten published models, our certified radii beside CROWN's, alpha-CROWN's and the attack's.

    python benchmarks/readme_table.py --models DIR --data-root DIR --data cifar10=FILE.npz [--samples 10]

DIR holds the ONNX files and an index.json (see global_bounds.py); auto_LiRPA must be importable. One Markdown row a
model; radii are means over the samples that the model classifies correctly, the same samples in every column. The
attack's mean leaves out samples where the search found none.

A cell says so where auto_LiRPA fails on a model ("fails"), and of how many samples its radius lies above an attack that
was found and replayed ("above the attack"): that radius is refuted. One of our own radii above an attack ends the
benchmark with an error.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import crown
import methods
from common import header, in_process, load, parser, read_index, row

MODELS = (
    "act_small_sigmoid_cifar10_cnn",
    "act_small_sigmoid_mnist_cnn",
    "dualapp_mnist_fnn_1x100_sigmoid",
    "o4lc_mnist_tanh_1x200",
    "vnn21_mnist_ffnnSIGMOID__Point_6x200",
    "abcrown_mnist_6_100_relu",
    "abcrown_mnist_conv_small_relu",
    "vnn21_mnist-net_256x4",
    "vnn21_marabou_cifar10_small",
    "vnn21_verivital_mnist_Convnet_avgpool",
)
"""Shallow and deep, dense and convolutional, smooth activations first; chosen before alpha-CROWN was measured."""
SAMPLES = 10
COLUMNS = ("model", "correct", "ours (auto)", "CROWN", "alpha-CROWN", "attack", "ours/CROWN", "ours/attack")
OURS, THEIRS, OPTIMISED = "ours", "CROWN", "alpha-CROWN"
"""What one process measures: our radii and the attack's, CROWN's, or CROWN's and alpha-CROWN's."""


def child(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One of the measurements, of one model, in this process."""
    import torch

    from certify_cli.network.evaluate import exact_kernels

    torch.set_num_threads(options.threads)
    path, entry = options.models / name, read_index(options.models, options.data)[name]
    network, data = load(path, entry, options.data_root, options.samples)
    if options.measure != OURS:
        return crown.measure(path, entry, data, optimised=options.measure == OPTIMISED)
    with exact_kernels():
        return methods.measure(network, data.x.double(), data.y, ["auto", "attack"])


def rival_cell(radii: dict[str, float] | None, right: list[int], attack: list[float]) -> tuple[str, float | None]:
    """What the table says of another tool's radii, and their mean; no mean where an attack refutes one of them.

    radii: by the sample's index, as text; right: indices of the samples; attack: the attack's radius of each.
    """
    if radii is None:
        return "fails", None
    values = [radii.get(str(index), 0.0) for index in right]
    mean, refuted = methods.mean(values), len(methods.above(values, attack))
    if mean is None:
        return "-", None
    return (f"{mean:.3g} ({refuted} above the attack)", None) if refuted else (f"{mean:.3g}", mean)


def table_row(name: str, ours: dict[str, Any], plain: Any, optimised: Any) -> list[Any]:
    radii = ours["radii"]
    methods.check_sound(name, radii, None)
    finite = [k for k, found in enumerate(radii["attack"]) if found < float("inf")]
    auto, attack = methods.mean(radii["auto"]), methods.mean([radii["attack"][k] for k in finite])
    attacked = methods.mean([radii["auto"][k] for k in finite])
    crown_cell, crown_mean = rival_cell(plain and plain["radii"], ours["right"], radii["attack"])
    alpha_cell, _ = rival_cell(optimised and optimised["optimised"], ours["right"], radii["attack"])
    return [
        name, f"{len(ours['right'])}/{ours['count']}", auto, crown_cell, alpha_cell, attack,
        auto / crown_mean if auto is not None and crown_mean else None,
        attacked / attack if attacked is not None and attack else None,
    ]  # fmt: skip


def main() -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(samples=SAMPLES, threads=1)
    arguments.add_argument("--match", default=list(MODELS), nargs="+", help="names of models, without .onnx")
    arguments.add_argument("--measure", choices=(OURS, THEIRS, OPTIMISED), default=OURS, help="used internally")
    options = arguments.parse_args()
    if options.only:
        print(json.dumps(child(options.only, options)))
        return
    if not crown.importable():
        arguments.error("auto_LiRPA is not importable")
    print(header(COLUMNS, text=("model",)), flush=True)
    for name in options.match:
        call = [
            "--models", str(options.models), "--threads", str(options.threads), "--samples", str(options.samples),
            *(("--data-root", options.data_root) if options.data_root else ()),
            *(part for item in options.data for part in ("--data", item)), "--only", f"{name}.onnx", "--measure",
        ]  # fmt: skip
        ours = in_process(__file__, [*call, OURS])
        if ours is None:
            continue
        optimised = in_process(__file__, [*call, OPTIMISED])
        plain = optimised if optimised is not None else in_process(__file__, [*call, THEIRS])
        print(row(table_row(name, ours, plain, optimised)), flush=True)


if __name__ == "__main__":
    main()
