"""Damaged and hostile files: each is read right or refused in one sentence, within bounds."""

import contextlib
import errno
import gzip
import io
import lzma
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tracemalloc
import urllib.error
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from comet_np.errors import UserError
from comet_np.experiments import datasets
from comet_np.experiments.datasets import base, cifar, download, pickles, sarcos
from tests.test_datasets import refused, sarcos_rows, write_cifar, write_sarcos

ARCHIVE = cifar.CIFAR10.versions[0].archive
MIB = 1 << 20


def in_a_child(script, *arguments):
    """Run a script in a process of its own, which may crash; return what it prints."""
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)],
                          env=os.environ | path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@contextlib.contextmanager
def memory_below(size):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()


@contextlib.contextmanager
def as_nobody():
    """Let permissions count, also for root."""
    if os.name != "posix":
        pytest.skip("permissions of POSIX are needed")
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def public():
    """Return an empty folder that everybody may enter (above pytest's, only its owner may)."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


# --- .mat files -------------------------------------------------------------------------------

EACH_BYTE = """
import sys
from pathlib import Path
import numpy as np
from comet_np.errors import UserError
from comet_np.experiments.datasets import sarcos

folder, compressed = Path(sys.argv[1]), sys.argv[2] == "True"
file = folder / sarcos.TEST.name
good = file.read_bytes()
rows, _ = sarcos._read(folder, sarcos.TEST)
numbers = 200  # where they begin, if not compressed
counts = [0, 0]
for at in range(300):
    for value in {0, 1, 8, 255, good[at] ^ 1} - {good[at]}:
        file.write_bytes(good[:at] + bytes([value]) + good[at + 1:])
        try:
            found, _ = sarcos._read(folder, sarcos.TEST)
        except UserError as error:
            assert "\\n" not in str(error) and str(file) in str(error), error
            counts[0] += 1
            assert not 10 <= at < 124, "the text of the header was refused"
        else:
            expected = rows
            if not compressed and at >= numbers:
                expected = np.frombuffer(file.read_bytes()[numbers:]).reshape(rows.shape[::-1]).T
            assert 10 <= at < 124 or at >= numbers or compressed, (at, value)
            np.testing.assert_array_equal(found, expected)
            counts[1] += 1
