"""Records: JSON files that carry the hash of what they say, and hashes of the files beside them."""

import hashlib
import json
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from .checkpoint import write_atomically
from .errors import UserError, of_system, one_line


class DamagedRecord(UserError):
    """A file that does not hold what was written into it, said in one sentence."""


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write JSON values and their hash, atomically; `read_json` returns them."""
    text = json.dumps(values | {"sha256": _of_values(values)}, indent=1)
    write_atomically(path, text.encode() + b"\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the values that `write_json` wrote.

    Raises
    ------
    DamagedRecord
        If the file was changed, or is a folder.
    UserError
        If it cannot be read.
    FileNotFoundError, NotADirectoryError
        If it is not there.
    """
    try:
        values = json.loads(path.read_bytes())
        known = values.pop("sha256", None)
        found = _of_values(values)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except IsADirectoryError as error:
        raise DamagedRecord(f"{path} is damaged: it is a folder") from error
    except OSError as error:
        raise UserError(of_system("read", path, error)) from error
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedRecord(f"{path} is damaged: it holds no JSON record") from error
    if known != found:
        what = ("has no hash: it is older than COMET-NP 0.3, or was changed" if known is None else
                "is damaged: its contents do not match their hash")
        raise DamagedRecord(f"{path} {what}")
    return dict(values)


def _of_values(values: dict[str, Any]) -> str:
    """Return the SHA-256 of JSON values, as they are read back: a tuple is a list."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def digests(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Return the SHA-256 of those of the named files that are in the folder."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in names if (folder / name).is_file()}


def read_known(path: Path, known: dict[str, str]) -> bytes:
    """Return the content of a file whose hash is among the `known` ones, by its name.

    Raises
    ------
    DamagedRecord
        If it is missing, unknown, or was changed.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DamagedRecord(f"{path} is missing or damaged ({error.strerror})") from error
    if hashlib.sha256(content).hexdigest() != known.get(path.name):
        raise DamagedRecord(f"{path} is missing or damaged: its contents do not match the hash in "
                            "the result beside it")
    return content


@contextmanager
def believed(path: Path) -> Iterator[None]:
    """Turn what goes wrong when values of a file are used into a `DamagedRecord`.

    Its hash may be right and its values none of ours: then a name is missing, or a type is wrong.
    """
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError,
            RecursionError) as error:
        raise DamagedRecord(f"{path} is damaged: it does not hold what was written "
                            f"({type(error).__name__}: {one_line(error)})") from error


def read_arrays(file: IO[bytes], what: str,
                names: Sequence[str] | None = None) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return arrays of an npz file, of some `names` if given, and the names of all; no pickles.

    Raises
    ------
    DamagedRecord
        If it, which the message calls `what`, is no npz file, or one of these arrays is unreadable.
    OSError
        If the file cannot be read.
    """
    try:
        found = np.load(file, allow_pickle=False)
        if not isinstance(found, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        with found:
            return {name: found[name] for name in found.files
                    if names is None or name in names}, found.files
    except (ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError, MemoryError,
            SyntaxError, struct.error, zipfile.BadZipFile, zlib.error) as error:
        raise DamagedRecord(f"{what} is no npz file of plain arrays "
                            f"({one_line(error)})") from error
