"""The engine: a run as a stream of records, in the data's order, one batch after another.

The command line, `certify` of the library and `check` all consume `Job.records` or `Job.samples`. The engine itself
writes nothing and shows no progress.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from certify_cli.attacks.ddn import nearest_attacks
from certify_cli.bounds.global_bounds.layer_report import layer_table
from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.bounds.relaxation.intermediate_bounds import ball_cost
from certify_cli.certificates.certificates import Certificates
from certify_cli.certificates.methods import Method, certify_batch, decided, nothing_proved, select
from certify_cli.data.datasets import Dataset
from certify_cli.efforts import EFFORTS, FAST, MEMORY
from certify_cli.errors import DataError, UsageError, first_line, quoted
from certify_cli.load.loaded_model import LoadedModel
from certify_cli.load.preprocessing import fit
from certify_cli.names import TANGENT_METHODS
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from certify_cli.numerics.deadline import Deadline, OutOfTime, nothing, unheard
from certify_cli.records import SECONDS, TOTAL_SECONDS, Record, Run, Sample, sealed, summarise
from certify_cli.run.memory import allowed, within_memory
from certify_cli.run.provenance import describe
from certify_cli.run.resume import Begun
from certify_cli.run.sample_records import sample_records
from certify_cli.run.settings import Settings

DEFAULT_MEMORY = 2**29
"""Bytes for the tensors of one batch on a CPU, at most, if `--memory` is not given: more would leave the cache."""
LARGEST_BATCH, SEARCHED_BATCH = 512, 128
"""Largest number of samples in a batch, without and with a method that searches; smaller batches show progress."""
SEARCHED_WORK = 3e10
"""Floating-point operations that one ball of a batch may take if a method searches."""


@dataclass(frozen=True, eq=False)
class Witness:
    """A replayed attack: the prediction at x + d differs from that at x.

    index: position in the data set.   x, moved: the sample and x + d, rounded; shape of x, float64, data units.
    """

    index: int
    x: Tensor
    moved: Tensor

    @property
    def d(self) -> Tensor:
        return self.moved - self.x


@dataclass(frozen=True, eq=False)
class TangentPoint:
    """Where the tangent that certifies a sample was taken (written by `--certificate`, read by `verify`).

    index: position in the data set.   rival: class of the margin.   d: offset from x, shape of x, float64.
    """

    index: int
    rival: int
    d: Tensor


@dataclass(frozen=True, eq=False)
class CertifiedSample:
    """A sample's record and the arrays behind it; None where there is no attack, or no tangent."""

    record: Sample
    witness: Witness | None = None
    tangent: TangentPoint | None = None


def unwatched(sample: CertifiedSample) -> None:
    """A `watch` that does nothing."""


