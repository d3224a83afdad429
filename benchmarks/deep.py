"""Deep networks on images of real size: loading, global bounds, and a sample by one method.

    python benchmarks/deep.py [--networks resnet18,vgg11_bn] [--samples 2] [--size 224] [--classes 1000]
                              [--method lipschitz] [--effort normal] [--seconds 600] [--threads 2]

Networks of torchvision with the weights that it draws, or `cifar_resnet20` (8, 14, ..., of 6 n + 2 layers, shortcuts
that slice and pad, as on CIFAR-10), in evaluation mode, exported to ONNX in a folder that is removed afterwards, on
images of uniform noise. Every network runs in a process of its own, so that its peak memory is its own. L: the largest
Lipschitz constant of the margins of the predicted classes; the radius is the first sample's, 0 where nothing is proved.
The table is Markdown.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import header, in_process, parser, peak_mib, row

if TYPE_CHECKING:
    from torch import Tensor, nn

NETWORKS = ("resnet18", "vgg11_bn", "mobilenet_v2", "densenet121", "squeezenet1_1")
CIFAR = "cifar_resnet"
SAMPLES, SECONDS = 2, 600.0
COLUMNS = ("network", "parameters", "load, s", "bounds, s", "s a sample", "L", "radius", "peak MiB")


def cifar_resnet(depth: int, classes: int) -> nn.Module:
    """A residual network of 6 n + 2 layers for small images, in three stages of 16, 32 and 64 channels."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, before: int, channels: int) -> None:
            super().__init__()
            self.stride = channels // before
            self.inner = nn.Sequential(
                nn.Conv2d(before, channels, 3, self.stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
                nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels),
            )  # fmt: skip
            self.fresh = channels - before

        def forward(self, x: Tensor) -> Tensor:
            short = x[:, :, :: self.stride, :: self.stride]
            padded = nn.functional.pad(short, (0, 0, 0, 0, self.fresh // 2, self.fresh // 2))
            return torch.relu(self.inner(x) + (padded if self.fresh else x))

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))

    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    before = 16
    for channels in (16, 32, 64):
        for _ in range((depth - 2) // 6):
            layers.append(Block(before, channels))
            before = channels
    module = nn.Sequential(*layers, Mean(), nn.Linear(64, classes))
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight)
    return module


def export(name: str, path: Path, size: int, classes: int) -> int:
    """Write the network as ONNX, with a free batch; returns its number of parameters."""
    import torch

    from certify_cli.torchvision_schemas import import_torchvision

    torch.manual_seed(0)
    if name.startswith(CIFAR):
        module = cifar_resnet(int(name.removeprefix(CIFAR)), classes).eval()
    else:
        import_torchvision()
        from torchvision import models

        module = getattr(models, name)(weights=None, num_classes=classes).eval()
    names: dict[str, Any] = {"input_names": ["input"], "output_names": ["logits"]}
    free = {"input": {0: "batch"}, "logits": {0: "batch"}}
    sample = (torch.zeros(1, 3, size, size),)
    torch.onnx.export(module, sample, path, dynamo=False, dynamic_axes=free, **names)
    return sum(parameter.numel() for parameter in module.parameters())


def measure(
    name: str, path: Path, parameters: int, samples: int, method: str, effort: str, seconds: float, threads: int
) -> dict[str, Any]:
    """One network's row. The bounds are those of the predicted classes; a sample's time includes its evaluation."""
    import torch

    from certify_cli import load_model
    from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
    from certify_cli.certificates.methods import certify_batch, select
    from certify_cli.efforts import EFFORTS
    from certify_cli.network.evaluate import exact_kernels
    from certify_cli.network.evaluated import EvaluatedPoints
    from certify_cli.numerics.deadline import Deadline, OutOfTime

    torch.set_num_threads(threads)
    begun = time.perf_counter()
    network = load_model(path).network
    loaded = time.perf_counter()
    images = torch.rand(samples, *network.input_shape, generator=torch.Generator().manual_seed(0)).double()
    methods = select(method, network)
    radii = []
    with exact_kernels():
        predicted = torch.cat([network(x.unsqueeze(0)).argmax(1) for x in images])
        bounds = ModelBounds(network, EFFORTS[effort], expected=predicted)
        start = time.perf_counter()
        for each in methods:
            each.prepare(bounds, predicted)
        largest = float(bounds.lipschitz_pairs.rows(predicted).max())
        bounded = time.perf_counter()
        for x in images:
            point = EvaluatedPoints(network, x.unsqueeze(0))
            with Deadline("seconds", seconds).in_force(), suppress(OutOfTime):
                radii.append(float(certify_batch(methods, bounds, point, attack=False).radius))
        end = time.perf_counter()
    return {
        "network": name,
        "parameters": f"{parameters / 1e6:.3g} M",
        "load, s": loaded - begun,
        "bounds, s": bounded - start,
        "s a sample": (end - bounded) / samples,
        "L": f"{largest:.3g}",
        "radius": f"{(radii or [0.0])[0]:.3g}",
        "peak MiB": peak_mib(),
    }


def measured(name: str, size: int, classes: int, arguments: list[str]) -> dict[str, Any] | None:
    """The row of a network exported for the purpose; None, with a word on stderr, where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.onnx"
        count = export(name, path, size, classes)
        found: dict[str, Any] | None
        found = in_process(__file__, [*arguments, "--only", name, "--exported", str(path), str(count)])
    return found


def main() -> None:
    arguments = parser(__doc__, models_required=False)
    arguments.add_argument("--networks", default=",".join(NETWORKS))
    arguments.add_argument("--method", default="lipschitz")
    arguments.add_argument("--effort", default="normal")
    arguments.add_argument("--seconds", type=float, default=SECONDS, help="that a sample may take")
    arguments.add_argument("--size", type=int, default=224, help="height and width; for VGG a multiple of 224")
    arguments.add_argument("--classes", type=int, default=1000)
    arguments.add_argument("--exported", nargs=2, metavar=("FILE", "PARAMETERS"), help="used internally")
    options = arguments.parse_args()
    if options.only:
        file, parameters = options.exported
        samples = options.samples or SAMPLES
        found = measure(
            options.only, Path(file), int(parameters), samples, options.method, options.effort, options.seconds,
            options.threads,
        )  # fmt: skip
        print(json.dumps(found))
        return
    print(header(COLUMNS, ("network",)), flush=True)
    for name in options.networks.split(","):
        found = measured(name, options.size, options.classes, sys.argv[1:])
        if found is not None:
            print(row([found[c] for c in COLUMNS]), flush=True)


if __name__ == "__main__":
    main()
