"""Data sets as the contract states them, and the files that are refused."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from certify_cli.data import npz, torchvision_sets
from certify_cli.data.datasets import digits_table, load_data, named_shape, parse_samples
from certify_cli.data.idx import read_idx
from certify_cli.errors import DataError, UsageError
from certify_cli.torchvision_schemas import import_torchvision
from tests.files import npy_header

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the shared MNIST and CIFAR files are not beside this clone"
)


def save(path: Path, **arrays: Any) -> str:
    np.savez_compressed(path, **arrays)
    return str(path)


def pixels(*shape: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


# named sets


@pytest.mark.smoke
def test_digits_splits_are_disjoint_and_scaled() -> None:
    test, train = load_data("digits"), load_data("digits", split="train")
    assert test.x.shape == (360, *named_shape("digits")) == (360, 1, 8, 8)
    assert train.x.shape == (1437, 1, 8, 8)
    assert test.x.dtype == torch.float32
    assert test.y is not None
    assert test.y.dtype == torch.int64
    assert (test.x.min(), test.x.max()) == (0, 1)
    assert test.classes == tuple("0123456789")
    assert test.image


def test_the_digest_is_over_float32_samples_then_int64_labels() -> None:
    data = load_data("digits", samples="10:20")
    assert data.y is not None
    raw = data.x.numpy().astype("<f4").tobytes() + data.y.numpy().astype("<i8").tobytes()
    assert data.sha256 == hashlib.sha256(raw).hexdigest()


def test_samples_and_shuffle() -> None:
    everything = load_data("digits")
    part = load_data("digits", samples="100:130")
    assert part.indices == tuple(range(100, 130))
    assert torch.equal(part.x, everything.x[100:130])
    shuffled = load_data("digits", samples=50, shuffle=True, seed=3)
    assert shuffled.indices == load_data("digits", samples="0:50", shuffle=True, seed=3).indices
    assert shuffled.indices != load_data("digits", samples=50, shuffle=True, seed=4).indices
    assert len(set(shuffled.indices)) == 50
    assert torch.equal(shuffled.x, everything.x[list(shuffled.indices)])
    assert shuffled.y is not None
    assert everything.y is not None
    assert torch.equal(shuffled.y, everything.y[list(shuffled.indices)])


def test_a_seed_means_the_same_samples_for_ever() -> None:
    assert load_data("digits", samples=5, shuffle=True, seed=0).indices == (40, 186, 225, 310, 266)


@pytest.mark.parametrize(
    ("text", "range_"),
    [(None, (0, None)), ("100", (0, 100)), (7, (0, 7)), ("0:1000", (0, 1000)), ("5:", (5, None)), (":9", (0, 9))],
)
def test_sample_texts(text: str | int | None, range_: tuple[int, int | None]) -> None:
    assert parse_samples(text) == range_


@pytest.mark.parametrize("text", ["", ":", "0", "5:5", "9:3", "-1", "1:2:3", "a", "1.5", "1e3", "٣", "9" * 5000])
def test_bad_sample_texts(text: str) -> None:
    with pytest.raises(UsageError, match="--samples"):
        parse_samples(text)


def test_a_range_past_the_end() -> None:
    assert load_data("digits", samples="300:1000").x.shape[0] == 60
    assert any("360" in note for note in load_data("digits", samples="300:1000").notes)
    with pytest.raises(UsageError, match="360"):
        load_data("digits", samples="360:400")


@needs_shared
def test_mnist_reads_torchvisions_folder_without_the_network() -> None:
    data = load_data("mnist", root=SHARED, samples=10, offline=True)
    assert data.x.shape == (10, *named_shape("mnist")) == (10, 1, 28, 28)
    assert data.y is not None
    assert data.y.tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert torch.equal(data.x, (data.x * 255).round() / 255)


@needs_shared
def test_cifar_npz() -> None:
    data = load_data(str(SHARED / "cifar10_test_first761.npz"))
    assert data.x.shape == (761, 3, 32, 32)
    assert data.image
    assert 0 <= data.x.min() < data.x.max() <= 1
    assert not data.notes


def torchvision_datasets() -> ModuleType:
    import_torchvision()
    from torchvision import datasets

    return datasets


def test_every_vision_set_exists_in_torchvision() -> None:
    assert all(hasattr(torchvision_datasets(), row.kind) for row in torchvision_sets.SETS.values())


@pytest.mark.parametrize("name", torchvision_sets.SETS)
def test_offline_forbids_the_download(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--offline.*--data-root"):
        load_data(name, root=tmp_path, offline=True)
    assert not any(tmp_path.rglob("*.gz"))


class FakeSet:
    """Stands in for torchvision: absent until downloaded, talkative, and able to fail."""

    fails = False

    def __init__(self, root: Path, download: bool, **_: Any) -> None:
        if not download:
            raise RuntimeError("Dataset not found.")
        print("chatter")
        if self.fails:
            raise OSError("<urlopen error no route>\nmore")
        self.data, self.targets, self.classes = (
            torch.full((3, 4, 4), 255, dtype=torch.uint8),
            [2, 1, 0],
            ["a", "b", "c"],
        )


def test_a_download_is_announced_and_leaves_stdout_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torchvision_datasets(), "KMNIST", FakeSet)
    monkeypatch.setenv("CURVCERT_DATA", str(tmp_path / "new"))
    told: list[str] = []
    data = load_data("kmnist", notify=told.append)
    assert told == [f"downloading kmnist into {tmp_path / 'new'}"]
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "chatter\n")
    assert data.x.shape == (3, 1, 4, 4)
    assert data.x.min() == 1
    assert data.classes == torchvision_sets.SETS["kmnist"].classes
    assert data.notes
    load_data("kmnist")
    assert capsys.readouterr() == ("", "")


def test_a_failed_download_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision_datasets(), "KMNIST", FakeSet)
    monkeypatch.setattr(FakeSet, "fails", True)
    with pytest.raises(DataError, match=r"kmnist: the download into .* failed \(<urlopen error no route>\)") as caught:
        load_data("kmnist", root=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_copy(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for what in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{what}-ubyte").write_bytes(b"\0\0\x08\x03\0\0\0\x09")
    with pytest.raises(DataError, match=r"mnist: .*damaged"):
        load_data("mnist", root=tmp_path, offline=True)


# .npz files


def test_npz_integers_are_divided_and_grey_images_gain_a_channel(tmp_path: Path) -> None:
    x = pixels(6, 28, 28)
    data = load_data(save(tmp_path / "d.npz", x=x, y=np.arange(6, dtype=np.uint8)))
    assert data.x.shape == (6, 1, 28, 28)
    assert np.array_equal(data.x.numpy()[:, 0], x.astype(np.float32) / np.float32(255))
    assert data.y is not None
    assert data.y.tolist() == [0, 1, 2, 3, 4, 5]
    assert data.classes is None


def test_npz_floats_are_taken_as_they_are_and_need_no_labels(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    data = load_data(save(tmp_path / "d.npz", x=x))
    assert np.array_equal(data.x.numpy(), x)
    assert data.y is None
    assert not data.image
    assert not data.notes


def test_npz_channels_last(tmp_path: Path) -> None:
    x = pixels(4, 6, 5, 3)
    path = save(tmp_path / "d.npz", x=x)
    assert load_data(path, data_layout="nhwc").x.shape == (4, 3, 6, 5)
    assert any("--data-layout nhwc" in note for note in load_data(path).notes)


def test_npz_notes(tmp_path: Path) -> None:
    wide = load_data(save(tmp_path / "wide.npz", x=np.linspace(-1, 2, 32, dtype=np.float32).reshape(2, 1, 4, 4)))
    assert any("[-1, 2]" in note for note in wide.notes)
    fine = load_data(save(tmp_path / "fine.npz", x=np.full((2, 3), 0.1)))
    assert any("rounded" in note for note in fine.notes)


@pytest.mark.parametrize(
    ("arrays", "what"),
    [
        ({"images": pixels(2, 4), "labels": np.arange(2)}, "images, labels"),
        ({"x": pixels(2, 4), "y": np.arange(2), "z": pixels(1)}, "x, y, z"),
        ({"x": pixels(4)}, r"shape \(4,\)"),
        ({"x": pixels(0, 4)}, r"shape \(0, 4\)"),
        ({"x": pixels(2, 4), "y": np.arange(3)}, r"\(3,\).*2 samples"),
        ({"x": pixels(2, 4), "y": np.zeros((2, 1), int)}, r"\(2, 1\)"),
        ({"x": pixels(2, 4), "y": np.array([0.0, 1.0])}, "float64"),
        ({"x": pixels(2, 4), "y": np.array([0, -1])}, "-1"),
        ({"x": np.array([["a", "b"]])}, "<U1"),
        ({"x": np.zeros((2, 2), complex)}, "complex128"),
        ({"x": np.array([[1.0, 2.0], [np.nan, 0.0]])}, "sample 1"),
        ({"x": np.array([[1.0, np.inf]])}, "sample 0"),
        ({"x": np.array([[{}]], dtype=object)}, "objects"),
    ],
)
def test_npz_that_break_the_convention(tmp_path: Path, arrays: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError, match=what) as caught:
        load_data(save(tmp_path / "bad.npz", **arrays))
    assert "bad.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


def crafted(path: Path, header: bytes, body: bytes = b"", method: int = zipfile.ZIP_DEFLATED) -> str:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("x.npy", header + body)
    return str(path)


def test_npz_whose_declared_size_lies_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("the array was read"))
    with pytest.raises(DataError, match="does not match"):
        load_data(crafted(tmp_path / "a.npz", npy_header((1000, 1000)), b"\0" * 10))
    with pytest.raises(DataError, match="the limit is"):
        load_data(crafted(tmp_path / "b.npz", npy_header((10**6, 10**6)), b"\0" * 10))
    with pytest.raises(DataError, match="numpy does not write"):
        load_data(crafted(tmp_path / "c.npz", npy_header((4, 4)), b"\0" * 16, zipfile.ZIP_LZMA))
    monkeypatch.setattr(npz, "DEFLATE_RATIO", 10)
    with pytest.raises(DataError, match="impossible"):
        load_data(crafted(tmp_path / "d.npz", npy_header((1000, 1000)), b"\0" * 10**6))


def test_npz_damaged(tmp_path: Path) -> None:
    whole = Path(save(tmp_path / "whole.npz", x=pixels(50, 8, 8))).read_bytes()
    cases = {
        "truncated": (whole[: len(whole) // 2], "cut off"),
        "flipped": (whole[:200] + bytes([whole[200] ^ 255]) + whole[201:], "not a readable"),
        "text": (b"not a zip at all", r"not an \.npz file; .*x holds the samples"),
        "array": (b"\x93NUMPY", r"not an \.npz file; .*x holds the samples"),
        "empty": (b"", r"not an \.npz file; .*x holds the samples"),
    }
    for name, (content, what) in cases.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}\.npz: .*{what}") as caught:
            load_data(str(path))
        assert "zip file" not in str(caught.value)
    with pytest.raises(DataError, match="garbled"):
        load_data(crafted(tmp_path / "garbled.npz", b"\x93NUMPY\x01\x00\x10\x00{'descr': boom()}"))


# folders


def picture(path: Path, size: tuple[int, int] = (6, 5), mode: str = "RGB", value: int = 255) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode != "RGB" else (value, 0, 0)).save(path)


def test_folder_with_classes(tmp_path: Path) -> None:
    picture(tmp_path / "dog" / "1.png")
    picture(tmp_path / "cat" / "1.png", value=51)
    picture(tmp_path / "cat" / "2.png")
    data = load_data(str(tmp_path))
    assert data.x.shape == (3, 3, 5, 6)
    assert data.x[0, :, 0, 0].tolist() == pytest.approx([0.2, 0, 0])
    assert data.classes == ("cat", "dog")
    assert data.y is not None
    assert data.y.tolist() == [0, 0, 1]


def test_folder_without_classes_has_no_labels_and_grey_images_one_channel(tmp_path: Path) -> None:
    picture(tmp_path / "b.png", mode="L", value=0)
    picture(tmp_path / "a.png", mode="L")
    data = load_data(str(tmp_path))
    assert data.x.shape == (2, 1, 5, 6)
    assert data.x[:, 0, 0, 0].tolist() == [1, 0]
    assert data.y is None
    assert data.notes


def test_folder_of_mixed_sizes_needs_resize(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", size=(9, 9))
    with pytest.raises(DataError, match=r"a\.png is 5x6, b\.png 9x9.*--resize"):
        load_data(str(tmp_path))
    data = load_data(str(tmp_path), resize=(4, 7))
    assert data.x.shape == (2, 3, 4, 7)
    assert any("resized to 4x7" in note for note in data.notes)


def test_images_of_one_name_are_told_apart(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "1.png")
    picture(tmp_path / "dog" / "1.png", size=(9, 9))
    with pytest.raises(DataError, match=r"cat.1\.png is 5x6, dog.1\.png 9x9"):
        load_data(str(tmp_path))


@pytest.mark.parametrize("name", ["folder", "d.npz", "missing", "digits"])
@pytest.mark.parametrize("option", [{"resize": (4, 4)}, {"data_layout": "nhwc"}, {"split": "train"}])
def test_options_of_another_kind_of_data(
    name: str, option: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is said about the source is so, also where a folder bears the name of a data set."""
    monkeypatch.chdir(tmp_path)
    picture(Path("folder/a.png"))
    Path("digits").mkdir()
    save(Path("d.npz"), x=pixels(2, 4, 4, 3))
    kinds = {"folder": "is a folder", "d.npz": "is a file", "missing": "no such file", "digits": "is a data set known"}
    fits = {"resize": "folder", "data_layout": "d.npz", "split": "digits"}
    if fits[next(iter(option))] == name:
        load_data(name, **option)
        return
    with pytest.raises(DataError if name == "missing" else UsageError, match=kinds[name]):
        load_data(name, **option)


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 4, 5, 6)])
def test_a_layout_of_what_are_no_images(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not \(N, H, W, C\)"):
        load_data(save(tmp_path / "d.npz", x=pixels(*shape)), data_layout="nhwc")


def test_folders_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no image"):
        load_data(str(tmp_path))
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="not a folder of images"):
        load_data(str(tmp_path))
    (tmp_path / "cat" / "x.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"x\.png: not a readable image"):
        load_data(str(tmp_path))
    picture(tmp_path / "cat" / "x.png", mode="I;16", value=3)
    with pytest.raises(DataError, match="8 bits"):
        load_data(str(tmp_path))


def test_a_program_or_a_pipe_under_the_name_of_an_image(tmp_path: Path) -> None:
    """Pillow would hand PostScript to another program, and wait for a pipe."""
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n"
    )
    assert Image.open(tmp_path / "a.png").format == "EPS"
    with pytest.raises(DataError, match=r"a\.png: not a readable image"):
        load_data(str(tmp_path))
    (tmp_path / "a.png").unlink()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "a.png")
        with pytest.raises(DataError, match=r"a\.png: not a plain file"):
            load_data(str(tmp_path))


