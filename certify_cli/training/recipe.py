"""Recipes: everything that decides what a training run makes, as one flat table of named values.

A recipe is read from a TOML file or from the metadata of a file that it made; options of the command line replace its
values by the same names. `KEYS` is the table of what a recipe may say; nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from certify_cli.errors import UsageError, listed, quoted, shown
from certify_cli.plain import integer, ratio
from certify_cli.toml_file import read_toml

OBJECTIVES = ("plain", "curvature", "crt", "local", "local-lipschitz", "lcnn")
SHARES = ("local", "local-lipschitz")
"""Objectives in which the weight is the worst case's share."""
OPTIMISERS = ("adam", "adamw", "sgd")
SCHEDULES = ("one-cycle", "cosine", "constant")
STARTS = ("torch", "identity")
NORMS = ("none", "batch", "lipschitz")
LARGEST_NUMBER = 2**53
"""No number of a recipe is larger."""


@dataclass(frozen=True)
class _Limits:
    """What a value of a recipe may be.   says: what it means, for the page and for `--help`."""

    says: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()


def _key(default: Any, says: str, low: float = -math.inf, high: float = math.inf, choices: tuple[str, ...] = ()) -> Any:
    return dataclasses.field(default=default, metadata={"limits": _Limits(says, low, high, choices)})


