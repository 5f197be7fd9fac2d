"""What cannot be written, read or deleted is a StorageError that says so, once."""

import errno
import os
from pathlib import Path

import pytest

from src.utils.errors import StorageError
from src.utils.files import replacing, storage_errors


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(StorageError, match=f"cannot write {path}: No space"), replacing(path, 1):
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_is_said_once_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(StorageError) as caught, storage_errors(tmp_path), storage_errors(path, "read"):
        path.read_bytes()
    assert str(caught.value).startswith(f"cannot read {path}: No such file or directory; bring it back, and")
    assert caught.value.exit_code == 4


def test_the_disk_that_is_needed_is_said_where_it_is_known(tmp_path: Path) -> None:
    words = r"No space left on device; 123,456 bytes more are needed, [\d,]+ are free; "
    with pytest.raises(StorageError, match=words), storage_errors(tmp_path / "file", needed_bytes=123_456):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EACCES, "mend the permissions"),
        (errno.EROFS, "make the disk writable"),
        (errno.EIO, "see to the disk"),
        (errno.EXDEV, "mend that"),
    ],
)
def test_what_to_do_suits_the_error(tmp_path: Path, number: int, remedy: str) -> None:
    """And room is spoken of only where it is missing."""
    with pytest.raises(StorageError) as raised, storage_errors(tmp_path / "file", needed_bytes=123_456):
        raise OSError(number, os.strerror(number))
    message = str(raised.value)
    assert f"{os.strerror(number)}; " in message
    assert f"; {remedy}" in message
    assert ("make room" in message) == ("123,456" in message) == (number == errno.ENOSPC)


def test_a_file_in_the_way_of_a_folder_is_not_about_room(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file/out"
    with pytest.raises(StorageError, match="a file lies where") as raised, storage_errors(out, needed_bytes=1):
        out.mkdir()
    assert "bytes" not in str(raised.value)
