"""Every method on every model, against CROWN and the attack: mean certified radii, time and memory.

    python benchmarks/methods.py --models DIR --data-root DIR [--data cifar10=FILE.npz] [--peers FILE.json]
    python benchmarks/methods.py ... --columns composition,curvature,dual,fast,local,max,attack
    python benchmarks/methods.py --scaling [--svg FILE.svg]

DIR holds ONNX files and an index.json (see global_bounds.py; train_mlps.py makes such a folder). One Markdown row a
model. Radii are means over the correctly classified ones of the first samples, by column:

- a method's name: the method, `auto` all that apply; a dash where one cannot apply;
- fast, max: `local` by effort; composition: the closed form at the sample, with the compositional curvature bound only;
- attack: the nearest adversarial example by `--attack search`, or promised by a certificate;
- CROWN: auto_LiRPA's backward mode, measured in the same run with as many threads, by a bisection of 12 steps a sample
  (to 1/2048) in float32; from --peers ("stored") where auto_LiRPA is not importable. `log(1+exp)` marks softplus
  written so, as auto_LiRPA relaxes nothing nearer.

The shares (of CROWN, of composition, of the attack) are those of `auto`, or of `local` where `auto` is not asked for.
Milliseconds are per sample, the correct ones in one batch (CROWN: one by one), after a first call, with the global
bounds known: those are "bounds, s". Every model is measured in a process of its own, and CROWN in another: peaks
include some 350 MiB of libraries. A certified radius above an attack ends the benchmark with an error.

--peers: {"models": {NAME: {"n": samples, "radii": [n, 0 where misclassified]}}}; n is also how many samples are used.
--scaling: how time and memory of `local` grow with width and depth, on random networks, as a table and (with
matplotlib) an SVG.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import crown
import scaling
from common import Entry, header, in_process, load, parser, peak_mib, read_index, row

if TYPE_CHECKING:
    from torch import Tensor

    from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
    from certify_cli.certificates.certificates import Certificates
    from certify_cli.network.evaluated import EvaluatedPoints
    from certify_cli.network.graph import Network

LARGEST = 1e6
"""Radii count as no more than this in a mean."""
SAMPLES, OF_CONVOLUTIONS = 100, 20
"""How many samples, where neither --samples nor --peers says."""

FIRST = 10
"""Of so many samples the share of CROWN is given as well."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A network, the samples x (count, *shape) that it classifies correctly, and its global bounds at one effort."""

    network: Network
    x: Tensor
    analysis: ModelBounds

    @property
    def point(self) -> EvaluatedPoints:
        """The samples, with nothing computed yet: a method that is timed must not find another's work."""
        from certify_cli.network.evaluated import EvaluatedPoints

        return EvaluatedPoints(self.network, self.x)

    def first(self, index: Tensor) -> Subject:
        return Subject(self.network, self.x[index], self.analysis)

    @cached_property
    def composition(self) -> Tensor:
        """The compositional curvature bounds of all margins, (classes, classes)."""
        import torch

        from certify_cli.bounds.global_bounds.curvature import COMPOSITION

        pairs = (1 - torch.eye(self.network.classes)).nonzero()
        table = torch.zeros(self.network.classes, self.network.classes, dtype=torch.float64)
        table[pairs[:, 0], pairs[:, 1]] = self.analysis.curvature.lower(pairs, COMPOSITION)
        return table


def by_composition(subject: Subject) -> Tensor:
    import torch

    from certify_cli.certificates.closed_form import curvature_radius

    point = subject.point
    radius = curvature_radius(point.margin_low, point.gradient_norm, subject.composition[point.prediction])
    return radius.masked_fill(point.own, torch.inf).amin(1)


def by_method(name: str) -> Callable[[Subject], Tensor]:
    def radii(subject: Subject) -> Tensor:
        from certify_cli.certificates.methods import certify_batch, select

        return certify_batch(select(name, subject.network), subject.analysis, subject.point, False).radius

    return radii


def cheapest(subject: Subject, attack: bool = False) -> tuple[EvaluatedPoints, Certificates]:
    """The samples and their certificates by the cheapest method, of those with attacks where one applies."""
    from certify_cli.bounds.global_bounds.curvature import why_no_curvature
    from certify_cli.certificates.methods import METHODS

    name = "curvature" if why_no_curvature(subject.network) is None else "lipschitz"
    point = subject.point
    return point, METHODS[name].certify(subject.analysis, point, attack and METHODS[name].attacks, None)


def by_attack(subject: Subject) -> Tensor:
    """Distances of the adversarial examples that the search finds, or a certificate promises; inf where none."""
    import torch

    from certify_cli.attacks.ddn import nearest_attacks

    point, found = cheapest(subject, attack=True)
    _, norm = nearest_attacks(point, found.near, found.radius, subject.analysis.effort)
    return torch.minimum(norm.nan_to_num(nan=torch.inf), found.attack.nan_to_num(nan=torch.inf))


