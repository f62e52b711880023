"""Records: JSON files that carry the hash of what they say, and hashes of the files beside them."""

import hashlib
import json
from pathlib import Path
from typing import Any

from .checkpoint import write_atomically
from .errors import UserError, of_system


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
        If the file was changed.
    UserError
        If it cannot be read.
    FileNotFoundError, NotADirectoryError
        If it is not there.
    """
    try:
        values = json.loads(path.read_bytes())
        known = values.pop("sha256", None)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UserError(of_system("read", path, error)) from error
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedRecord(f"{path} is damaged: it holds no JSON record") from error
    if known != _of_values(values):
        raise DamagedRecord(f"{path} is damaged: its contents do not match their hash")
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
