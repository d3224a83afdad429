"""Global bounds side by side: mean certified radius by each method built on them, time and memory.

    python benchmarks/global_bounds.py --models DIR --data-root DIR [--samples 100] [--effort normal]

DIR holds ONNX files and an index.json that gives each one's data set, mean, std and public source. Every model runs in
a process of its own, so that its peak memory is its own. Radii are means over the correctly classified ones of the
first samples; a dash means that the method does not apply. The column `curvature` uses global bounds only; `anchored`
is `--method curvature` as it is, with the bounds anchored at the sample. The table is Markdown, as it stands, cut in
two, in docs/benchmarks.md.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from common import Entry, header, in_process, load, parser, peak_mib, read_index, row

SAMPLES = 100
GLOBAL = ("lipschitz", "curvature", "dual")
"""The methods whose time is taken."""
COLUMNS = (
    "model",
    "source",
    "correct",
    "product",
    "LipLT",
    "curvature",
    "anchored",
    "dual",
    "ms a sample",
    "bounds, s",
    "peak MiB",
)


def measure(path: Path, entry: Entry, root: str | None, samples: int, effort: str, threads: int) -> dict[str, Any]:
    """One model's row. The time a sample is that of all `GLOBAL` on the batch, once the global bounds are known."""
    import torch

    from certify_cli.bounds.global_bounds.curvature import why_no_curvature
    from certify_cli.bounds.global_bounds.expansion import lipschitz_expansion, product_expansion
    from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
    from certify_cli.certificates.closed_form import hybrid_radius, lipschitz_radius
    from certify_cli.certificates.dual import refined
    from certify_cli.certificates.methods import METHODS, certify_batch, select
    from certify_cli.efforts import EFFORTS
    from certify_cli.network.evaluate import exact_kernels
    from certify_cli.network.evaluated import EvaluatedPoints

    torch.set_num_threads(threads)
    network, data = load(path, entry, root, samples)
    if data.y is None:
        raise SystemExit(f"{path}: its data have no labels")
    x = data.x.double()

    methods = tuple(method for method in select("auto", network) if method.name in GLOBAL)
    with exact_kernels():
        analysis = ModelBounds(network, EFFORTS[effort])
        start = time.perf_counter()
        point = EvaluatedPoints(network, x)
        certify_batch(methods, analysis, point, attack=False)
        first = time.perf_counter() - start
        start = time.perf_counter()
        certify_batch(methods, analysis, EvaluatedPoints(network, x), attack=False)
        again = time.perf_counter() - start

        right = point.prediction == data.y
        pairs = (1 - torch.eye(network.classes)).nonzero()

        def mean(radius: torch.Tensor) -> float:
            return float(radius[right].clamp(max=1e6).mean()) if bool(right.any()) else 0.0

        def by_constant(constants: torch.Tensor) -> float:
            table = torch.zeros(network.classes, network.classes, dtype=torch.float64)
            table[pairs[:, 0], pairs[:, 1]] = constants
            radius = lipschitz_radius(point.margin_low, table[point.prediction])
            return mean(radius.masked_fill(point.own, torch.inf).amin(1))

        def by_method(name: str) -> float | None:
            method = METHODS[name]
            return (
                mean(method.certify(analysis, point, False, None).radius) if method.applies(network) is None else None
            )

        def by_curvature() -> float | None:
            """The method `curvature` without what is anchored at the sample."""
            if why_no_curvature(network) is not None:
                return None
            lower = analysis.curvature_pairs.rows(point.prediction)
            upper = analysis.curvature_pairs.columns(point.prediction)
            lipschitz = analysis.lipschitz_pairs.rows(point.prediction)
            closed = hybrid_radius(point.margin_low, point.gradient_norm, lower, lipschitz)
            radius = refined(point, closed, lower, upper, EFFORTS[effort].tangents).radius
            return mean(radius.masked_fill(point.own, torch.inf).amin(1))

        return {
            "model": path.name,
            "source": entry["source"],
            "correct": f"{int(right.sum())}/{len(x)}",
            "product": by_constant(product_expansion(network, analysis.weights).sensitivity(0, pairs)),
            "LipLT": by_constant(lipschitz_expansion(network, analysis.budget).sensitivity(0, pairs)),
            "curvature": by_curvature(),
            "anchored": by_method("curvature"),
            "dual": by_method("dual"),
            "ms a sample": 1000 * again / len(x),
            "bounds, s": first - again,
            "peak MiB": peak_mib(),
        }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--effort", default="normal")
    options = arguments.parse_args()
    index = read_index(options.models, options.data)
    if options.only:
        path, samples = options.models / options.only, options.samples or SAMPLES
        found = measure(path, index[options.only], options.data_root, samples, options.effort, options.threads)
        print(json.dumps(found))
        return
    print(header(COLUMNS), flush=True)
    for name in sorted(index):
        found = in_process(__file__, [*sys.argv[1:], "--only", name])
        if found is not None:
            print(row([found[c] for c in COLUMNS]), flush=True)


if __name__ == "__main__":
    main()