# arguments


def test_an_unknown_source_lists_the_names() -> None:
    with pytest.raises(DataError, match=r"nowhere: no such file.*digits, mnist"):
        load_data("nowhere")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"split": "validation"}, "--split"),
        ({"data_layout": "hwc"}, "--data-layout"),
        ({"data_layout": "nhwc"}, "--data-layout"),
        ({"resize": (4, 4)}, "--resize"),
        ({"resize": (0, 4)}, "--resize"),
    ],
)
def test_arguments_that_cannot_be_used(arguments: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        load_data("digits", **arguments)


IDX = {
    "t10k-images-idx3-ubyte": bytes((0, 0, 8, 3))
    + b"".join(n.to_bytes(4, "big") for n in (2, 3, 4))
    + bytes(range(24)),
    "t10k-labels-idx1-ubyte": bytes((0, 0, 8, 1, 0, 0, 0, 2)) + bytes((7, 1)),
}


def idx_folder(path: Path, **changes: bytes) -> Path:
    for name, content in (IDX | {f"t10k-{key}-ubyte": value for key, value in changes.items()}).items():
        (path / name).write_bytes(content)
    return path


def test_files_of_mnist_read_as_torchvision_reads_them(tmp_path: Path) -> None:
    folder = tmp_path / "KMNIST" / "raw"
    folder.mkdir(parents=True)
    found = read_idx(idx_folder(folder), "test")
    assert found is not None
    assert read_idx(folder, "train") is None
    for name in IDX:  # torchvision wants all files
        (folder / name.replace("t10k", "train")).write_bytes(IDX[name])
    expected = torchvision_datasets().KMNIST(tmp_path, train=False)
    assert np.array_equal(found[0], expected.data.numpy())
    assert np.array_equal(found[1], expected.targets.numpy())
    assert tuple(expected.classes) == torchvision_sets.SETS["kmnist"].classes


@pytest.mark.parametrize("change", ["images", "labels"])
@pytest.mark.parametrize("damage", ["short", "long", "other type", "empty", "head only"])
def test_damaged_files_of_mnist_are_not_read(tmp_path: Path, change: str, damage: str) -> None:
    """They are left to torchvision, whose complaint becomes the sentence."""
    name = {"images": "images-idx3", "labels": "labels-idx1"}[change]
    whole = IDX[f"t10k-{name}-ubyte"]
    content = {
        "short": whole[:-1],
        "long": whole + b"x",
        "other type": whole[:2] + bytes((13,)) + whole[3:],
        "empty": b"",
        "head only": whole[:6],
    }[damage]
    assert read_idx(idx_folder(tmp_path, **{name: content}), "test") is None


def test_labels_of_another_number_are_not_read(tmp_path: Path) -> None:
    labels = bytes((0, 0, 8, 1, 0, 0, 0, 3)) + bytes(3)
    assert read_idx(idx_folder(tmp_path, **{"labels-idx1": labels}), "test") is None


def test_names_of_garments_are_torchvisions() -> None:
    assert tuple(torchvision_datasets().FashionMNIST.classes) == torchvision_sets.SETS["fashion-mnist"].classes


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    data, target = load_digits(return_X_y=True)
    assert np.array_equal(digits_table(), np.column_stack([data, target]))
