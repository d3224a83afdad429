"""Train the shipped digits classifiers and write each as ONNX and as safetensors: python models/make.py [FOLDER]

The test digits are by other writers than the training digits: random affine maps and noise make up for that, and weight
decay keeps the norms of the layers, on which the certified radii rest, small.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certify_cli.data.datasets import load_data
from certify_cli.load.convert import write_safetensors
from certify_cli.load.safetensors.architecture import FORMAT

INPUT = [1, 8, 8]


BATCH = 64
EPOCHS = 100
NOISE = 0.1
"""Standard deviation of the noise added to pixels in [0, 1]."""


@dataclass(frozen=True)
class Recipe:
    """A model as the layers of a spec ("size" is for training only); `decay` weighs the squares of all weights."""

    name: str
    layers: tuple[tuple[str, dict[str, Any]], ...]
    decay: float


MLP = (
    ("Flatten", {}),
    ("Linear", {"name": "fc1", "size": (64, 64)}),
    ("softplus", {"beta": 5}),
    ("Linear", {"name": "fc2", "size": (64, 64)}),
    ("softplus", {"beta": 5}),
    ("Linear", {"name": "fc3", "size": (64, 10)}),
)

RECIPES = (
    Recipe("digits_mlp", MLP, decay=2e-4),
    Recipe("digits_mlp_v2", MLP, decay=0.0),  # as a team might release it that only looks at the accuracy
    Recipe(
        "digits_conv",
        (
            ("Conv2d", {"name": "conv1", "size": (1, 8), "padding": 1}),
            ("silu", {}),
            ("AvgPool2d", {"kernel_size": 2}),
            ("Conv2d", {"name": "conv2", "size": (8, 16), "padding": 1}),
            ("silu", {}),
            ("Flatten", {}),
            ("Linear", {"name": "fc", "size": (256, 10)}),
        ),
        decay=5e-4,
    ),
)


def module(recipe: Recipe) -> nn.Sequential:
    """The recipe as torch modules, which carry the names that the spec gives their tensors."""
    made = nn.Sequential()
    for position, (kind, fields) in enumerate(recipe.layers):
        made.add_module(fields.get("name", f"{kind.lower()}_{position}"), _layer(kind, fields))
    return made


def _layer(kind: str, fields: dict[str, Any]) -> nn.Module:
    make: dict[str, Callable[[], nn.Module]] = {
        "Flatten": nn.Flatten,
        "Linear": lambda: nn.Linear(*fields["size"]),
        "Conv2d": lambda: nn.Conv2d(*fields["size"], kernel_size=3, padding=fields["padding"]),
        "AvgPool2d": lambda: nn.AvgPool2d(fields["kernel_size"]),
        "softplus": lambda: nn.Softplus(fields["beta"]),
        "silu": nn.SiLU,
    }
    return make[kind]()


def spec(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a declared architecture."""
    layers = [{"type": kind, **{k: v for k, v in fields.items() if k != "size"}} for kind, fields in recipe.layers]
    return {"format": FORMAT, "input": INPUT, "layers": layers}


def warped(x: Tensor) -> Tensor:
    """Images under random rotations (standard deviation 10 degrees), scalings, shears and shifts of a few per cent."""
    count = len(x)
    angle, scale = 0.175 * torch.randn(count), 1 + 0.075 * torch.randn(count)
    shear, shift = 0.125 * torch.randn(count), 0.06 * torch.randn(count, 2)
    first = torch.stack([scale * angle.cos(), shear - angle.sin(), shift[:, 0]], dim=1)
    second = torch.stack([angle.sin(), scale * angle.cos(), shift[:, 1]], dim=1)
    grid = F.affine_grid(torch.stack([first, second], dim=1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def train(recipe: Recipe) -> nn.Sequential:
    """The trained model, in evaluation mode; the same on every run of one machine and torch."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = load_data("digits", split="train")
    assert data.y is not None
    model = module(recipe)
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(data.x)).split(BATCH):
            x = warped(data.x[batch])
            logits = model(x + NOISE * torch.randn_like(x))
            decay = torch.stack([weight.square().sum() for weight in weights]).sum()
            loss = F.cross_entropy(logits, data.y[batch]) + recipe.decay * decay
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def accuracy(model: nn.Module) -> float:
    """On the 360 test samples."""
    data = load_data("digits")
    with torch.no_grad():
        return float((model(data.x).argmax(dim=1) == data.y).double().mean())


def export(recipe: Recipe, model: nn.Module, folder: Path) -> None:
    """Both files. torch's older exporter is used: the newer one writes source paths of the machine into the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            model,
            (torch.zeros(1, *INPUT),),
            str(folder / f"{recipe.name}.onnx"),
            dynamo=False,
            opset_version=17,
            input_names=["x"],
            output_names=["logits"],
            dynamic_axes={"x": {0: "n"}, "logits": {0: "n"}},
        )
    write_safetensors(folder / f"{recipe.name}.safetensors", spec(recipe), model.state_dict())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and write the shipped digits models.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent)
    folder = parser.parse_args().folder
    for recipe in RECIPES:
        model = train(recipe)
        export(recipe, model, folder)
        print(f"{recipe.name}: accuracy {accuracy(model):.4f}")


if __name__ == "__main__":
    main()