print(*counts)
"""


@pytest.mark.parametrize("compressed", [False, True])
def test_no_byte_of_a_mat_file_crashes_its_reader(tmp_path, compressed):
    savemat(tmp_path / sarcos.TEST.name, {"sarcos_inv_test": sarcos_rows(50)},
            do_compression=compressed)
    bad, good = map(int, in_a_child(EACH_BYTE, tmp_path, compressed).split())
    assert bad > 250
    assert good > 250


@pytest.mark.parametrize("array", [
    np.ones((5, 28), complex), np.ones((5, 28), np.float32), np.ones((5, 28), np.int64),
    np.ones((5, 28), bool), np.ones((5, 2, 14)), np.ones((28, 5)), np.zeros((0, 28)), "text",
    {"a": 1}, np.array([[1, "a"]], object)])
def test_other_arrays_are_refused(tmp_path, array):
    savemat(tmp_path / sarcos.TEST.name, {"sarcos_inv_test": array})
    refused(lambda: datasets.load("sarcos", tmp_path), sarcos.TEST.name, "of 28 columns of finite",
            "--fetch sarcos")


def test_two_arrays_an_empty_file_and_another_version_are_refused(tmp_path):
    file = tmp_path / sarcos.TEST.name
    savemat(file, {"sarcos_inv_test": sarcos_rows(9), "more": 1})
    refused(lambda: datasets.load("sarcos", tmp_path), file, "28 columns")
    savemat(file, {"sarcos_inv_test": sarcos_rows(9)}, format="4")
    refused(lambda: datasets.load("sarcos", tmp_path), file, "MATLAB 5")
    for content in (b"", b"MATLAB", bytes(200)):
        file.write_bytes(content)
        refused(lambda: datasets.load("sarcos", tmp_path), file, "MATLAB 5")


@pytest.mark.parametrize("compressed", [False, True])
def test_what_is_left_over_in_a_mat_file_is_refused(tmp_path, compressed):
    file = tmp_path / sarcos.TEST.name
    savemat(file, {"sarcos_inv_test": sarcos_rows(9)}, do_compression=compressed)
    content = bytearray(file.read_bytes() + bytes(8))
    content[132:136] = (len(content) - 136).to_bytes(4, "little")
    file.write_bytes(content)
    refused(lambda: datasets.load("sarcos", tmp_path), file, "28 columns")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_named(tmp_path, value):
    rows = sarcos_rows(20)
    rows[7, 3] = value
    write_sarcos(tmp_path, test=rows)
    refused(lambda: datasets.load("sarcos", tmp_path), sarcos.TEST.name,
            f"{value} in row 7, column 3")


def test_a_mat_file_that_unpacks_to_too_much_is_refused(tmp_path):
    savemat(tmp_path / sarcos.TEST.name, {"sarcos_inv_test": np.ones((200_000, 28))},
            do_compression=True)
    with memory_below(8 * MIB):
        refused(lambda: datasets.load("sarcos", tmp_path), sarcos.TEST.name, "more than")


def test_constant_columns_and_few_rows_are_refused_by_name(tmp_path):
    rows = sarcos_rows(20)
    rows[:, 3] = 0.1
    write_sarcos(tmp_path, test=rows)
    refused(lambda: datasets.load("sarcos", tmp_path), tmp_path / sarcos.TEST.name,
            "column 3 is the same")
    write_sarcos(tmp_path, test=sarcos_rows(4))
    refused(lambda: datasets.load("sarcos", tmp_path), tmp_path / sarcos.TEST.name,
            "at least 5 examples", "got 4")
    write_cifar(tmp_path, cifar.CIFAR100, "binary folder")
    (tmp_path / "cifar-100-binary" / "train.bin").write_bytes(bytes(3 * 3074))
    refused(lambda: datasets.load("cifar100", tmp_path), tmp_path / "cifar-100-binary",
            "at least 5 examples", "got 3")


def numbers(n, columns=2):
    return np.random.default_rng(n).normal(size=(n, columns))


@pytest.mark.parametrize(("which", "value", "words"), [
    ("x", 0.1, "input 1 is the same"), ("x", np.nan, "input 1 has numbers"),
    ("x", np.inf, "input 1 has numbers"), ("y", 1e7, "target 1 is the same")])
def test_columns_that_cannot_be_standardised_are_named(which, value, words):
    x, y = numbers(10), numbers(10)
    (x if which == "x" else y)[:, 1] = value
    refused(lambda: base.standardised("mine", (x, y), (numbers(5), numbers(5))), "mine", words)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e60, 1e300])
@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_numbers_that_cannot_be_standardised_are_named(part, value):
    parts = {name: (numbers(10), numbers(10)) for name in ("train", "val", "test")}
    parts[part][1][4, 0] = value
    if (part, value) == ("train", 1e60):
        base.standardised("mine", **parts)  # is large, but so is the deviation then
    else:
        refused(lambda: base.standardised("mine", **parts), "mine", "target 0 has numbers")


# --- pickles ----------------------------------------------------------------------------------

DEEP = b")" + b"\x85" * 200_000  # tuples, each in the next
HOSTILE = {
    "deep key": b"\x80\x02}" + DEEP + b"K\x01s.",
    "deep keys": b"\x80\x02}(" + DEEP + b"K\x01u.",
    "deep dictionary": b"(" + DEEP + b"K\x01d.",
    "deep name": b"\x80\x04" + DEEP + b"\x8c\x01a\x93.",
    "deep module": b"\x80\x04\x8c\x01a" + DEEP + b"\x93.",
    "deep function": b"\x80\x02" + DEEP + b")R.",
    "deep object": b"\x80\x02" + DEEP + b"}b.",
    "deep set": b"\x80\x04(" + DEEP + b"\x91.",
    "deep tuple": DEEP + b".",
    "key that doubles": b"\x80\x02})" + b"2\x86" * 100 + b"K\x01s.",
    "key that doubles by the memo": b"\x80\x02})" + b"q\x01h\x01\x86" * 100 + b"K\x01s.",
    "huge bytes": b"\x80\x04\x8e" + (1 << 33).to_bytes(8, "little") + b".",
    "huge array of bytes": b"\x80\x05\x96" + (1 << 33).to_bytes(8, "little") + b".",
    "huge string": b"\x80\x04\x8d" + (1 << 33).to_bytes(8, "little") + b".",
    "huge Python 2 string": b"\x80\x02T\xff\xff\xff\x7f.",
    "negative string": b"\x80\x02T\xff\xff\xff\xff.",
    "huge number": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "harmless huge frame": b"\x80\x04\x95" + (1 << 62).to_bytes(8, "little") + b"}.",
    "harmless huge memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "harmless huge memo in text": b"}p2147483000\n.",
    "no stack": b"\x80\x02}s.", "no mark": b"\x80\x02}u.", "no memo": b"\x80\x02h\x07.",
    "nothing": b".", "no end": b"}", "no pickle": b"\xff\xfe", "odd items": b"}(U\x01au.",
    "text": b"I" + b"x" * 10**6 + b"\n.", "digits": b"I" + b"9" * 10**5 + b"\n.",
    "in itself": b"]q\x00h\x00a.",
    "no function": b"}U\x01aU\x02hi)R(K\x01K\x01\x85cnumpy\ndtype\nU\x02u1\x85R\x89U\x01xtbs.",
    "huge shape": b"}U\x01acnumpy.core.multiarray\n_reconstruct\n)R(K\x01I" + b"9" * 30
                  + b"\n\x85cnumpy\ndtype\nU\x02u1\x85R\x89U\x01xtbs.",
}
READ_EACH = """
import resource, sys
from pathlib import Path
from comet_np.experiments.datasets import pickles

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29), -1))
for file in sorted(Path(sys.argv[1]).iterdir()):
    print(file.name, flush=True)
    try:
        found = pickles.read_pickle(file.read_bytes())
        assert found == {} and file.name.startswith("harmless"), found
    except ValueError as error:
        assert "\\n" not in str(error) and len(str(error)) < 400, error
        assert not file.name.startswith("harmless"), error
