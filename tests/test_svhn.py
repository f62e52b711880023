"""SVHN: its files are read right, or refused in one sentence, on small ones of the same format."""

import gzip
import hashlib

import numpy as np
import pytest
from scipy.io import savemat

from comet_np.experiments import datasets
from comet_np.experiments.datasets import svhn
from tests.test_damaged_data import MIB, in_a_child, memory_below
from tests.test_datasets import real, refused

__all__ = ["real"]  # a fixture


def write(folder, n=50, n_test=15, y_type="uint8", **options):
    """Write small files in the official format; return each one's images and digits."""
    draw, written = np.random.default_rng(0), {}
    for file, count in zip(svhn.DOWNLOADS, (n, n_test), strict=True):
        x = draw.integers(256, size=(32, 32, 3, count), dtype=np.uint8)
        y = (np.arange(count) % 10 + 1).astype(y_type)[:, None]
        savemat(folder / file.name, {"X": x, "y": y}, **options)
        written[file.name] = x, y
    return written


def image_of(x, i):
    """Return an image pixel by pixel: the red plane, the green, the blue, each row by row."""
    return [x[row, column, colour, i] for colour in range(3) for row in range(32)
            for column in range(32)]


def check(folder, written):
    data = datasets.load("svhn", folder)
    assert (data.x_train.shape, data.x_val.shape) == ((40, 3072), (10, 3072))
    x, y = written[svhn.TEST.name]
    for i, image in enumerate(data.x_test):
        np.testing.assert_array_equal(image, image_of(x, i))
    np.testing.assert_array_equal(data.y_test, y[:, 0] % 10)
    assert data.y_test[9] == 0
    x, y = written[svhn.TRAIN.name]
    images = np.array([image_of(x, i) for i in range(50)])
    order = [int(np.flatnonzero((images == image).all(axis=1))[0])
             for image in np.concatenate([data.x_train, data.x_val])]
    assert sorted(order) == list(range(50))
    np.testing.assert_array_equal(np.concatenate([data.y_train, data.y_val]), y[order, 0] % 10)
    for part in ("train", "val", "test"):
        x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
        assert (x.dtype, y.dtype, x.flags.c_contiguous) == (np.uint8, np.int64, True)
    assert (data.outputs, data.image) == (10, (3, 32, 32))
    np.testing.assert_allclose(data.x_test * data.scale + data.shift,
                               (data.x_test / 255 - 0.5) / 0.5, atol=1e-12)
    return data


@pytest.mark.parametrize("form", ["plain", "compressed", "gzip", "doubles", "doubles in bytes",
                                  "in a folder"])
def test_every_form_is_read(tmp_path, form):
    folder = tmp_path / "svhn" if form == "in a folder" else tmp_path
    folder.mkdir(exist_ok=True)
    written = write(folder, do_compression=form == "compressed",
                    y_type="float64" if form == "doubles" else "uint8")
    for file in (folder / each.name for each in svhn.DOWNLOADS):
        content = file.read_bytes()
        if form == "gzip":
            file.unlink()
            file.with_name(file.name + ".gz").write_bytes(gzip.compress(content))
        elif form == "doubles in bytes":  # as MATLAB writes doubles that are small whole numbers
            y = content.rindex(b"\x06\0\0\0\x08\0\0\0\x09\0\0\0")
            file.write_bytes(content[:y + 8] + b"\x06" + content[y + 9:])
    notice = check(tmp_path, written).notice
    assert "train_32x32.mat, test_32x32.mat in" in notice
    assert "unknown hash" in notice
    assert "50 images for training and validation, 15 for the test" in notice


def test_official_bytes_give_no_notice_and_are_believed(tmp_path, monkeypatch):
    written = write(tmp_path)
    files = [file._replace(hash=hashlib.md5((tmp_path / file.name).read_bytes()).hexdigest())
             for file in svhn.DOWNLOADS]
    monkeypatch.setattr(svhn, "DOWNLOADS", files)
    assert check(tmp_path, written).notice == ""


def test_the_status_and_what_is_missing(tmp_path):
    def status():
        return {row[0]: row[1:3] for row in datasets.report(tmp_path)}["svhn"]

    assert status() == ("missing", "-")
    refused(lambda: datasets.load("svhn", tmp_path), tmp_path, "train_32x32.mat and test_32x32.mat",
            "--fetch svhn", svhn.TEST.url)
    write(tmp_path)
    assert status() == ("found", str(tmp_path))
    (tmp_path / svhn.TEST.name).unlink()
    assert status() == ("incomplete", str(tmp_path))
    refused(lambda: datasets.load("svhn", tmp_path), f"{tmp_path} lacks test_32x32.mat",
            "--fetch svhn")
    refused(lambda: datasets.look(["svhn"], tmp_path), "svhn is incomplete in")
    (tmp_path / "svhn").mkdir()
    write(tmp_path / "svhn")
    assert status() == ("found", str(tmp_path / "svhn"))


