"""What a training run leaves: the model with its recipe, as safetensors and ONNX."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certify_cli.errors import ModelError
from certify_cli.load.convert import write_safetensors
from certify_cli.load.safetensors.architecture import TRAINING
from certify_cli.load.torch_module import export
from certify_cli.training.elementwise import Elementwise
from certify_cli.training.loop import Training
from certify_cli.training.recipe import Recipe
from certify_cli.training.validation import Score
from certify_cli.version import __version__
from certify_cli.whole_file import write_whole


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
        epoch, score = training.best
        module = training.best_module()
        return cls(
            module.spec,
            module.state_dict(),
            training.recipe,
            score,
            epoch,
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


def refuse_unnamed(module: nn.Module) -> None:
    """ModelError for a module with an activation that torch has no module for, and ONNX no name."""
    if odd := [part.text for part in module.modules() if isinstance(part, Elementwise)]:
        raise ModelError(f"--onnx: torch has no module for {odd[0]}, which ONNX could name; leave out --onnx")


def write_onnx(training: Training, path: Path) -> None:
    """Write the best model of a finished run as ONNX, atomically, with a free batch axis."""
    content = io.BytesIO()
    export(training.best_module(), torch.zeros(1, *training.architecture.input_shape, dtype=torch.float32), content)
    write_whole(path, content.getvalue())
