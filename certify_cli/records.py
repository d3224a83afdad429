"""The records of a run: frozen dataclasses, their dictionaries, and the name of their schema.

`Sample` is one certified sample, `Run` the settings, model and data, `Summary` the figures of all samples. They are
plain data: no tensor, no device, nothing to import but the standard library. The JSON schema of the dictionaries is
`certify_cli/schema/curvcert-1.json`. "Certified at eps" and "attacked at eps" are defined here, once.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from statistics import fmean, median
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from certify_cli.errors import UsageError, quoted
from certify_cli.plain import ratio

if TYPE_CHECKING:
    from pandas import DataFrame

SCHEMA = "curvcert/1"

Kind = TypeVar("Kind")

CERTIFIED = "certified"
NOT_CERTIFIED = "not_certified"
ERROR = "error"

SECONDS, TOTAL_SECONDS, SIGNAL = "seconds", "total-seconds", "signal"
"""What can end the work on a sample early: its own time; that of the run; SIGINT or SIGTERM."""


@dataclass(frozen=True)
class Sample:
    """One sample. Radii are Euclidean norms in data units; numbers are finite.

    certified_radius: positive, rounded down; or None, with a `reason`.   attack_radius: rounded up, or None.
    margin: to the class `runner_up`.   rival: the class that decides the certified radius. Upper bounds for its margin
    are gradient_norm, curvature_lower (of -lambda_min of the Hessian), curvature_upper (of lambda_max) and lipschitz;
    None where the method has none.
    stopped: what ended the work before every method had ended (SECONDS, TOTAL_SECONDS, SIGNAL); what was proved by then
    counts. None where nothing did.
    """

    index: int
    label: int | None
    prediction: int | None
    correct: bool | None
    margin: float | None
    runner_up: int | None
    rival: int | None
    gradient_norm: float | None
    curvature_lower: float | None
    curvature_upper: float | None
    lipschitz: float | None
    certified_radius: float | None
    attack_radius: float | None
    attack_kind: str | None
    attack_in_range: bool | None
    method: str | None
    status: str
    reason: str | None
    stopped: str | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"sample {self.index}: {item.name} is {value}; records hold finite numbers only")
        if self.certified_radius is None and not self.reason:
            raise ValueError(f"sample {self.index}: a record without a radius needs a reason")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Sample:
        """The record in a dictionary. Here and in `Run` and `Summary`: TypeError or ValueError where it holds none."""
        known = {item.name for item in fields(cls)}
        return checked(cls(**{key: value for key, value in data.items() if key in known}))


@dataclass(frozen=True)
class ModelInfo:
    """The model. sha256: over the file and its external data."""

    path: str
    sha256: str
    format: str
    opset: int | None
    classes: int


@dataclass(frozen=True)
class DataInfo:
    """The samples. sha256: over them as float32 NCHW before mean and std, then the labels."""

    name: str
    samples: int
    sha256: str


@dataclass(frozen=True)
class Run:
    """The settings, model and data of a run: enough to repeat it."""

    tool: str
    version: str
    libraries: dict[str, str]
    arguments: dict[str, Any]
    method: str
    effort: str
    attack: str
    device: str
    dtype: str
    threads: int
    batch_size: int
    seed: int | None
    started: str
    model: ModelInfo
    data: DataInfo
    preprocessing: dict[str, Any]
    classes: list[str] | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Run:
        known = {item.name for item in fields(cls)}
        values = {key: value for key, value in data.items() if key in known}
        for key, kind in (("model", ModelInfo), ("data", DataInfo)):
            own = {item.name for item in fields(kind)}
            values[key] = checked(kind(**{name: value for name, value in values[key].items() if name in own}))
        return checked(cls(**values))


@dataclass(frozen=True)
class Summary:
    """The figures of all samples; fractions lie in [0, 1].

    Mean and median radius run over all samples, misclassified and uncertified ones as 0 (without labels: over the
    radii as they are); `mean_certified_radius_correct` runs over the correct samples only (the papers' figure).
    certified_accuracy, attack_accuracy: by the text of each `--eps`.   certified_share: replaces certified_accuracy
    where there are no labels.   seconds: of the whole run.   search_seconds: of them, those of the search for attacks,
    None without one.   stopped: what ended the run early (TOTAL_SECONDS, SIGNAL), None for a whole one.
    seal: a hash of the run as it was written; it reveals an accidental change, not a forgery.
    """

    samples: int
    accuracy: float | None
    mean_certified_radius: float | None
    median_certified_radius: float | None
    mean_certified_radius_correct: float | None
    certified_accuracy: dict[str, float] | None
    certified_share: dict[str, float] | None
    attack_accuracy: dict[str, float] | None
    seconds: float
    search_seconds: float | None = None
    stopped: str | None = None
    seal: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Summary:
        known = {item.name for item in fields(cls)}
        return checked(cls(**{key: value for key, value in data.items() if key in known}))


ARGUMENTS = {
    "activation": str | None,
    "data": str | None,
    "data_layout": str | None,
    "data_root": str | None,
    "eps": str | float | list[str | float] | None,
    "resize": list[int] | None,
    "samples": str | int | None,
    "seed": int | None,
    "shuffle": bool | None,
    "split": str | None,
}
"""Types of the arguments that are read back from a run, which the command line or a call from Python wrote."""
PREPROCESSING = {"mean": list[float] | None, "std": list[float] | None, "layout": str | None}

HINTS: dict[type, dict[str, Any]] = {kind: get_type_hints(kind) for kind in (Run, ModelInfo, DataInfo, Sample, Summary)}
"""The declared type of each field of a record."""


def checked(record: Kind) -> Kind:
    """The record, unchanged. Raises TypeError, naming the field, for a value of another type than is declared."""
    for name, hint in HINTS[type(record)].items():
        _check(name, getattr(record, name), hint)
    if isinstance(record, Run):
        for held, hints in ((record.arguments, ARGUMENTS), (record.preprocessing, PREPROCESSING)):
            for name, hint in hints.items():
                _check(name, held.get(name), hint)
        if record.batch_size < 1:
            raise TypeError(f"batch_size is {record.batch_size}")
    if isinstance(record, Summary):
        for level in {**(record.certified_accuracy or {}), **(record.certified_share or {})}:
            parse_eps(level)
    return record


def _check(name: str, value: Any, hint: Any) -> None:
    if not _is(value, hint):
        raise TypeError(f"{name} is {quoted(value)}")


def _is(value: Any, hint: Any) -> bool:
    """Whether a value out of JSON has the type `hint`.

    An int may stand for a float; numbers must fit into float64 and int64.
    """
    origin, of = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_is(value, part) for part in of)
    if origin is dict:
        return isinstance(value, dict) and all(_is(k, of[0]) and _is(v, of[1]) for k, v in value.items())
    if origin is list:
        return isinstance(value, list) and all(_is(item, of[0]) for item in value)
    if hint is Any:
        held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return all(_is(item, Any) for item in held) and (not isinstance(value, float) or math.isfinite(value))
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max  # which no NaN is
    return isinstance(value, hint) and not (hint is int and abs(value) >= 2**63)


Record = Run | Sample | Summary
"""A run is a stream of them: its run line, its samples, its summary."""


@dataclass(frozen=True)
class Result:
    """A finished run."""

    run: Run
    samples: tuple[Sample, ...]
    summary: Summary

    def to_pandas(self) -> DataFrame:
        """The samples as a pandas DataFrame: a row a sample, a column a field, indexed by `index`.

        Raises UsageError where pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise UsageError("to_pandas needs pandas: pip install 'curvcert[pandas]'") from None
        names = [item.name for item in fields(Sample)]
        rows = [[getattr(sample, name) for name in names] for sample in self.samples]
        return pandas.DataFrame(rows, columns=names).set_index("index")


def collect(records: Iterable[Record]) -> Result:
    """All records of a run. Raises ValueError unless they are a run, its samples and its summary, in this order."""
    first, *samples, last = records
    if not (isinstance(first, Run) and isinstance(last, Summary)):
        raise ValueError("the records of a run begin with its run line and end with its summary")
    if not all(isinstance(sample, Sample) for sample in samples):
        raise ValueError("only samples stand between the run line and the summary")
    return Result(first, tuple(samples), last)  # type: ignore[arg-type]


def certifies(radius: Any, eps: float) -> Any:
    """Whether certified radii (a float, or a tensor of them) cover the closed ball of radius `eps`.

    They do if they are larger than it, for a certificate leaves out the boundary of its own ball.
    """
    return radius > eps


def refutes(attack_radius: Any, eps: float) -> Any:
    """Whether attacks at these distances (a float, or a tensor of them) lie in the closed ball of radius `eps`."""
    return attack_radius <= eps


def counts(sample: Sample) -> bool:
    """Whether a sample's radius counts towards the figures: that of a misclassified sample does not."""
    return sample.correct is not False


def certified_at(sample: Sample, eps: float) -> bool:
    """Certified at eps: not misclassified, and no perturbation in the closed ball of radius `eps` changes that."""
    return counts(sample) and certifies(sample.certified_radius or 0.0, eps)


def attacked_at(sample: Sample, eps: float) -> bool:
    """Attacked at eps: an adversarial example is known in the closed ball of radius `eps`."""
    return sample.attack_radius is not None and refutes(sample.attack_radius, eps)


def withstands(sample: Sample, eps: float) -> bool:
    """Not misclassified, and not attacked at eps."""
    return counts(sample) and not attacked_at(sample, eps)


def counted_radius(sample: Sample) -> float:
    """The certified radius, as the figures take it: 0 where there is none or it does not count."""
    return sample.certified_radius or 0.0 if counts(sample) else 0.0


def parse_eps(text: str) -> float:
    """The radius that an `--eps` text stands for: a positive decimal or a fraction of two, such as 36/255.

    Raises UsageError.
    """
    try:
        value = ratio(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise UsageError(f"--eps {quoted(text)} is not a positive number or fraction such as 0.5 or 36/255")
    return value


def summarise(
    samples: Iterable[Sample],
    eps: Sequence[str],
    seconds: float,
    search_seconds: float | None = None,
    stopped: str | None = None,
) -> Summary:
    """The summary of the samples. eps: radii as typed, in order; raises UsageError for one that is none."""
    rows = list(samples)
    labelled = bool(rows) and all(row.label is not None for row in rows)
    radii = [counted_radius(row) for row in rows]
    correct = [counted_radius(row) for row in rows if row.correct]

    def share(holds: Callable[[Sample, float], bool], level: float) -> float:
        return fmean(float(holds(row, level)) for row in rows) if rows else 0.0

    levels = {text: parse_eps(text) for text in eps}
    certified_shares = {text: share(certified_at, level) for text, level in levels.items()}
    return Summary(
        samples=len(rows),
        accuracy=fmean(float(bool(row.correct)) for row in rows) if labelled else None,
        mean_certified_radius=fmean(radii) if rows else None,
        median_certified_radius=median(radii) if rows else None,
        mean_certified_radius_correct=fmean(correct) if correct else None,
        certified_accuracy=certified_shares if labelled else None,
        certified_share=None if labelled else certified_shares,
        attack_accuracy={text: share(withstands, level) for text, level in levels.items()} if labelled else None,
        seconds=seconds,
        search_seconds=search_seconds,
        stopped=stopped,
    )


def seal(run: Run, samples: Iterable[Sample], summary: Summary) -> str:
    """SHA-256 over the run line, every sample and the summary as JSON; the summary's own seal left out."""
    digest = hashlib.sha256()
    records: list[Record] = [run, *samples, replace(summary, seal=None)]
    for record in records:
        digest.update(_canonical(record).encode())
    return digest.hexdigest()


def _canonical(record: Record) -> str:
    """The record as JSON, always the same; without `stopped` where it is None, as in runs from before that field."""
    content = {name: value for name, value in record.to_dict().items() if (name, value) != ("stopped", None)}
    return json.dumps(content, sort_keys=True, allow_nan=False)


def linked(chain: str, sample: Sample) -> str:
    """The link of a sample's line to all samples' lines before it; chain: the last link, "" in front of the first.

    A run that is resumed finds by the links whether its earlier lines were changed.
    """
    return hashlib.sha256(f"{chain}{_canonical(sample)}".encode()).hexdigest()[:32]


def sealed(run: Run, samples: Sequence[Sample], summary: Summary) -> Summary:
    """The summary with its seal over the run, the samples and itself."""
    return replace(summary, seal=seal(run, samples, summary))
