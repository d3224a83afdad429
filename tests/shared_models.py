"""The models in shared/models, loaded with the data and preprocessing that their index states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from certify_cli import load_data, load_model
from certify_cli.data.datasets import Dataset
from certify_cli.load.preprocessing import fit
from certify_cli.network.graph import Network
from tests.conftest import SHARED

INDEX: dict[str, dict[str, Any]] = (
    json.loads((SHARED / "models" / "index.json").read_text()) if (SHARED / "models").is_dir() else {}
)


def load(shared: Path, name: str, samples: str) -> tuple[Network, Dataset, dict[str, Any]]:
    entry = INDEX[name]
    if entry["dataset"] == "mnist":
        data = load_data("mnist", root=shared / "data", samples=samples, offline=True)
    else:
        data = load_data(str(shared / "data" / "cifar10_test_first761.npz"), samples=samples)
    layout = "nhwc" if entry["layout"] == "NHWC" else None
    model = load_model(shared / "models" / name)
    network = fit(model.network, tuple(data.x.shape[1:]), mean=entry["mean"], std=entry["std"], layout=layout)
    return network, data, entry
