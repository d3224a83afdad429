"""The table of `curvcert bounds`: how much each layer adds to a network's Lipschitz constant and curvature."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from certify_cli.bounds.global_bounds.curvature import why_no_curvature
from certify_cli.bounds.global_bounds.expansion import node_lipschitz
from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.efforts import EFFORTS
from certify_cli.load.loaded_model import LoadedModel
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.graph import Network
from certify_cli.network.propagate import nonlinear_nodes, pre_activation
from certify_cli.numerics.rounding import up


@dataclass(frozen=True)
class LayerRow:
    """One row of the table: a nonlinear layer, or the logits in the last row. Every number is an upper bound.

    norm: spectral norm of the weights that lead to the layer.
    slope: largest slope of the nonlinearity; None for the logits.
    lipschitz: Lipschitz constant of input -> the layer's value; for the logits, of the worst margin.
    curvature: part of this and all earlier layers in the worst margin's Hessian norm.
    share: that part over the whole, at most 1.

    `curvature` and `share` are None where a nonlinearity has no bounded second derivative.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    norm: float | None
    slope: float | None
    lipschitz: float
    curvature: float | None
    share: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def layer_table(network: Network, effort: str = "normal") -> list[LayerRow]:
    """The rows of `curvcert bounds`, first layer first; the last row is the worst pair of classes at the logits."""
    with exact_kernels():
        return _rows(network, ModelBounds(network, EFFORTS[effort]))


def _rows(network: Network, model_bounds: ModelBounds) -> list[LayerRow]:
    lipschitz, weights = model_bounds.lipschitz, model_bounds.weights
    pairs = (~torch.eye(network.classes, dtype=torch.bool, device=network.device)).nonzero()
    layers = nonlinear_nodes(network)
    parts = None
    if why_no_curvature(network) is None:
        terms = model_bounds.curvature.terms(pairs)
        parts = up(terms[int(terms.sum(1).argmax())].cumsum(0), terms.shape[1]).tolist()

    def norm_into(target: int) -> float:
        norms = [block.norm for (t, _), block in weights.items() if t == target]
        return norms[0] if len(norms) == 1 else up(math.hypot(*norms), len(norms) + 2)

    rows = []
    for position, k in enumerate(layers):
        node, target = network.nodes[k], pre_activation(network, k)
        slope = node_lipschitz(network, k)
        curvature = parts[position] if parts else None
        share = curvature / parts[-1] if parts and curvature is not None and parts[-1] > 0 else None
        rows.append(
            LayerRow(node.name, node.op.title, node.shape, norm_into(target), slope,
                     lipschitz.to_output(k), curvature, share)
        )  # fmt: skip
    last = network.nodes[-1]
    worst = float(lipschitz.of_margins(pairs).max())
    total = parts[-1] if parts else None
    share = 1.0 if total else None
    rows.append(LayerRow(last.name, "logits", last.shape, norm_into(len(network.nodes) - 1), None, worst, total, share))
    return rows


def bound(model: LoadedModel, effort: str = "normal") -> list[LayerRow]:
    """Layer-by-layer bounds of a loaded model, over its own input (before mean and std of `fit`)."""
    return layer_table(model.network, effort)
