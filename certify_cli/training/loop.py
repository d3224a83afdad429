"""The training loop of `curvcert train`: epochs, selection by certified accuracy, and all state of a run."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from certify_cli.data.datasets import digest_of
from certify_cli.errors import DataError, TrainingError
from certify_cli.load.safetensors.architecture import build
from certify_cli.training.architectures import Architecture, LayeredModule, Style, architecture
from certify_cli.training.augmentation import Augmentation
from certify_cli.training.local_lipschitz import LocalLipschitz
from certify_cli.training.low_curvature import copy_vectors
from certify_cli.training.objectives import CRT, CurvaturePenalty, LocalCurvature, LowCurvature, Objective, Plain
from certify_cli.training.recipe import Recipe
from certify_cli.training.start import middle_layers, start_from_identity
from certify_cli.training.validation import Score, score

VALIDATION = 12
"""A recipe that does not say otherwise keeps one in so many training samples for selection."""
SELECTIONS = 12
"""About so many times a run models are compared, where the recipe does not say otherwise."""
MOMENTUM_SWING = 0.05
"""By so much momentum falls and rises as the one-cycle rate rises and falls."""
MOST_SKIPPED = 20
"""Steps in a row without a finite loss and gradient after which a run is given up."""


@dataclass(frozen=True)
class Epoch:
    """What is known after an epoch.

    number: from 1.   loss: mean over its steps.   skipped: steps taken back, whose loss or gradient was not finite.
    accuracy, certified: on the validation samples, None where models were not compared.   seconds: that it took.
    """

    number: int
    loss: float
    skipped: int
    accuracy: float | None
    certified: float | None
    seconds: float


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Samples x (N, *shape), float32, and labels y (N,), in two parts.

    classes: number of classes.   sha256: of all samples and labels.
    """

    x: Tensor
    y: Tensor
    validation_x: Tensor
    validation_y: Tensor
    classes: int
    sha256: str

    @classmethod
    def of(cls, x: Tensor, y: Tensor | None, recipe: Recipe) -> TrainingData:
        """Some samples, always the same, are kept for validation. DataError without labels, or with too few samples."""
        if y is None:
            raise DataError("the data has no labels, and cannot be trained on")
        kept = recipe.validation or max(1, len(x) // VALIDATION)
        if len(x) - kept < 2:
            raise DataError(f"{len(x)} training samples are too few where {kept} are kept for validation")
        found = y.unique()
        classes = len(found)
        if classes == 1:
            raise DataError("the training samples are all of one class")
        if missing := (found != torch.arange(classes)).nonzero()[:1, 0].tolist():
            raise DataError(
                f"no training sample has the label {missing[0]}, and one has {int(found[missing[0]])}; number the "
                "classes from 0 without gaps"
            )
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))  # sets may be sorted by class
        train, validation = order[: len(x) - kept], order[len(x) - kept :]
        sha256 = digest_of(x.numpy(), y.numpy())
        return cls(x[train], y[train], x[validation], y[validation], classes, sha256)


