"""Architectures that `curvcert train` knows by name, as layers of the declared spec and as torch modules.

An architecture is a list of layers, each an entry of the spec (docs/safetensors-spec.md) with the torch module that
holds its weights while it is trained. So a trained file declares itself, and `certify` takes it as any other. What
follows from learned numbers, such as a threshold or an activation's beta, is entered when the module is written out
(`derived`).
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from certify_cli.errors import UsageError, quoted
from certify_cli.load.safetensors.architecture import FORMAT
from certify_cli.load.torch_module import write_parametrizations_out
from certify_cli.network.graph import Shape
from certify_cli.training.derived import Derived
from certify_cli.training.low_curvature import LipschitzBatchNorm, spectral_norm
from certify_cli.training.sll import Returning, Unshuffled
from certify_cli.training.trained_activations import Made, activation_layers

MAX_WIDTH, MAX_HIDDEN = 2**14, 64
"""Largest width of a layer, and largest number of hidden layers, that a name may ask for."""

MAX_WEIGHTS = 2**27
"""Largest number of weights in all: 512 MiB, and a few times that while training."""


class Sum(nn.Module):
    """The sum of two values."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return first + second


@dataclass(frozen=True)
class Layer:
    """One layer.   entry: of the spec, without name and inputs.   inputs: names of layers; empty for the one before."""

    name: str
    entry: dict[str, Any]
    module: nn.Module
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """Layers in order, for samples of `input_shape`."""

    input_shape: Shape
    layers: tuple[Layer, ...]

    def module(self) -> LayeredModule:
        """The torch module."""
        return LayeredModule(self)


class LayeredModule(nn.Module):
    """The layers of an architecture as one module."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self._input_shape = architecture.input_shape
        self._layers = [(layer.name, layer.entry, layer.inputs) for layer in architecture.layers]
        for layer in architecture.layers:
            self.add_module(layer.name, layer.module)

    def forward(self, x: Tensor) -> Tensor:
        values, previous = {"input": x}, "input"
        for name, _, inputs in self._layers:
            values[name] = self.get_submodule(name)(*(values[key] for key in inputs or (previous,)))
            previous = name
        return values[previous]

    @property
    def spec(self) -> dict[str, Any]:
        """The declared architecture, with what the layers have learned that is no tensor."""
        entries = []
        for name, entry, inputs in self._layers:
            layer = self.get_submodule(name)
            learned = layer.entry() if isinstance(layer, Derived) else {}
            entries.append({"name": name, **entry, **learned, **({"inputs": list(inputs)} if inputs else {})})
        return {"format": FORMAT, "input": list(self._input_shape), "layers": entries}

    def written_out(self) -> LayeredModule:
        """The same module on the CPU in evaluation mode, whose layers all have the weights that the spec names."""
        copied = copy.deepcopy(self).cpu().eval()
        write_parametrizations_out(copied)
        for name, layer in list(copied.named_children()):
            if isinstance(layer, Derived):
                copied.add_module(name, layer.written_out())
        return copied

    def declared(self) -> dict[str, Tensor]:
        """The tensors that the spec names, on the CPU."""
        return self.written_out().state_dict()


@dataclass(frozen=True)
class Style:
    """What the layers of an architecture are made of.

    norm: in front of every activation, one of `recipe.NORMS`.   spectral: divide weights by their spectral norms.
    learned_beta: beta of the activation, which is then centred_softplus, is learned, layer by layer.
    learned_thresholds: so are the thresholds of clip:0,HIGH or maxmin:LOW,HIGH.
    """

    norm: str = "none"
    spectral: bool = False
    learned_beta: bool = False
    learned_thresholds: bool = False


@dataclass
class _Plan:
    """An architecture as it grows; the shape of its last value decides the sizes of the next layer."""

    input_shape: Shape
    activation: Callable[[], Made]
    style: Style = Style()
    layers: list[Layer] = field(default_factory=list)
    shape: Shape = ()
    weights: int = 0

    def _spend(self, weights: int) -> None:
        """Count the weights of a layer before any memory is asked for."""
        self.weights += weights
        if self.weights > MAX_WEIGHTS:
            raise UsageError(f"--arch: the network has more than {MAX_WEIGHTS} weights; choose smaller widths")

    def __post_init__(self) -> None:
        self.shape = self.input_shape

    @property
    def last(self) -> str:
        """The name of the last layer."""
        return self.layers[-1].name if self.layers else "input"

    def add(self, name: str, entry: dict[str, Any], module: nn.Module, inputs: tuple[str, ...] = ()) -> None:
        """Append a layer of one input, or of the named ones."""
        self.layers.append(Layer(name, entry, module, inputs))
        with torch.no_grad():
            if not inputs:
                module.eval()  # norms and power iterations stay as they are
                self.shape = tuple(module(torch.zeros(1, *self.shape, dtype=torch.float32)).shape[1:])
                module.train()

    def activate(self) -> None:
        self._normalise()
        entry, module = self.activation()
        if entry["type"] == "MaxMin" and self.shape[0] % 2:
            raise UsageError(
                f"maxmin pairs the channels or units of a layer, and one has {self.shape[0]}; choose even widths"
            )
        self.add(f"activation_{len(self.layers)}", entry, module)

    def _normalise(self) -> None:
        """Add the style's norm, on the first axis of the last value."""
        channels, image = self.shape[0], len(self.shape) == 3
        entry = {"type": "BatchNorm2d" if image else "BatchNorm1d"}
        if self.style.norm == "lipschitz":
            self.add(f"norm_{len(self.layers)}", entry, LipschitzBatchNorm(channels))
        elif self.style.norm == "batch":
            module = nn.BatchNorm2d(channels) if image else nn.BatchNorm1d(channels)
            self.add(f"norm_{len(self.layers)}", entry, module)

    def dense(self, name: str, width: int) -> None:
        if len(self.shape) > 1:
            self.add("flatten", {"type": "Flatten"}, nn.Flatten())
        self._spend(self.shape[0] * width)
        layer = nn.Linear(self.shape[0], width)
        self.add(name, {"type": "Linear"}, spectral_norm(layer) if self.style.spectral else layer)

    def conv(self, name: str, width: int, kernel: int, stride: int, padding: int) -> None:
        self._spend(self.shape[0] * width * kernel * kernel)
        layer = nn.Conv2d(self.shape[0], width, kernel, stride, padding)
        entry = {"type": "Conv2d", "stride": stride, "padding": padding}
        self.add(name, entry, spectral_norm(layer) if self.style.spectral else layer)