COLUMNS: dict[str, tuple[str, Callable[[Subject], Tensor]]] = {
    "composition": ("normal", by_composition),
    **{name: ("normal", by_method(name)) for name in ("lipschitz", "curvature", "dual")},
    "fast": ("fast", by_method("local")),
    "local": ("normal", by_method("local")),
    "max": ("max", by_method("local")),
    **{name: ("normal", by_method(name)) for name in ("linear", "local-lipschitz", "auto")},
    "attack": ("normal", by_attack),
}
"""By column: the effort, and the radii (count,) that are measured."""
USUAL = "lipschitz,curvature,dual,local,linear,local-lipschitz,auto,attack"
OF_CURVATURE = ("composition", "curvature", "dual", "fast", "local", "max")


def measure(network: Network, x: Tensor, labels: Tensor | None, columns: list[str]) -> dict[str, Any]:
    """Radii and milliseconds a sample by column, over the samples that are classified correctly, and their indices."""
    import torch

    from certify_cli.bounds.global_bounds.curvature import why_no_curvature
    from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
    from certify_cli.efforts import EFFORTS
    from certify_cli.network.evaluated import EvaluatedPoints

    if why_no_curvature(network) is not None:
        columns = [column for column in columns if column not in OF_CURVATURE]
    predicted = EvaluatedPoints(network, x).prediction
    right = (torch.ones_like(predicted, dtype=torch.bool) if labels is None else predicted == labels).nonzero()[:, 0]
    if not len(right):
        return {"reason": "no sample is classified correctly"}
    classes = predicted[right]
    each = torch.stack([(classes == c).nonzero()[0, 0] for c in classes.unique()])  # one sample a predicted class
    subjects, bounds = {}, 0.0
    for effort in dict.fromkeys(COLUMNS[column][0] for column in columns):
        subjects[effort] = Subject(network, x[right], ModelBounds(network, EFFORTS[effort]))
        some = subjects[effort].first(each)
        _, cold = _timed(lambda some=some: cheapest(some))  # type: ignore[misc]
        _, warm = _timed(lambda some=some: cheapest(some))  # type: ignore[misc]
        bounds = max(bounds, cold - warm)
    radii, ms = {}, {}
    for column in columns:
        effort, radius = COLUMNS[column]
        subject = subjects[effort]
        if column == "composition":
            _ = subject.composition
        radius(subject.first(each[:1]))  # a first call prepares more than later ones
        found, seconds = _timed(lambda radius=radius, subject=subject: radius(subject))  # type: ignore[misc]
        radii[column], ms[column] = found.tolist(), 1000 * seconds / len(right)
    return {"right": right.tolist(), "count": len(x), "radii": radii, "ms": ms, "bounds": bounds}


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def child(path: Path, entry: Entry, options: argparse.Namespace) -> dict[str, Any]:
    """One measurement in this process: the columns asked for, or CROWN."""
    import torch

    from certify_cli.network.evaluate import exact_kernels

    torch.set_num_threads(options.threads)
    network, data = load(path, entry, options.data_root, options.samples)
    if options.columns == ["CROWN"]:
        result = crown.measure(path, entry, data)
    else:
        with exact_kernels():
            result = measure(network, data.x.double(), data.y, options.columns)
    return result | {"peak": peak_mib()}


def stored_crown(peer: Entry) -> dict[str, Any]:
    return {"radii": {str(k): r for k, r in enumerate(peer["radii"])}, "ms": None, "peak": None, "note": "stored"}


def mean(values: list[float]) -> float | None:
    return math.fsum(min(v, LARGEST) for v in values) / len(values) if values else None


def check_sound(name: str, radii: dict[str, list[float]], rival: list[float] | None) -> int:
    """The number of CROWN's radii above an attack: they are computed in float32 without bounds of its rounding, and for
    some convolutional networks they are plainly wrong. Ends the benchmark where a certificate of ours is above one.
    """
    for column, values in radii.items():
        refuted = above(values, radii["attack"])
        if refuted:
            raise SystemExit(f"{name}: {column} certifies more than an attack allows, on correct samples {refuted}")
    return len(above(rival or [], radii["attack"]))


def above(values: list[float], attack: list[float]) -> list[int]:
    """Positions of the radii above the attack's."""
    return [k for k, (radius, found) in enumerate(zip(values, attack, strict=bool(values))) if radius > found]


