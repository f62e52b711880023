"""Checkpoints: what goes in comes out, and whatever happens to the file is said in a sentence."""

import io
import os

import numpy as np
import pytest

from comet_np import checkpoint
from comet_np.checkpoint import CheckpointError, write_atomically

ARRAYS = {"w": np.arange(12, dtype="float32").reshape(3, 4), "empty": np.zeros((0, 2)),
          "step": np.array(7), "transposed": np.arange(6.0).reshape(2, 3).T}


def test_round_trip(tmp_path):
    file = tmp_path / "checkpoint"
    checkpoint.save(file, ARRAYS, {"step": 3, "loss": 0.1 + 0.2})
    arrays, description = checkpoint.load(file)
    assert description == {"step": 3, "loss": 0.1 + 0.2}
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)


def test_nothing_there(tmp_path):
    assert checkpoint.load_latest(tmp_path / "checkpoint") is None


def test_damage_of_any_byte_is_found_and_the_previous_one_is_used(tmp_path):
    file = tmp_path / "checkpoint"
    checkpoint.save(file, ARRAYS, {"step": 1})
    checkpoint.save(file, ARRAYS, {"step": 2})
    content = file.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"damaged|not a COMET-NP checkpoint|version"):
            checkpoint.load(file)
        _, description, notice = checkpoint.load_latest(file)
        assert description == {"step": 1}
        assert str(file) in notice


def test_truncation_at_every_length_is_found(tmp_path):
    file = tmp_path / "checkpoint"
    checkpoint.save(file, {"w": np.arange(3.0)}, {})
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            checkpoint.load(file)


def test_all_damaged_says_what_to_do(tmp_path):
    file = tmp_path / "checkpoint"
    file.write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"not a COMET-NP checkpoint: move .* away"):
        checkpoint.load_latest(file)


def test_another_version(tmp_path):
    file = tmp_path / "checkpoint"
    checkpoint.save(file, {}, {})
    file.write_bytes(file.read_bytes().replace(b"\n2 ", b"\n99 "))
    with pytest.raises(CheckpointError, match=r"version 99 .* reads version 2"):
        checkpoint.load(file)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"),
                                   PermissionError(13, "Permission denied")])
def test_a_failed_write_loses_nothing(tmp_path, monkeypatch, error):
    file = tmp_path / "checkpoint"
    checkpoint.save(file, ARRAYS, {"step": 1})

    def fail(descriptor):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=error.strerror):
        checkpoint.save(file, ARRAYS, {"step": 2})
    assert checkpoint.load(file)[1] == {"step": 1}
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint"]


def test_a_crash_between_the_renames_keeps_the_newest(tmp_path, monkeypatch):
    file = tmp_path / "checkpoint"
    checkpoint.save(file, {}, {"step": 1})
    checkpoint.save(file, {}, {"step": 2})
    replace = os.replace

    def crash(source, target):
        if str(target).endswith(".previous"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(file, {}, {"step": 3})
    assert checkpoint.load_latest(file)[1] == {"step": 3}


# --- any file, written atomically ---------------------------------------------------------------


class Watched(io.FileIO):
    """A file open for writing that calls `after` when a part was written."""

    def __init__(self, path, mode, after):
        super().__init__(path, mode)
        self.after = after

    def write(self, part):
        super().write(part)
        self.after()


@pytest.fixture
def file(tmp_path):
    """Return a file that holds something old."""
    file = tmp_path / "file"
    file.write_bytes(b"old")
    return file


@pytest.fixture
def after_each_part(monkeypatch):
    """Return a function that lets another one be called after each part that is written."""
    def watch(after):
        monkeypatch.setattr(checkpoint, "open", lambda path, mode: Watched(path, mode, after),
                            raising=False)

    return watch


def test_a_reader_sees_the_old_file_or_the_new_one(file, after_each_part, monkeypatch):
    seen, replace = [], os.replace

    def watched(source, target):
        assert source.read_bytes() == b"new and longer"
        seen.append(file.read_bytes())
        replace(source, target)

    after_each_part(lambda: seen.append(file.read_bytes()))
    monkeypatch.setattr(os, "replace", watched)
    write_atomically(file, b"new", memoryview(b" and"), b" longer")
    assert seen == 4 * [b"old"]
    assert file.read_bytes() == b"new and longer"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("parts", [1, 2])
def test_a_failure_in_the_middle_leaves_the_old_file_and_no_other(file, after_each_part, parts):
    written = []

    def fill_the_disk():
        written.append(1)
        if len(written) == parts:
            raise OSError(28, "No space left on device")

    after_each_part(fill_the_disk)
    with pytest.raises(CheckpointError, match=r"cannot write .*No space left on device.*--out"):
        write_atomically(file, b"new", b"and more")
    assert file.read_bytes() == b"old"
    assert list(file.parent.iterdir()) == [file]


def test_a_file_is_on_the_disk_before_it_takes_the_name(file, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def watched(descriptor):
        fsync(descriptor)
        events.append(("on the disk", os.fstat(descriptor).st_size))

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("named"), replace(*names)))
    write_atomically(file, b"new", b"!")
    assert events == [("on the disk", 4), "named"]


@pytest.mark.parametrize("first_fails", [False, True])
def test_two_processes_do_not_write_into_each_others_file(file, after_each_part, monkeypatch,
                                                          first_fails):
    """The second writes all of its file while the first is in the middle of its own."""
    turns = []

    def let_the_other_write():
        if turns:
            return
        turns.append(1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 2**22)
            write_atomically(file, b"second")
        assert file.read_bytes() == b"second"
        if first_fails:
            raise OSError(28, "No space left on device")

    after_each_part(let_the_other_write)
    if first_fails:
        with pytest.raises(CheckpointError):
            write_atomically(file, b"first, ", b"whole")
    else:
        write_atomically(file, b"first, ", b"whole")
    assert file.read_bytes() == (b"second" if first_fails else b"first, whole")
    assert list(file.parent.iterdir()) == [file]
