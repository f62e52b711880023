"""The adapter: how another implementation is asked for what the test vectors expect.

An adapter is a class of three methods, each of which may be missing::

    class Adapter:
        def cap(self, scores, k, ties): ...  # -> the mask of scores (..., N)
        def run(self, case, masks): ...      # -> {name: array}; masks None: route yourself
        def train(self, case): ...           # -> {name: array}, parameters after steps
"""

import importlib
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from ..backends import backend_of
from ..backends.base import is_array
from ..errors import UserError, nearest, one_line

Array = Any

METHODS = ("cap", "run", "train")


class Unsupported(Exception):
    """Raised by an adapter for what it does not compute: that is then no failure."""


class Wrong(Exception):
    """What an adapter did that no number explains, in a sentence.

    trace : str, the traceback of an exception, or "".
    """

    def __init__(self, sentence: str, trace: str = "") -> None:
        super().__init__(sentence)
        self.trace = trace


class Given(NamedTuple):
    """What an adapter sees of a case.

    id, model : str
        Its name, and what is to be computed, as "mlp".
    config : dict
        All numbers and names that the model needs.
    arrays : dict of str to array
        Copies of what is given, float32, uint8 (masks) or int64. Without the masks where the
        adapter is to find them.
    """

    id: str
    model: str
    config: dict[str, Any]
    arrays: dict[str, Array]


def load(name: str) -> Any:
    """Return the adapter called ``package.module:Class``, from the folder one is in, or installed.

    Raises
    ------
    UserError
        If there is none, or it cannot be made.
    """
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        raise UserError(f'an adapter is named package.module:Class, got "{name}"')
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _unimportable(name, error) from error
        raise UserError(f"the adapter {name} was not found: there is no module {error.name} in "
                        f"{here}, nor is one installed") from None
    except Exception as error:  # another's code, which may raise anything
        raise _unimportable(name, error) from error
    try:
        made = getattr(module, attribute)
    except AttributeError:
        raise UserError(f"the adapter {name} was not found: {module_name} has no "
                        f"{attribute}{nearest(attribute, vars(module))}") from None
    if isinstance(made, type):
        try:
            made = made()
        except Exception as error:  # another's code
            raise UserError(f"the adapter {name} cannot be made without arguments: "
                            f"{said(error)}") from error
    if not any(hasattr(made, method) for method in METHODS):
        raise UserError(f"the adapter {name} has none of the methods {', '.join(METHODS)}, of "
                        "which an adapter has at least one")
    return made


def _unimportable(name: str, error: Exception) -> UserError:
    return UserError(f"the adapter {name} cannot be imported: {said(error)}")


def said(error: BaseException) -> str:
    """Return what an exception says, and where it was raised, on one line."""
    if isinstance(error, SyntaxError):  # raised where it is read, not where it stands
        return f"{type(error).__name__}: {one_line(error)}"
    frame = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" ({Path(frame[0].filename).name}, line {frame[0].lineno})" if frame else ""
    text = one_line(error)
    return f"{type(error).__name__}{f': {text}' if text else ''}{where}"


def called(adapter: Any, method: str, arrays: Mapping[str, Array], *arguments: Any) -> Any:
    """Return what a method of an adapter returns.

    Parameters
    ----------
    adapter : object
    method : str
    arrays : mapping of str to array
        Those among the arguments, which it must not change.

    Raises
    ------
    Unsupported
        If it has no such method, or raises this itself.
    Wrong
        If it raises anything else, or writes into an array that it was given.
    """
    function = getattr(adapter, method, None)
    if function is None:
        raise Unsupported(f"the adapter has no method {method}")
    before = {name: array.copy() for name, array in arrays.items()}
    try:
        answer = function(*arguments)
    except Unsupported:
        raise
    except Exception as error:  # another's code: whatever it raises, the other cases go on
        raise Wrong(f"{method} raised {said(error)}", _trace(error.__traceback__, error)) from None
    for name, array in arrays.items():
        if not np.array_equal(array, before[name], equal_nan=array.dtype.kind == "f"):
            raise Wrong(f"{method} writes into {name}, which it was given: let it work on a copy")
    return answer


def _trace(where: TracebackType | None, error: BaseException) -> str:
    """Return the traceback of an exception, without our own frame."""
    inner = where.tb_next if where is not None else None
    return "".join(traceback.format_exception(type(error), error, inner))


def host(name: str, value: Any) -> Array:
    """Return an array of another's, of whatever library and device, as a NumPy array of numbers.

    Raises
    ------
    Wrong
        If it is none.
    """
    try:
        if hasattr(value, "detach"):  # of PyTorch
            value = value.detach().cpu()
        elif not isinstance(value, np.ndarray) and is_array(value):
            value = backend_of(value).to_host(value)
        array = np.asarray(value)
    except Exception as error:  # another's code
        raise Wrong(f"{name} is no array: {said(error)}") from None
    if array.dtype.kind not in "bfiu":
        raise Wrong(f"{name} must be an array of numbers, got {type(value).__name__} of dtype "
                    f"{array.dtype}")
    return array
