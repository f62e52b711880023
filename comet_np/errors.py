"""Errors that are meant for the person at the keyboard: one sentence, no traceback."""

import difflib
import errno
from collections.abc import Iterable
from pathlib import Path

_ELSEWHERE = "{elsewhere}"
# What helps against an error of the system about a file.
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), f"free some space or {_ELSEWHERE}"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), f"{_ELSEWHERE}, one that is yours"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
                    f"something else lies there, {_ELSEWHERE}"),
    errno.ENAMETOOLONG: f"{_ELSEWHERE}, of a shorter name",
    errno.ELOOP: f"its links lead nowhere, {_ELSEWHERE}",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "close other files, or raise ulimit -n"),
    errno.EIO: f"check the disk or the network that it is on, or {_ELSEWHERE}",
}


class UserError(ValueError):
    """Bad input, said in one sentence: what was expected, what came, what to do."""


class NaNScore(UserError):
    """A routing score that is NaN and so has no rank."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``'; did you mean "x"?'`` for the known name closest to `name`, or ``''``."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else ""


def unknown(kind: str, name: object, known: Iterable[str]) -> UserError:
    """Return the error for a name that is not among the `known` names of this `kind`."""
    known = sorted(known)
    return UserError(f'unknown {kind} "{name}"{nearest(str(name), known)} '
                     f'(known: {", ".join(known)})')


def of_system(doing: str, path: object, error: OSError, flag: str = "--out") -> str:
    """Return what the system refused and what helps: ``"cannot write FILE (why): REMEDY"``.

    Parameters
    ----------
    doing : str
        ``"write"``, say.
    path : path
    error : OSError
    flag : str
        By which another folder is chosen; "" where a function was called with the path.
    """
    shown = str(path)
    if len(shown) > 200:
        shown = f"{shown[:80]}...{shown[-80:]}"
    elsewhere = f"choose another folder with {flag}" if flag else "give another path"
    remedy = REMEDIES.get(error.errno or 0, _ELSEWHERE).format(elsewhere=elsewhere)
    return f"cannot {doing} {shown} ({error.strerror or error}): {remedy}"


def one_line(text: object) -> str:
    """Return a text, or what an error says, on one line."""
    return " ".join(str(text).split())


def user_path(text: str | Path) -> Path:
    """Return the path that a person wrote, with ``~`` as the home folder.

    Raises
    ------
    UserError
        If there is no such user.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text}: there is no such home folder, write the path in full") from None
