"""What a training run leaves: the model with its recipe, as safetensors and ONNX, and a plot of the run."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from certify_cli.errors import ModelError, UsageError, first_line
from certify_cli.load.convert import write_safetensors
from certify_cli.load.safetensors.architecture import TRAINING
from certify_cli.training.elementwise import Elementwise
from certify_cli.training.loop import Epoch, Training
from certify_cli.training.recipe import Recipe
from certify_cli.training.validation import Score
from certify_cli.version import __version__


@dataclass(frozen=True, eq=False)
class Made:
    """The best model of a run.

    spec: its architecture.   tensors: by the names of the spec.   score: on the validation samples, of which the first
    `checked` were certified.   epoch: after which it was the model.
    """

    spec: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    recipe: Recipe
    score: Score
    epoch: int
    checked: int

    @classmethod
    def of(cls, training: Training) -> Made:
        """The best model of a finished run."""
        if training.best is None:
            raise ValueError("a run without epochs has no model")
        return cls(
            training.architecture.spec,
            training.best_tensors,
            training.recipe,
            training.best,
            training.best_epoch,
            min(training.recipe.checked, len(training.data.validation_x)),
        )

    def document(self) -> dict[str, Any]:
        """What the file's metadata says of its making: recipe, versions, what was reached where."""
        reached = {**asdict(self.score), "radius": self.recipe.radius, "certified_samples": self.checked}
        return {
            "recipe": self.recipe.values(),
            "versions": {"curvcert": __version__, "torch": str(torch.__version__)},
            "reached": {**reached, "epoch": self.epoch, "on": "training samples kept for selection"},
        }

    def write(self, path: Path) -> str:
        """Write the safetensors file, atomically, and return its SHA-256."""
        write_safetensors(path, {**self.spec, TRAINING: self.document()}, self.tensors)
        return hashlib.sha256(path.read_bytes()).hexdigest()


def write_onnx(training: Training, path: Path) -> None:
    """Write the best model as ONNX, atomically, with a free batch axis."""
    module = training.module
    present = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.load_state_dict(training.best_tensors)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    sample = torch.zeros(1, *training.architecture.input_shape, dtype=torch.float32, device=training.device)
    if odd := [part.text for part in module.modules() if isinstance(part, Elementwise)]:
        raise ModelError(f"{path}: torch has no module for {odd[0]}, which ONNX could name; leave out --onnx")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on exporters to come
            # torch's older exporter: the newer one writes source paths of the machine into the file
            torch.onnx.export(
                module.eval(),
                (sample,),
                str(unfinished),
                dynamo=False,
                opset_version=17,
                input_names=["x"],
                output_names=["logits"],
                dynamic_axes={"x": {0: "n"}, "logits": {0: "n"}},
            )
        os.replace(unfinished, path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or first_line(error)})") from error
    finally:
        unfinished.unlink(missing_ok=True)
        module.load_state_dict(present)


def write_plot(history: Sequence[Epoch], recipe: Recipe, path: Path) -> None:
    """Draw the loss, and accuracy and certified accuracy on the validation samples, by epoch, as SVG."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--save-plot needs matplotlib: pip install 'curvcert[report]'") from None
    figure = Figure(figsize=(6.4, 3.7), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    compared = [
        (e.number, e.accuracy, e.certified) for e in history if e.accuracy is not None and e.certified is not None
    ]
    numbers, accuracies, certified = zip(*compared, strict=True)
    left.plot(numbers, accuracies, color="#1f5fb4", label="accuracy")
    left.plot(numbers, certified, color="#c2570c", label=f"certified at {recipe.radius:g}")
    right.plot([epoch.number for epoch in history], [epoch.loss for epoch in history], color="#8a8f99", label="loss")
    left.set(xlabel="epoch", ylabel="share of validation samples", ylim=(0, 1))
    right.set(ylabel="loss")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    try:
        figure.savefig(path, metadata={"Date": None})
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or error})") from error
