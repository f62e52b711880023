"""Checkpoints: what goes in comes out, and whatever happens to the file is said in a sentence."""

import os

import numpy as np
import pytest

from comet_np import checkpoint
from comet_np.checkpoint import CheckpointError

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
