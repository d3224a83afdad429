"""Certified radii of CROWN and alpha-CROWN by auto_LiRPA, where it is importable: what our radii are measured against.

Everything is to their advantage: one backward pass bounds all rivals by one matrix; only lower bounds are computed;
convolutions stay patches. The mean is subtracted from the sample, which moves no ball, instead of inside the network:
auto_LiRPA (0.7.1) pulls an added constant through padding as if padded pixels had it, and the radii come out wrong.

alpha-CROWN is the method "CROWN-Optimized" with its default settings (20 iterations over the slopes of the last
backward pass, intermediate bounds by CROWN), which stops as soon as every margin is positive. Its bisection starts from
CROWN's radius, so that it is never below that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from certify_cli.data.datasets import Dataset

STEPS = 12
TOP = 2.0
"""Bisection steps, and the radius they start below; doubled only where the whole of it is certified."""
FAR = 1e3
OPTIMISED_STEPS = 8
"""Bisection steps of alpha-CROWN, between CROWN's radius and its double."""
CROWN, OPTIMISED = "CROWN", "CROWN-Optimized"
"""auto_LiRPA's names of the two methods."""
GELU_OPSET = 20
SOUND = {"sparse_intermediate_bounds_with_ibp": False}
"""auto_LiRPA (0.7.1) leaves out rows of its sparse intermediate bounds by interval bounds, and behind an operation that
is no dense layer or convolution and comes first, those of a Euclidean ball have width 0: rows that are not stable are
then left out, and the radii come out too large, too soon. With this option they agree with dense CROWN."""


Margins = Callable[["Tensor", int, float, str], "Tensor"]
"""(sample, class, radius, auto_LiRPA's name of the method) -> lower bounds of that class's margins towards all
others on the ball."""
Predict = Callable[["Tensor"], list[int]]
"""A batch of samples -> their classes."""


def importable() -> bool:
    return find_spec("auto_LiRPA") is not None


def classifier(
    path: Path, mean: list[float], std: list[float], shape: tuple[int, ...], nhwc: bool
) -> tuple[Predict, Margins, str]:
    """An ONNX classifier of samples of `shape` (without the batch), its bound, and what to say of its form."""
    import torch
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm
    from auto_LiRPA.operators.gelu import GELU
    from auto_LiRPA.utils import stop_criterion_min
    from torch import nn

    from certify_cli.torchvision_schemas import import_torchvision

    import_torchvision()
    import onnx
    from onnx2torch import convert
    from onnx2torch.node_converters.registry import add_converter
    from onnx2torch.utils.common import OperationConverterResult, onnx_mapping_from_node

    class LogOfExp(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(1 + torch.exp(x))

    class Scaled(nn.Module):
        """The model on (x - mean), divided by std, in its own layout."""

        def __init__(self, model: nn.Module, sizes: tuple[int, ...]) -> None:
            super().__init__()
            self.model, self.sizes = model, sizes
            self.factor = 1 / torch.tensor(std).reshape(1, -1, *[1] * (len(shape) - 1))

        def forward(self, x: Tensor) -> Tensor:
            if std != [1.0] * len(std):
                x = x * self.factor
            if nhwc:
                x = x.permute(0, 2, 3, 1)
            elif self.sizes != shape:
                x = x.reshape(-1, *self.sizes)
            return self.model(x)

    @add_converter(operation_type="Gelu", version=GELU_OPSET)
    def gelu(node: Any, graph: Any) -> Any:
        if node.attributes.get("approximate", "none") != "none":
            raise NotImplementedError("auto_LiRPA has no relaxation of GELU's tanh form")
        return OperationConverterResult(GELU(), onnx_mapping_from_node(node))

    file = onnx.load(path)
    model, note = convert(file).eval(), ""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Softplus):
            model.set_submodule(name, LogOfExp())
            note = "log(1+exp)"
    initialised = {tensor.name for tensor in file.graph.initializer}
    source = next(value for value in file.graph.input if value.name not in initialised)
    scaled = Scaled(model, tuple(dim.dim_value for dim in source.type.tensor_type.shape.dim[1:]))
    middle = torch.tensor(mean).reshape(-1, *[1] * (len(shape) - 1))
    with torch.no_grad():
        classes = scaled(torch.zeros(1, *shape)).shape[1]
        # a module for each method: slopes that were optimised stay in the module
        bounded = {
            method: BoundedModule(scaled, torch.zeros(1, *shape), bound_opts=dict(SOUND))
            for method in (CROWN, OPTIMISED)
        }
    settings = {"stop_criterion_func": stop_criterion_min()}
    bounded[OPTIMISED].set_bound_opts({"optimize_bound_args": settings})
    eye = torch.eye(classes)

    def predict(samples: Tensor) -> list[int]:
        with torch.no_grad():
            return [int(scaled((x - middle).unsqueeze(0)).argmax()) for x in samples]

    def bound(x: Tensor, label: int, radius: float, method: str) -> Tensor:
        rivals = torch.cat([eye[:label], eye[label + 1 :]])
        ball = BoundedTensor((x - middle).unsqueeze(0), PerturbationLpNorm(norm=2, eps=radius))
        with torch.set_grad_enabled(method == OPTIMISED):
            low, _ = bounded[method].compute_bounds(
                x=(ball,), C=(eye[label] - rivals)[None], method=method, bound_upper=False
            )
        return low[0].detach()

    return predict, bound, note


def bisected(holds: Callable[[float], bool], low: float = 0.0, top: float = TOP, steps: int = STEPS) -> float:
    """The largest radius between `low`, which is taken to hold, and `top` that was seen to hold.

    Where all of the steps hold, the search goes on from there to the double of `top`.
    """
    high = top
    for _ in range(steps):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return bisected(holds, low, 2 * top, steps) if high == top and top < FAR else low


def measure(path: Path, entry: dict[str, Any], data: Dataset, optimised: bool = False) -> dict[str, Any]:
    """Radii of the correctly classified samples by index, milliseconds a sample, and a note on the form.

    optimised: alpha-CROWN's radii, too, under the key "optimised".
    """
    x = data.x.float()
    nhwc = entry["layout"] == "NHWC"
    predict, bound, note = classifier(path, entry["mean"] or [0.0], entry["std"] or [1.0], tuple(x.shape[1:]), nhwc)
    predicted = predict(x)
    right = [k for k, label in enumerate(predicted) if data.y is None or label == int(data.y[k])]

    def holds(k: int, method: str) -> Callable[[float], bool]:
        return lambda radius: bool((bound(x[k], predicted[k], radius, method) > 0).all())

    if right:  # what a first call prepares
        bound(x[right[0]], predicted[right[0]], 0.1, CROWN)
    start = time.perf_counter()
    radii = {k: bisected(holds(k, CROWN)) for k in right}
    seconds = time.perf_counter() - start
    result = {"radii": radii, "ms": 1000 * seconds / max(1, len(right)), "note": note}
    if optimised:
        result["optimised"] = {
            k: bisected(holds(k, OPTIMISED), low=radii[k], top=2 * radii[k], steps=OPTIMISED_STEPS) for k in right
        }
    return result
