"""The reader in C: it agrees with all vectors of the MLP, and notices what is spoiled."""

import shutil
import subprocess

import pytest

from comet_np.conformance.vectors import files, read_all

SOURCE = files.DATA.parent / "reader.c"
MLPS = [case for case in read_all() if case.model == "mlp" and "forward" in case.levels]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Return a function that runs the reader on folders: its exit status and lines."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    program = tmp_path_factory.mktemp("reader") / "reader"
    subprocess.run([compiler, "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-O2",
                    str(SOURCE), "-o", str(program), "-lm"], check=True, timeout=120)

    def run(*folders):
        done = subprocess.run([program, *folders], capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout.splitlines()

    return run


def test_it_is_short():
    lines = SOURCE.read_text(encoding="ascii").splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 100


def test_it_agrees_with_every_mlp(reader):
    folders = [files.DATA / case.id for case in MLPS]
    status, lines = reader(*folders)
    assert lines == [f"{folder}: agrees" for folder in folders]
    assert status == 0 and len(lines) > 30


def spoiled(tmp_path, case, name, place, byte):
    """Return a copy of a case in which one byte of an array is another, counted from the end."""
    copy = tmp_path / case.id
    shutil.copytree(files.DATA / case.id, copy)
    data = bytearray((copy / f"{name}.npy").read_bytes())
    data[place] ^= byte
    (copy / f"{name}.npy").write_bytes(data)
    return copy


@pytest.mark.parametrize("case", MLPS, ids=lambda case: case.id)
def test_it_notices_what_is_spoiled(reader, case, tmp_path):
    L = len(case.config["widths"]) - 1
    spoil = [(f"a_{L}", -1, 0x80), (f"a_{L}", -2, 0x20), ("loss", -2, 0x20), ("W_1", -1, 0x80),
             ("dx", -1, 0x80), ("dW_1", -1, 0x80), ("labels", -8, 1)]
    if case.config["gate"] != "none":
        spoil += [(f"m_{layer}", -1, 1) for layer in range(1, L)]
    for name, place, byte in spoil:
        values = (case.inputs | case.expected)[name]
        if byte == 0x80 and not values.flat[-1]:
            continue  # -0
        folder = spoiled(tmp_path / f"{name}{place}", case, name, place, byte)
        status, (line,) = reader(folder)
        assert status == 1 and " of layer " in line and "differs" in line, (name, line)


def test_it_says_what_it_cannot_read(reader, tmp_path):
    shutil.copytree(files.DATA / MLPS[0].id, tmp_path / "one")
    (tmp_path / "one" / "b_1.npy").unlink()
    cap = next(files.DATA.glob("cap-*"))
    assert reader(tmp_path / "one", tmp_path / "two", cap) == (1, [
        f"{tmp_path / 'one'}: {tmp_path / 'one' / 'b_1.npy'} cannot be read",
        f"{tmp_path / 'two'}: no case.json of format 1", f"{cap}: no MLP to compute"])
    shutil.copytree(files.DATA / MLPS[0].id, tmp_path / "three")
    file = tmp_path / "three" / "x.npy"
    file.write_bytes(file.read_bytes().replace(b"(8, ", b"(7, "))
    status, (line,) = reader(tmp_path / "three")
    assert status == 1 and "is not an array of shape (8, " in line
