"""Reading pickles as data: nothing that they say is executed, nothing that they name is loaded.

A pickle is a program for a stack machine. Python's own executes whatever functions it names, and
crashes or takes all memory if it is made for that. This one knows the instructions that the pickle
of a dictionary of plain arrays, lists and strings needs, and a call is a record of its arguments.
"""

import pickletools
from typing import Any

import numpy as np

from .base import reason

# What the pickle of an array names: NumPy's modules were renamed in version 2.
_NAMES = {"numpy.dtype", "numpy.ndarray", "numpy.core.multiarray._reconstruct",
          "numpy._core.multiarray._reconstruct"}
_VALUES = {"BININT", "BININT1", "BININT2", "INT", "LONG1", "BINBYTES", "SHORT_BINBYTES",
           "BINUNICODE", "SHORT_BINUNICODE", "UNICODE"}
_PYTHON2_STRINGS = {"STRING", "BINSTRING", "SHORT_BINSTRING"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LAST = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}  # items that they take
_SINCE_MARK = {"LIST", "TUPLE", "DICT", "APPENDS", "SETITEMS"}


class _Name(str):
    """The name of a function, which is not looked up."""


class _Record:
    """What a pickle wanted to build: the arguments of the call, and the state to be set."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.arguments = arguments
        self.state: Any = None


def read_pickle(content: bytes) -> dict[Any, Any]:
    """Return the dictionary in a pickle; its values are numbers, bytes, lists and byte arrays.

    Strings of Python 2 come as bytes, arrays as read-only uint8 arrays.

    Raises
    ------
    ValueError
        If it is no pickle, is damaged, or asks for anything else.
    """
    try:
        found = _run(content)
        return {key: _array(value) if isinstance(value, _Record) else value
                for key, value in found.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        # as many as there are ways of not being what was expected
        raise ValueError("expected a pickle of plain arrays, lists and strings, got something else "
                         f"({reason(error)}), of which nothing was executed") from error


def _run(content: bytes) -> Any:
    """Return what a pickle builds, with a `_Record` for each call."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    argument: Any
    for instruction, argument, _ in pickletools.genops(content):
        kind = instruction.name
        if kind in _VALUES:
            stack.append(argument)
        elif kind in _PYTHON2_STRINGS:
            stack.append(argument.encode("latin-1"))
        elif kind in {"BINPUT", "LONG_BINPUT", "PUT"}:
            memo[argument] = stack[-1]
        elif kind == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif kind in {"BINGET", "LONG_BINGET", "GET"}:
            stack.append(memo[argument])
        elif kind in _CONSTANTS:
            stack.append(_CONSTANTS[kind])
        elif kind == "EMPTY_LIST":
            stack.append([])
        elif kind == "EMPTY_DICT":
            stack.append({})
        elif kind == "MARK":
            marks.append(len(stack))
        elif kind in _SINCE_MARK or kind in _LAST:
            first = marks.pop() if kind in _SINCE_MARK else len(stack) - _LAST[kind]
            items = stack[first:]
            del stack[first:]
            _gather(kind, items, stack)
        elif kind == "GLOBAL":
            stack.append(_known(*argument.split(" ", 1)))
        elif kind == "STACK_GLOBAL":
            stack.append(_known(*[stack.pop() for _ in range(2)][::-1]))
        elif kind == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            if not isinstance(function, _Name):
                raise ValueError("a call of what is no function")
            stack.append(_Record(arguments))
        elif kind == "BUILD":
            state = stack.pop()
            stack[-1].state = state
        elif kind not in {"PROTO", "FRAME", "STOP"}:
            raise ValueError(f"the instruction {kind}")
    return stack.pop()


def _gather(kind: str, items: list[Any], stack: list[Any]) -> None:
    """Make a container of the items, or put them into the one on top of the stack."""
    if kind == "LIST":
        stack.append(items)
    elif kind.startswith("TUPLE"):
        stack.append(tuple(items))
    elif kind.startswith("APPEND"):
        stack[-1].extend(items)
    else:
        if kind == "DICT":
            stack.append({})
        if not all(isinstance(key, bytes | str) for key in items[::2]):
            raise ValueError("a key that is no string")  # the hash of deep tuples crashes Python
        stack[-1].update(zip(items[::2], items[1::2], strict=True))


def _known(module: Any, name: Any) -> _Name:
    if not (isinstance(module, str) and isinstance(name, str)):
        raise ValueError("a name that is no string")
    if f"{module}.{name}" not in _NAMES:
        raise ValueError(f"a call of {module}.{name}")
    return _Name(f"{module}.{name}")


def _array(record: _Record) -> np.ndarray:
    """Return the uint8 array that a record of `numpy._reconstruct` describes."""
    _version, shape, dtype, fortran_order, data = record.state
    if dtype.arguments[0] not in (b"u1", "u1") or fortran_order:
        raise ValueError("an array that does not hold bytes in C order")
    return np.frombuffer(data, np.uint8).reshape(shape)
