"""Checkpoints: named arrays and a JSON description in one file, written atomically, no pickle.

Layout: the magic line; a line with the format's version and the SHA-256 of all that follows; a line
of JSON (description, the arrays' names, dtypes and shapes); the arrays' bytes one after the other.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UserError, of_system, one_line

MAGIC = b"COMET-NP checkpoint\n"
VERSION = 2


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written, said in one sentence."""


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Write the parts to `path` so that a reader, or a crash, sees the old file or the new one.

    Raises
    ------
    CheckpointError
        If it cannot be written (disk full, read-only folder); the old file is then untouched.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(f"{of_system('write', path, error)}; then run the same command "
                              "again, what was saved before is still there") from error


def save(path: Path, arrays: Mapping[str, np.ndarray], description: Mapping[str, Any]) -> None:
    """Write a checkpoint; the one that was there is kept as ``NAME.previous``.

    Parameters
    ----------
    path : Path
    arrays : mapping of str to NumPy array
    description : mapping of JSON values
    """
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    header = {"description": description, "arrays": {name: [array.dtype.str, array.shape]
                                                     for name, array in contiguous.items()}}
    content: list[bytes | memoryview] = [
        json.dumps(header).encode() + b"\n",
        *(array.reshape(-1).view(np.uint8).data for array in contiguous.values())]
    digest = hashlib.sha256()
    for part in content:
        digest.update(part)
    fresh = path.with_name(path.name + ".new")
    write_atomically(fresh, MAGIC, f"{VERSION} {digest.hexdigest()}\n".encode(), *content)
    if path.exists():
        os.replace(path, previous(path))
    os.replace(fresh, path)


def previous(path: Path) -> Path:
    """Return where `save` keeps the checkpoint before the last."""
    return path.with_name(path.name + ".previous")


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the arrays and the description of a checkpoint, after checking its hash.

    Raises
    ------
    CheckpointError
        If the file is no checkpoint, of another version, or damaged.
    """
    try:
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise CheckpointError(f"{path} is not a COMET-NP checkpoint")
            version, _, known = file.readline().decode("ascii", "replace").strip().partition(" ")
            if version != str(VERSION):
                other = f"version {version}" if version.isdecimal() else "another version"
                raise CheckpointError(f"{path} was written by {other} of the format; this COMET-NP "
                                      f"reads version {VERSION}")
            line, payload = file.readline(), file.read()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    digest = hashlib.sha256(line)
    digest.update(payload)
    if digest.hexdigest() != known:
        raise CheckpointError(f"{path} is damaged: its contents do not match their hash")
    try:
        header, arrays, position = json.loads(line), {}, 0
        for name, (dtype, shape) in header["arrays"].items():
            if min(shape, default=0) < 0:
                raise ValueError(f"the shape of {name} is {shape}")
            array = np.frombuffer(payload, np.dtype(dtype), math.prod(shape), position)
            arrays[name] = array.reshape(shape)
            position += array.nbytes
        return arrays, dict(header["description"])
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError,
            RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its hash is right, but it does not hold what "
                              f"`save` writes ({one_line(error)})") from error


def load_latest(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any], str] | None:
    """Return the newest readable checkpoint of `path` and a notice, or None if there is none.

    The notice is empty, or says why an older checkpoint was taken.

    Raises
    ------
    CheckpointError
        If there are checkpoints, but none can be read.
    """
    problems: list[str] = []
    for candidate in (path.with_name(path.name + ".new"), path, previous(path)):
        if not candidate.exists():
            continue
        try:
            return *load(candidate), "; ".join(problems)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("; ".join(problems) + f": move {path.parent} away to start again")
    return None