def test_the_sizes_are_those_of_the_official_files():
    assert datasets.sizes_of("svhn")[:4] == ("classification", 3072, 10, 73_257 - 73_257 // 5)
    assert datasets.sizes_of("svhn").image == (3, 32, 32)


def arrays(n=9, **changes):
    """Return what a file holds, with some changes."""
    x, y = np.zeros((32, 32, 3, n), np.uint8), np.ones((n, 1), np.uint8)
    return {name: array for name, array in ({"X": x, "y": y} | changes).items()
            if array is not None}


@pytest.mark.parametrize("content", [
    arrays(X=None), arrays(y=None), arrays(Z=np.ones(3)), arrays(y=np.ones((8, 1), np.uint8)),
    arrays(y=np.ones((9, 2), np.uint8)), arrays(y=np.ones((1, 9), np.uint8)),
    arrays(y=np.zeros((9, 1), np.uint8)), arrays(y=np.full((9, 1), 11, np.uint8)),
    arrays(y=np.full((9, 1), 1.5)), arrays(y=np.full((9, 1), np.nan)), arrays(y="text"),
    arrays(y=np.ones((9, 1), np.int16)), arrays(X=np.zeros((32, 32, 3, 9))),
    arrays(X=np.zeros((32, 32, 3, 9), np.int8)), arrays(X=np.zeros((3, 32, 32, 9), np.uint8)),
    arrays(X=np.zeros((32, 32, 1, 9), np.uint8)), arrays(X=np.zeros((32, 32, 3), np.uint8)),
    arrays(X=np.zeros((32, 32, 3, 0), np.uint8)), arrays(X=np.zeros((9, 3072), np.uint8)),
    arrays(X=np.zeros((32, 32, 3, 9), bool)), arrays(X={"a": 1})], ids=range(21))
@pytest.mark.parametrize("compressed", [False, True])
def test_other_contents_are_refused(tmp_path, content, compressed):
    write(tmp_path)
    savemat(tmp_path / svhn.TRAIN.name, content, do_compression=compressed)
    refused(lambda: datasets.load("svhn", tmp_path), tmp_path / svhn.TRAIN.name,
            'an array "X" of (32, 32, 3, n) bytes', "got something else", "--fetch svhn")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("keep", [0, 100, 130, 200, 5000, -1, -100])
def test_a_cut_file_is_refused(tmp_path, compressed, keep):
    write(tmp_path, do_compression=compressed)
    file = tmp_path / svhn.TEST.name
    file.write_bytes(file.read_bytes()[:keep])
    refused(lambda: datasets.load("svhn", tmp_path), file, "expected a MATLAB 5 file",
            "--fetch svhn")


def test_few_and_small_numbers_are_read(tmp_path):
    """Up to four bytes lie in the tag of an array's part."""
    write(tmp_path, n=5, n_test=3)
    data = datasets.load("svhn", tmp_path)
    assert (len(data.x_train), len(data.x_val), data.y_test.tolist()) == (4, 1, [1, 2, 3])
    write(tmp_path, n=4)
    refused(lambda: datasets.load("svhn", tmp_path), tmp_path / svhn.TRAIN.name, "got 4")


def test_a_file_that_holds_too_much_is_refused(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setitem(svhn.IMAGES, svhn.TEST.name, 2)
    refused(lambda: datasets.load("svhn", tmp_path), tmp_path / svhn.TEST.name, "more than")
    savemat(tmp_path / svhn.TEST.name, arrays(3000), do_compression=True)
    with memory_below(2 * MIB):
        refused(lambda: datasets.load("svhn", tmp_path), tmp_path / svhn.TEST.name,
                "more than the official one")


EACH_BYTE = """
import sys
from pathlib import Path
from comet_np.errors import UserError
from comet_np.experiments.datasets import svhn

folder = Path(sys.argv[1])
file = folder / svhn.TEST.name
good, read = file.read_bytes(), 0
at_y = good.rindex(bytes([9, 0, 0, 0])) - 24 if sys.argv[2] == "False" else len(good) - 60
for at in [*range(260), *range(max(at_y, 260), len(good))]:
    for value in {0, 1, 8, 255, good[at] ^ 1} - {good[at]}:
        file.write_bytes(good[:at] + bytes([value]) + good[at + 1:])
        try:
            x, y, _ = svhn._read(folder, svhn.TEST)
        except UserError as error:
            assert "\\n" not in str(error) and str(file) in str(error), error
            assert not 10 <= at < 124, "the text of the header was refused"
        else:
            assert x.shape == (3, 3072) and y.shape == (3,) and 0 <= y.min() and y.max() <= 9
            read += 1
print(read)
"""


@pytest.mark.parametrize("compressed", [False, True])
def test_no_byte_of_a_file_crashes_its_reader(tmp_path, compressed):
    write(tmp_path, n_test=3, do_compression=compressed)
    assert int(in_a_child(EACH_BYTE, tmp_path, compressed)) > 250


def test_official_svhn(real):
    data = real("svhn")
    if data.notice:
        pytest.skip("these are not the official files")
    assert (len(data.x_train), len(data.x_val), len(data.x_test)) == (58_606, 14_651, 26_032)
    assert np.bincount(data.y_test).tolist() == [1744, 5099, 4149, 2882, 2523, 2384, 1977, 2019,
                                                 1660, 1595]
