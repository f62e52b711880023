"""Data sets: the built-in ones are what they claim, official files are read right or refused."""

import contextlib
import gzip
import hashlib
import io
import os
import pickle
import sys
import tarfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest
from scipy.io import savemat

from comet_np.errors import UserError
from comet_np.experiments import datasets
from comet_np.experiments.datasets import arm, cifar, download, glyphs, pickles, sarcos
from comet_np.experiments.datasets.base import OfficialFile
from comet_np.rng import stream

KINDS = [cifar.CIFAR10, cifar.CIFAR100]
FORMS = ["binary folder", "python folder", "binary archive", "python archive", "gzip"]


@pytest.fixture(autouse=True)
def no_folder_from_outside(request, monkeypatch):
    if "real" not in request.fixturenames:
        monkeypatch.delenv("COMET_DATA", raising=False)


@pytest.fixture
def real():
    """Return a loader of official files, which skips the test where they are not."""
    folder = os.environ.get("COMET_DATA")

    def load(name, **options):
        found = {row[0]: row[1] for row in datasets.report(folder)}
        if found[name] == "missing":
            pytest.skip(f"COMET_DATA names no folder with the official files of {name}")
        return datasets.load(name, **options)

    return load


def refused(call, *words):
    """Check that a call ends in one sentence with all of these words in it."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert "Traceback" not in text
    for word in words:
        assert str(word) in text, text


# --- all data sets ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["glyphs", "arm"])
def test_built_in_data_are_of_the_promised_shape_and_reproducible(name):
    if name == "glyphs":
        pytest.importorskip("matplotlib")
    data, again = datasets.load(name, seed=3), datasets.load(name, seed=3)
    task, inputs, outputs, examples, _, image = datasets.sizes_of(name)
    assert data.x_train.shape == (examples, inputs)
    assert data.outputs == outputs
    assert data.image == image == (None if name == "arm" else (3, 32, 32))
    assert data.task == task
    for split in ("train", "val", "test"):
        x, y = getattr(data, f"x_{split}"), getattr(data, f"y_{split}")
        assert len(x) == len(y)
        assert x.dtype == (np.float32 if name == "arm" else np.uint8)
        assert (y.dtype, y.ndim) == ((np.float32, 2) if name == "arm" else (np.int64, 1))
        np.testing.assert_array_equal(x, getattr(again, f"x_{split}"))
        np.testing.assert_array_equal(y, getattr(again, f"y_{split}"))
    rows = np.concatenate([data.x_train, data.x_val, data.x_test])
    assert len(np.unique(rows, axis=0)) == len(rows)
    assert not np.array_equal(data.x_train, datasets.load(name, seed=4).x_train)


def test_train_takes_the_first_examples_and_leaves_the_rest():
    data, part = datasets.load("arm"), datasets.load("arm", train=100)
    np.testing.assert_array_equal(part.x_train, data.x_train[:100])
    np.testing.assert_array_equal(part.y_train, data.y_train[:100])
    np.testing.assert_array_equal(part.x_val, data.x_val)
    assert len(datasets.load("arm", train=10**9).x_train) == len(data.x_train)


def test_the_digest_is_of_every_number():
    data = datasets.load("arm", train=30)
    for name in ("x_train", "y_train", "x_val", "y_val", "x_test", "y_test"):
        for place in (0, -1):
            changed = getattr(data, name).copy()
            changed.flat[place] += 1
            assert replace(data, **{name: changed}).digest != data.digest
    assert replace(data, notice="another").digest == data.digest


def test_bad_requests_are_one_clear_sentence(tmp_path):
    refused(lambda: datasets.load("cifar1"), 'unknown data set "cifar1"; did you mean "cifar10"?')
    refused(lambda: datasets.load("arm", train=0), "at least 1 example, got train = 0")
    refused(lambda: datasets.load("glyphs", target=1), "has classes", "target")
    refused(lambda: datasets.load("arm", target=7), "0 to 6", "got 7")
    refused(lambda: datasets.load("sarcos", tmp_path, target=3), "21 to 27", "got 3")
    refused(lambda: datasets.load("cifar10"), "--data", "COMET_DATA", cifar.ADDRESS)
    refused(lambda: datasets.load("cifar100", tmp_path), tmp_path, "cifar-100-binary.tar.gz",
            "comet-np data --data DIR --fetch cifar100", cifar.ADDRESS)
    refused(lambda: datasets.load("sarcos", tmp_path), sarcos.ADDRESS, "sarcos_inv_test.mat")
    refused(lambda: datasets.fetch("glyphs", tmp_path), "built in")
    refused(lambda: datasets.fetch("sarkos", tmp_path), 'did you mean "sarcos"?')


def test_the_folder_may_come_from_the_environment(tmp_path, monkeypatch):
    write_cifar(tmp_path, cifar.CIFAR10, "binary folder")
    monkeypatch.setenv("COMET_DATA", str(tmp_path))
    assert datasets.load("cifar10").x_train.shape == (40, 3072)


def test_report_says_what_is_there_and_where_the_rest_comes_from(tmp_path):
    status = {row[0]: row[1:] for row in datasets.report(None)}
    assert status["glyphs"][0] == status["arm"][0] == "built in"
    assert status["sarcos"] == ("missing", "-", f"{sarcos.TRAIN.url} and {sarcos.TEST.url}")
    write_cifar(tmp_path, cifar.CIFAR10, "python archive")
    (tmp_path / "cifar-100-binary").mkdir()
    write_sarcos(tmp_path, test=np.ones((3, 28)))
    status = {row[0]: row[1:3] for row in datasets.report(tmp_path)}
    assert status["cifar10"] == ("found", str(tmp_path / "cifar-10-python.tar.gz"))
    assert status["cifar100"] == ("incomplete", str(tmp_path / "cifar-100-binary"))
    assert status["sarcos"] == ("test file only", str(tmp_path))


# --- glyphs -----------------------------------------------------------------------------------


def test_each_glyph_is_a_function_of_its_number():
    pytest.importorskip("matplotlib")
    x, y = glyphs.images(0, "train", 10_000)
    some_x, some_y = glyphs.images(0, "train", 300)
    np.testing.assert_array_equal(some_x, x[:300])
    np.testing.assert_array_equal(some_y, y[:300])
    assert np.bincount(y, minlength=10).min() > 900
    assert x.min() == 0
    assert x.max() == 255


def test_every_font_draws_ten_different_digits():
    pytest.importorskip("matplotlib")
    ink, _ = glyphs.drawings()
    assert ink.shape[:2] == (len(glyphs.BLURS), 10 * len(glyphs.FONTS) + 1)
    assert not ink[:, glyphs.BLANK].any()
    assert len(np.unique(ink[0, :-1].reshape(10 * len(glyphs.FONTS), -1), axis=0)) == glyphs.BLANK
    margin = np.ones((glyphs.CELL, glyphs.CELL), bool)
    margin[1:-1, 1:-1] = False
    assert not ink[:, :, margin].any()  # so that looking beyond the edge finds no ink


def test_drawings_do_not_depend_on_the_users_settings():
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"figure.facecolor": "black", "patch.antialiased": False,
                                "figure.constrained_layout.use": True}):
        np.testing.assert_array_equal(glyphs.drawings.__wrapped__()[0], glyphs.drawings()[0])


def test_glyphs_are_neither_hopeless_nor_trivial():
    """Ridge regression finds far more than chance (0.1), but far from all."""
    pytest.importorskip("matplotlib")
    data = datasets.load("glyphs", train=4000)
    x, x_val = ((part * data.scale + data.shift).astype(np.float32)
                for part in (data.x_train, data.x_val))
    targets = np.eye(10, dtype=np.float32)[data.y_train] - np.float32(0.1)
    weights = np.linalg.solve(x @ x.T + 1000 * np.eye(len(x), dtype=np.float32), targets)
    scores = x_val @ (x.T @ weights)
    assert 0.4 < (scores.argmax(axis=1) == data.y_val).mean() < 0.8


def test_without_matplotlib_one_sentence_says_what_to_install(monkeypatch):
    glyphs.drawings.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(lambda: datasets.load("glyphs"), 'python -m pip install matplotlib')


# --- arm --------------------------------------------------------------------------------------


def energies(q, qd):
    """Return kinetic and potential energy (n,), J, from the links' motion in the base frame.

    Independent of the Newton-Euler recursion, and analytic, for complex steps.
    """
    n = len(q)
    R, origin = np.broadcast_to(np.eye(3), (n, 3, 3)), np.zeros((n, 3))
    joints = []  # (axis, origin) in the base frame
    kinetic, potential = 0, 0
    for i, link in enumerate(arm.ARM):
        origin = origin + R @ link.offset()
        R = R @ link.rotation(q[:, i])
        joints.append((R[:, :, 2], origin))
        mass, centre, inertia = link.body()
        c = origin + R @ centre
        w = sum(qd[:, j, None] * axis for j, (axis, _) in enumerate(joints))
        v = sum(qd[:, j, None] * np.cross(axis, c - at) for j, (axis, at) in enumerate(joints))
        w_link = np.einsum("nji,nj->ni", R, w)
        kinetic = kinetic + mass / 2 * (v * v).sum(1) + ((w_link @ inertia) * w_link).sum(1) / 2
        potential = potential - mass * c @ arm.GRAVITY
    return kinetic, potential


@pytest.fixture(scope="module")
def motion():
    return arm.movements(stream(0, "test"), 2)


STEP = 1e-30  # of complex-step derivatives, which have no rounding error


def test_power_balance(motion):
    """The joints' power is the rate at which the arm's energy grows."""
    q, qd, qdd = motion
    kinetic, potential = energies(q + 1j * STEP * qd, qd + 1j * STEP * qdd)
    rate = (kinetic + potential).imag / STEP
    power = (arm.torques(q, qd, qdd) * qd).sum(axis=1)
    np.testing.assert_allclose(power, rate, rtol=1e-11, atol=1e-11 * np.abs(rate).max())


def test_lagrange_equations(motion):
    """tau_j = d/dt dT/dqd_j - dT/dq_j + dV/dq_j, which also sees the forces that do no work."""
    q, qd, qdd = motion
    q_later, qd_later = q + 1j * STEP * qd, qd + 1j * STEP * qdd
    tau = []
    for unit in np.eye(7):
        # T is quadratic in qd, so its derivative by qd_j is this difference
        momentum = (energies(q_later, qd_later + unit)[0] - energies(q_later, qd_later)[0]
                    - energies(q_later, qd * 0 + unit)[0])
        kinetic, potential = energies(q + 1j * STEP * unit, qd)
        tau.append((momentum - kinetic + potential).imag / STEP)
    tau = np.stack(tau, axis=1)
    np.testing.assert_allclose(arm.torques(q, qd, qdd), tau, atol=1e-11 * np.abs(tau).max())


def test_gravity_torque_is_the_gradient_of_the_potential_energy(motion):
    q, rest = motion[0], np.zeros_like(motion[0])
    tau = arm.torques(q, rest, rest)
    gradient = np.stack([energies(q + 1j * STEP * np.eye(7)[j], rest)[1].imag / STEP
                         for j in range(7)], axis=1)
    np.testing.assert_allclose(tau, gradient, rtol=1e-11, atol=1e-11)
    assert (np.abs(tau).max(axis=0) > 0.01).all()  # gravity loads every joint


def test_mass_matrix_is_symmetric_positive_definite_and_gives_the_kinetic_energy(motion):
    q, qd, _ = motion
    rest = np.zeros_like(q)
    M = np.stack([arm.torques(q, rest, rest + np.eye(7)[j]) - arm.torques(q, rest, rest)
                  for j in range(7)], axis=2)
    np.testing.assert_allclose(M, M.swapaxes(1, 2), rtol=1e-11, atol=1e-13)
    assert np.linalg.eigvalsh(M).min() > 0
    np.testing.assert_allclose(np.einsum("ni,nij,nj->n", qd, M, qd) / 2, energies(q, qd)[0],
                               rtol=1e-11)


def test_movements_keep_the_limits_and_are_their_own_derivatives(motion, monkeypatch):
    low, high = np.array([(link.low, link.high) for link in arm.ARM]).T
    assert (motion[0] >= low).all()
    assert (motion[0] <= high).all()
    monkeypatch.setattr(arm, "INTERVAL", 1e-4)
    monkeypatch.setattr(arm, "MOMENTS", 3)
    q, qd, qdd = (part.reshape(5, 3, 7) for part in arm.movements(stream(0, "test"), 5))
    for part, rate in ((q, qd), (qd, qdd)):
        np.testing.assert_allclose((part[:, 2] - part[:, 0]) / 2e-4, rate[:, 1], atol=1e-4)


def test_arm_targets_are_standardised_torques():
    all_seven, third = datasets.load("arm", target="all"), datasets.load("arm", target=2)
    assert all_seven.outputs == 7
    np.testing.assert_array_equal(third.y_test, all_seven.y_test[:, 2:3])
    np.testing.assert_array_equal(datasets.load("arm").y_val, all_seven.y_val[:, :1])
    for values in (all_seven.x_train, all_seven.y_train):
        np.testing.assert_allclose(values.mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(values.std(axis=0), 1, rtol=1e-5)


# --- CIFAR ------------------------------------------------------------------------------------


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, as in the official files."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_python2_string(self, text):
        self.write(b"T" + len(text).to_bytes(4, "little") + text)

    dispatch[bytes] = save_python2_string


class Python2Array:
    """An array that pickles as NumPy 1 did."""

    def __init__(self, array):
        self.array = array

    def __reduce__(self):
        return Reconstruct("numpy.core.multiarray", "_reconstruct"), (
            Reconstruct("numpy", "ndarray"), (0,), b"b"), (
            1, self.array.shape, self.array.dtype, False, self.array.tobytes())


class Reconstruct:
    """A name in a module, which pickles as such whether there is such a module or not."""

    def __init__(self, module, name):
        self.module, self.name = module, name

    def __call__(self):
        raise AssertionError("only its name is used")


def save_name(pickler, reference):
    pickler.write(f"c{reference.module}\n{reference.name}\n".encode())


Python2Pickler.dispatch[Reconstruct] = save_name


def python_file(x, y, kind):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump({
        b"batch_label": b"a test", b"data": Python2Array(x), kind.label_key: y.tolist()})
    return file.getvalue()


def binary_file(x, y, kind):
    coarse = np.full((len(y), kind.label_bytes - 1), 7, np.uint8)
    return np.concatenate([coarse, y[:, None].astype(np.uint8), x], axis=1).tobytes()


def write_cifar(folder, kind, form, n=10):
    """Write a small data set in an official form; return all pixels and labels, test set last."""
    version = kind.versions["python" in form]
    rng = np.random.default_rng(0)
    contents, pixels, labels = {}, [], []
    for name in version.files:
        count = n if kind is cifar.CIFAR10 or name.startswith("test") else 5 * n
        pixels.append(rng.integers(256, size=(count, 3072), dtype=np.uint8))
        labels.append(rng.integers(kind.classes, size=count))
        write = python_file if "python" in form else binary_file
        contents[name] = write(pixels[-1], labels[-1], kind)
    if "archive" in form:
        with tarfile.open(folder / version.archive, "w:gz") as tar:
            for name, content in contents.items():
                member = tarfile.TarInfo(f"{version.folder}/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    else:
        place = folder / version.folder
        place.mkdir()
        for name, content in contents.items():
            if form == "gzip":
                (place / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (place / name).write_bytes(content)
    return np.concatenate(pixels), np.concatenate(labels)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("form", FORMS)
def test_cifar_is_read_from_every_official_form(tmp_path, kind, form):
    x, y = write_cifar(tmp_path, kind, form)
    data = datasets.load(kind.name, tmp_path)
    assert (data.x_train.shape, data.x_val.shape) == ((40, 3072), (10, 3072))
    assert all(part.dtype == np.uint8 and part.flags.c_contiguous
               for part in (data.x_train, data.x_val, data.x_test))
    np.testing.assert_array_equal(data.x_test, x[50:])
    np.testing.assert_array_equal(data.y_test, y[50:])
    # training and validation set are a partition of the training images, each with its label
    split_x = np.concatenate([data.x_train, data.x_val])
    split_y = np.concatenate([data.y_train, data.y_val])
    order = [int(np.flatnonzero((x == image).all(axis=1))[0]) for image in split_x]
    assert sorted(order) == list(range(50))
    assert order != list(range(50))
    np.testing.assert_array_equal(split_y, y[order])
    assert "unknown hash" in data.notice
    scaled = data.x_test * data.scale + data.shift
    np.testing.assert_allclose(scaled, (data.x_test / 255 - 0.5) / 0.5, atol=1e-12)


def test_every_form_has_the_same_split(tmp_path):
    loaded = []
    for form in FORMS:
        (tmp_path / form).mkdir()
        write_cifar(tmp_path / form, cifar.CIFAR10, form)
        loaded.append(datasets.load("cifar10", tmp_path / form).x_train)
    assert all(np.array_equal(loaded[0], other) for other in loaded[1:])
    other_seed = datasets.load("cifar10", tmp_path / "gzip", seed=1).x_train
    assert not np.array_equal(loaded[0], other_seed)


def test_the_folder_of_the_files_itself_will_do(tmp_path):
    write_cifar(tmp_path, cifar.CIFAR10, "binary folder")
    assert len(datasets.load("cifar10", tmp_path / "cifar-10-batches-bin").x_test) == 10


def test_official_bytes_give_no_notice(tmp_path, monkeypatch):
    write_cifar(tmp_path, cifar.CIFAR10, "binary folder")
    files = cifar.CIFAR10.versions[0].files
    for name in files:
        content = (tmp_path / "cifar-10-batches-bin" / name).read_bytes()
        monkeypatch.setitem(files, name, hashlib.md5(content).hexdigest())
    assert datasets.load("cifar10", tmp_path).notice == ""
    monkeypatch.setitem(files, "data_batch_2.bin", 32 * "0")
    notice = datasets.load("cifar10", tmp_path).notice
    assert "data_batch_2.bin in" in notice
    assert "data_batch_3.bin" not in notice


def damaged(tmp_path, content, kind=cifar.CIFAR10, form="binary folder", which=1):
    """Return a call that loads a data set one of whose files has this content."""
    write_cifar(tmp_path, kind, form)
    version = kind.versions["python" in form]
    file = tmp_path / version.folder / list(version.files)[which]
    file.write_bytes(content(file.read_bytes()) if callable(content) else content)
    return lambda: datasets.load(kind.name, tmp_path)


def test_damaged_binary_files_are_refused(tmp_path):
    call = damaged(tmp_path, lambda content: content[:-5])
    refused(call, "data_batch_2.bin", "records of 3073 bytes", "got 30725 bytes", "--fetch cifar10")


def test_empty_file_is_refused(tmp_path):
    refused(damaged(tmp_path, b""), "got 0 bytes")


def test_records_of_the_other_data_set_are_refused(tmp_path):
    call = damaged(tmp_path, bytes(10 * 3074))
    refused(call, "records of 3073 bytes (1 of labels, 3072 of pixels), got 30740 bytes")


def test_labels_out_of_range_are_refused(tmp_path):
    call = damaged(tmp_path, bytes([10]) + bytes(3072))
    refused(call, "data_batch_2.bin", "labels from 0 to 9, got 10 to 10")


def test_folder_without_all_files_says_which(tmp_path):
    write_cifar(tmp_path, cifar.CIFAR10, "binary folder")
    (tmp_path / "cifar-10-batches-bin" / "data_batch_4.bin").unlink()
    refused(lambda: datasets.load("cifar10", tmp_path), "cifar-10-batches-bin lacks",
            "data_batch_4.bin", cifar.ADDRESS)


@pytest.mark.parametrize("cut", [20, 5000, 100_000])
def test_damaged_archives_are_refused(tmp_path, cut):
    write_cifar(tmp_path, cifar.CIFAR10, "binary archive")
    archive = tmp_path / "cifar-10-binary.tar.gz"
    archive.write_bytes(archive.read_bytes()[:cut])
    refused(lambda: datasets.load("cifar10", tmp_path), archive, "--fetch cifar10")


def test_damaged_gzip_file_is_refused(tmp_path):
    write_cifar(tmp_path, cifar.CIFAR10, "gzip")
    file = tmp_path / "cifar-10-batches-bin" / "test_batch.bin.gz"
    file.write_bytes(file.read_bytes()[:-100])
    refused(lambda: datasets.load("cifar10", tmp_path), "cannot read", file)


class Malicious:
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.mkdir, exec, bytearray, np.fromfile])
def test_no_pickle_is_executed(tmp_path, function):
    target = tmp_path / "was executed"
    content = pickle.dumps({b"data": Malicious(function, str(target)), b"labels": [1]})
    call = damaged(tmp_path, content, form="python folder")
    refused(call, "data_batch_2", function.__name__, "nothing was executed", "--fetch cifar10")
    assert not target.exists()


@pytest.mark.parametrize("content", [
    b"", b"no pickle", pickle.dumps([1, 2]), pickle.dumps({b"data": 1, b"labels": [1]}),
    pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": [1, 2]}),
    pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 2, 3]}),
    pickle.dumps({b"data": np.zeros((2, 3072), np.uint8)}),
    pickle.dumps({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}),
    pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [[1, 2], 3]}),
    pickle.dumps({b"data": np.zeros((3072, 3072), np.uint8).T, b"labels": [1] * 3072})])
def test_other_pickles_are_refused(tmp_path, content):
    refused(damaged(tmp_path, content, form="python folder"), "data_batch_2: expected")


def test_arrays_pickled_by_this_numpy_are_read_too():
    x = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for protocol in (3, 4):
        np.testing.assert_array_equal(
            pickles.read_pickle(pickle.dumps({b"x": x}, protocol))[b"x"], x)


# --- SARCOS -----------------------------------------------------------------------------------


def write_sarcos(folder, **rows):
    for name, array in rows.items():
        stem = {"train": "sarcos_inv", "test": "sarcos_inv_test"}[name]
        savemat(folder / f"{stem}.mat", {stem: array})


def sarcos_rows(n, seed=0):
    rows = np.random.default_rng(seed).normal(3, 2, (n, 28))
    rows[:, 27] = np.arange(n)  # names the row
    return rows


def test_sarcos_from_both_files(tmp_path):
    train, test = sarcos_rows(50), sarcos_rows(20, seed=1)
    write_sarcos(tmp_path, train=train, test=test)
    data = datasets.load("sarcos", tmp_path)
    assert [len(x) for x in (data.x_train, data.x_val, data.x_test)] == [40, 10, 20]
    assert (data.outputs, data.y_train.shape, data.y_train.dtype) == (1, (40, 1), np.float32)
    np.testing.assert_allclose(data.x_train.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(data.y_train.std(axis=0), 1, rtol=1e-5)
    # the rows of the split, found by the last column, which names them
    names = datasets.load("sarcos", tmp_path, target=27)
    values = np.concatenate([names.y_train, names.y_val])[:, 0]
    order = np.argsort(np.argsort(values))
    rows = train[order]
    for target, column in ((None, 21), (22, 22)):
        y = datasets.load("sarcos", tmp_path, **({} if target is None else {"target": target}))
        mean, std = rows[:40, column].mean(), rows[:40, column].std()
        np.testing.assert_allclose(y.y_val[:, 0], (rows[40:, column] - mean) / std, rtol=1e-4,
                                   atol=1e-5)
        np.testing.assert_allclose(y.y_test[:, 0], (test[:, column] - mean) / std, rtol=1e-4,
                                   atol=1e-5)
    x, x_test = rows[:, :21], test[:, :21]
    for ours, theirs in ((data.x_val, x[40:]), (data.x_test, x_test)):
        np.testing.assert_allclose(ours, (theirs - x[:40].mean(axis=0)) / x[:40].std(axis=0),
                                   rtol=1e-4, atol=1e-5)
    assert datasets.load("sarcos", tmp_path, target="all").outputs == 7
    assert data.notice.count("unknown hash") == 2


def test_sarcos_without_its_training_file_is_for_trials(tmp_path):
    (tmp_path / "sarcos").mkdir()
    write_sarcos(tmp_path / "sarcos", test=sarcos_rows(50))
    data = datasets.load("sarcos", tmp_path)
    assert (len(data.x_train), len(data.x_val), data.x_test) == (40, 10, None)
    assert "sarcos_inv.mat is missing" in data.notice
    assert "trials only" in data.notice
    write_sarcos(tmp_path, train=sarcos_rows(100), test=sarcos_rows(50))  # as `fetch` puts them
    assert len(datasets.load("sarcos", tmp_path).x_train) == 80


def test_damaged_sarcos_files_are_refused(tmp_path):
    def call():
        datasets.load("sarcos", tmp_path)

    file = tmp_path / "sarcos_inv_test.mat"
    for rows in (np.ones((5, 27)), np.full((5, 28), np.nan)):
        write_sarcos(tmp_path, test=rows)
        refused(call, file, "28 columns", "--fetch sarcos")
    savemat(file, {"other": np.ones((5, 28))})
    refused(call, '"sarcos_inv_test"')
    write_sarcos(tmp_path, test=sarcos_rows(50))
    file.write_bytes(file.read_bytes()[:5000])
    refused(call, file, "expected a MATLAB 5 file", "5000 bytes")


# --- download ---------------------------------------------------------------------------------


CONTENT = np.random.default_rng(0).integers(256, size=1_000_000, dtype=np.uint8).tobytes()


class Server(ThreadingHTTPServer):
    """Serves CONTENT at any address; `breaks_at` is how many bytes a connection lives."""

    daemon_threads = False
    resumes, breaks_at, ranges = True, None, ()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range") if server.resumes else None
        server.ranges = (*server.ranges, self.headers.get("Range"))
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if self.path == "/missing" or start >= len(CONTENT):
            self.send_error(404 if self.path == "/missing" else 416)
            return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(CONTENT[start:][:server.breaks_at])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def offered(server, content=CONTENT, name="file.bin"):
    return OfficialFile(name, f"http://127.0.0.1:{server.server_port}/{name}",
                        hashlib.md5(content).hexdigest())


def test_download_with_progress(server, tmp_path):
    seen = []
    path = download.fetch_file(offered(server), tmp_path / "new", lambda *state: seen.append(state))
    assert path == tmp_path / "new" / "file.bin"
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]
    assert seen[-1] == ("file.bin", len(CONTENT), len(CONTENT))
    assert [here for _, here, _ in seen] == sorted(here for _, here, _ in seen)
    download.fetch_file(offered(server), tmp_path / "new")
    assert server.ranges == (None,)  # what is there is not fetched again


def test_interrupted_download_goes_on_where_it_stopped(server, tmp_path):
    server.breaks_at = 300_000
    refused(lambda: download.fetch_file(offered(server), tmp_path), "try again", "goes on where")
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENT[:300_000]
    assert not (tmp_path / "file.bin").exists()
    server.breaks_at = None
    seen = []
    download.fetch_file(offered(server), tmp_path, lambda *state: seen.append(state))
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert server.ranges == (None, "bytes=300000-")
    assert seen[-1][1:] == (len(CONTENT), len(CONTENT))


def test_server_that_cannot_resume_sends_it_all(server, tmp_path):
    server.resumes = False
    (tmp_path / "file.bin.part").write_bytes(b"the start of something")
    assert download.fetch_file(offered(server), tmp_path).read_bytes() == CONTENT


def test_complete_part_is_checked_and_used(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    assert download.fetch_file(offered(server), tmp_path).read_bytes() == CONTENT


def test_wrong_hash_is_refused_and_removed(server, tmp_path):
    file = offered(server, b"other bytes")
    refused(lambda: download.fetch_file(file, tmp_path), "not the official file", file.hash,
            hashlib.md5(CONTENT).hexdigest())
    assert not list(tmp_path.iterdir())


def test_other_file_of_that_name_is_not_overwritten(server, tmp_path):
    (tmp_path / "file.bin").write_bytes(b"mine")
    refused(lambda: download.fetch_file(offered(server), tmp_path), "move it away")
    assert (tmp_path / "file.bin").read_bytes() == b"mine"


def test_unreachable_addresses_and_folders(server, tmp_path):
    refused(lambda: download.fetch_file(offered(server, name="missing"), tmp_path), "404",
            "/missing")
    with Server(("127.0.0.1", 0), Handler) as closed:
        nobody = offered(closed)
    refused(lambda: download.fetch_file(nobody, tmp_path), "could not download", nobody.url)
    (tmp_path / "file").touch()
    refused(lambda: download.fetch_file(offered(server), tmp_path / "file"), "cannot use",
            "no folder", "--data")


def test_fetch_takes_all_files_of_a_data_set(server, tmp_path, monkeypatch):
    files = (offered(server), offered(server, name="two.bin"))
    monkeypatch.setitem(datasets.DATASETS, "sarcos",
                        datasets.DATASETS["sarcos"]._replace(downloads=files))
    assert datasets.fetch("sarcos", tmp_path) == [tmp_path / "file.bin", tmp_path / "two.bin"]


def test_progress_line_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    now = [0.0]
    monkeypatch.setattr(download.time, "monotonic", lambda: now[0])
    line = download.Line()
    for i in range(1, 4):
        now[0] += 1
        line("file.bin", 40_000_000 + i * 10_000_000, 80_000_000 if i < 3 else 70_000_000)
    shown = capsys.readouterr().err.split("\r\x1b[K")
    assert shown[2] == "file.bin  60.0 MB  5.0 MB/s   75% of 80.0 MB  4.0 s left  "
    assert shown[3].endswith("\n")


# --- the official files, where they are ---------------------------------------------------------


def test_official_cifar10(real):
    data = real("cifar10")
    assert (len(data.x_train), len(data.x_val), len(data.x_test)) == (40_000, 10_000, 10_000)
    assert data.notice == ""
    assert np.bincount(data.y_test).tolist() == [1000] * 10
    assert np.bincount(np.concatenate([data.y_train, data.y_val])).tolist() == [5000] * 10
    assert data.y_test[:5].tolist() == [3, 8, 8, 0, 6]  # cat, ship, ship, airplane, frog
    pixels = np.concatenate([data.x_train, data.x_val]).reshape(-1, 3, 1024) / np.float32(255)
    np.testing.assert_allclose(pixels.mean(axis=(0, 2)), [0.4914, 0.4822, 0.4465], atol=1e-4)


def test_official_cifar100(real):
    data = real("cifar100")
    assert len(data.x_train) == 4 * len(data.x_val)
    assert np.bincount(data.y_test).tolist() == [100] * 100


def test_official_sarcos(real):
    data = real("sarcos")
    assert data.x_train.shape[1:] == (21,)
    x = np.c_[data.x_train, np.ones(len(data.x_train))]
    weights = np.linalg.lstsq(x, data.y_train, rcond=None)[0]
    error = np.c_[data.x_val, np.ones(len(data.x_val))] @ weights - data.y_val
    assert 0.05 < (error**2).mean() < 0.1  # 0.075 in Rasmussen & Williams, table 2.1