def table_row(name: str, ours: dict[str, Any], theirs: dict[str, Any] | None, columns: list[str]) -> list[Any]:
    """A row of the table, in the order of `table_columns`."""
    radii: dict[str, list[float]] = ours["radii"]
    rival = None if theirs is None else [theirs["radii"].get(str(k), 0.0) for k in ours["right"]]
    wrong = check_sound(name, radii, rival)
    means = {column: mean(values) for column, values in radii.items()}
    attacked = [k for k, found in enumerate(radii["attack"]) if math.isfinite(found)]
    means["attack"] = mean([radii["attack"][k] for k in attacked])
    crown_mean = None if rival is None else mean(rival)
    note = f" ({theirs['note']})" if theirs is not None and theirs["note"] else ""
    if wrong:
        note += f" ({wrong} above an attack)"
    best = best_of(columns)
    early = [k for k, index in enumerate(ours["right"]) if index < FIRST]

    def ratio(value: float | None, to: float | None) -> float | None:
        return value / to if value is not None and to else None

    return [
        name, f"{len(ours['right'])}/{ours['count']}",
        *(means.get(c) for c in columns if c != "attack"),
        crown_mean if not note or crown_mean is None else f"{crown_mean:.3g}{note}",
        means["attack"],
        None if wrong else ratio(means.get(best), crown_mean),
        None if wrong or rival is None else ratio(*(mean([r[k] for k in early]) for r in (radii[best], rival))),
        *([ratio(means.get(best), means.get("composition"))] if "composition" in columns else []),
        ratio(mean([radii[best][k] for k in attacked]), means["attack"]) if best in radii else None,
        *(ours["ms"].get(c) for c in columns if c not in ("attack", "composition")),
        theirs and theirs["ms"],
        ours["ms"]["attack"], ours["bounds"], ours["peak"],
        theirs and theirs["peak"],
    ]  # fmt: skip


def best_of(columns: list[str]) -> str:
    return "auto" if "auto" in columns else "local"


def table_columns(columns: list[str]) -> list[str]:
    own, best = [c for c in columns if c != "attack"], best_of(columns)
    return [
        "model", "correct", *own, "CROWN", "attack", f"{best}/CROWN", f"of first {FIRST}",
        *([f"{best}/composition"] if "composition" in columns else []), f"{best}/attack",
        *(f"{c}, ms" for c in own if c != "composition"), "CROWN, ms", "attack, ms", "bounds, s",
        "peak MiB", "CROWN, MiB",
    ]  # fmt: skip


def table(options: argparse.Namespace) -> None:
    columns = [c for c in COLUMNS if c in options.columns] + ([] if "attack" in options.columns else ["attack"])
    peers: dict[str, Entry] = json.loads(options.peers.read_text())["models"] if options.peers else {}
    if not crown.importable():
        print("auto_LiRPA is not importable: CROWN's radii are those of --peers", file=sys.stderr)
    print(header(table_columns(columns)), flush=True)
    index = read_index(options.models, options.data)
    for name in sorted(fnmatch.filter(index, options.match)):
        usual = OF_CONVOLUTIONS if "Conv" in index[name].get("ops", ()) else SAMPLES
        samples = options.samples or peers.get(name, {}).get("n", usual)
        arguments = [
            "--models", str(options.models), "--threads", str(options.threads), "--samples", str(samples),
            *(("--data-root", options.data_root) if options.data_root else ()),
            *(part for item in options.data for part in ("--data", item)), "--only", name, "--columns",
        ]  # fmt: skip
        ours = in_process(__file__, [*arguments, ",".join(columns)])
        if ours is None:
            continue
        if ours.get("reason"):
            print(f"{name}: no row, as {ours['reason']}", file=sys.stderr)
            continue
        theirs = in_process(__file__, [*arguments, "CROWN"]) if crown.importable() else None
        if name in peers:
            stored = stored_crown(peers[name])
            if theirs is not None and not theirs["note"]:
                distance = max(abs(r - stored["radii"].get(k, r)) for k, r in theirs["radii"].items())
                print(f"{name}: CROWN as measured is within {distance:.2g} of --peers", file=sys.stderr)
            theirs = theirs or stored
        print(row(table_row(name, ours, theirs, columns)), flush=True)


def main() -> None:
    arguments = parser(__doc__, models_required=False)
    arguments.add_argument("--match", default="*", help="only the models whose names match, such as '*tanh*'")
    arguments.add_argument(
        "--columns", type=lambda text: text.split(","), default=USUAL.split(","), help=f"of {','.join(COLUMNS)}"
    )
    arguments.add_argument("--peers", type=Path, help="stored radii of CROWN")
    arguments.add_argument("--scaling", action="store_true", help="time and memory against width and depth instead")
    arguments.add_argument("--svg", type=Path, default=Path("scaling.svg"), help="where --scaling draws")
    options = arguments.parse_args()
    unknown = [c for c in options.columns if c not in (*COLUMNS, "CROWN")]
    if unknown:
        arguments.error(f"--columns: {unknown[0]!r} is not one of {', '.join(COLUMNS)}")
    if options.scaling:
        scaling.run(__file__, options)
    elif options.models is None:
        arguments.error("--models or --scaling is needed")
    elif options.only:
        entry = read_index(options.models, options.data)[options.only]
        print(json.dumps(child(options.models / options.only, entry, options)))
    else:
        table(options)


if __name__ == "__main__":
    main()
