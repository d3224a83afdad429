"""Operators that onnx.reference lacks or computes wrongly, as the standard defines and onnxruntime computes them.

Functions of (node, its inputs as arrays, opset). They raise a ValueError for cases that they cannot compute, whose text
completes "node 'name' (Type) ...".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from onnx import NodeProto, helper

Arrays = Sequence[Any]


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """Attributes as Python numbers, text and lists."""
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {key: value.decode(errors="replace") if isinstance(value, bytes) else value for key, value in values.items()}


# --- batch norm -------------------------------------------------------------------------------------------------


def batch_norm(node: NodeProto, inputs: Arrays, opset: int) -> list[np.ndarray]:
    """Batch norm in evaluation mode. Below opset 14 onnx.reference mixes in the batch's own statistics."""
    x, gain, shift, mean, variance = inputs
    axes = (-1, *[1] * (x.ndim - 2))
    epsilon = attributes_of(node).get("epsilon", np.float32(1e-5))
    centred = (x - mean.reshape(axes)) / np.sqrt(variance.reshape(axes) + np.asarray(epsilon, variance.dtype))
    return [(gain.reshape(axes) * centred + shift.reshape(axes)).astype(x.dtype)]


# --- activations ------------------------------------------------------------------------------------------------


def erf(node: NodeProto, inputs: Arrays, opset: int) -> list[np.ndarray]:
    """erf in the type of its operand; onnx.reference rounds it to float32."""
    return [_erf(inputs[0])]


def gelu(node: NodeProto, inputs: Arrays, opset: int) -> list[np.ndarray]:
    """x Phi(x), or its form by a hyperbolic tangent."""
    x = inputs[0]
    if attributes_of(node).get("approximate", "none") == "tanh":
        share = 1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    else:
        share = 1 + _erf(x / math.sqrt(2))
    return [(0.5 * x * share).astype(x.dtype)]


def hard_swish(node: NodeProto, inputs: Arrays, opset: int) -> list[np.ndarray]:
    """x min(max(x + 3, 0), 6) / 6; onnx.reference rounds 1/6 to float32."""
    x = inputs[0]
    return [(x * np.clip(x + 3, 0, 6) / 6).astype(x.dtype)]


def _erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf, otypes=[np.float64])(x).astype(x.dtype)


