"""The engine: one record a sample, in order, as batches finish. Progress bars and writers are consumers of it."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from certify_cli.attacks.ddn import searched
from certify_cli.bounds.global_bounds.layer_report import layer_table
from certify_cli.bounds.global_bounds.model_bounds import MEMORY, Analysis
from certify_cli.bounds.relaxation.intermediate_bounds import ball_cost
from certify_cli.certificates.certificates import Certificates
from certify_cli.certificates.methods import TANGENT_METHODS, certify_batch, method_name, select
from certify_cli.data.datasets import Dataset
from certify_cli.errors import DataError, UsageError, first_line, quoted
from certify_cli.load.loaded_model import LoadedModel
from certify_cli.load.preprocessing import fit
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import Point
from certify_cli.network.graph import Network
from certify_cli.records import CERTIFIED, ERROR, NOT_CERTIFIED, Result, Run, Sample, sealed, summarise
from certify_cli.run.provenance import describe
from certify_cli.run.settings import Settings

DEFAULT_MEMORY = 2**29
"""Bytes for the tensors of one batch on a CPU, unless `--memory` says otherwise."""
LARGEST_BATCH, SEARCHED_BATCH = 512, 128
"""Samples; fewer where a method searches, so that a run shows progress."""
SEARCHED_WORK = 3e10
"""And no more than have so many floating-point operations a ball together."""

TIED = "the two largest logits are equal up to rounding error"
NOT_FINITE = "a logit is not a finite number"
NO_BOUND = "the bound on this network is too large for a positive radius"
HUGE = 1e100
"""Radii above it are no distance any more: the margins do not depend on the input, but for rounding."""
NEVER = f"no perturbation of norm below {HUGE:g} changes the prediction: its margins do not depend on the input"


Radii = str | float | Sequence[str | float]


@dataclass(frozen=True, eq=False)
class Witness:
    """A replayed attack on sample `index`: x + d as rounded is `moved`; all of the data's shape, float64."""

    index: int
    x: Tensor
    moved: Tensor

    @property
    def d(self) -> Tensor:
        return self.moved - self.x


@dataclass(frozen=True, eq=False)
class Place:
    """x + d, where the tangent that certifies sample `index` against `rival` was taken; d as a witness has it."""

    index: int
    rival: int
    d: Tensor


