"""The check of one finished run against its model and its data.

Every record gets one outcome, and every statement that turns out false is a contradiction.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from certify_cli.audit.verify.claims import evaluate, is_class, record_contradictions, run_contradictions
from certify_cli.audit.verify.proof import proved
from certify_cli.audit.verify.prover import Prover
from certify_cli.audit.verify.reading import UnreadableError, read
from certify_cli.audit.verify.reference import Reference
from certify_cli.audit.verify.replay import FLOAT32_TOLERANCE, STRETCH, Deployed, Witnesses, replayed
from certify_cli.audit.verify.search import attacked
from certify_cli.data.datasets import Dataset
from certify_cli.load.loaded_model import LoadedModel
from certify_cli.load.onnx.parity import NOISE, UNITS, noise_of
from certify_cli.load.onnx.runtime import NotRunnableError
from certify_cli.load.preprocessing import fit
from certify_cli.records import Result, Sample

PROVED, RECOMPUTED, ATTACKED, NOTHING = "proved", "recomputed", "attacked only", "no radius"
UNPROVED = "not proved"
CONTRADICTED = "contradicted"
OUTCOMES = {
    PROVED: "the radius is proved anew: norms and arithmetic of this check, every rival",
    RECOMPUTED: "a dense float64 reference reaches at least 90 % of the radius",
    UNPROVED: "a proof by the record's own method was tried and falls short of the radius; an attack found nothing",
    ATTACKED: "an attack inside the ball found nothing; the radius itself was not looked at again",
    NOTHING: "the record claims no radius",
    CONTRADICTED: "something in the record is not so",
}
TO_PROVE = 1 - 1e-6
"""Part of a radius that a proof must reach: two proofs round differently."""
PROOF_REACHES = {"lipschitz": 0.9, "curvature": 0.4, "dual": 0.4}
"""Methods with a proof rule of their own (`proof`): their radii are proved anew. A proof that falls short even of this
part of a radius contradicts it: on honest runs the proofs reach far more (tests/audit/test_verify_bounds.py). Radii of
every other method are recomputed for a share, and attacked."""
TO_RECOMPUTE = 0.9
"""Part of a radius that the reference must reach: it optimises less than the bounds do."""
FEWEST_RECOMPUTED = 4
"""Records that are recomputed at least, where any are."""
BATCH = 256
"""Samples evaluated together."""
MEMORY = 2**28
"""Bytes for the Jacobians of one batch of proofs."""


@dataclass(frozen=True)
class Checked:
    """The outcome of one record, one of OUTCOMES, and its contradictions, a sentence each."""

    index: int
    method: str | None
    radius: float | None
    outcome: str
    contradictions: tuple[str, ...]


class Verifier:
    """Checks one finished run: `of_run` as a whole, `records()` one after the other.

    witnesses, points: the arrays that the run wrote with --witnesses and --certificate, or None.
    share: part of the records without a proof rule that is recomputed, drawn by `seed`, which also seeds the attacks.
    notes: sentences on checks that cannot be made.
    """

    def __init__(
        self,
        result: Result,
        loaded: LoadedModel,
        data: Dataset,
        witnesses: Mapping[str, Any] | None = None,
        points: Mapping[str, Any] | None = None,
        share: float = 0.01,
        seed: int = 0,
    ) -> None:
        self.result, self.data, self.seed = result, data, seed
        said = result.run.preprocessing
        self.network = fit(
            loaded.network,
            tuple(data.x.shape[1:]),
            mean=said.get("mean"),
            std=said.get("std"),
            layout=said.get("layout"),
        )
        self.notes: list[str] = []
        if result.summary.seal is None:
            self.notes.append("the run bears no seal, so a change that leaves it true is not noticed")
        if witnesses is None and any(sample.attack_kind == "search" for sample in result.samples):
            self.notes.append("attacks that a search found are not replayed: say --witnesses FILE.npz")
        self._loaded = loaded
        self._output = result.run.arguments.get("output")
        self._witnesses = None if witnesses is None else Witnesses.of(witnesses)
        self._points = None if points is None else dict(zip(points["index"].tolist(), points["d"], strict=True))
        self._share, self._recomputed = share, 0
        self._prover, self._reference = self._read()
        self._deployed = self._runtime()

    @cached_property
    def of_run(self) -> tuple[str, ...]:
        """Contradictions of the whole run, a sentence each."""
        return tuple(run_contradictions(self.result, self.data, self.network))

    def _read(self) -> tuple[Prover | None, Reference | None]:
        try:
            prover = Prover(read(self.network))
        except UnreadableError as error:
            self.notes.append(f"nothing is proved or recomputed: {error}")
            return None, None
        return prover, Reference(prover)

    def _runtime(self) -> Deployed | None:
        info = self._loaded.info
        if info.format != "onnx":
            return None
        try:
            import onnxruntime  # noqa: F401
        except ImportError:
            self.notes.append("onnxruntime is not installed, so the file itself was not run")
            return None
        if self._loaded.deployment is None:
            return None
        try:
            return Deployed(self._loaded, self._output, self._before_model)
        except NotRunnableError as error:
            self.notes.append(f"onnxruntime does not run the file, so it was not run itself ({error})")
            return None

    def _before_model(self, x: Tensor) -> Tensor:
        """The model file's own input for data x (batch, *shape): after mean, std and layout."""
        return self.network.values(x)[len(self.network.nodes) - len(self._loaded.network.nodes)]

    def records(self) -> Iterator[Checked]:
        """The outcome of every record, in order."""
        count = min(len(self.result.samples), len(self.data.x))
        for start in range(0, count, BATCH):
            part = slice(start, min(start + BATCH, count))
            with torch.no_grad():
                yield from self._batch(part)

    def _batch(self, part: slice) -> Iterator[Checked]:
        samples, run = list(self.result.samples[part]), self.result.run
        x = self.data.x[part].to(torch.float64)
        labels = [None] * len(x) if self.data.y is None else self.data.y[part].tolist()
        evaluation = evaluate(self.network, x, samples)
        found: list[list[str]] = [
            list(record_contradictions(sample, label, evaluation, row, run))
            for row, (sample, label) in enumerate(zip(samples, labels, strict=True))
        ]
        for row, sample in enumerate(samples):
            if is_class(sample.prediction, evaluation.logits):
                found[row] += replayed(self.network, sample, x[row], self._witnesses)
        certified = [
            n
            for n, s in enumerate(samples)
            if s.certified_radius is not None and is_class(s.prediction, evaluation.logits)
        ]
        if certified:
            radius = torch.tensor([samples[n].certified_radius for n in certified], dtype=torch.float64)
            prediction = torch.tensor([samples[n].prediction for n in certified], dtype=torch.int64)
            hit = attacked(self.network, x[certified], prediction, radius, self.seed + part.start)
            for n, broken in zip(certified, hit.tolist(), strict=True):
                if broken:
                    found[n].append("an attack inside the certified radius changes the prediction")
        for n, text in self._through_runtime(samples, x, evaluation.logits):
            found[n].append(text)
        outcome = self._outcomes(samples, x, certified, found)
        for n, sample in enumerate(samples):
            ended = CONTRADICTED if found[n] else outcome[n]
            yield Checked(sample.index, sample.method, sample.certified_radius, ended, tuple(found[n]))

    def _outcomes(self, samples: list[Sample], x: Tensor, certified: list[int], found: list[list[str]]) -> list[str]:
        """The outcome of each record. `found`, contradictions by row, gains radii that proofs contradict."""
        outcome = [ATTACKED if sample.certified_radius is not None else NOTHING for sample in samples]
        if self._prover is None or self._reference is None:
            return outcome
        flat = x.flatten(1)
        provable = [n for n in certified if samples[n].method in PROOF_REACHES]
        sizes = sum(len(layer.bias) for layer in self._prover.layers)
        step = max(1, MEMORY // (8 * 6 * sizes * max(sizes, flat.shape[1])))
        for rows in (provable[k : k + step] for k in range(0, len(provable), step)):
            chosen = [samples[n] for n in rows]
            radii = torch.tensor([s.certified_radius for s in chosen], dtype=torch.float64)
            predictions = torch.tensor([s.prediction for s in chosen], dtype=torch.int64)
            points = self._tangent_points(chosen, flat[rows])
            done = proved(self._prover, flat[rows], predictions, radii * TO_PROVE, points)
            for n, holds in zip(rows, done, strict=True):
                outcome[n] = PROVED if holds else UNPROVED
            self._refute([n for n in rows if outcome[n] == UNPROVED], samples, flat, found)
        for n in certified:
            radius, prediction = samples[n].certified_radius, samples[n].prediction
            if (
                outcome[n] not in (ATTACKED, UNPROVED)
                or not self._is_drawn(samples[n].index)
                or radius is None
                or prediction is None
            ):
                continue
            if self._reference.holds(flat[n], prediction, radius * TO_RECOMPUTE):
                outcome[n] = RECOMPUTED
        return outcome

    def _refute(self, rows: list[int], samples: list[Sample], flat: Tensor, found: list[list[str]]) -> None:
        """Add a contradiction for every record of `rows` of whose radius no proof reaches PROOF_REACHES."""
        if self._prover is None or not self._prover.tight or not rows:
            return
        predictions = torch.tensor([samples[n].prediction for n in rows], dtype=torch.int64)
        margins = self._prover.margins(self._prover.values(flat[rows]), predictions).amin(1).tolist()
        kept = [k for k, n in enumerate(rows) if self._is_resolved(samples[n], margins[k])]
        if not kept:
            return
        chosen = [rows[k] for k in kept]
        parts = [PROOF_REACHES[str(samples[n].method)] * float(samples[n].certified_radius or 0.0) for n in chosen]
        radii = torch.tensor(parts, dtype=torch.float64)
        for n, part, holds in zip(
            chosen, parts, proved(self._prover, flat[chosen], predictions[kept], radii), strict=True
        ):
            if not holds:
                found[n].append(
                    f"no proof by {samples[n].method} reaches {part:.9g}, a part of the radius "
                    f"{samples[n].certified_radius:.9g} that honest ones exceed"
                )

    def _is_resolved(self, sample: Sample, margin: float) -> bool:
        """Whether the rounding that a proof counts is small against the margin and the constant it is divided by."""
        claimed, radius = sample.margin, sample.certified_radius
        if claimed is None or radius is None or self._prover is None or not margin > 0.99 * claimed:
            return False
        return margin / radius > 1e-8 * self._prover.norm_product

    def _is_drawn(self, index: int) -> bool:
        """Whether a record belongs to the share that is recomputed; counts those that do."""
        drawn = self._share > 0 and (
            self._recomputed < FEWEST_RECOMPUTED or random.Random(f"{self.seed}:{index}").random() < self._share
        )
        self._recomputed += drawn
        return drawn

    def _noise(self, x: Tensor) -> Tensor:
        """Error (batch, classes) of the logits in the arithmetic of the model file's own type, an estimate."""
        unit = UNITS.get(self._loaded.stored_dtype, UNITS["float32"]) / UNITS["float32"]
        with torch.no_grad():
            exact = self.network(x).numpy()
        return torch.from_numpy(NOISE * unit * noise_of(self.network, x.numpy(), exact))

    def _tangent_points(self, samples: list[Sample], x: Tensor) -> Tensor | None:
        """d (batch, inputs), where the run took its tangents, 0 where it kept none; None where it kept none at all."""
        if self._points is None:
            return None
        points = torch.zeros_like(x)
        for n, sample in enumerate(samples):
            if sample.index in self._points:
                points[n] = torch.from_numpy(self._points[sample.index]).double().flatten()
        return points

    def _through_runtime(self, samples: list[Sample], x: Tensor, logits: Tensor) -> Iterator[tuple[int, str]]:
        """Contradictions, by row, of the ONNX file in onnxruntime: at the samples, and at the witnesses, lengthened."""
        if self._deployed is None:
            return
        said = [s.prediction for s in samples]
        for n, text in _differing(self._deployed.logits(x), logits, said, self._noise(x)):
            yield n, f"onnxruntime predicts {text}"
        kept = [n for n, s in enumerate(samples) if self._witnesses and s.index in self._witnesses.d]
        if kept and self._witnesses:
            moved = torch.stack([x[n] + self._witnesses.d[samples[n].index] * (1 + STRETCH) for n in kept])
            expected = self.network(moved)
            there = self._deployed.logits(moved)
            for k, text in _differing(there, expected, expected.argmax(1).tolist(), self._noise(moved)):
                yield kept[k], f"at its witness onnxruntime predicts {text}"


def _differing(
    deployed: Tensor, logits: Tensor, prediction: list[int | None], noise: Tensor
) -> Iterator[tuple[int, str]]:
    """Rows where the file clearly predicts another class, and which. noise: the error of a logit in its arithmetic."""
    values, order = logits.topk(2, dim=1)
    tolerance = FLOAT32_TOLERANCE * values.abs().sum(1) + noise.gather(1, order).sum(1)
    clear = (values[:, 0] - values[:, 1] > tolerance) & deployed.isfinite().all(1)
    for n, (claimed, there) in enumerate(zip(prediction, deployed.argmax(1).tolist(), strict=True)):
        if bool(clear[n]) and claimed != there:
            yield n, f"{there}, not {claimed}"