Planner = Callable[[_Plan, int, str], None]
"""From an empty plan, the number of classes and the text after the colon: adds the layers."""


def _mlp(plan: _Plan, classes: int, text: str) -> None:
    """mlp:784-1024-10 - dense layers of these widths, from the input to the classes."""
    widths = _widths(text, "mlp:784-1024-10")
    size = math.prod(plan.input_shape)
    if len(widths) < 2 or widths[0] != size or widths[-1] != classes:
        raise UsageError(
            f"--arch {quoted(f'mlp:{text}')} must begin with the {size} inputs and end with the {classes} classes of "
            f"the data, as mlp:{size}-1024-{classes} does"
        )
    for number, width in enumerate(widths[1:], start=1):
        if number > 1:
            plan.activate()
        plan.dense(f"fc{number}", width)


def _convolutions(plan: _Plan, classes: int, stages: list[tuple[int, int, int, int]], dense: list[int]) -> None:
    """Convolutions (width, kernel, stride, padding), then dense layers of these widths."""
    _needs_images(plan)
    for number, stage in enumerate(stages, start=1):
        try:
            plan.conv(f"conv{number}", *stage)
        except RuntimeError:
            raise UsageError(
                f"images of {plan.input_shape[1]} x {plan.input_shape[2]} are too small for this architecture; "
                "choose mlp or conv"
            ) from None
        plan.activate()
    for number, width in enumerate(dense, start=1):
        plan.dense(f"fc{number}", width)
        plan.activate()
    plan.dense(f"fc{len(dense) + 1}", classes)


def _conv(plan: _Plan, classes: int, text: str) -> None:
    """conv:16,32-100 - convolutions of these widths (5 x 5, every second pixel), then dense layers of those."""
    first, _, rest = text.partition("-")
    stages = [(width, 5, 2, 2) for width in _widths(first.replace(",", "-"), "conv:16,32-100")]
    _convolutions(plan, classes, stages, _widths(rest, "conv:16,32-100") if rest else [])


def _4c3f(plan: _Plan, classes: int, text: str) -> None:
    """4c3f - four convolutions (32, 32, 64, 64), three dense layers (512, 512, classes), as in the literature."""
    _no_text("4c3f", text)
    stages = [(32, 3, 1, 1), (32, 4, 2, 1), (64, 3, 1, 1), (64, 4, 2, 1)]
    _convolutions(plan, classes, stages, [512, 512])


def _6c2f(plan: _Plan, classes: int, text: str) -> None:
    """6c2f - six convolutions (32, 32, 32, 64, 64, 64), two dense layers (512, classes)."""
    _no_text("6c2f", text)
    stages = [(32, 3, 1, 1), (32, 3, 1, 1), (32, 4, 2, 1), (64, 3, 1, 1), (64, 3, 1, 1), (64, 4, 2, 1)]
    _convolutions(plan, classes, stages, [512])


