"""Objectives: losses of a torch module that make its certificates larger (theory section 9).

An objective is made from a module and called with a batch: `objective(x, y)` gives the loss (one number with its
gradient). It holds what training keeps between steps (singular vectors, a multiplier) in its `state_dict`. Bounds are
those of `certify` at the module's present parameters, with norms that are estimates from below (`numerics.estimates`):
a value of training is no certificate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from certify_cli.bounds.global_bounds.chain import Chain
from certify_cli.bounds.global_bounds.curvature import RULES, Curvature, why_no_curvature
from certify_cli.bounds.global_bounds.expansion import product_expansion, weight_blocks
from certify_cli.bounds.global_bounds.lipschitz import Lipschitz
from certify_cli.bounds.on_ball.interval_ranges import interval_ranges
from certify_cli.bounds.remainder.tangent_bound import tangent_losses
from certify_cli.efforts import Budget
from certify_cli.errors import ModelError
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from certify_cli.network.propagate import vjp
from certify_cli.numerics.estimates import KeptVectors
from certify_cli.training.attack_points import attack_points
from certify_cli.training.differentiable import DifferentiableNetwork
from certify_cli.training.low_curvature import betas, log_gammas

BUDGET = Budget(norm=1e11, eigenvalues=1e12, blocks=0.0, writing=1e8)
"""Dense layers up to about 4,000 x 4,000 are matrices; convolutions but the smallest stay operators."""
TRAINED_RULES = tuple(name for name in RULES if name != "two layers")
"""Rules of the curvature bound that training uses; the other needs an eigenvalue of a dense matrix at every step."""
GRADIENT_SCALE = 1e5
"""Of the gradient penalty of `LowCurvature`, as in the paper."""
EVERY_PAIR = 128
"""Largest number of pairs of classes that are bounded at every step, whichever of them a batch has."""


class Objective(ABC):
    """A loss of a module.

    module: any that `certify` can load, in training or evaluation mode.   input_shape: of one sample.
    """

    def __init__(self, module: nn.Module, input_shape: Sequence[int]) -> None:
        self.module = module
        self.source = DifferentiableNetwork(module, input_shape)
        self.kept = KeptVectors()

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch: x (batch, *input_shape) in the module's dtype, labels y (batch,)."""
        with self.kept.step():
            return self._loss(x, y)

    @abstractmethod
    def _loss(self, x: Tensor, y: Tensor) -> Tensor: ...

    def state_dict(self) -> dict[str, Any]:
        """What the objective keeps between steps, for a checkpoint."""
        return {"vectors": self.kept.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.kept.load_state_dict(state["vectors"])


class Plain(Objective):
    """Cross-entropy at the samples."""

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(self.module(x), y)


class LowCurvature(Objective):
    """Cross-entropy plus what the curvature of a low-curvature network is made of (Srinivas et al., NeurIPS 2022).

    CE + weight_beta sum beta + weight_gamma sum |log gamma| + gradient_penalty GRADIENT_SCALE ||grad_x CE||^2 / batch,

    over the learned betas and gammas of the module's parts (`low_curvature`); CE is the batch's mean, and its gradient
    that by all samples together. The paper's gradient_penalty is 1e-3.
    """

    def __init__(
        self,
        module: nn.Module,
        input_shape: Sequence[int],
        *,
        weight_beta: float = 0.01,
        weight_gamma: float = 0.01,
        gradient_penalty: float = 0.0,
    ) -> None:
        super().__init__(module, input_shape)
        self.weight_beta, self.weight_gamma, self.gradient_penalty = weight_beta, weight_gamma, gradient_penalty

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        if self.gradient_penalty:
            x = x.detach().requires_grad_(True)
        entropy = cross_entropy(self.module(x), y)
        loss = entropy + self.weight_beta * sum(betas(self.module))
        loss = loss + self.weight_gamma * sum(log_gamma.abs() for log_gamma in log_gammas(self.module))
        if self.gradient_penalty:
            (gradient,) = torch.autograd.grad(entropy, x, create_graph=True)
            loss = loss + self.gradient_penalty * GRADIENT_SCALE * gradient.square().sum() / len(x)
        return loss


class _Curved(Objective):
    """An objective that needs curvature: ModelError for a module with an activation that has none."""

    def __init__(self, module: nn.Module, input_shape: Sequence[int]) -> None:
        super().__init__(module, input_shape)
        why = why_no_curvature(self.source.network())
        if why is not None:
            raise ModelError(f"{why}; curvature objectives need smooth activations such as softplus or tanh")

    def curvatures(self, y: Tensor, rivals: Tensor) -> Tensor:
        """Estimates (batch,) of the global curvature bound of the margins z_y - z_rival."""
        network = self.source.network()
        classes = network.classes
        code = y * classes + rivals
        if classes * (classes - 1) <= EVERY_PAIR:
            every = torch.arange(classes * classes, device=y.device)
            wanted = every[every // classes != every % classes]
        else:
            wanted = code.unique()
        self.kept.stands_for(wanted)
        pairs = torch.stack([wanted // classes, wanted % classes], dim=1)
        bound = global_curvature(network).lower(pairs, TRAINED_RULES)
        return bound[torch.searchsorted(wanted, code)]


def global_curvature(network: Network) -> Curvature:
    """The global curvature bounds of `certify`, by products of norms and residual blocks that are recognised."""
    weights = weight_blocks(network, BUDGET)
    expansions, chain = (product_expansion(network, weights),), Chain.of(network, BUDGET, norms_alone=True)
    return Curvature(network, weights, Lipschitz(network, expansions, chain), BUDGET)


class CurvaturePenalty(_Curved):
    """Cross-entropy with an offset at temperature T, plus the global curvature bound times a primal-dual multiplier.

    T CE((z - offset onehot(y)) / T) + multiplier * mean over the batch of the mean bound towards all rivals.

    The multiplier rises while accuracy (an exponential average over batches) is above `target`, and falls below it:
    multiplier <- max(multiplier + step (accuracy - target), floor), after every batch.
    """

    def __init__(
        self,
        module: nn.Module,
        input_shape: Sequence[int],
        *,
        temperature: float = 1.0,
        offset: float = 0.0,
        weight: float = 0.1,
        step: float = 0.0,
        target: float = 1.0,
        floor: float = 0.0,
        memory: float = 0.99,
    ) -> None:
        super().__init__(module, input_shape)
        self.temperature, self.offset = temperature, offset
        self.multiplier, self.step, self.target, self.floor = weight, step, target, floor
        self.memory, self.accuracy = memory, target

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.module(x)
        self._count(logits, y)
        shifted = logits - self.offset * nn.functional.one_hot(y, logits.shape[1])
        loss = self.temperature * cross_entropy(shifted / self.temperature, y)
        classes = logits.shape[1]
        rivals = torch.arange(classes, device=y.device).repeat(len(y))
        own = y.repeat_interleave(classes)
        penalty = self.curvatures(own[rivals != own], rivals[rivals != own]).mean()
        return loss + self.multiplier * penalty.to(loss.dtype)

    def _count(self, logits: Tensor, y: Tensor) -> None:
        correct = float((logits.detach().argmax(1) == y).double().mean())
        self.accuracy = self.memory * self.accuracy + (1 - self.memory) * correct
        self.multiplier = max(self.multiplier + self.step * (self.accuracy - self.target), self.floor)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "multiplier": self.multiplier, "accuracy": self.accuracy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.multiplier, self.accuracy = state["multiplier"], state["accuracy"]


class CRT(_Curved):
    """Curvature-regularised robust training: cross-entropy at an attack point, plus gamma K(y, rival).

    radius: of the ball in which attack points lie.   weight: gamma.   steps: of the attack.
    every_rival: K is the mean over all rivals, not that of the runner-up at the attack point.
    """

    def __init__(
        self,
        module: nn.Module,
        input_shape: Sequence[int],
        *,
        radius: float,
        weight: float = 0.01,
        steps: int = 7,
        every_rival: bool = False,
    ) -> None:
        super().__init__(module, input_shape)
        self.radius, self.weight, self.steps, self.every_rival = radius, weight, steps, every_rival

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.module(attack_points(self.module, x, y, self.radius, self.steps))
        loss = cross_entropy(logits, y)
        if self.weight == 0.0:
            return loss
        others = logits.detach().scatter(1, y.unsqueeze(1), -torch.inf)
        count = logits.shape[1] - 1 if self.every_rival else 1
        rivals = others.topk(count, dim=1).indices
        penalty = self.curvatures(y.repeat_interleave(count), rivals.flatten()).mean()
        return loss + self.weight * penalty.to(loss.dtype)


class LocalCurvature(_Curved):
    """Cross-entropy of worst-case logits: every margin lowered by its bound of the loss on the ball (theory section 4).

    The bound is the fast tier of the remainder identity, at the target radius and around each sample: no Jacobian.

    radius: of the balls.   share: of the bounded loss that is subtracted, in [0, 1]; 1 is the bound itself, and less
        than 1 a start from which training can grow.   weight: of the worst case; the sample itself has the rest.
    every_rival: False lowers the margin towards the runner-up alone, at a fraction of the time.
    """

    def __init__(
        self,
        module: nn.Module,
        input_shape: Sequence[int],
        *,
        radius: float,
        share: float = 1.0,
        weight: float = 1.0,
        every_rival: bool = True,
    ) -> None:
        super().__init__(module, input_shape)
        self.radius, self.share, self.weight, self.every_rival = radius, share, weight, every_rival

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.module(x)
        worst = worst_entropy(logits, y, lambda rivals: self.worst_margins(x, y, rivals), self.every_rival)
        return (1 - self.weight) * cross_entropy(logits, y) + self.weight * worst

    def worst_margins(self, x: Tensor, y: Tensor, rivals: Tensor) -> Tensor:
        """Estimates (batch, rivals) of lower bounds of the margins on the balls: those at x less `share` of the losses.

        rivals: (batch, rivals), classes.
        """
        network = self.source.network()
        point = EvaluatedPoints(network, x.double())
        adjoints = vjp(network, margin_rows(y, rivals, network.classes), point.slopes)
        radius = torch.full((len(x),), self.radius, dtype=torch.float64, device=x.device)
        ranges = interval_ranges(point, weight_blocks(network, BUDGET), radius)
        margin = margins_of(point.evaluation.logits, y, rivals)
        return margin - self.share * tangent_losses(point, ranges, adjoints, sharp=False)


def rivals_of(y: Tensor, classes: int) -> Tensor:
    """All classes but the label's, ascending: (batch, classes - 1)."""
    index = torch.arange(classes - 1, device=y.device).expand(len(y), -1)
    return index + (index >= y.unsqueeze(1))


def margins_of(logits: Tensor, y: Tensor, rivals: Tensor) -> Tensor:
    """Margins (batch, rivals) of the label's logit; rivals: (batch, rivals), classes."""
    return logits.gather(1, y.unsqueeze(1)) - logits.gather(1, rivals)


def margin_rows(y: Tensor, rivals: Tensor, classes: int) -> Tensor:
    """The margins as rows (batch, rivals, classes) that are multiplied with the logits, float64."""
    eye = torch.eye(classes, dtype=torch.float64, device=y.device)
    return eye[y].unsqueeze(1) - eye[rivals]


def worst_entropy(logits: Tensor, y: Tensor, worst: Callable[[Tensor], Tensor], every_rival: bool) -> Tensor:
    """Mean cross-entropy of the logits whose margins are lowered to the worst case.

    worst: from rivals (batch, rivals) to lower bounds of their margins.   every_rival: False asks for the runner-up's
    alone, and leaves the other margins.
    """
    rivals = rivals_of(y, logits.shape[1])
    if every_rival:
        margins = worst(rivals)
    else:
        plain = margins_of(logits, y, rivals)
        nearest = plain.detach().argmin(1, keepdim=True)
        margins = plain.double().scatter(1, nearest, worst(rivals.gather(1, nearest)))
    entropy = torch.logsumexp(torch.cat([-margins, torch.zeros_like(margins[:, :1])], dim=1), dim=1).mean()
    return entropy.to(logits.dtype)
