"""Which torchvision classifiers load: exported with random weights by both of torch's exporters, at a small image size.

    python benchmarks/exports.py [--size 64] [--only resnet] [--folder DIR]

Prints, for every model and exporter, the seconds that loading takes, or the sentence that refuses the file. Nothing is
downloaded. A file that loads has been compared with onnxruntime on the way.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from pathlib import Path

import torch

from certify_cli.errors import ModelError
from certify_cli.torchvision_schemas import import_torchvision

SEED = 0
EXPORTERS = {"legacy": {"dynamo": False, "opset_version": 17}, "default": {"dynamo": True, "verbose": False}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--largest", type=float, default=60e6, help="parameters of the largest model that is tried")
    parser.add_argument("--folder", type=Path, help="keep the files here")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    import_torchvision()
    import torchvision.models as zoo

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in zoo.list_models(module=zoo):
            if options.only in name:
                weights = zoo.get_model_weights(name)
                if weights.DEFAULT.meta["num_params"] > options.largest:
                    print(f"{name:<22} left out: more than {options.largest:.3g} parameters", flush=True)
                    continue
                for exporter in EXPORTERS:
                    print(f"{name:<22} {exporter:<8} {outcome(name, exporter, options.size, folder)}", flush=True)


def outcome(name: str, exporter: str, size: int, folder: Path) -> str:
    """The outcome of one model and exporter, a sentence."""
    import torchvision.models as zoo

    from certify_cli import load_model

    path = folder / f"{name}-{exporter}.onnx"
    if not path.exists():
        torch.manual_seed(SEED)
        try:
            module = zoo.get_model(name, weights=None, **({"init_weights": True} if "googlenet" in name else {})).eval()
            torch.onnx.export(module, (torch.rand(1, 3, size, size),), path, **EXPORTERS[exporter])
        except Exception as error:  # the exporters fail on some models in their own ways
            path.unlink(missing_ok=True)
            return f"not exported: {type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"
    started = time.perf_counter()
    try:
        loaded = load_model(path)
    except ModelError as error:
        return f"refused in {time.perf_counter() - started:.1f} s: {str(error).removeprefix(f'{path}: ')}"
    nodes = len(loaded.network.nodes)
    return f"loads in {time.perf_counter() - started:.1f} s, {nodes} nodes {'; '.join(loaded.notes)}"


if __name__ == "__main__":
    main()