"""


def test_no_pickle_crashes_or_takes_the_memory(tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("the child limits its memory as Linux does")
    for name, content in HOSTILE.items():
        (tmp_path / name).write_bytes(content)
    assert in_a_child(READ_EACH, tmp_path).splitlines() == sorted(HOSTILE)


def test_pickles_of_protocol_0_and_1_are_read():
    assert pickles.read_pickle(b"(dp0\nS'a'\np1\n(lp2\nI1\naI01\nas.") == {b"a": [1, True]}
    assert pickles.read_pickle(b"}q\x00(U\x01aq\x01(K\x01K\x02tU\x01bh\x01u.") == {
        b"a": (1, 2), b"b": b"a"}


def test_long_numbers_of_python_2_are_read():
    assert pickles.read_pickle(b"\x80\x02}U\x01a\x8a\x01\x05s.") == {b"a": 5}


def test_the_sentence_about_a_pickle_holds_no_control_characters():
    refused_name = b"\x80\x02cposix\nsys\x1b[2Jtem\n)R."
    with pytest.raises(ValueError, match=r"posix\.sys\?\[2Jtem"):
        pickles.read_pickle(refused_name)


# --- archives and gzip files --------------------------------------------------------------------


def test_a_changed_archive_is_refused_or_the_same(tmp_path):
    write_cifar(tmp_path, cifar.CIFAR10, "binary archive")
    archive = tmp_path / ARCHIVE
    good, expected = archive.read_bytes(), datasets.load("cifar10", tmp_path).digest
    places = [*range(12), *range(100, len(good) - 8, len(good) // 40), *range(-8, 0)]
    refusals = 0
    for at in places:
        changed = bytearray(good)
        changed[at] ^= 16
        archive.write_bytes(changed)
        try:
            assert datasets.load("cifar10", tmp_path).digest == expected
            assert 0 <= at < 12  # the time and the like, which no checksum covers
        except UserError as error:
            assert "damaged archive" in str(error)
            assert "\n" not in str(error)
            refusals += 1
    assert refusals > 45


def test_a_plain_tar_of_that_name_is_read(tmp_path):
    write_cifar(tmp_path, cifar.CIFAR10, "binary archive")
    archive = tmp_path / ARCHIVE
    expected = datasets.load("cifar10", tmp_path).digest
    archive.write_bytes(gzip.decompress(archive.read_bytes()))
    assert datasets.load("cifar10", tmp_path).digest == expected


@pytest.mark.parametrize("change", [lambda content: content, lambda content: content[:300],
                                    lambda content: content[:50] + b"?" + content[51:]])
def test_an_xz_archive_is_refused(tmp_path, change):
    write_cifar(tmp_path, cifar.CIFAR10, "binary archive", n=1)
    archive = tmp_path / ARCHIVE
    archive.write_bytes(change(lzma.compress(gzip.decompress(archive.read_bytes()))))
    refused(lambda: datasets.load("cifar10", tmp_path), archive, "damaged archive", "--fetch")


def archive_of(folder, *members, name="data_batch_1.bin", **fields):
    """Write an archive of one member, in which some fields are set, or of the blocks given."""
    member = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(member, key, value)
    blocks = b"".join(members) or member.tobuf() + bytes(1024)
    (folder / ARCHIVE).write_bytes(gzip.compress(blocks + bytes(10240), 1))
    return lambda: datasets.load("cifar10", folder)


def header(kind, size, name="data_batch_1.bin"):
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def padded(content):
    return content + bytes(-len(content) % 512)


@pytest.mark.parametrize("record", [
    b"20 size=no number\n", b"0 size=1\n", b"9999 size=1\n", b"18 mtime=infinite\n",
    b"11 mtime=1e999\n", b"17 path=\xff\xfe\xff\xfe\xff\n", b"no record at all",
    b"24 GNU.sparse.map=a,b,c\n", b"22 GNU.sparse.size=-1\n22 GNU.sparse.numblocks=1\n",
    b"30 GNU.sparse.major=1\n30 GNU.sparse.minor=0\n", b"17 hdrcharset=BIN\n"])
def test_odd_pax_headers_are_one_sentence(tmp_path, record):
    call = archive_of(tmp_path, header(b"x", len(record)), padded(record), header(b"0", 5),
                      padded(b"12345"))
    refused(call, tmp_path / ARCHIVE, "remove it and fetch it with", cifar.ADDRESS)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_headers_before_headers_are_one_sentence(tmp_path, kind):
    record = b"11 path=aa\n"
    call = archive_of(tmp_path, (header(kind, len(record)) + padded(record)) * 3000)
    refused(call, tmp_path / ARCHIVE, "remove it and fetch it with")


@pytest.mark.parametrize("size", [-1, -1024, 10**6, 2**40, 2**80])
@pytest.mark.parametrize("kind", [b"0", b"5", b"x", b"g", b"L", b"K", b"S", b"7", b"Z"])
def test_sizes_that_cannot_be_are_one_sentence(tmp_path, kind, size):
    refused(archive_of(tmp_path, header(kind, size), bytes(2048)), tmp_path / ARCHIVE,
            "remove it and fetch it with")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE,
                                  tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE])
def test_links_and_other_members_are_no_files(tmp_path, kind):
    call = archive_of(tmp_path, type=kind, linkname="/etc/passwd")
    refused(call, tmp_path / ARCHIVE, "lacks data_batch_1.bin")


@pytest.fixture
def small_limits(monkeypatch):
    """Let the official files be as small as those of the tests."""
    monkeypatch.setattr(cifar, "limit", lambda name: 40_000)
    monkeypatch.setattr(cifar, "OTHER", 20_000)


@pytest.mark.parametrize(("kind", "name"), [
    (b"0", "data_batch_1.bin"), (b"0", "readme"), (b"x", "pax"), (b"g", "global"), (b"L", "name"),
    (b"S", "sparse")])
def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, small_limits, kind, name):
    size = 50 * MIB
    call = archive_of(tmp_path, header(kind, size, name), bytes(size))
    assert (tmp_path / ARCHIVE).stat().st_size < MIB
    with memory_below(5 * MIB):
        refused(call, tmp_path / ARCHIVE, "more than the official one", "remove it")


def test_a_member_larger_than_the_official_file_is_refused(tmp_path, small_limits):
    size = 30 * 3073
    refused(archive_of(tmp_path, header(b"0", size), padded(bytes(size))), tmp_path / ARCHIVE,
            "it holds 92190 bytes of data_batch_1.bin, more than the official one")


def test_what_comes_behind_an_archive_counts(tmp_path, small_limits):
    write_cifar(tmp_path, cifar.CIFAR10, "binary archive")
    archive = tmp_path / ARCHIVE
    datasets.load("cifar10", tmp_path)
    archive.write_bytes(archive.read_bytes() + gzip.compress(bytes(50 * MIB), 1))
    with memory_below(5 * MIB):
        refused(lambda: datasets.load("cifar10", tmp_path), "more than the official one")


def test_a_file_larger_than_the_official_one_is_refused(tmp_path, small_limits):
    write_cifar(tmp_path, cifar.CIFAR10, "gzip")
    file = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    packed = file.with_name("test_batch.bin.gz")
    packed.write_bytes(gzip.compress(bytes(30 * MIB)))
    with memory_below(5 * MIB):
        refused(lambda: datasets.load("cifar10", tmp_path), packed, "more than 40000 bytes")
    assert packed.stat().st_size < 40_000
    with open(file, "wb") as sparse:
        sparse.truncate(50 * MIB)
    with memory_below(5 * MIB):
        refused(lambda: datasets.load("cifar10", tmp_path), f"{file} holds", "more than 40000")


def test_the_limits_are_those_of_the_official_files():
    """Sizes in bytes of the longest official files, python version with the images' names."""
    assert 10_000 * 3073 < 31_035_999 < cifar.limit("data_batch_3") < 1.05 * 31_035_999
    assert 50_000 * 3074 < 155_249_918 < cifar.limit("train") < 1.05 * 155_249_918
    assert cifar.limit("train.bin") == cifar.limit("train")