# --- pooling ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """The windows of a pooling, along every spatial axis; pixels are counted from the first one of the image.

    Window j covers begin + stride j + dilation (0 ... kernel - 1).
    begin: negative where the windows start in the padding.   count: number of windows.
    padded: end of the declared padding.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    begin: tuple[int, ...]
    count: tuple[int, ...]
    padded: tuple[int, ...]

    def end(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """How far the last window reaches beyond the image; negative where pixels are left over."""
        parts = zip(self.begin, self.stride, self.count, self.dilation, self.kernel, sizes, strict=True)
        return tuple(b + s * (c - 1) + d * (k - 1) + 1 - n for b, s, c, d, k, n in parts)


def padding_of(attributes: dict[str, Any], sizes: Sequence[int], kernel: Sequence[int]) -> list[tuple[int, int]]:
    """(begin, end) along every spatial axis, `auto_pad` resolved."""
    axes = len(kernel)
    rule = attributes.get("auto_pad", "NOTSET")
    if rule in ("NOTSET", ""):
        pads = [int(p) for p in attributes.get("pads", [0] * 2 * axes)]
        return list(zip(pads[:axes], pads[axes:], strict=True))
    if rule == "VALID":
        return [(0, 0)] * axes
    if rule not in ("SAME_UPPER", "SAME_LOWER"):
        raise ValueError(f"pads by the unknown rule {rule!r}")
    found = []
    strides, dilations = attributes.get("strides", [1] * axes), attributes.get("dilations", [1] * axes)
    for n, k, s, d in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        small, large = total // 2, total - total // 2
        found.append((small, large) if rule == "SAME_UPPER" else (large, small))
    return found


def windows_of(node: NodeProto, sizes: Sequence[int]) -> Windows:
    """The windows of a pooling node on images of `sizes`.

    With `ceil_mode` the last window may reach beyond the padding, but starts within the image or the padding before it.
    """
    attributes = attributes_of(node)
    kernel = [int(k) for k in attributes.get("kernel_shape", sizes)]
    axes = len(kernel)
    stride = [int(s) for s in attributes.get("strides") or [1] * axes]
    dilation = [int(d) for d in attributes.get("dilations") or [1] * axes]
    if not len(stride) == len(dilation) == axes == len(sizes) or min([*kernel, *stride, *dilation]) < 1:
        raise ValueError(f"has windows that do not fit a value of {len(sizes)} spatial axes")
    pads = padding_of(attributes, sizes, kernel)
    if str(attributes.get("auto_pad", "NOTSET")).startswith("SAME"):
        short = any((-(-n // s) - 1) * s + k < n for n, k, s in zip(sizes, kernel, stride, strict=True))
        if short or any(d != 1 for d in dilation):
            raise ValueError(
                "pads by SAME with strides longer than its windows, or with dilation, where onnxruntime and the "
                "standard differ; export explicit pads"
            )
    count, padded = [], []
    for n, k, s, d, (begin, end) in zip(sizes, kernel, stride, dilation, pads, strict=True):
        if min(begin, end) < 0 or max(begin, end) >= k:
            raise ValueError(f"pads by {begin} and {end} pixels, which a window of {k} does not allow")
        room = n + begin + end - ((k - 1) * d + 1)
        if attributes.get("ceil_mode", 0):
            found = -(-room // s) + 1
            found -= (found - 1) * s >= n + begin
        else:
            found = room // s + 1
        if found < 1 or room < 0:
            raise ValueError(f"has a window of {k} pixels, larger than its padded input of {n + begin + end}")
        count.append(found)
        padded.append(n + end)
    lengths = [n + begin + end + k for n, k, (begin, end) in zip(sizes, kernel, pads, strict=True)]
    if max(math.prod(lengths), math.prod(count) * math.prod(kernel)) > LARGEST:
        raise ValueError(f"has windows of {kernel} pixels on {sum(lengths)} padded ones, which is too large to certify")
    starts = tuple(-first for first, _ in pads)
    return Windows(tuple(kernel), tuple(stride), tuple(dilation), starts, tuple(count), tuple(padded))


def _windows(x: np.ndarray, windows: Windows, fill: float) -> np.ndarray:
    """x (batch, channels, *space) as (batch, channels, *count, *kernel), `fill` around the image."""
    axes = len(windows.kernel)
    space = x.shape[2:]
    ends = windows.end(space)
    cut = tuple(slice(None, n + min(e, 0)) for n, e in zip(space, ends, strict=True))
    widths = [(0, 0), (0, 0), *((-b, max(e, 0)) for b, e in zip(windows.begin, ends, strict=True))]
    padded = np.pad(x[(slice(None), slice(None), *cut)], widths, constant_values=fill)
    extent = tuple((k - 1) * d + 1 for k, d in zip(windows.kernel, windows.dilation, strict=True))
    views = sliding_window_view(padded, extent, axis=tuple(range(2, 2 + axes)))
    steps = [slice(None, None, s) for s in windows.stride] + [slice(None, None, d) for d in windows.dilation]
    return views[(slice(None), slice(None), *steps)]


def max_pool(node: NodeProto, inputs: Arrays, opset: int) -> list[np.ndarray]:
    """The maximum of every window; padding is -inf."""
    x = inputs[0]
    windows = windows_of(node, x.shape[2:])
    return [_windows(x, windows, -np.inf).max(axis=tuple(range(-len(windows.kernel), 0)))]


def average_pool(node: NodeProto, inputs: Arrays, opset: int) -> list[np.ndarray]:
    """The mean of every window over its pixels in the image, or in the padded image."""
    x = inputs[0]
    windows = windows_of(node, x.shape[2:])
    total = _windows(x, windows, 0.0).sum(axis=tuple(range(-len(windows.kernel), 0)))
    return [(total / pixel_counts(windows, x.shape[2:], _counts_padding(node))).astype(x.dtype)]


def global_average_pool(node: NodeProto, inputs: Arrays, opset: int) -> list[np.ndarray]:
    """The mean over all pixels."""
    x = inputs[0]
    return [x.mean(axis=tuple(range(2, x.ndim)), keepdims=True)]


def _counts_padding(node: NodeProto) -> bool:
    return bool(attributes_of(node).get("count_include_pad", 0))


def pixel_counts(windows: Windows, sizes: Sequence[int], padding: bool) -> np.ndarray:
    """The number of pixels (*count) in every window: of the image, or of the image with its declared padding."""
    total = np.ones((1,) * len(sizes))
    for axis, n in enumerate(sizes):
        starts = windows.begin[axis] + windows.stride[axis] * np.arange(windows.count[axis])
        taps = starts[:, None] + windows.dilation[axis] * np.arange(windows.kernel[axis])
        first, last = (windows.begin[axis], windows.padded[axis]) if padding else (0, n)
        inside = ((taps >= first) & (taps < last)).sum(1)
        total = total * inside.reshape([-1 if i == axis else 1 for i in range(len(sizes))])
    return total


# --- padding and resizing ---------------------------------------------------------------------------------------


def pad(node: NodeProto, inputs: Arrays, opset: int) -> list[np.ndarray]:
    """Padding; negative widths cut pixels off, before others are added."""
    attributes = attributes_of(node)
    x = inputs[0]
    if opset < 11:
        widths, value = attributes["pads"], attributes.get("value", 0.0)
    else:
        widths = np.ravel(inputs[1]).tolist()
        value = 0.0 if len(inputs) < 3 or inputs[2] is None else float(np.ravel(inputs[2])[0])
    axes = range(x.ndim) if len(inputs) < 4 or inputs[3] is None else [int(a) % x.ndim for a in np.ravel(inputs[3])]
    half = len(axes)
    if len(widths) != 2 * half:
        raise ValueError(f"names {len(widths)} widths for {half} axes")
    pairs = [(0, 0)] * x.ndim
    for position, axis in enumerate(axes):
        pairs[axis] = (int(widths[position]), int(widths[half + position]))
    cut = []
    for n, (begin, end) in zip(x.shape, pairs, strict=True):
        cut.append(slice(max(-begin, 0), n - max(-end, 0)))
        if n - max(-begin, 0) - max(-end, 0) < 1:
            raise ValueError("cuts off every pixel of an axis")
    x = x[tuple(cut)]
    added = [(max(begin, 0), max(end, 0)) for begin, end in pairs]
    size = math.prod(n + sum(pair) for n, pair in zip(x.shape, added, strict=True))
    if size > LARGEST:
        raise ValueError(f"makes a value of {size} entries, which is too large to certify")
    mode = attributes.get("mode", "constant")
    if mode not in ("constant", "reflect", "edge", "wrap"):
        raise ValueError(f"pads by the unknown rule {mode!r}")
    if mode == "constant":
        return [np.pad(x, added, constant_values=np.asarray(value, x.dtype))]
    if mode == "reflect" and any(max(pair) >= n for n, pair in zip(x.shape, added, strict=True) if max(pair)):
        raise ValueError("reflects more pixels than there are")
    return [np.pad(x, added, mode=mode)]


MAX_FACTOR = 4096
"""Largest factor of a resized axis: beyond it, float32 does not distinguish its pixels."""
LARGEST = 2**28
"""Largest number of entries of a value: 2 GiB in float64."""

NEAREST: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "round_prefer_floor": lambda x: np.ceil(x - x.dtype.type(0.5)),
    "round_prefer_ceil": lambda x: np.floor(x + x.dtype.type(0.5)),
    "floor": np.floor,
    "ceil": np.ceil,
}


def resize(node: NodeProto, inputs: Arrays, opset: int) -> list[np.ndarray]:
    """Resize and Upsample to the nearest pixel.

    The pixel is computed in float32, as onnxruntime and PyTorch do, and in float64. ValueError where the two differ:
    another program, or another release, may take another pixel.
    """
    attributes = attributes_of(node)
    x = inputs[0]
    mode = attributes.get("mode", "nearest")
    if mode != "nearest":
        raise ValueError(f"resizes by {mode!r}, which is not supported; use nearest")
    if attributes.get("antialias", 0) or attributes.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise ValueError("resizes with antialiasing or keeps the aspect ratio, which is not supported")
    axes = [int(axis) % x.ndim for axis in attributes.get("axes") or range(x.ndim)]
    scales, sizes = _scales_and_sizes(node, inputs, opset, [x.shape[axis] for axis in axes])
    region = np.ravel(inputs[1]) if opset >= 11 and len(inputs) > 1 and inputs[1] is not None else np.zeros(0)
    result = x
    outside = np.zeros((1,) * x.ndim, dtype=bool)
    for position, axis in enumerate(axes):
        n, m, scale = x.shape[axis], sizes[position], scales[position]
        ends = (region[position], region[len(axes) + position]) if region.size == 2 * len(axes) else (0.0, 1.0)
        pixel, beyond = _nearest(attributes, opset, n, m, scale, ends)
        if scale == 1 and n == m:
            if beyond.any() or not np.array_equal(pixel, np.arange(n)):
                raise ValueError(
                    "crops an axis that it does not resize, which onnxruntime leaves as it is and the standard does "
                    "not; crop it with a Slice"
                )
            continue
        result = np.take(result, pixel, axis=axis)
        outside = outside | beyond.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    if outside.any():
        result = np.where(outside, np.asarray(attributes.get("extrapolation_value", 0.0), x.dtype), result)
    return [result]


def _scales_and_sizes(
    node: NodeProto, inputs: Arrays, opset: int, before: list[int]
) -> tuple[list[np.float32], list[int]]:
    """The factor, in float32, and the number of pixels of every resized axis."""
    attributes = attributes_of(node)
    given: Any = attributes.get("scales")  # Upsample below opset 9
    if given is None and opset < 11:
        given = inputs[1]
    elif given is None and len(inputs) > 2 and inputs[2] is not None and np.size(inputs[2]):
        given = inputs[2]
    if given is not None:
        scales = [np.float32(s) for s in np.ravel(given)]
        sizes = [math.floor(float(np.float32(n) * s)) for n, s in zip(before, scales, strict=True)]
        exact = [math.floor(n * float(s)) for n, s in zip(before, scales, strict=True)]
        if sizes != exact:
            raise ValueError("has a scale for which float32 and float64 give another size; name the sizes instead")
    elif len(inputs) > 3 and inputs[3] is not None:
        sizes = [int(m) for m in np.ravel(inputs[3])]
        scales = [np.float32(m) / np.float32(n) for m, n in zip(sizes, before, strict=True)]
    else:
        raise ValueError("names neither scales nor sizes")
    if min(sizes) < 1 or math.prod(sizes) > LARGEST or not all(0 < s <= MAX_FACTOR for s in scales):
        raise ValueError(f"resizes to {sizes} pixels, which is not supported")
    return scales, sizes


def _nearest(
    attributes: dict[str, Any], opset: int, n: int, m: int, scale: np.float32, region: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """For m pixels along a resized axis: the index of each in the n original ones, and whether it lies outside them."""
    found = []
    for kind in (np.float32, np.float64):
        position = _original(attributes, opset, n, m, kind(scale), (kind(region[0]), kind(region[1])), kind)
        if opset < 11:
            # onnxruntime: up when shrinking, down otherwise
            index = np.ceil(position) if scale < 1 else np.floor(position)
        else:
            rule = attributes.get("nearest_mode", "round_prefer_floor")
            if rule not in NEAREST:
                raise ValueError(f"takes the nearest pixel by the unknown rule {rule!r}")
            index = NEAREST[rule](position)
        crops = attributes.get("coordinate_transformation_mode") == "tf_crop_and_resize"
        beyond = (position < 0) | (position > n - 1) if crops else np.zeros(m, dtype=bool)
        found.append((index.clip(0, n - 1).astype(np.int64), beyond))
    (single, single_beyond), (double, double_beyond) = found
    if not (np.array_equal(single, double) and np.array_equal(single_beyond, double_beyond)):
        raise ValueError(
            "resizes by a factor for which float32 and float64 take other pixels, so that programs differ; "
            "resize by whole factors"
        )
    return double, double_beyond


def _original(
    attributes: dict[str, Any], opset: int, n: int, m: int, scale: Any, region: tuple[Any, Any], kind: Any
) -> np.ndarray:
    """Coordinates, along an axis of n pixels, of the centres of m pixels."""
    j, half, one = np.arange(m).astype(kind), kind(0.5), kind(1)
    usual = "asymmetric" if opset < 11 else "half_pixel"
    mode = attributes.get("coordinate_transformation_mode", usual)
    if mode == "asymmetric":
        return j / scale
    if mode == "half_pixel":
        return (j + half) / scale - half
    if mode == "pytorch_half_pixel":
        return (j + half) / scale - half if m > 1 else np.zeros(m, dtype=kind)
    if mode == "tf_half_pixel_for_nn":
        return (j + half) / scale
    if mode == "half_pixel_symmetric":
        adjustment = kind(m) / (kind(n) * scale)
        return kind(n) / kind(2) * (one - adjustment) + (j + half) / scale - half
    if mode == "align_corners":
        return j * kind(n - 1) / kind(m - 1) if m > 1 else np.zeros(m, dtype=kind)
    if mode == "tf_crop_and_resize":
        start, end = region
        if m > 1:
            return start * kind(n - 1) + j * (end - start) * kind(n - 1) / kind(m - 1)
        return half * (start + end) * kind(n - 1) * np.ones(m, dtype=kind)
    raise ValueError(f"places pixels by the unknown rule {mode!r}")


OPERATORS: dict[str, Callable[[NodeProto, Arrays, int], list[np.ndarray]]] = {
    "BatchNormalization": batch_norm,
    "Erf": erf,
    "Gelu": gelu,
    "HardSwish": hard_swish,
    "GlobalAveragePool": global_average_pool,
    "GlobalMaxPool": max_pool,
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "Pad": pad,
    "Resize": resize,
    "Upsample": resize,
}
