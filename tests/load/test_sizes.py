"""Small files that ask for much: refused in a sentence before memory is asked for, or loaded within little."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from certify_cli.load.safetensors.architecture import FORMAT, MAX_LAYERS
from tests.files import npy_header
from tests.hostile import is_sentence

BIG = 10**9
IMAGE = [1, 4, 4]


def spec(*layers: dict[str, Any], shape: list[int] = IMAGE) -> dict[str, Any]:
    named = [{"name": f"l{k}", **layer} for k, layer in enumerate(layers)]
    return {"format": FORMAT, "input": shape, "layers": named}


def conv(**fields: Any) -> dict[str, Any]:
    return spec({"type": "Conv2d", "name": "conv", **fields})


def window(kind: str, **fields: Any) -> dict[str, Any]:
    return spec({"type": kind, **fields})


def doubled(times: int) -> dict[str, Any]:
    layers: list[dict[str, Any]] = [{"type": "Identity"}, {"type": "tanh"}]
    layers += [{"type": "concat", "axis": 0, "inputs": [f"l{k + 1}", f"l{k + 1}"]} for k in range(times)]
    return spec(*layers)


SPECS: dict[str, Any] = {
    "input": spec({"type": "tanh"}, shape=[BIG]),
    "input of several axes": spec({"type": "tanh"}, shape=[10**5, 10**5]),
    "input beyond integers": spec({"type": "tanh"}, shape=[10**30, 10**30]),
    "input of many axes": spec({"type": "tanh"}, shape=[1] * 10**5),
    "layers": spec(*[{"type": "tanh"}] * (MAX_LAYERS + 1)),
    "layers that are nothing": {"format": FORMAT, "input": [4], "layers": [{}] * 10**6},
    "large layers": spec(*[{"type": "tanh"}] * 1000, shape=[2**24]),
    "no tensors": spec({"type": "Linear"}, shape=[4]),
    "padding": conv(padding=BIG),
    "padding of one axis": conv(padding=[BIG, 0]),
    "padding with a stride": conv(padding=BIG, stride=BIG),
    "padding by copies": conv(padding=10**5, padding_mode="replicate"),
    "padding around": conv(padding=10**5, padding_mode="circular"),
    "dilation": conv(dilation=BIG, padding=BIG),
    "stride": conv(stride=BIG),
    "many integers": conv(padding=[1] * 10**5),
    "beyond integers": conv(padding=10**30),
    "transposed stride": spec({"type": "ConvTranspose2d", "name": "conv", "stride": BIG}),
    "transposed output padding": spec(
        {"type": "ConvTranspose2d", "name": "conv", "output_padding": 10**8, "stride": BIG}
    ),
    "transposed padding": spec({"type": "ConvTranspose2d", "name": "conv", "padding": BIG}),
    "average": window("AvgPool2d", kernel_size=BIG),
    "average padded": window("AvgPool2d", kernel_size=2 * BIG, padding=BIG),
    "average padded, ceiled": window("AvgPool2d", kernel_size=2 * BIG, padding=BIG, ceil_mode=True),
    "average without the padding": window("AvgPool2d", kernel_size=2 * 10**6, padding=10**6, count_include_pad=False),
    "average to many": window("AdaptiveAvgPool2d", output_size=BIG),
    "average to many pixels": window("AdaptiveAvgPool2d", output_size=10**5),
    "average unevenly": spec({"type": "AdaptiveAvgPool1d", "output_size": 7}, shape=[1, 10**5]),
    "average unevenly, small": spec(
        {"type": "AdaptiveAvgPool1d", "output_size": 9}, {"type": "Flatten"}, shape=[1, 7000]
    ),
    "maximum, small": spec({"type": "MaxPool1d", "kernel_size": 700}, {"type": "Flatten"}, shape=[1, 7000]),
    "average unevenly to many": spec({"type": "AdaptiveAvgPool1d", "output_size": 10**5 - 1}, shape=[1, 10**5]),
    "maximum": window("MaxPool2d", kernel_size=BIG),
    "maximum padded": window("MaxPool2d", kernel_size=2 * BIG, padding=BIG),
    "maximum ceiled": window("MaxPool2d", kernel_size=BIG, stride=BIG, ceil_mode=True),
    "maximum of many": spec({"type": "MaxPool1d", "kernel_size": 5 * 10**5}, shape=[1, 10**6]),
    "maximum of many windows": spec(
        {"type": "MaxPool1d", "kernel_size": 5 * 10**5, "stride": 1, "padding": 10}, shape=[1, 10**6]
    ),
    "primitive window": window("max_pool", kernel=[BIG, BIG], stride=[1, 1], padding=[10**8, 10**8], dilation=[1, 1]),
    "pad": window("Pad", padding=[BIG, BIG]),
    "pad every axis": window("Pad", padding=[10**4] * 6),
    "pad by copies": window("Pad", padding=[BIG, 0], mode="replicate"),
    "pad with a value": window("Pad", padding=[10**4] * 4, value=1.5),
    "pad many axes": window("Pad", padding=[1] * 10**5),
    "reshape": window("reshape", shape=[BIG, BIG]),
    "reshape to many axes": window("reshape", shape=[1] * 10**5 + [16]),
    "select of ours": spec({"type": "select", "name": "pick", "size": 2 * BIG}),
    "concat": doubled(40),
    "groups": conv(groups=BIG),
    "pairs": window("GroupSort", group_size=BIG),
    "many taps": conv(padding=2040),
    "mean": window("Normalise", mean=[0.5] * 10**5),
    "deep": "[" * 10**6,
    "deep objects": '{"a":' * 10**5,
    "long": " " * (5 * 2**20),
    "long number": '{"format": ' + "1" * 10**5 + "}",
}


def png(width: int, height: int) -> bytes:
    """The header of an image of so many pixels, with a few bytes of them."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(10**7), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def archive(path: Path, content: bytes, repeated: int = 1) -> None:
    """An .npz whose one array unpacks to `content` so many times over."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as written,
        written.open("x.npy", "w", force_zip64=True) as file,
    ):
        file.write(content)
        for _ in range(repeated - 1):
            file.write(content)


def long_header() -> bytes:
    """An .npy header that claims to be three gigabytes long."""
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", 3 * 2**30)


CHILD = """
import json, resource, sys
from pathlib import Path
from certify_cli.errors import CurvcertError
from certify_cli import load_data, load_model
from certify_cli.data.npz import read_rows
load_data("digits")
folder = Path(sys.argv[1])
for path in sorted(folder.iterdir()):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        if path.suffix == ".safetensors":
            load_model(path)
        elif path.suffix != ".json":
            load_data(str(path))
        said = ""
    except CurvcertError as error:
        said = str(error).replace(str(path), "FILE").replace(str(folder), "FOLDER")
    unit = 1 if sys.platform == "darwin" else 1024
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    print(json.dumps([path.name, said, grown]), flush=True)
"""
MOST = 700 * 2**20
"""Bytes by which one file may let the process grow; gigabytes it must never be."""
LOADS = {"average unevenly, small", "maximum, small"}


@pytest.mark.skipif(sys.platform == "win32", reason="the memory of a process is not told there")
def test_small_files_take_little_memory(tmp_path: Path) -> None:
    weight = {"conv.weight": torch.ones(1, 1, 3, 3), "pick.index": torch.zeros(2, dtype=torch.int64)}
    for name, declared in SPECS.items():
        text = declared if isinstance(declared, str) else json.dumps(declared)
        used = {key: value for key, value in weight.items() if f'"{key.split(".")[0]}"' in text}
        save_file(used, tmp_path / f"{name}.safetensors", {"curvcert": text})
    for name, size in (("square", (60_000, 60_000)), ("wide", (2**30, 1)), ("half", (12_000, 12_000))):
        (tmp_path / f"png {name}").mkdir()
        (tmp_path / f"png {name}" / "a.png").write_bytes(png(*size))
    (tmp_path / "many images").mkdir()
    Image.new("L", (4000, 4000)).save(tmp_path / "many images" / "0.png")
    for k in range(1, 300):
        (tmp_path / "many images" / f"{k}.png").hardlink_to(tmp_path / "many images" / "0.png")
    header = npy_header((2, 2**30))
    archive(tmp_path / "unpacks.npz", header + bytes(2**20))
    archive(tmp_path / "bomb.npz", bytes(2**24), 128)
    archive(tmp_path / "header.npz", long_header() + bytes(2**24), 2)
    large = io.BytesIO()
    np.lib.format.write_array_header_2_0(
        large, {"descr": [("a" * 50_000, "<f4")] * 40, "fortran_order": False, "shape": (1,)}
    )
    archive(tmp_path / "long header.npz", large.getvalue())
    archive(tmp_path / "type.npz", npy_header((1, 1), f"|V{2**31 - 1}"))
    archive(tmp_path / "negative.npz", npy_header((-1, 4)))

    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    found = {name: (said, grown) for name, said, grown in map(json.loads, done.stdout.splitlines())}
    missing = sorted({path.name for path in tmp_path.iterdir()} - set(found))
    assert not missing, (missing[0], done.stderr[-2000:])
    for name, (said, grown) in found.items():
        assert grown < MOST, (name, said, grown)
        assert said == "" if Path(name).stem in LOADS else is_sentence(said), (name, said)
