"""`certify` for Python: the run of the command line, from arguments instead of options."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from certify_cli.data.arrays import dataset
from certify_cli.data.datasets import Dataset
from certify_cli.errors import CurvcertWarning, UsageError, quoted
from certify_cli.load.loaded_model import LoadedModel
from certify_cli.load.model import load_model
from certify_cli.records import Result, collect
from certify_cli.run.doubts import doubts, shortfalls
from certify_cli.run.engine import prepare
from certify_cli.run.settings import Settings

if TYPE_CHECKING:
    from torch.nn import Module


Radii = str | float | Sequence[str | float]


def certify(
    model: LoadedModel | Module,
    data: Any,
    labels: Any = None,
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
    seconds: float | None = None,
    total_seconds: float | None = None,
) -> Result:
    """Certify every sample of `data`: the same records as the command line's.

    model: from `load_model`, or a torch.nn.Module.
    data: a `Dataset` from `load_data`; a tensor or array (N, ...), with `labels` (N,) or without; or batches of them,
    such as a DataLoader gives. Samples are taken in float32, integers divided by 255.
    eps: radii at which the certified accuracy is wanted: 0.5, "36/255", or several. mean, std: one value, or one a
    channel. memory in bytes. seconds: that each sample may take, those of a batch together; total_seconds: that the run
    may take. What is proved by then counts, and `stopped` of the sample, or of the summary, says that time ended.
    Raises CurvcertError (UsageError, ModelError, DataError, MethodError) for what cannot run; warns by CurvcertWarning
    of figures that look wrong, and of time that ended.
    """
    arguments = {key: value for key, value in locals().items() if key not in ("model", "data", "labels")}
    settings = Settings(**arguments | {"eps": _texts(eps), "mean": _numbers(mean), "std": _numbers(std)})
    if isinstance(data, Dataset):
        if labels is not None:
            raise UsageError("labels are given twice: a Dataset has its own")
        chosen = data
    else:
        chosen = dataset(data, labels)
    loaded = model if isinstance(model, LoadedModel) else load_model(model, input_shape=tuple(chosen.x.shape[1:]))
    job = prepare(loaded, chosen, settings, arguments)
    result = collect(job.records())
    for text in (*doubts(job.run, result.summary), *shortfalls(job.run, result.samples, result.summary)):
        warnings.warn(text, CurvcertWarning, stacklevel=2)
    return result


def _texts(eps: Radii) -> tuple[str, ...]:
    return tuple(str(level) for level in ([eps] if isinstance(eps, str | int | float) else eps))


def _numbers(values: float | Sequence[float]) -> tuple[float, ...]:
    try:
        return tuple(float(value) for value in ([values] if isinstance(values, int | float) else values))
    except (TypeError, ValueError):
        raise UsageError(f"mean and std must be numbers, one or one a channel, not {quoted(values)}") from None