@dataclass(frozen=True)
class Recipe:
    """The values of one training run. Raises UsageError, naming the key, for a value that cannot be used."""

    data: str = _key("mnist", "the data set, as for --data of certify; its training split is used")
    arch: str = _key("mlp:784-1024-10", "the architecture")
    activation: str = _key("softplus:2", "the activation, such as softplus:5, tanh, relu or maxmin")
    learned_thresholds: bool = _key(False, "the thresholds of clip:0,1 or maxmin:-1,1 are learned, one or two a layer")
    learned_beta: bool = _key(False, "beta of the activation, then centred_softplus, is learned layer by layer")
    norm: str = _key("none", "in front of every activation; lipschitz: of a bounded, learned constant", choices=NORMS)
    spectral: bool = _key(False, "divide all weights by their spectral norms, a convolution's as a matrix")
    start: str = _key("torch", "of dense layers in the middle: torch's, or a tenth of the identity", choices=STARTS)
    objective: str = _key("crt", "the loss", choices=OBJECTIVES)
    radius: float = _key(1.58, "the radius that is trained for, and at which models are selected", 1e-9, 1e6)
    weight: float = _key(
        0.1, "of the curvature penalty, or of the worst case in `local` and `local-lipschitz`", 0.0, 1e6
    )
    sparsity: float = _key(0.01, "local-lipschitz: weight of units' distance from being constant", 0.0, 1e3)
    attack_steps: int = _key(7, "gradient steps of the attack that crt trains on", 1, 1000)
    every_rival: bool = _key(
        False, "crt, local, local-lipschitz: bounds towards all rivals, not towards the runner-up alone"
    )
    temperature: float = _key(1.0, "curvature: of the cross-entropy", 1e-3, 1e3)
    offset: float = _key(0.0, "curvature: subtracted from the label's logit in the cross-entropy", 0.0, 1e3)
    dual_step: float = _key(0.0, "curvature: how fast the weight follows accuracy minus dual_target", 0.0, 1e3)
    dual_target: float = _key(1.0, "curvature: the accuracy above which the weight rises", 0.0, 1.0)
    dual_floor: float = _key(0.0, "curvature: the smallest weight", 0.0, 1e6)
    weight_beta: float = _key(0.01, "lcnn: of the sum of all learned betas", 0.0, 1e6)
    weight_gamma: float = _key(0.01, "lcnn: of the sum of the sizes of log gamma of all lipschitz norms", 0.0, 1e6)
    gradient_penalty: float = _key(
        0.0, "lcnn: of 1e5 times the squared gradient norm over the batch; the paper's is 0.001", 0.0, 1e6
    )
    epochs: int = _key(20, "passes over the training samples", 1, 100_000)
    ramp: float = _key(
        0.15, "part of the run over which the radius, or in `local` the share of the worst case, grows", 0.0, 1.0
    )
    batch: int = _key(256, "samples a step", 1, 2**20)
    optimiser: str = _key("adam", "of torch", choices=OPTIMISERS)
    rate: float = _key(0.008, "the largest learning rate", 1e-9, 1e3)
    middle_rate: float = _key(1.0, "of dense layers in the middle, as a part of the rate", 1e-6, 1.0)
    momentum: float = _key(0.9, "of sgd; of adam and adamw, the decay of their mean gradient", 0.0, 0.9999)
    second: float = _key(0.999, "of adam and adamw, the decay of their mean squared gradient", 0.0, 0.999999)
    schedule: str = _key("one-cycle", "of the learning rate", choices=SCHEDULES)
    decay: float = _key(0.0, "weight decay", 0.0, 1e3)
    average: float = _key(0.0, "decay of an exponential average of the weights, which is then the model; 0: none", 0, 1)
    shift: float = _key(0.0, "augmentation: largest shift, in pixels", 0.0, 1e3)
    rotate: float = _key(0.0, "augmentation: largest rotation, in degrees", 0.0, 180.0)
    scale: float = _key(0.0, "augmentation: largest relative change of size", 0.0, 0.9)
    flip: bool = _key(False, "augmentation: mirror half of the images")
    noise: float = _key(0.0, "augmentation: standard deviation of noise", 0.0, 1e3)
    validation: int = _key(0, "training samples that are kept for selection; 0: a twelfth", 0, 2**40)
    checked: int = _key(500, "validation samples that are certified for selection", 1, 2**40)
    every: int = _key(0, "epochs between two selections; 0: about twelve in a run", 0, 100_000)
    seed: int = _key(0, "of weights, order, augmentation", 0, 10**18 - 1)

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            _check(item.name, getattr(self, item.name), item.metadata["limits"])
        if self.objective in SHARES and self.weight > 1:
            raise UsageError(
                f"the recipe's weight = {self.weight} is a share in `{self.objective}`, and must not be above 1"
            )
        if self.start == "identity" and (self.spectral or self.norm != "none"):
            raise UsageError(
                "start = identity sizes weights that spectral and norm would size anew; choose start = torch"
            )

    def with_values(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe with some values replaced; None leaves a value as it is."""
        given = {key: value for key, value in values.items() if value is not None}
        if unknown := sorted(set(given) - set(KEYS)):
            raise UsageError(f"a recipe has no key {listed(unknown)}; it may set {', '.join(KEYS)}")
        return dataclasses.replace(self, **{key: _typed(key, value) for key, value in given.items()})

    def values(self) -> dict[str, Any]:
        """All values by key."""
        return dataclasses.asdict(self)

    def difference(self, other: Recipe) -> str | None:
        """How the first key that differs is set in both; None for equal recipes."""
        for key, value in self.values().items():
            if value != getattr(other, key):
                return f"{key} is {shown(str(value))} here and {shown(str(getattr(other, key)))} there"
        return None


KEYS: dict[str, _Limits] = {item.name: item.metadata["limits"] for item in dataclasses.fields(Recipe)}
"""Key -> what its value may be."""
_TYPES: dict[str, type] = {item.name: type(item.default) for item in dataclasses.fields(Recipe)}

SUITED: Mapping[str, Mapping[str, Any]] = {
    "digits": {
        "arch": "mlp:64-256-10",
        "activation": "softplus:4",
        "radius": 0.5,
        "weight": 0.02,
        "rate": 0.02,
        "epochs": 60,
        "batch": 64,
        "shift": 0.6,
        "rotate": 10.0,
        "checked": 119,
        "validation": 119,
    },
    "cifar10": {
        "arch": "6c2f",
        "activation": "tanh",
        "objective": "curvature",
        "radius": 36 / 255,
        "rate": 1e-3,
        "flip": True,
    },
}
"""What a recipe says by itself of a data set, where it is not the general default."""


def suited(data: str) -> Recipe:
    """The recipe for a data set of which nothing else is said."""
    return Recipe().with_values({"data": data, **SUITED.get(data.lower(), {})})


def read_recipe(path: str) -> dict[str, Any]:
    """The values of a recipe's file: TOML, or a .safetensors that `train` wrote. Raises UsageError."""
    file = Path(path)
    if file.suffix.lower() == ".safetensors":
        return _from_metadata(file)
    return read_toml(file, "recipes")


def _from_metadata(file: Path) -> dict[str, Any]:
    from certify_cli.load.safetensors.architecture import TRAINING
    from certify_cli.load.safetensors.loader import read_declared

    _, spec = read_declared(file)
    training = spec.get(TRAINING) if isinstance(spec, dict) else None
    recipe = training.get("recipe") if isinstance(training, dict) else None
    if not isinstance(recipe, dict):
        raise UsageError(f"{file}: holds no recipe; only files that curvcert train wrote do")
    # a path that a model names is not opened: whoever wants it says so
    return {key: value for key, value in recipe.items() if key != "data" or is_named(value)}


def is_named(data: Any) -> bool:
    """Whether it is the name of a set, not of a file."""
    from certify_cli.data.datasets import named_shape

    return isinstance(data, str) and named_shape(data) is not None


def as_toml(recipe: Recipe) -> str:
    """The recipe as a TOML text that `read_recipe` reads; JSON's texts, numbers and truth values are TOML's."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in recipe.values().items())


def typed_text(key: str, text: str) -> Any:
    """The value that a text of the command line gives a key: numbers may be fractions, such as 36/255."""
    wanted = _TYPES[key]
    if wanted is str:
        return text
    try:
        if wanted is bool:
            return {"true": True, "false": False}[text.lower()]
        return integer(text) if wanted is int else ratio(text)
    except (ValueError, KeyError):
        names = {int: "an integer", float: "a number", bool: "true or false"}
        raise UsageError(f"the recipe's {key} = {quoted(text)} is not {names[wanted]}") from None


def _typed(key: str, value: Any) -> Any:
    """A value of a file as the key's type: an integer stands for the number, unless it is beyond all numbers."""
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER
    return float(value) if whole and _TYPES[key] is float else value


def _check(key: str, value: Any, limits: _Limits) -> None:
    wanted = _TYPES.get(key)
    if wanted is not None and type(value) is not wanted:
        names = {str: "a text", int: "an integer", float: "a number", bool: "true or false"}
        shown_value = str(value).lower() if isinstance(value, bool) else quoted(value)
        raise UsageError(f"the recipe's {key} = {shown_value} is not {names[wanted]}")
    if limits.choices and value not in limits.choices:
        raise UsageError(f"the recipe's {key} = {quoted(value)} is not one of {', '.join(limits.choices)}")
    if isinstance(value, int | float) and not limits.low <= value <= limits.high:
        raise UsageError(f"the recipe's {key} = {quoted(value)} is not between {limits.low:g} and {limits.high:g}")
