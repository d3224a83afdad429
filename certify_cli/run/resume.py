"""Resuming a run from its JSON lines: the run record and the samples done so far.

An incomplete batch, and one in which time ended, is computed again from its first sample. Every sample is then computed
in the same batch as in a run that was never stopped, and its record is the same byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from certify_cli.errors import UsageError, quoted, shown
from certify_cli.records import SCHEMA, SECONDS, Run, Sample, linked
from certify_cli.run.settings import Settings

BEGINNING = b'{"type": "run"'
"""How a file begins whose run line may have been cut off."""
ELSEWHERE = ("model", "data", "data_root", "offline")
"""Arguments that may differ, because they only locate files: the hashes of these may not differ."""


@dataclass(frozen=True)
class Begun:
    """The part of a run that a file of records holds. Positions are in bytes.

    start: end of the run line.   ends: end of each sample's line.
    finished: whether the file has the summary of a whole run.
    links: each sample's link to all earlier ones (`records.linked`).
    """

    path: str
    run: Run
    samples: tuple[Sample, ...]
    ends: tuple[int, ...]
    start: int
    finished: bool
    links: tuple[str, ...]

    def settings(self, wanted: Settings) -> Settings:
        """The settings with the batch size and threads of this run, where `wanted` leaves them open."""
        return replace(
            wanted,
            batch_size=wanted.batch_size or self.run.batch_size,
            threads=wanted.threads or self.run.threads,
        )

    def check(self, now: Run, indices: Sequence[int]) -> None:
        """Raise UsageError, naming the first difference, if `now` is another run than this one.

        indices: positions of the samples of `now` in their data set.
        """
        before, after = _identity(self.run), _identity(now)
        different = [name for name in {**before, **after} if before.get(name) != after.get(name)]
        if different:
            name = different[0]
            raise UsageError(
                f"--resume: {self.path} holds another run: its {shown(name)} is {quoted(before.get(name))}, not "
                f"{quoted(after.get(name))}; repeat the command that began it, or write to another file"
            )
        if self.finished and len(self.samples) != now.data.samples:
            raise UsageError(
                f"--resume: {self.path} has a summary, but {len(self.samples)} of {now.data.samples} samples: records "
                "are missing; write to another file"
            )
        if [sample.index for sample in self.samples] != list(indices[: len(self.samples)]):
            raise UsageError(f"--resume: {self.path} holds other samples than these; write to another file")

    @property
    def whole(self) -> int:
        """The number of samples that are kept: those of complete batches."""
        if self.finished:
            return len(self.samples)
        cut = [k for k, sample in enumerate(self.samples) if sample.stopped not in (None, SECONDS)]
        return min([len(self.samples), *cut]) // self.run.batch_size * self.run.batch_size

    @property
    def chain(self) -> str:
        """The link of the last kept sample; "" if none is kept."""
        return self.links[self.whole - 1] if self.whole else ""

    @property
    def size(self) -> int:
        """The number of bytes that are kept."""
        return self.ends[self.whole - 1] if self.whole else self.start


def begun(path: str) -> Begun | None:
    """The part of a run in a file; None if there is no file, or no complete line in it.

    Raises UsageError for any other content, and for records that were changed.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise UsageError(f"--resume: {path} is no file that can be gone on with")
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"--resume: {path} cannot be read: {error.strerror or error}") from error
    run, samples, ends, links, offset, ended, finished = None, [], [], [""], 0, False, False
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):  # cut off while it was written
            break
        offset += len(line)
        record = _record(line)
        kind = record.pop("type", None)
        changed = False
        try:
            if run is None and kind == "run" and record.get("schema") == SCHEMA:
                run, start = Run.from_dict(record), offset
                _identity(run)  # whole, and of the right kinds
                continue
            if run is not None and kind == "sample" and not ended:
                sample = Sample.from_dict(record)
                samples.append(sample)
                ends.append(offset)
                links.append(linked(links[-1], sample))
                changed = record.get("chain") != links[-1]
                if not changed:
                    continue
            elif run is not None and kind == "summary" and not ended:
                ended, finished = True, record.get("stopped") is None
                continue
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, UsageError):
            pass  # reported below
        raise _changed(path, number) if changed else _foreign(path, number)
    if run is None:
        if content[:offset] or not BEGINNING.startswith(content[: len(BEGINNING)]):
            raise _foreign(path)
        return None
    return Begun(path, run, tuple(samples), tuple(ends), start, finished, tuple(links[1:]))


def _changed(path: str, line: int) -> UsageError:
    """The error for a record whose link does not belong to it and its predecessors."""
    return UsageError(
        f"--resume: {path}, line {line}: this record, or one before it, was changed after it was written; delete this "
        "line and all that follow if those before are as certify wrote them, or write to another file"
    )


def _foreign(path: str, line: int = 1) -> UsageError:
    """The error for a line that is no record of a run."""
    return UsageError(
        f"--resume: {path}, line {line}: is no record of a run that certify began; delete this line and all that "
        "follow, or write to another file"
    )


def _record(line: bytes) -> dict[str, Any]:
    """The JSON object of a line; empty if it holds none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _identity(run: Run) -> dict[str, Any]:
    """Everything on which the sample records depend, by names that a user knows."""
    return {
        **{_option(name): value for name, value in _plain(run.arguments).items() if name not in ELSEWHERE},
        "model (sha256)": run.model.sha256,
        "data (sha256)": run.data.sha256,
        "number of samples": run.data.samples,
        "curvcert version": run.version,
        **{f"{name} version": version for name, version in dict(run.libraries).items()},
        "device": run.device,
        "threads": run.threads,
        "batch size": run.batch_size,
        "preprocessing": run.preprocessing,
        "method": run.method,
        "effort": run.effort,
        "attack": run.attack,
    }


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments in the types that JSON returns, without those that may differ or that the run record has as chosen."""
    plain: dict[str, Any] = json.loads(json.dumps(arguments))
    apart = ("threads", "batch_size", "device", "total_seconds")
    return {name: value for name, value in plain.items() if name not in apart}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