class Job:
    """A prepared run: its run record, and iterators that certify the samples.

    run: the run record, complete before the first sample.   total: number of samples.
    """

    def __init__(
        self,
        network: Network,
        data: Dataset,
        settings: Settings,
        run: Run,
        methods: tuple[Method, ...],
        memory: int,
    ) -> None:
        """methods: to try, in order.   memory: bytes that the bounds of a batch may take."""
        self.run = run
        self.total = len(data.x)
        self._search_seconds: float | None = None
        self._stopped: str | None = None
        self._network, self._data, self._settings = network, data, settings
        self._methods, self._memory = methods, memory
        self._effort = EFFORTS[settings.effort]

    @cached_property
    def _model_bounds(self) -> ModelBounds:
        """Bounds for all classes that are predicted in the data, so that they are the same when a run is resumed."""
        with exact_kernels():
            predicted = torch.cat([self._network(self._batch(rows)).argmax(1) for rows in self._slices(0)])
        return ModelBounds(self._network, self._effort, self._memory, predicted)

    def _slices(self, first: int) -> Iterator[slice]:
        """The batches from sample number `first` on."""
        for start in range(first, self.total, self.run.batch_size):
            yield slice(start, min(start + self.run.batch_size, self.total))

    def _batch(self, rows: slice) -> Tensor:
        return self._data.x[rows].to(self._network.device, torch.float64)

    @property
    def indices(self) -> Sequence[int]:
        """Positions of the samples in their data set, in order."""
        return self._data.indices

    def records(
        self,
        past: Begun | None = None,
        watch: Callable[[CertifiedSample], None] = unwatched,
        halted: Callable[[], str | None] = nothing,
        tell: Callable[[str], None] = unheard,
    ) -> Iterator[Record]:
        """The run record, a record for every sample as soon as its batch is done, and the sealed summary.

        past: an earlier part of the same run. Its records count in the summary, but are not repeated.
        watch: called with every sample after its record has been consumed; an exception that it raises ends the run.
        halted, tell: as in `samples`. The summary of a run that ended early says so.
        """
        start = time.perf_counter()
        if past is None:
            yield self.run
        done = [] if past is None else list(past.samples[: past.whole])
        for sample in self.samples(len(done), halted, tell):
            done.append(sample.record)
            yield sample.record
            watch(sample)
        seconds = time.perf_counter() - start
        summary = summarise(done, self._settings.eps, seconds, self._search_seconds, self._stopped)
        yield sealed(self.run if past is None else past.run, done, summary)

    def samples(
        self,
        first: int = 0,
        halted: Callable[[], str | None] = nothing,
        tell: Callable[[str], None] = unheard,
    ) -> Iterator[CertifiedSample]:
        """The samples in the data's order, batch by batch, from number `first` on, which must be a batch's first.

        halted: asked between the steps of the work; once it gives a name, the run ends with what is proved by then.
        tell: called with what is being done.

        A run that ends early gives the samples of its last batch unless nothing has been proved of them.
        """
        run = Deadline(TOTAL_SECONDS, self._settings.total_seconds, halted)
        for rows in self._slices(first):
            share = None if self._settings.seconds is None else self._settings.seconds * (rows.stop - rows.start)
            try:
                with exact_kernels(), Deadline(SECONDS, share, run.passed, tell).in_force() as deadline:
                    batch = self._certify(rows, deadline)
            except OutOfTime:
                self._stopped = deadline.ended
                return
            yield from batch
            if rows.stop < self.total or deadline.ended not in (None, SECONDS):
                self._stopped = run.passed()
            if self._stopped is not None:
                return

    def _certify(self, rows: slice, deadline: Deadline) -> list[CertifiedSample]:
        """The samples of one batch. Raises OutOfTime where the run ends before a radius is proved."""
        settings = self._settings
        with deadline.clock_stopped():
            deadline.begin("evaluating")
            model_bounds, point = self._model_bounds, EvaluatedPoints(self._network, self._batch(rows))
            deadline.check()
            point.margin_low  # noqa: B018  (all that a record needs where nothing is proved)
        try:
            certificates = certify_batch(self._methods, model_bounds, point, settings.attack != "none", settings.levels)
        except OutOfTime:
            if deadline.ended != SECONDS:
                raise
            certificates = nothing_proved(point)
        by_certificate = certificates.attack.isfinite()
        if settings.attack == "search":
            with suppress(OutOfTime):
                deadline.begin("searching for attacks")
                certificates, by_certificate = self._with_nearer_attacks(point, certificates)
        settled = decided(certificates, settings.levels) if settings.levels else torch.zeros_like(by_certificate)
        stopped = [None if done else deadline.ended for done in settled.tolist()]
        return self._certified(rows, point, certificates, by_certificate, stopped)

    def model_figures(self) -> dict[str, float]:
        """Global bounds of the model, fitted to the data, by the names that policies use; inf where there is none."""
        last = layer_table(self._network)[-1]
        curvature = math.inf if last.curvature is None else last.curvature
        return {"largest_lipschitz": last.lipschitz, "largest_curvature": curvature}

    def _with_nearer_attacks(self, point: EvaluatedPoints, certificates: Certificates) -> tuple[Certificates, Tensor]:
        """The certificates with the attacks of a search where these are nearer.

        Returns as well a mask (batch,) of the attacks that are still those of a certificate.
        """
        start = time.perf_counter()
        witness, norm = nearest_attacks(point, certificates.near, certificates.radius, self._effort)
        nearer = norm < certificates.attack.nan_to_num(nan=torch.inf, posinf=torch.inf)
        nearest = certificates.where(nearer, replace(certificates, attack=norm, witness=witness))
        self._search_seconds = (self._search_seconds or 0.0) + time.perf_counter() - start
        return nearest, certificates.attack.isfinite() & ~nearer

    def _certified(
        self,
        rows: slice,
        point: EvaluatedPoints,
        certificates: Certificates,
        by_certificate: Tensor,
        stopped: list[str | None],
    ) -> list[CertifiedSample]:
        """The samples of a batch; arguments as in `sample_records`."""
        data = self._data
        indices = data.indices[rows]
        labels = data.y[rows].tolist() if data.y is not None else None
        batch = []
        records = sample_records(point, certificates, by_certificate, indices, labels, data.image, stopped)
        for row, record in enumerate(records):
            witness = tangent = None
            if record.attack_radius is not None:
                witness = Witness(record.index, point.x[row].cpu(), certificates.witness[row].cpu())
            if record.method in TANGENT_METHODS and record.rival is not None:
                tangent = TangentPoint(record.index, record.rival, (certificates.near[row] - point.x[row]).cpu())
            batch.append(CertifiedSample(record, witness, tangent))
        return batch


