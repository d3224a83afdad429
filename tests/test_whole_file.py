"""Files that appear whole or not at all, and names that no file can have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from certify_cli.errors import UsageError
from certify_cli.whole_file import refuse_unwritable, whole_file, write_whole


def test_a_file_is_replaced_when_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, b"one")
    with pytest.raises(TypeError), whole_file(path) as stream:
        stream.write(b"no text")
    assert path.read_bytes() == b"one"
    write_whole(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["file"]


def test_what_another_process_left_is_not_in_the_way(tmp_path: Path) -> None:
    """A killed process leaves its unfinished file; the next one may have its number."""
    for name in (f".file.{os.getpid()}", f".file.{os.getpid()}.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    write_whole(tmp_path / "file", b"one")
    assert (tmp_path / "file").read_bytes() == b"one"
    assert not (tmp_path / "elsewhere").exists()


def test_a_link_stays_a_link_and_a_device_a_device(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    write_whole(tmp_path / "link", b"one")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"one"
    write_whole(os.devnull, b"one")
    assert not Path(os.devnull).is_file()


def test_what_cannot_be_written_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"one")
    refuse_unwritable(tmp_path / "file")
    refuse_unwritable(tmp_path / "new")
    assert (tmp_path / "file").read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["file"]
    for path, why in (
        (tmp_path / "no" / "file", "No such file"),
        (tmp_path / ("n" * 300), "File name too long"),
        (tmp_path / "file" / "below", "Not a directory"),
        (tmp_path / "a\x00b", "null"),
    ):
        with pytest.raises(UsageError, match=f"cannot be written: .*{why}"):
            refuse_unwritable(path)
        with pytest.raises(UsageError, match="--onnx cannot be written"):
            refuse_unwritable(path, "--onnx")