class Job:
    """A run made ready: `run` is known before the first sample, `samples()` does the work."""

    def __init__(self, network: Network, data: Dataset, settings: Settings, run: Run) -> None:
        self.run = run
        self.total = len(data.x)
        self.eps = settings.eps
        self.witnesses: list[Witness] = []
        self.places: list[Place] = []
        self.search_seconds: float | None = None
        self._network, self._data, self._settings = network, data, settings
        self._methods = select(settings.method, network)

    @cached_property
    def _analysis(self) -> Analysis:
        """For the classes that are predicted anywhere in the data: it is the same wherever a run begins."""
        memory = _memory(self._network.device, self._settings.memory, MEMORY)
        with exact_kernels():
            predicted = torch.cat([self._network(self._batch(part)).argmax(1) for part in self._parts(0)])
        return Analysis(self._network, self._settings.effort, memory, predicted)

    def _parts(self, first: int) -> Iterator[slice]:
        for start in range(first, self.total, self.run.batch_size):
            yield slice(start, min(start + self.run.batch_size, self.total))

    def _batch(self, part: slice) -> Tensor:
        return self._data.x[part].to(self._network.device, torch.float64)

    @property
    def indices(self) -> Sequence[int]:
        """Of the samples in their data set, in order."""
        return self._data.indices

    def samples(self, first: int = 0) -> Iterator[Sample]:
        """Records in the data's order, a batch at a time, from sample number `first` on, which begins a batch."""
        for part in self._parts(first):
            with exact_kernels():
                point = Point(self._network, self._batch(part))
                settings = self._settings
                found = certify_batch(self._methods, self._analysis, point, settings.attack != "none", settings.levels)
                promised = found.attack.isfinite()
                if settings.attack == "search":
                    found, promised = self._searched(point, found)
                records = self._records(part, point, found, promised)
            yield from records

    def model_bounds(self) -> dict[str, float]:
        """Bounds of the model as it meets the data, by the keys that a policy has for them; inf where there is none."""
        last = layer_table(self._network)[-1]
        curvature = math.inf if last.curvature is None else last.curvature
        return {"largest_lipschitz": last.lipschitz, "largest_curvature": curvature}

    def _searched(self, point: Point, found: Certificates) -> tuple[Certificates, Tensor]:
        """The certificates with nearer attacks where the search finds them; which attacks a certificate promised."""
        start = time.perf_counter()
        witness, norm = searched(point, found.near, found.radius, self._settings.effort)
        nearer = norm < found.attack.nan_to_num(nan=torch.inf, posinf=torch.inf)
        shape = (-1, *[1] * (witness.dim() - 1))
        better = replace(
            found,
            attack=torch.where(nearer, norm, found.attack),
            witness=torch.where(nearer.reshape(shape), witness, found.witness),
        )
        self.search_seconds = (self.search_seconds or 0.0) + time.perf_counter() - start
        return better, found.attack.isfinite() & ~nearer

    def _records(self, part: slice, point: Point, found: Certificates, promised: Tensor) -> list[Sample]:
        data = self._data
        labels = data.y[part].tolist() if data.y is not None else [None] * len(point.x)
        margin, runner_up = point.margin.min(1)
        inside = ((found.witness >= 0) & (found.witness <= 1)).flatten(1).all(1).tolist()
        columns = {
            name: getattr(found, name).tolist()
            for name in (
                "radius", "rival", "gradient", "curvature_lower", "curvature_upper", "lipschitz", "attack", "method",
            )
        }  # fmt: skip
        columns |= {
            "margin": margin.tolist(),
            "runner_up": runner_up.tolist(),
            "prediction": point.prediction.tolist(),
            "finite": point.finite.tolist(),
            "promised": promised.tolist(),
            "safe": (point.margin_low.min(1).values > 0).tolist(),
        }
        records = []
        for row, label in enumerate(labels):
            values = {name: column[row] for name, column in columns.items()}
            index = data.indices[part.start + row]
            record = _record(index, label, values, inside[row] if data.image else None)
            if record.attack_radius is not None:
                self.witnesses.append(Witness(index, point.x[row].cpu(), found.witness[row].cpu()))
            if record.method in TANGENT_METHODS and record.rival is not None:
                self.places.append(Place(index, record.rival, (found.near[row] - point.x[row]).cpu()))
            records.append(record)
        return records


def _record(index: int, label: int | None, values: dict[str, Any], inside: bool | None) -> Sample:
    finite = values["finite"]
    radius = values["radius"]
    reason = None
    if not finite:
        status, reason = ERROR, NOT_FINITE
    elif radius > HUGE:
        status, reason = CERTIFIED, NEVER
    elif radius > 0:
        status = CERTIFIED
    else:
        status, reason = NOT_CERTIFIED, NO_BOUND if values["safe"] else TIED
    attack = _number(values["attack"]) if finite else None
    prediction = values["prediction"] if finite else None
    return Sample(
        index=index,
        label=label,
        prediction=prediction,
        correct=None if label is None else prediction == label,
        margin=_number(values["margin"]) if finite else None,
        runner_up=values["runner_up"] if finite else None,
        rival=values["rival"] if finite else None,
        gradient_norm=_number(values["gradient"]),
        curvature_lower=_number(values["curvature_lower"]),
        curvature_upper=_number(values["curvature_upper"]),
        lipschitz=_number(values["lipschitz"]),
        certified_radius=radius if reason is None else None,
        attack_radius=attack,
        attack_kind=None if attack is None else "certificate" if values["promised"] else "search",
        attack_in_range=None if attack is None else inside,
        method=method_name(values["method"]) if status == CERTIFIED else None,
        status=status,
        reason=reason,
    )


def _number(value: float) -> float | None:
    """Records hold finite numbers: what is not one (a bound that a method lacks, an infinite bound) is null."""
    return value if value == value and abs(value) != float("inf") else None