def test_the_checksum_of_a_gzip_file_counts(tmp_path):
    write_cifar(tmp_path, cifar.CIFAR10, "gzip")
    file = tmp_path / "cifar-10-batches-bin" / "test_batch.bin.gz"
    good = file.read_bytes()
    for at in (-8, -3):
        changed = bytearray(good)
        changed[at] ^= 1
        file.write_bytes(changed)
        refused(lambda: datasets.load("cifar10", tmp_path), f"cannot read {file}", "damaged")


# --- files that cannot be read ------------------------------------------------------------------


def test_a_folder_in_the_place_of_a_file(tmp_path):
    write_cifar(tmp_path, cifar.CIFAR10, "binary folder")
    file = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    file.unlink()
    file.mkdir()
    refused(lambda: datasets.load("cifar10", tmp_path), f"{file} is a folder", "move it away")
    (tmp_path / sarcos.TEST.name).mkdir()
    refused(lambda: datasets.load("sarcos", tmp_path), f"{sarcos.TEST.name} is a folder")
    (tmp_path / "two" / ARCHIVE).mkdir(parents=True)
    refused(lambda: datasets.load("cifar10", tmp_path / "two"), f"{ARCHIVE} is a folder")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_what_never_ends_in_the_place_of_a_file(tmp_path):
    file = tmp_path / sarcos.TEST.name
    os.mkfifo(file)
    refused(lambda: datasets.load("sarcos", tmp_path), f"{file} is a device or a pipe")
    file.unlink()
    file.symlink_to("/dev/zero")
    refused(lambda: datasets.load("sarcos", tmp_path), f"{file} is a device or a pipe")
    (tmp_path / ARCHIVE).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / ARCHIVE))} is a device or a"):
        datasets.load("cifar10", tmp_path)


