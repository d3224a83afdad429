"""Ordinarily trained MNIST classifiers to measure bounds on: no robust training, no regularisation.

    python benchmarks/train_mlps.py --data-root DIR --out DIR

784-256-256-10 and 784-100-100-100-100-10, each with tanh, sigmoid, softplus and GELU, as float32 ONNX files with an
index.json beside them in the form that the other benchmarks read. Adam, 1e-3, batches of 128, 10 epochs, seed 0, inputs
in [0,1]. Weights differ a little between machines; accuracies are 97 to 98.5 %.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from certify_cli import load_data

WIDTHS = {"256x2": (256, 256), "100x4": (100, 100, 100, 100)}
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
}


def mlp(widths: tuple[int, ...], activation: type[nn.Module]) -> nn.Sequential:
    """Flatten, then dense layers with `activation` between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    sizes = (784, *widths)
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 10))


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    """Plain cross-entropy."""
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(128):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimiser.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data, test = (load_data("mnist", root=options.data_root, split=s, offline=True) for s in ("train", "test"))
    if data.y is None or test.y is None:
        raise SystemExit("MNIST without labels cannot be trained on")
    index = {}
    for shape, widths in WIDTHS.items():
        for name, activation in ACTIVATIONS.items():
            torch.manual_seed(0)
            model = mlp(widths, activation)
            train(model, data.x.float(), data.y, options.epochs)
            with torch.no_grad():
                accuracy = float((model(test.x.float()).argmax(1) == test.y).double().mean())
            file = options.out / f"mlp_{shape}_{name}.onnx"
            torch.onnx.export(model, (data.x[:1].float(),), file, input_names=["x"], dynamo=False,
                              dynamic_axes={"x": {0: "batch"}})  # fmt: skip
            index[file.name] = {
                "dataset": "mnist", "mean": [0.0], "std": [1.0], "layout": "NCHW", "source": "benchmarks/train_mlps.py",
                "accuracy": accuracy,
            }  # fmt: skip
            print(f"{file.name}: accuracy {accuracy:.4f}", flush=True)
    (options.out / "index.json").write_text(json.dumps(index, indent=2))


if __name__ == "__main__":
    main()