def prepare(
    model: LoadedModel,
    data: Dataset,
    settings: Settings,
    arguments: dict[str, Any] | None = None,
    largest_batch: int | None = None,
) -> Job:
    """Fit the model to the data and choose device and batch size.

    arguments: copied into the run record.   largest_batch: upper limit of a batch size that is chosen here.
    Raises UsageError, DataError or MethodError for a run that is impossible.
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
    refuse_foreign_labels(data, network.classes)
    device = device_named(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    memory = allowed(device, settings.memory, MEMORY)
    methods, left_out = within_memory(select(settings.method, network), network, memory, settings.method)
    searched = any(method.searched for method in methods) and settings.effort != FAST.name
    fitting = max(1, int(SEARCHED_WORK / max(1.0, ball_cost(network))))
    limit = min(SEARCHED_BATCH, fitting) if searched else LARGEST_BATCH
    limit = min(limit, largest_batch or limit)
    batch_size = settings.batch_size or min(len(data.x), limit, _batch_size(network, device, settings.memory))
    run = describe(
        model,
        data,
        settings,
        arguments=arguments or {},
        device=str(device),
        threads=torch.get_num_threads(),
        batch_size=batch_size,
        notes=(*model.notes, *data.notes, *left_out),
    )
    return Job(network.to(device), data, settings, run, methods, memory)


def refuse_foreign_labels(data: Dataset, classes: int) -> None:
    """DataError for a label that is none of the model's classes."""
    if data.y is not None and int(data.y.max()) >= classes:
        raise DataError(
            f"{data.name} has the label {int(data.y.max())}, but the model has {classes} classes (0 to {classes - 1}); "
            "is this the data set the model was trained on?"
        )


def device_named(name: str) -> torch.device:
    """The device of a `--device` text. Raises UsageError for a device that does not exist or cannot hold float64."""
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
    """The number of samples whose values, errors and cotangents of all classes at the widest nodes fit the memory."""
    every = sum(node.size for node in network.nodes)
    widest = max(node.size for node in network.nodes)
    sample = 8 * (4 * every + 8 * network.classes * widest)
    return max(1, allowed(device, memory, DEFAULT_MEMORY) // sample)