def test_a_home_that_is_not_known():
    refused(lambda: datasets.load("cifar10", "~no such user/data"), "~no such user/data",
            "write the path in full")


def test_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "file").touch()
    for name in ("cifar10", "sarcos"):
        refused(lambda name=name: datasets.load(name, tmp_path / "file"),
                f"{tmp_path / 'file'} is a file", "--data")
    (tmp_path / "sarcos").touch()
    write_sarcos(tmp_path, test=sarcos_rows(20))
    assert len(datasets.load("sarcos", tmp_path).x_train) == 16


def test_links_to_nothing(tmp_path):
    write_cifar(tmp_path, cifar.CIFAR10, "binary folder")
    file = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    file.unlink()
    file.symlink_to(tmp_path / "gone")
    refused(lambda: datasets.load("cifar10", tmp_path), f"{file} is a link to {tmp_path / 'gone'}",
            "mend the link")
    file.unlink()
    file.symlink_to(file)
    refused(lambda: datasets.load("cifar10", tmp_path), f"{file} is a link to {file}")
    (tmp_path / "loop").symlink_to("loop")
    refused(lambda: datasets.load("cifar10", tmp_path / "loop"), f"cannot read {tmp_path}/loop",
            "name another folder")
    (tmp_path / sarcos.TEST.name).symlink_to("gone")
    refused(lambda: datasets.load("sarcos", tmp_path), "is a link to gone")


@pytest.mark.parametrize("form", ["binary folder", "binary archive", "gzip"])
def test_a_file_that_may_not_be_read(public, form):
    write_cifar(public, cifar.CIFAR10, form)
    file = next(path for path in sorted(public.rglob("*")) if path.is_file())
    file.chmod(0)
    with as_nobody():
        refused(lambda: datasets.load("cifar10", public), f"cannot read {file} (Permission denied)",
                "right to read")


