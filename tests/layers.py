"""Declared layers beside the torch modules that they mean."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.load.exports import ClampedMaxMin, GroupSort, MaxMin

# type, fields, the torch module, input shape
LAYER_CASES: list[tuple[str, dict[str, Any], nn.Module, list[int]]] = [
    ("Linear", {}, nn.Linear(6, 4), [6]),
    ("Linear", {}, nn.Linear(6, 4, bias=False), [3, 6]),
    ("Conv1d", {"stride": 2, "padding": [1]}, nn.Conv1d(2, 3, 3, 2, 1), [2, 9]),
    (
        "Conv2d",
        {"stride": [2, 1], "padding": [1, 0], "dilation": 2, "groups": 2},
        nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), 2, 2),
        [4, 9, 8],
    ),
    ("Conv2d", {"padding": 1, "padding_mode": "reflect"}, nn.Conv2d(2, 3, 3, 1, 1, padding_mode="reflect"), [2, 5, 5]),
    ("Conv3d", {}, nn.Conv3d(1, 2, 2, bias=False), [1, 3, 4, 3]),
    ("ConvTranspose1d", {}, nn.ConvTranspose1d(2, 3, 3), [2, 4]),
    (
        "ConvTranspose2d",
        {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2},
        nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2),
        [4, 3, 3],
    ),
    ("ConvTranspose3d", {"dilation": 2}, nn.ConvTranspose3d(2, 1, 2, dilation=2), [2, 2, 2, 2]),
    ("BatchNorm1d", {}, nn.BatchNorm1d(3), [3, 4]),
    ("BatchNorm2d", {"eps": 0.01}, nn.BatchNorm2d(3, eps=0.01), [3, 4, 2]),
    ("BatchNorm3d", {}, nn.BatchNorm3d(2, affine=False), [2, 2, 2, 2]),
    ("AvgPool1d", {"kernel_size": 2}, nn.AvgPool1d(2), [2, 6]),
    (
        "AvgPool2d",
        {"kernel_size": [3, 2], "stride": 2, "padding": 1, "count_include_pad": False, "ceil_mode": True},
        nn.AvgPool2d((3, 2), 2, 1, ceil_mode=True, count_include_pad=False),
        [2, 6, 5],
    ),
    ("AvgPool3d", {"kernel_size": 2}, nn.AvgPool3d(2), [1, 4, 4, 2]),
    ("AdaptiveAvgPool1d", {"output_size": 3}, nn.AdaptiveAvgPool1d(3), [2, 7]),
    ("AdaptiveAvgPool2d", {"output_size": 1}, nn.AdaptiveAvgPool2d(1), [2, 4, 5]),
    ("AdaptiveAvgPool3d", {"output_size": [1, 2, 1]}, nn.AdaptiveAvgPool3d((1, 2, 1)), [1, 2, 4, 3]),
    ("MaxPool1d", {"kernel_size": 3, "stride": 1}, nn.MaxPool1d(3, 1), [2, 5]),
    (
        "MaxPool2d",
        {"kernel_size": 2, "padding": 1, "ceil_mode": True},
        nn.MaxPool2d(2, 2, 1, 1, False, True),
        [2, 5, 4],
    ),
    ("MaxPool3d", {"kernel_size": 2, "dilation": 2}, nn.MaxPool3d(2, 2, dilation=2), [1, 4, 5, 4]),
    ("MaxMin", {}, MaxMin(), [4, 3]),
    ("MaxMin", {}, MaxMin(), [6]),
    ("MaxMin", {"low": -0.2, "high": 0.3}, ClampedMaxMin(-0.2, 0.3), [4, 3]),
    ("MaxMin", {"high": 0, "low": 0.5}, ClampedMaxMin(0.5, 0.0), [6]),
    ("GroupSort", {"group_size": 2}, GroupSort(), [4, 3]),
    ("GroupSort", {}, GroupSort(), [6]),
    ("Flatten", {}, nn.Flatten(), [2, 3]),
    ("Identity", {}, nn.Identity(), [2, 3]),
    ("Pad", {"padding": [1, 2, 0, 1]}, nn.ZeroPad2d((1, 2, 0, 1)), [2, 3, 3]),
    ("Pad", {"padding": [1, 2], "value": 0.5}, nn.ConstantPad1d((1, 2), 0.5), [2, 3]),
    ("Pad", {"padding": [1, 1, 2, 0], "mode": "reflect"}, nn.ReflectionPad2d((1, 1, 2, 0)), [1, 4, 4]),
    ("Pad", {"padding": [1, 1, 2, 0], "mode": "replicate"}, nn.ReplicationPad2d((1, 1, 2, 0)), [1, 4, 4]),
    ("Pad", {"padding": [1, 1, 2, 0], "mode": "circular"}, nn.CircularPad2d((1, 1, 2, 0)), [1, 4, 4]),
    ("relu", {}, nn.ReLU(), [5]),
    ("leaky_relu", {"negative_slope": 0.2}, nn.LeakyReLU(0.2), [5]),
    ("softplus", {"beta": 5}, nn.Softplus(5, 1000), [5]),
    ("gelu", {}, nn.GELU(), [2, 5]),
]
"""Type, fields, the torch module, shape of the input."""
