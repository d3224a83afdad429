"""A batch of samples with everything that more than one method needs: margins, gradients, their error bounds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from certify_cli.network.activations import Activation
from certify_cli.network.evaluate import Evaluation, deviation, evaluate, margins
from certify_cli.network.graph import Network
from certify_cli.network.propagate import Slope, Vectors, head, nonlinear_nodes, pull
from certify_cli.numerics.rounding import UNIT, down, up


@dataclass(frozen=True, eq=False)
class Point:
    """Samples x (batch, *input shape), float64, and what the network says of them."""

    network: Network
    x: Tensor

    def at(self, index: Tensor) -> Point:
        """The samples at `index`, with the prediction they have here, and what is known of them already."""
        part = Point(self.network, self.x[index])
        part.__dict__["prediction"] = self.prediction[index]
        if "evaluation" in self.__dict__:
            e = self.evaluation
            part.__dict__["evaluation"] = Evaluation([v[index] for v in e.values], [v[index] for v in e.errors])
        if "slopes" in self.__dict__:
            part.__dict__["slopes"] = {k: Slope(s.value[index], s.error[index]) for k, s in self.slopes.items()}  # type: ignore[index]
        if "adjoints" in self.__dict__:  # large, and seldom asked of a part: taken when they are
            part.__dict__["_whole"] = self.adjoints, index
        elif "_whole" in self.__dict__:
            adjoints, mine = self.__dict__["_whole"]
            part.__dict__["_whole"] = adjoints, mine[index]
        return part

    @cached_property
    def evaluation(self) -> Evaluation:
        return evaluate(self.network, self.x)

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
        """Margins of class `reference` (batch,) towards every class, and error bounds: rounding of the evaluation, and
        the distance between activations as deployed and as bounded."""
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
        found = {}
        for k in nonlinear_nodes(self.network):
            op, before = self.network.nodes[k].op, head(self.network, k)
            if isinstance(op, Activation) and op.curvature_range is not None:
                z, error = self.evaluation.values[before], self.evaluation.errors[before]
                found[k] = Slope(op.slope(z), up(op.curvature_sup * error + op.slope_error(z), 4))
        return found

    @property
    def smooth(self) -> bool:
        """Whether every nonlinear node has a slope at the samples; without, there are no gradients."""
        return len(self.slopes) == len(nonlinear_nodes(self.network))

    @cached_property
    def adjoints(self) -> dict[int, Vectors]:
        """Adjoints v_l of the margins towards every class, (batch, classes, *shape), at every nonlinear node's output;
        0: at the input."""
        if "_whole" in self.__dict__:
            adjoints, index = self.__dict__.pop("_whole")
            return {k: v.at(index) for k, v in adjoints.items()}
        eye = torch.eye(self.network.classes, dtype=self.x.dtype, device=self.x.device)
        cotangents = eye[self.prediction].unsqueeze(1) - eye.unsqueeze(0)
        return pull(self.network, cotangents, self.slopes)

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
    def about(self) -> Tensor:
        """About how far to first order every rival is, (batch, classes), for networks with or without curvature; inf
        at the prediction. No bound."""
        if self.smooth:
            return self.first_order
        with torch.enable_grad():
            x = self.x.detach().requires_grad_(True)
            logits = self.network(x)
            margins = logits.gather(1, self.prediction.unsqueeze(1)) - logits
            each = [torch.autograd.grad(m.sum(), x, retain_graph=True)[0] for m in margins.unbind(1)]
        steepness = torch.stack([g.flatten(1).norm(dim=1) for g in each], dim=1)
        return (self.margin_low / steepness).masked_fill(self.own, torch.inf)

    @cached_property
    def gradient_norm_low(self) -> Tensor:
        """Lower bounds (batch, classes) of ||g_i||."""
        entries = self.gradients.value[0, 0].numel()
        low = self.gradients.size * (1 - 4 * (entries + 10) * UNIT) - self.gradients.error
        return down(low.clamp(min=0.0), 2)