@pytest.mark.parametrize("name", ["cifar10", "sarcos"])
def test_a_folder_that_may_not_be_entered(public, name):
    (public / "data").mkdir()
    (public / "data").chmod(0)
    with as_nobody():
        for call in (lambda: datasets.load(name, public / "data"),
                     lambda: datasets.report(public / "data")):
            refused(call, "cannot read", public / "data", "Permission denied", "right to read")


@pytest.mark.parametrize("name", ["cifar10", "sarcos"])
def test_a_name_that_is_too_long(tmp_path, name):
    refused(lambda: datasets.load(name, tmp_path / ("x" * 300)), "cannot read", "too long",
            "another folder with --data")


def test_errors_of_several_lines_become_one():
    assert base.reason(ValueError("one\n  two\x1b[0m\n")) == "one two?[0m"
    assert base.reason(OSError(errno.ENOSPC, "No space", "/long/path")) == "No space"
    assert base.reason(KeyError()) == "KeyError()"
    assert len(base.reason(ValueError("x" * 10**6))) == 200


# --- download -----------------------------------------------------------------------------------


class Response(io.BytesIO):
    """What a server answers."""

    status, length = 200, None


@pytest.fixture
def answers(monkeypatch):
    """Let a server answer with these pieces, or errors."""
    pieces = [b"content", b""]

    class Answer(Response):
        def read(self, size=-1):
            piece = pieces.pop(0)
            if isinstance(piece, Exception):
                raise piece
            return piece

    monkeypatch.setattr(download.urllib.request, "urlopen", lambda *_, **__: Answer())
    return pieces


FILE = base.OfficialFile("file.bin", "http://nowhere/file.bin", "9a0364b9e99bb480dd25e1f0284c8555")


def test_a_file_comes(tmp_path, answers):
    assert download.fetch_file(FILE, tmp_path).read_bytes() == b"content"


def test_a_full_disk(tmp_path, answers, monkeypatch):
    class Full(io.BytesIO):
        def write(self, piece):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "open", lambda *_: Full(), raising=False)
    refused(lambda: download.fetch_file(FILE, tmp_path), f"cannot use {tmp_path / 'file.bin.part'}",
            "(No space left on device)", "free some space and try again")


@pytest.mark.parametrize("name", ["file.bin", "file.bin.part"])
def test_a_folder_named_like_the_file(tmp_path, answers, name):
    (tmp_path / name).mkdir()
    refused(lambda: download.fetch_file(FILE, tmp_path), f"cannot use {tmp_path / name} (",
            "move that folder away")


def test_a_folder_that_cannot_be_written(public, answers):
    with as_nobody():
        for folder in (public, public / "new"):
            refused(lambda folder=folder: download.fetch_file(FILE, folder), folder,
                    "(Permission denied)", "right to write there, or choose another folder")
    (public / "file.bin").touch()
    (public / "file.bin").chmod(0)
    with as_nobody():
        refused(lambda: download.fetch_file(FILE, public), f"{public / 'file.bin'} (Permission",
                "right to")


def test_a_folder_that_is_a_file_or_too_long(tmp_path, answers):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "more"):
        refused(lambda folder=folder: download.fetch_file(FILE, folder), "cannot use", folder,
                "no folder, choose one with --data")
    refused(lambda: download.fetch_file(FILE, tmp_path / ("x" * 300)), "too long",
            "choose another folder with --data")


@pytest.mark.parametrize("error", [
    OSError(errno.ENETUNREACH, "Network is unreachable"), ConnectionResetError("by peer"),
    TimeoutError("timed out"), urllib.error.URLError("several\nlines")])
def test_an_error_of_the_connection_is_not_one_of_the_disk(tmp_path, answers, error, monkeypatch):
    answers.insert(1, error)
    refused(lambda: download.fetch_file(FILE, tmp_path), f"could not download {FILE.url}",
            "goes on where it stopped")
    assert (tmp_path / "file.bin.part").read_bytes() == b"content"

    def broken(*_, **__):
        raise error

    monkeypatch.setattr(download.urllib.request, "urlopen", broken)
    refused(lambda: download.fetch_file(FILE, tmp_path), f"could not download {FILE.url}")