class Training:
    """One run: all of its state, and the steps that change it.

    `epochs` trains and yields after each epoch. The same recipe, machine and number of threads give the same weights,
    whether or not the run was resumed (`checkpoint`).
    """

    def __init__(self, recipe: Recipe, data: TrainingData, device: torch.device) -> None:
        self.recipe, self.data, self.device = recipe, data, device
        torch.manual_seed(recipe.seed)
        shape = tuple(data.x.shape[1:])
        style = Style(recipe.norm, recipe.spectral, recipe.learned_beta, recipe.learned_thresholds)
        self.architecture: Architecture = architecture(recipe.arch, recipe.activation, shape, data.classes, style)
        module = self.architecture.module()
        if recipe.start == "identity":
            start_from_identity(module, torch.zeros(1, *shape, dtype=torch.float32))
        self.module: LayeredModule = module.to(device)
        self.augmentation = Augmentation(recipe, shape)
        self.objective = objective_of(recipe, self.module, shape)
        self.optimiser = _optimiser(recipe, self.module)
        self.steps = math.ceil(len(data.x) / recipe.batch)
        self.schedule = _schedule(recipe, self.optimiser, self.steps * recipe.epochs)
        self.average = (
            AveragedModel(self.module, multi_avg_fn=get_ema_multi_avg_fn(recipe.average), use_buffers=True)
            if recipe.average
            else None
        )
        self.history: list[Epoch] = []
        self.best_state: dict[str, Tensor] = {}
        self.skipped_in_row = 0

    def epochs(self, step: Callable[[float], None] = lambda loss: None) -> Iterator[Epoch]:
        """Train the epochs that are left.   step: is called after every step with its loss."""
        for number in range(len(self.history) + 1, self.recipe.epochs + 1):
            began = time.monotonic()
            loss, skipped = self._epoch(number, step)
            found = self._select() if self.compares(number) else None
            self.history.append(
                Epoch(
                    number,
                    loss,
                    skipped,
                    None if found is None else found.accuracy,
                    None if found is None else found.certified,
                    time.monotonic() - began,
                )
            )
            yield self.history[-1]

    def compares(self, number: int) -> bool:
        """Whether the model of this epoch is scored."""
        every = self.recipe.every or max(1, round(self.recipe.epochs / SELECTIONS))
        return number % every == 0 or number == self.recipe.epochs

    @property
    def best(self) -> tuple[int, Score] | None:
        """The epoch with the best score so far, of equal scores the last one; its weights are `best_state`."""
        return max(scores(self.history), key=lambda found: (found[1].key, found[0]), default=None)

    def _epoch(self, number: int, step: Callable[[float], None]) -> tuple[float, int]:
        """The mean loss of one pass over the samples, and the number of steps that were taken back."""
        self.module.train()
        total, skipped, done = 0.0, 0, 0
        order = torch.randperm(len(self.data.x))
        for position, index in enumerate(order.split(self.recipe.batch)):
            if len(index) == 1 and self.recipe.norm != "none":
                index = torch.cat([index, order[:1]])  # one sample has no variance
            _grow(self.objective, self.recipe, (number - 1 + position / self.steps) / self.recipe.epochs)
            x = self.augmentation(self.data.x[index]).to(self.device)
            loss = self._step(x, self.data.y[index].to(self.device), number)
            self.schedule.step()
            if loss is None:
                skipped += 1
                continue
            total, done = total + loss, done + 1
            step(loss)
        return (total / done if done else math.nan), skipped

    def _step(self, x: Tensor, y: Tensor, number: int) -> float | None:
        """The loss of one step; None where it, or a gradient, is not finite: then the weights stay as they are."""
        self.optimiser.zero_grad(set_to_none=True)
        statistics = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        loss = self.objective(x, y)
        loss.backward()
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        finite = torch.isfinite(loss) & torch.stack([g.isfinite().all() for g in gradients]).all()
        if not bool(finite):
            self.skipped_in_row += 1
            for buffer, before in statistics:
                buffer.copy_(before)
            if self.skipped_in_row >= MOST_SKIPPED:
                raise TrainingError(
                    f"epoch {number}: loss or gradients were not finite in {MOST_SKIPPED} steps in a row; "
                    "lower the recipe's rate or weight"
                )
            return None
        self.skipped_in_row = 0
        self.optimiser.step()
        if self.average is not None:
            self.average.update_parameters(self.module)
            copy_vectors(self.module, self.average.module)
        return float(loss.detach())

    def _select(self) -> Score:
        """Score the present model, and keep it where it is the best so far."""
        present = self.present()
        written = present.written_out()
        network = build(written.spec, written.state_dict())
        found = score(network, self.data.validation_x, self.data.validation_y, self.recipe.radius, self.recipe.checked)
        if self.best is None or found.key >= self.best[1].key:
            self.best_state = {key: tensor.detach().cpu().clone() for key, tensor in present.state_dict().items()}
        return found

    def present(self) -> LayeredModule:
        """The present model: the average, where the recipe has one."""
        source = self.module if self.average is None else self.average.module
        assert isinstance(source, LayeredModule)  # the average is of the same class
        return source

    def best_module(self) -> LayeredModule:
        """The best model so far, on the CPU, in evaluation mode, with the weights that the spec names."""
        module = copy.deepcopy(self.module).cpu().eval()
        module.load_state_dict(self.best_state)
        return module.written_out()