def _residual(plan: _Plan, classes: int, text: str) -> None:
    """resnet:16-2 - a convolution of this width, so many residual blocks of two convolutions, a dense layer."""
    width, blocks = _width_and_blocks(text, "resnet:16-2")
    _needs_images(plan)
    plan.conv("stem", width, 5, 2, 2)
    plan.activate()
    for number in range(1, blocks + 1):
        skipped = plan.last
        plan.conv(f"block{number}_in", width, 3, 1, 1)
        plan.activate()
        plan.conv(f"block{number}_out", width, 3, 1, 1)
        plan.add(f"block{number}_sum", {"type": "add"}, Sum(), (skipped, plan.last))
        plan.activate()
    plan.dense("fc", classes)


def _sll(plan: _Plan, classes: int, text: str) -> None:
    """sll:32-3 - 1-Lipschitz residual convolutions 3 x 3 (width, blocks) on every second pixel, and a dense layer."""
    width, blocks = _width_and_blocks(text, "sll:32-3")
    _needs_images(plan)
    if plan.style.norm != "none" or plan.style.spectral:
        raise UsageError("--arch sll has weights of known norm; leave out norm and spectral")
    channels, *sides = plan.input_shape
    side = 2 if all(length % 2 == 0 for length in sides) else 1
    if width < channels * side * side:
        raise UsageError(f"--arch sll:{width}: the width must be at least {channels * side * side} for these images")
    plan.add("stem", {"type": "Conv2d", "stride": side}, Unshuffled(channels, width, side))
    for number in range(1, blocks + 1):
        skipped = plan.last
        plan.conv(f"block{number}_in", width, 3, 1, 1)
        into = plan.layers[-1].module
        assert isinstance(into, nn.Conv2d)  # what conv adds
        plan.activate()
        plan.add(f"block{number}_out", {"type": "ConvTranspose2d", "padding": 1}, Returning(into))
        plan.add(f"block{number}_sum", {"type": "add"}, Sum(), (skipped, plan.last))
    plan.dense("fc", classes)


ARCHITECTURES: dict[str, Planner] = {
    "mlp": _mlp,
    "conv": _conv,
    "4c3f": _4c3f,
    "6c2f": _6c2f,
    "resnet": _residual,
    "sll": _sll,
}
"""Name -> planner."""


def architecture(
    text: str, activation: str, input_shape: Shape, classes: int, style: Style | None = None
) -> Architecture:
    """The architecture as written on the command line, with its weights drawn by torch's generator.

    UsageError, with what would be accepted, for an unknown name, wrong widths or an unknown activation.
    """
    name, _, rest = text.strip().partition(":")
    planner = ARCHITECTURES.get(name.lower())
    if planner is None:
        raise UsageError(f"--arch {quoted(text)} is not known; choose one of {', '.join(described())}")
    style = style or Style()
    made = activation_layers(activation, style.learned_thresholds, style.learned_beta)
    plan = _Plan(tuple(input_shape), made, style)
    planner(plan, classes, rest)
    return Architecture(plan.input_shape, tuple(plan.layers))


def described() -> list[str]:
    """How each architecture is written, such as `mlp:784-1024-10`."""
    return [(inspect.getdoc(planner) or "").split(" - ")[0] for planner in ARCHITECTURES.values()]


def _widths(text: str, example: str) -> list[int]:
    parts = text.split("-")
    if len(parts) > MAX_HIDDEN or not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
        raise UsageError(f"--arch: {quoted(text)} is not a list of at most {MAX_HIDDEN} widths, as in {example}")
    widths = [int(part) for part in parts]
    if not all(1 <= width <= MAX_WIDTH for width in widths):
        raise UsageError(f"--arch: a width of {quoted(text)} is not between 1 and {MAX_WIDTH}")
    return widths


def _width_and_blocks(text: str, example: str) -> tuple[int, int]:
    """Both numbers; what is left out is as in the example."""
    usual = _widths(example.partition(":")[2], example)
    given = _widths(text, example) if text else []
    if len(given) > len(usual):
        raise UsageError(f"--arch: {quoted(text)} has more than a width and a number of blocks, as in {example}")
    width, blocks = given + usual[len(given) :]
    if blocks > MAX_HIDDEN:
        raise UsageError(f"--arch: {blocks} blocks are more than {MAX_HIDDEN}, as in {example}")
    return width, blocks


def _no_text(name: str, text: str) -> None:
    if text:
        raise UsageError(f"--arch {name} takes no widths, and {quoted(text)} follows it")


def _needs_images(plan: _Plan) -> None:
    if len(plan.input_shape) != 3:
        raise UsageError(f"this architecture takes images, and a sample has the shape {plan.input_shape}; choose mlp")