def prepare(
    model: LoadedModel,
    data: Dataset,
    settings: Settings,
    arguments: dict[str, Any] | None = None,
    largest_batch: int | None = None,
) -> Job:
    """Fit the model to the data, choose device and batch size, and refuse what cannot run.

    `arguments` goes into the run record as it is. largest_batch: a bound of the batch size that is chosen. Raises
    UsageError, DataError or MethodError.
    """
    if not len(data.x):
        raise DataError(f"{data.name}: no sample selected")
    network = fit(
        model.network,
        tuple(data.x.shape[1:]),
        mean=settings.mean or None,
        std=settings.std or None,
        layout=settings.layout,
    )
    if data.y is not None and int(data.y.max()) >= network.classes:
        raise DataError(
            f"{data.name} has the label {int(data.y.max())}, but the model has {network.classes} classes (0 to "
            f"{network.classes - 1}); is this the data set the model was trained on?"
        )
    device = _device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    searched = any(method.searched for method in select(settings.method, network)) and settings.effort != "fast"
    fitting = max(1, int(SEARCHED_WORK / max(1.0, ball_cost(network))))
    most = min(SEARCHED_BATCH, fitting) if searched else LARGEST_BATCH
    most = min(most, largest_batch or most)
    batch_size = settings.batch_size or min(len(data.x), most, _batch_size(network, device, settings.memory))
    run = describe(
        model,
        data,
        settings,
        arguments=arguments or {},
        device=str(device),
        threads=torch.get_num_threads(),
        batch_size=batch_size,
        notes=(*model.notes, *data.notes),
    )
    return Job(network.to(device), data, settings, run)


def certify(
    model: LoadedModel,
    data: Dataset,
    *,
    method: str = "auto",
    effort: str = "normal",
    attack: str = "certificate",
    eps: Radii = (),
    device: str = "auto",
    batch_size: int | None = None,
    threads: int | None = None,
    memory: int | None = None,
    mean: float | Sequence[float] = (),
    std: float | Sequence[float] = (),
    layout: str | None = None,
) -> Result:
    """Certify every sample of `data`: the same records as the command line's.

    eps: radii at which the certified accuracy is wanted: 0.5, "36/255", or several. mean, std: one value, or one a
    channel. memory in bytes. Raises CurvcertError (UsageError, DataError, MethodError) for what cannot run.
    """
    arguments = {key: value for key, value in locals().items() if key not in ("model", "data")}
    settings = Settings(**arguments | {"eps": _texts(eps), "mean": _numbers(mean), "std": _numbers(std)})
    job = prepare(model, data, settings, arguments)
    start = time.perf_counter()
    samples = tuple(job.samples())
    summary = summarise(samples, job.eps, time.perf_counter() - start, job.search_seconds)
    return Result(job.run, samples, sealed(job.run, samples, summary))


def _texts(eps: Radii) -> tuple[str, ...]:
    return tuple(str(level) for level in ([eps] if isinstance(eps, str | int | float) else eps))


def _numbers(values: float | Sequence[float]) -> tuple[float, ...]:
    try:
        return tuple(float(value) for value in ([values] if isinstance(values, int | float) else values))
    except (TypeError, ValueError):
        raise UsageError(f"mean and std must be numbers, one or one a channel, not {quoted(values)}") from None


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if re.fullmatch(r"cpu|cuda(:(0|[1-9]\d?))?", name, re.ASCII) is None:  # others lack float64, or values altogether
        raise UsageError(f"--device {quoted(name)} is not one of auto, cpu, cuda, cuda:N")
    advice = "use --device cpu or --device auto"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        why = "no GPU was found" if torch.backends.cuda.is_built() else "this PyTorch is built without CUDA"
        raise UsageError(f"--device {quoted(name)} cannot be used here: {why}; {advice}")
    try:
        torch.zeros(1, device=device, dtype=torch.float64)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UsageError(f"--device {quoted(name)} cannot be used here: {first_line(error)}; {advice}") from None
    return device


def _batch_size(network: Network, device: torch.device, memory: int | None) -> int:
    """Samples a batch such that its tensors fit: values, errors and one cotangent per class at the widest nodes."""
    every = sum(node.size for node in network.nodes)
    widest = max(node.size for node in network.nodes)
    sample = 8 * (4 * every + 8 * network.classes * widest)
    return max(1, _memory(device, memory, DEFAULT_MEMORY) // sample)


def _memory(device: torch.device, asked: int | None, otherwise: int) -> int:
    """Bytes that a batch may take: as asked, half of what a GPU has free, or `otherwise`."""
    if asked is not None:
        return asked
    return int(torch.cuda.mem_get_info(device)[0]) // 2 if device.type == "cuda" else otherwise
