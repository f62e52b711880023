"""Errors that are meant for the person at the keyboard: one sentence, no traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input, said in one sentence: what was expected, what came, what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``'; did you mean "x"?'`` for the known name closest to `name`, or ``''``."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else ""


def unknown(kind: str, name: object, known: Iterable[str]) -> UserError:
    """Return the error for a name that is not among the `known` names of this `kind`."""
    known = sorted(known)
    return UserError(f'unknown {kind} "{name}"{nearest(str(name), known)} '
                     f'(known: {", ".join(known)})')
