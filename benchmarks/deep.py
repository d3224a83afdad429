"""Deep networks on images of real size: loading, global Lipschitz bounds, and a sample by them.

    python benchmarks/deep.py [--samples 2] [--size 224] [--classes 1000] [--effort normal] [--threads 2]

Networks of torchvision with the weights that it draws, in evaluation mode, exported to ONNX in a folder that is
removed afterwards, on images of uniform noise. Every network runs in a process of its own, so that its peak memory is
its own. L is the largest Lipschitz constant of the margins of the predicted classes; the radius is the first sample's
by `--method lipschitz`, 0 where rounding leaves its class open. The table is Markdown.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import header, in_process, parser, peak_mib, row

NETWORKS = ("resnet18", "vgg11_bn", "mobilenet_v2", "densenet121", "squeezenet1_1")
SAMPLES = 2
COLUMNS = ("network", "parameters", "load, s", "bounds, s", "s a sample", "L", "radius", "peak MiB")


def export(name: str, path: Path, size: int, classes: int) -> int:
    """Write the network as ONNX, with a free batch; returns its number of parameters."""
    import torch

    from certify_cli.torchvision_schemas import import_torchvision

    import_torchvision()
    from torchvision import models

    torch.manual_seed(0)
    module = getattr(models, name)(weights=None, num_classes=classes).eval()
    names: dict[str, Any] = {"input_names": ["input"], "output_names": ["logits"]}
    free = {"input": {0: "batch"}, "logits": {0: "batch"}}
    sample = (torch.zeros(1, 3, size, size),)
    torch.onnx.export(module, sample, path, dynamo=False, dynamic_axes=free, **names)
    return sum(parameter.numel() for parameter in module.parameters())


def measure(name: str, path: Path, parameters: int, samples: int, effort: str, threads: int) -> dict[str, Any]:
    """One network's row. The bounds are those of the predicted classes; a sample's time includes its evaluation."""
    import torch

    from certify_cli import load_model
    from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
    from certify_cli.certificates.methods import METHODS
    from certify_cli.efforts import EFFORTS
    from certify_cli.network.evaluate import exact_kernels
    from certify_cli.network.evaluated import EvaluatedPoints

    torch.set_num_threads(threads)
    begun = time.perf_counter()
    network = load_model(path).network
    loaded = time.perf_counter()
    images = torch.rand(samples, *network.input_shape, generator=torch.Generator().manual_seed(0)).double()
    with exact_kernels():
        predicted = torch.cat([network(x.unsqueeze(0)).argmax(1) for x in images])
        bounds = ModelBounds(network, EFFORTS[effort], expected=predicted)
        start = time.perf_counter()
        largest = float(bounds.lipschitz_pairs.rows(predicted).max())
        bounded = time.perf_counter()
        radii = [
            float(METHODS["lipschitz"].certify(bounds, EvaluatedPoints(network, x.unsqueeze(0)), False, None).radius)
            for x in images
        ]
        end = time.perf_counter()
    return {
        "network": name,
        "parameters": f"{parameters / 1e6:.1f} M",
        "load, s": loaded - begun,
        "bounds, s": bounded - start,
        "s a sample": (end - bounded) / samples,
        "L": f"{largest:.3g}",
        "radius": f"{radii[0]:.3g}",
        "peak MiB": peak_mib(),
    }


def main() -> None:
    arguments = parser(__doc__, models_required=False)
    arguments.add_argument("--effort", default="normal")
    arguments.add_argument("--size", type=int, default=224, help="height and width; for VGG a multiple of 224")
    arguments.add_argument("--classes", type=int, default=1000)
    arguments.add_argument("--exported", nargs=2, metavar=("FILE", "PARAMETERS"), help="used internally")
    options = arguments.parse_args()
    if options.only:
        file, parameters = options.exported
        samples = options.samples or SAMPLES
        found = measure(options.only, Path(file), int(parameters), samples, options.effort, options.threads)
        print(json.dumps(found))
        return
    print(header(COLUMNS, ("network",)), flush=True)
    for name in NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.onnx"
            count = export(name, path, options.size, options.classes)
            found = in_process(__file__, [*sys.argv[1:], "--only", name, "--exported", str(path), str(count)])
        if found is not None:
            print(row([found[c] for c in COLUMNS]), flush=True)


if __name__ == "__main__":
    main()
