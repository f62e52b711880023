"""Downloading official files: resumed where they broke off, checked by their hash."""

import contextlib
import errno
import http.client
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from ...errors import UserError
from ..progress import duration
from .base import OfficialFile, new_hash, reason

Progress = Callable[[str, int, int | None], None]  # name, bytes here, bytes in all if known
CHUNK = 1 << 18
TIMEOUT = 30  # seconds of silence after which a connection counts as broken


def fetch_file(file: OfficialFile, folder: Path, progress: Progress | None = None) -> Path:
    """Download a file into `folder` and return its path; go on where an earlier try broke off.

    What is not complete lies in ``NAME.part``; only a file with the right hash gets its name.

    Parameters
    ----------
    file : OfficialFile
    folder : Path
        Made if it is not there.
    progress : function (name, bytes here, bytes in all or None), optional
        Called after each piece; a line on the terminal if not given.

    Raises
    ------
    UserError
        If the connection fails or breaks, the folder cannot be written, or the hash is wrong; all
        but the last leave what has come for the next try.
    """
    path, part = folder / file.name, folder / f"{file.name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            if _digest(path, file.hash) == file.hash:
                return path
            raise UserError(f"{path} is there but is not the official file (unknown hash): move it "
                            "away to download that one")
        _receive(file, part, progress or Line())
        digest = _digest(part, file.hash)
        if digest != file.hash:
            part.unlink()
            raise UserError(f"what came from {file.url} is not the official file: its hash is "
                            f"{digest}, expected {file.hash}; it was removed, try again")
        part.replace(path)
    except (urllib.error.URLError, http.client.HTTPException) as error:
        raise UserError(f"could not download {file.url} ({reason(error)}): try again, it goes on "
                        "where it stopped") from error
    except OSError as error:
        raise UserError(f"cannot use {error.filename or part} ({reason(error)}): "
                        f"{_remedy(error)}") from error
    return path


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space and try again, it goes on where it stopped"
    if isinstance(error, IsADirectoryError):
        return "move that folder away, a file of this name is to come"
    if isinstance(error, PermissionError):
        return "give yourself the right to write there, or choose another folder with --data"
    if isinstance(error, FileExistsError | NotADirectoryError):
        return "that is no folder, choose one with --data"
    return "choose another folder with --data"


def _receive(file: OfficialFile, part: Path, progress: Progress) -> None:
    """Append to `part` what it lacks."""
    here = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(file.url, headers={"Range": f"bytes={here}-"} if here else {})
    try:
        with _network():
            response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing was missing; the hash will tell whether it is right
        raise
    with response, open(part, "ab") as out:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:  # it comes from the start
            out.truncate(0)
            here = 0
        total = None if response.length is None else here + response.length
        while True:
            with _network():
                piece = response.read(CHUNK)
            if not piece:
                break
            out.write(piece)
            here += len(piece)
            progress(file.name, here, total)
    if total is not None and here < total:
        raise http.client.IncompleteRead(b"", total - here)


@contextlib.contextmanager
def _network() -> Iterator[None]:
    """Tell the errors of the connection, which are OSErrors too, from those of the disk."""
    try:
        yield
    except urllib.error.URLError:
        raise
    except OSError as error:
        raise urllib.error.URLError(error) from error


def _digest(path: Path, known: str) -> str:
    """Return the hash of a file, of the kind of the `known` one."""
    digest = new_hash(known)
    with open(path, "rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


class Line:
    """A progress line on standard error, if that is a terminal: share, size, rate, time left."""

    def __init__(self) -> None:
        self._start = self._shown = time.monotonic()
        self._first: int | None = None

    def __call__(self, name: str, here: int, total: int | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = here  # what was here before does not count for the rate
        if not sys.stderr.isatty() or (now - self._shown < 0.1 and here != total):
            return
        self._shown = now
        rate = max(here - self._first, 1) / max(now - self._start, 1e-9)
        share = "" if total is None else (f"{here / total:4.0%} of {total / 1e6:.1f} MB  "
                                          f"{duration((total - here) / rate)} left  ")
        sys.stderr.write(f"\r\x1b[K{name}  {here / 1e6:.1f} MB  {rate / 1e6:.1f} MB/s  {share}"
                         + ("\n" if here == total else ""))
        sys.stderr.flush()
