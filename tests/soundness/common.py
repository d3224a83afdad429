"""What the soundness tests share: certify a batch by any method, flip it, and write down small networks."""

from __future__ import annotations

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.certificates.certificates import Certificates
from certify_cli.certificates.methods import METHODS, certify_batch, select
from certify_cli.efforts import EFFORTS
from certify_cli.names import AUTO
from certify_cli.network.affine import Dense
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Builder, Network


def certify(
    network: Network, x: Tensor, method: str = "auto", effort: str = "normal", attack: bool = True
) -> Certificates:
    """Certificates of the samples x (batch, *input shape)."""
    with exact_kernels():
        return certify_batch(
            select(method, network), ModelBounds(network, EFFORTS[effort]), EvaluatedPoints(network, x), attack
        )


def searches(method: str) -> bool:
    """Whether `method` searches, so that it takes its time."""
    return method == AUTO or METHODS[method].searched


def every_radius(network: Network, x: Tensor, effort: str = "normal") -> dict[str, float]:
    """The certified radius of the one sample x by each method that applies, and by `auto`."""
    names = [name for name, method in METHODS.items() if method.applies(network) is None]
    return {name: float(certify(network, x, name, effort, False).radius) for name in (*names, AUTO)}


def flips(network: Network, x: Tensor, moved: Tensor, radius: float) -> bool:
    """Whether `moved` lies strictly inside the ball of `radius` around x and has another prediction: a disproof."""
    near = float((moved - x).norm()) < radius
    return near and int(network(moved).argmax()) != int(network(x).argmax())


def tensor(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def dense_stack(*parts: object) -> Network:
    """A network from (weight, bias or None) pairs and activations, in order; the first pair sets the input size."""
    first = parts[0]
    assert isinstance(first, tuple)
    builder, last = Builder((first[0].shape[1],)), 0
    for number, part in enumerate(parts):
        op = Dense(*part) if isinstance(part, tuple) else part
        last = builder.add(f"n{number}", op, last)  # type: ignore[arg-type]
    return builder.build(last)


def margins(network: Network, x: Tensor, prediction: Tensor) -> Tensor:
    """z_y - z_i (batch, classes), +inf at y; differentiable."""
    logits = network(x)
    value = logits.gather(1, prediction.unsqueeze(1)) - logits
    own = torch.nn.functional.one_hot(prediction, network.classes).bool()
    return value.masked_fill(own, torch.inf)
