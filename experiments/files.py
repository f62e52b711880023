"""The files of a run: the lock of who is at it, and of a finished one the hashes of the others."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..records import believed, digests, read_json, write_json

CONFIG, WEIGHTS, METRICS, RESULT = "config.json", "weights.npz", "metrics.jsonl", "result.json"


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write the result of a finished run, with the hashes of the files that belong to it."""
    write_json(folder / RESULT, result | {"files": digests(folder, (CONFIG, WEIGHTS, METRICS))})


def finish(folder: Path, result: dict[str, Any]) -> None:
    """Write the result of a run; the checkpoints that led to it go after that."""
    write_result(folder, result)
    for file in folder.glob("checkpoint*"):
        file.unlink()


def read_result(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the result of a finished run, and the hashes of the files that belong to it."""
    with believed(folder / RESULT):
        result = read_json(folder / RESULT)
        return result, dict(result.pop("files"))


@contextmanager
def locked(file: Path) -> Iterator[bool]:
    """Hold an exclusive lock on `file`, or yield False; the system frees it if we are killed.

    Where a file system has no locks, as some of clusters do, two may do the same work.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no flock
        yield True
        return
    with open(file, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield True