def scores(history: Sequence[Epoch]) -> list[tuple[int, Score]]:
    """The epochs after which models were compared, with their scores."""
    return [
        (epoch.number, Score(epoch.accuracy, epoch.certified))
        for epoch in history
        if epoch.accuracy is not None and epoch.certified is not None
    ]


MADE: Mapping[str, tuple[Callable[..., Objective], Mapping[str, str]]] = {
    "plain": (Plain, {}),
    "curvature": (
        CurvaturePenalty,
        {
            "temperature": "temperature",
            "offset": "offset",
            "weight": "weight",
            "step": "dual_step",
            "target": "dual_target",
            "floor": "dual_floor",
        },
    ),
    "crt": (CRT, {"radius": "radius", "weight": "weight", "steps": "attack_steps", "every_rival": "every_rival"}),
    "local": (LocalCurvature, {"radius": "radius", "weight": "weight", "every_rival": "every_rival"}),
    "local-lipschitz": (
        LocalLipschitz,
        {"radius": "radius", "weight": "weight", "sparsity": "sparsity", "every_rival": "every_rival"},
    ),
    "lcnn": (LowCurvature, {key: key for key in ("weight_beta", "weight_gamma", "gradient_penalty")}),
}
"""A recipe's objective -> what makes it, and the recipe's key for each of its arguments."""


def objective_of(recipe: Recipe, module: nn.Module, shape: tuple[int, ...]) -> Objective:
    """The recipe's objective for a module."""
    make, arguments = MADE[recipe.objective]
    return make(module, shape, **{name: getattr(recipe, key) for name, key in arguments.items()})


def _grow(objective: Objective, recipe: Recipe, done: float) -> None:
    """Let the radius, or the share of the worst case, grow over the first part of the run."""
    share = 1.0 if recipe.ramp == 0 else min(1.0, 0.05 + done / recipe.ramp)
    if isinstance(objective, CRT | LocalLipschitz):
        objective.radius = share * recipe.radius
    elif isinstance(objective, LocalCurvature):
        objective.share = share


def _optimiser(recipe: Recipe, module: nn.Module) -> torch.optim.Optimizer:
    middle = [p for layer in middle_layers(module) for p in layer.parameters()]
    others = [p for p in module.parameters() if not any(p is q for q in middle)]
    rates = ((others, recipe.rate), (middle, recipe.rate * recipe.middle_rate))
    parameters = [{"params": group, "lr": rate} for group, rate in rates if group]
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(
            parameters, recipe.rate, momentum=recipe.momentum, nesterov=recipe.momentum > 0, weight_decay=recipe.decay
        )
    kind = torch.optim.AdamW if recipe.optimiser == "adamw" else torch.optim.Adam
    return kind(parameters, recipe.rate, (recipe.momentum, recipe.second), weight_decay=recipe.decay)


def _schedule(recipe: Recipe, optimiser: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    schedules = torch.optim.lr_scheduler
    if recipe.schedule == "one-cycle":
        swing = min(MOMENTUM_SWING, recipe.momentum, 0.5 * (1.0 - recipe.momentum))  # 1 would never forget
        return schedules.OneCycleLR(
            optimiser,
            [group["lr"] for group in optimiser.param_groups],
            total_steps=steps + 1,
            cycle_momentum=recipe.momentum > 0,
            base_momentum=recipe.momentum - swing,
            max_momentum=recipe.momentum + swing,
        )
    if recipe.schedule == "cosine":
        return schedules.CosineAnnealingLR(optimiser, steps)
    return schedules.ConstantLR(optimiser, factor=1.0, total_iters=0)
