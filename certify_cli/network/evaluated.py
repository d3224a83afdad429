"""A batch of evaluated samples: margins, slopes, adjoints and gradients, with bounds of their own rounding errors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from certify_cli.network.activations import Activation
from certify_cli.network.evaluate import Evaluation, deviation, evaluate, margins
from certify_cli.network.graph import Network
from certify_cli.network.propagate import Slope, Vectors, nonlinear_nodes, pre_activation, vjp
from certify_cli.network.row_norms import RowNorms, row_norms
from certify_cli.numerics.deadline import check
from certify_cli.numerics.rounding import UNIT, down, up
from certify_cli.numerics.trees import select

NEAREST = 64
"""Rivals whose distances are estimated, of more classes than these."""


@dataclass(frozen=True, eq=False)
class EvaluatedPoints:
    """Samples x (batch, *input shape), float64, and everything about them that more than one bound needs.

    Each figure is computed when it is first asked for. A part of a batch takes its figures from the whole one, so that
    none of them depends on how the batch is divided later.
    """

    network: Network
    x: Tensor
    whole: tuple[EvaluatedPoints, Tensor] | None = None
    """The batch that this is a part of, and the positions in it."""

    def at(self, index: Tensor) -> EvaluatedPoints:
        """The samples at `index`."""
        whole, positions = (self, index) if self.whole is None else (self.whole[0], self.whole[1][index])
        return EvaluatedPoints(self.network, self.x[index], (whole, positions))

    @cached_property
    def evaluation(self) -> Evaluation:
        if self.whole is None:
            return evaluate(self.network, self.x)
        whole, positions = self.whole
        return whole.evaluation.at(positions)

    @cached_property
    def finite(self) -> Tensor:
        """(batch,): whether every logit and its error bound is a finite number."""
        e = self.evaluation
        return (e.logits.isfinite() & e.logit_errors.isfinite()).all(1)

    @cached_property
    def prediction(self) -> Tensor:
        """(batch,): the largest logit's class; the lowest such class on a tie."""
        return self.evaluation.logits.argmax(1)

    @cached_property
    def own(self) -> Tensor:
        """(batch, classes): True at the prediction."""
        return torch.nn.functional.one_hot(self.prediction, self.network.classes).bool()

    def margins_of(self, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Margins of class `reference` (batch,) towards every class, and bounds of their errors, each (batch, classes).

        The bounds cover the rounding of the evaluation and the distance between activations as deployed and as bounded.
        """
        value, error = margins(self.evaluation.logits, self.evaluation.logit_errors, reference)
        apart = deviation(self.network).to(value.device)
        return value, up(error + apart[reference].unsqueeze(1) + apart.unsqueeze(0), 3)

    @cached_property
    def _margins(self) -> tuple[Tensor, Tensor]:
        return self.margins_of(self.prediction)

    @property
    def margin(self) -> Tensor:
        """Margins z_y - z_i (batch, classes) as computed, +inf at the prediction itself."""
        return self._margins[0].masked_fill(self.own, torch.inf)

    @property
    def margin_error(self) -> Tensor:
        """Bounds (batch, classes) of |computed - exact margin|."""
        return self._margins[1]

    @cached_property
    def margin_low(self) -> Tensor:
        """Lower bounds (batch, classes) of the margins; -inf where a logit is not finite, +inf at the prediction."""
        value = self.margin - self.margin_error
        value = torch.where(value > 0, down(value.clamp(min=0.0)), value).masked_fill(self.own, torch.inf)
        return value.masked_fill(~self.finite.unsqueeze(1), -torch.inf)

    @cached_property
    def margin_high(self) -> Tensor:
        """Upper bounds (batch, classes) of the margins."""
        return up((self.margin + self.margin_error).clamp(min=0.0), 1)

    @cached_property
    def slopes(self) -> dict[int, Slope]:
        """phi'(z_l) at the samples, with the error of z_l and of the evaluation; activations with curvature only."""
        if self.whole is not None:
            whole, positions = self.whole
            return select(whole.slopes, positions)
        found = {}
        for k in nonlinear_nodes(self.network):
            op, before = self.network.nodes[k].op, pre_activation(self.network, k)
            if isinstance(op, Activation) and op.curvature_range is not None:
                z, error = self.evaluation.values[before], self.evaluation.errors[before]
                found[k] = Slope(op.slope_at(z), up(op.curvature_sup * error + op.slope_error(z), 4))
        return found

    @cached_property
    def _row_norms(self) -> dict[int, RowNorms]:
        return {}

    def row_norms(self, sample: int) -> RowNorms:
        """The network linearised at one sample, and the norms of its rows (`network.row_norms`)."""
        if self.whole is not None:
            whole, positions = self.whole
            return whole.row_norms(int(positions[sample]))
        if sample not in self._row_norms:
            values = [value[sample : sample + 1] for value in self.evaluation.values]
            self._row_norms[sample] = row_norms(self.network, values)
        return self._row_norms[sample]

    @property
    def smooth(self) -> bool:
        """Whether every nonlinear node has a slope at the samples; without, there are no gradients."""
        return len(self.slopes) == len(nonlinear_nodes(self.network))

    @cached_property
    def adjoints(self) -> dict[int, Vectors]:
        """Adjoints v_l of the margins towards every class, (batch, classes, *shape).

        Keyed by nonlinear node, at its output; 0: at the input.
        """
        if self.whole is not None:
            whole, positions = self.whole
            return select(whole.adjoints, positions)
        eye = torch.eye(self.network.classes, dtype=self.x.dtype, device=self.x.device)
        cotangents = eye[self.prediction].unsqueeze(1) - eye.unsqueeze(0)
        return vjp(self.network, cotangents, self.slopes)

    @property
    def gradients(self) -> Vectors:
        """Gradients g_i of the margins towards every class, (batch, classes, *input shape)."""
        return self.adjoints[0]

    @cached_property
    def gradient_norm(self) -> Tensor:
        """Upper bounds (batch, classes) of ||g_i||."""
        return up(self.gradients.size + self.gradients.error, 2)

    @cached_property
    def first_order(self) -> Tensor:
        """Radii (batch, classes) that there would be without curvature; inf at the prediction. No bound."""
        return (self.margin_low / self.gradient_norm).masked_fill(self.own, torch.inf)

    @cached_property
    def distance_estimate(self) -> Tensor:
        """Distances (batch, classes) to every rival's decision boundary to first order; inf at the prediction.

        For networks with or without curvature; inf as well beyond the NEAREST rivals with the smallest margins. An
        estimate, no bound.
        """
        if self.smooth and self.network.classes <= NEAREST:
            return self.first_order
        nearest = self.margin.argsort(1)[:, :NEAREST]
        with torch.enable_grad():
            x = self.x.detach().requires_grad_(True)
            logits = self.network(x)
            margins = logits.gather(1, self.prediction.unsqueeze(1)) - logits.gather(1, nearest)
            steepness = torch.stack([_steepness(m, x) for m in margins.unbind(1)], dim=1)
        distance = self.margin_low.gather(1, nearest) / steepness
        every = torch.full_like(self.margin_low, torch.inf).scatter(1, nearest, distance)
        return every.masked_fill(self.own, torch.inf)

    @cached_property
    def gradient_norm_low(self) -> Tensor:
        """Lower bounds (batch, classes) of ||g_i||."""
        entries = self.gradients.value[0, 0].numel()
        low = self.gradients.size * (1 - 4 * (entries + 10) * UNIT) - self.gradients.error
        return down(low.clamp(min=0.0), 2)


def _steepness(margin: Tensor, x: Tensor) -> Tensor:
    """An estimate of the norms (batch,) of the gradients of margins (batch,) at x; one class at a time saves memory."""
    check()
    return torch.autograd.grad(margin.sum(), x, retain_graph=True)[0].flatten(1).norm(dim=1)
