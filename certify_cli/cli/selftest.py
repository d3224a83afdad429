"""Networks whose exact radius is known, for the self-test of `curvcert doctor`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from certify_cli.records import Sample

if TYPE_CHECKING:
    from certify_cli.data.datasets import Dataset
    from certify_cli.load.loaded_model import LoadedModel
    from certify_cli.network.graph import Network


@dataclass(frozen=True)
class Known:
    """A network, a point of class 0, and its exact radius there.

    The certified radius must lie in [certified, exact], the attack radius in [exact, attacked]. slack: relative error
    of `exact`, where the radius of the network as stored is known up to rounding only.
    """

    name: str
    build: Callable[[], Network]
    point: tuple[float, ...]
    exact: Fraction
    certified: Fraction
    attacked: Fraction
    slack: Fraction = Fraction(0)

    def problem(self) -> tuple[LoadedModel, Dataset]:
        """The model and its one sample, built in code."""
        import torch

        from certify_cli.data.datasets import Dataset
        from certify_cli.load.loaded_model import LoadedModel
        from certify_cli.records import ModelInfo

        network = self.build()
        info = ModelInfo(path=self.name, sha256="", format="built in code", opset=None, classes=network.classes)
        data = Dataset(
            name=self.name,
            x=torch.tensor([self.point], dtype=torch.float32),
            y=torch.tensor([0], dtype=torch.int64),
            indices=(0,),
            classes=None,
            image=False,
            sha256="",
            notes=(),
        )
        return LoadedModel(network, info, network.input_shape, "float64", ()), data

    def fault(self, sample: Sample) -> str | None:
        """The fault of the sample's record, found in exact arithmetic; None where it has none."""
        exact = float(self.exact)
        if sample.prediction != 0:
            return f"predicted class {sample.prediction} where class 0 is right"
        if sample.certified_radius is None:
            return f"certified nothing ({sample.reason})"
        certified = Fraction(sample.certified_radius)
        if certified > self.exact * (1 + self.slack):
            return f"certified {sample.certified_radius!r}, more than the exact {exact}: results cannot be trusted"
        if certified < self.certified:
            return f"certified only {sample.certified_radius!r} of {exact}"
        if sample.attack_radius is None:
            return "found no attack where one was promised"
        attacked = Fraction(sample.attack_radius)
        if attacked < self.exact * (1 - self.slack):
            return f"claims an attack at {sample.attack_radius!r}, below the exact {exact}: results cannot be trusted"
        if attacked > self.attacked:
            return f"attacked only at {sample.attack_radius!r} where the exact radius is {exact}"
        return None


def _linear() -> Network:
    """Logits (3 a + 4 b, 0): the margin's gradient has norm 5 everywhere."""
    import torch

    from certify_cli.network.affine import Dense
    from certify_cli.network.graph import Builder

    builder = Builder((2,))
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    return builder.build(builder.add("logits", Dense(weight), 0))


def _softplus() -> Network:
    """Logits (softplus(a), log(1 + e)): the classes meet at a = 1."""
    import torch

    from certify_cli.network.activations.rows import softplus
    from certify_cli.network.affine import Dense
    from certify_cli.network.graph import Builder

    builder = Builder((1,))
    one = torch.ones(1, 1, dtype=torch.float64)
    hidden = builder.add("softplus", softplus(), builder.add("hidden", Dense(one), 0))
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    offset = torch.tensor([0.0, math.log1p(math.e)], dtype=torch.float64)
    return builder.build(builder.add("logits", Dense(weight, offset), hidden))


PROBLEMS = (
    # margin 7 at (1, 1) over a gradient of norm 5; both bounds are exact but for rounding
    Known(
        name="linear network",
        build=_linear,
        point=(1.0, 1.0),
        exact=Fraction(7, 5),
        certified=Fraction(7, 5) * (1 - Fraction(1, 10**6)),
        attacked=Fraction(7, 5) * (1 + Fraction(1, 10**3)),
    ),
    # from a = 3 to a = 1; the margin 1.735 over the Lipschitz constant 1 is the least that any method must reach
    Known(
        name="softplus network",
        build=_softplus,
        point=(3.0,),
        exact=Fraction(2),
        certified=Fraction(173, 100),
        attacked=Fraction(4),
        slack=Fraction(1, 10**12),
    ),
)
