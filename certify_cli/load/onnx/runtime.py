"""Runs a file in onnxruntime, against which the loaded network is compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from onnx import ModelProto

from certify_cli.errors import first_line, shown


class NotRunnableError(Exception):
    """onnxruntime does not run a file, for the reason in the message (no kernel for a type, for example)."""


class Runtime:
    """An onnxruntime session on the CPU.   outputs: names of values, by default the file's own outputs."""

    def __init__(self, model: ModelProto | Path, outputs: Sequence[str] | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # its complaints quote the file
        source = str(model) if isinstance(model, Path) else model.SerializeToString()
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its own errors have no common type
            raise NotRunnableError(shown(first_line(error), 200)) from error
        self._input = self._session.get_inputs()[0].name
        self._outputs = list(outputs) if outputs is not None else None

    def run(self, x: np.ndarray) -> list[np.ndarray]:
        """The outputs for one feed, in the file's own types. NotRunnableError where it fails."""
        try:
            return [np.asarray(array) for array in self._session.run(self._outputs, {self._input: x})]
        except Exception as error:
            raise NotRunnableError(shown(first_line(error), 200)) from error
