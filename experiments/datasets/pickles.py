"""Reading pickles without executing anything that they say.

A pickle names the functions that rebuild its objects, and Python's loader calls them. Here every
name that NumPy's arrays need stands for a passive record of the arguments; any other is refused.
"""

import io
import pickle
from typing import Any

import numpy as np

# What the pickle of an array names: NumPy's modules were renamed in version 2.
_ARRAY_NAMES = {("numpy", "ndarray"), ("numpy", "dtype"),
                ("numpy.core.multiarray", "_reconstruct"),
                ("numpy._core.multiarray", "_reconstruct")}


class _Record:
    """What a pickle wanted to build: the arguments of the call, and the state to be set."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_Record]:
        if (module, name) in _ARRAY_NAMES:
            return _Record
        raise pickle.UnpicklingError(f"a call of {module}.{name}")


def read_pickle(content: bytes) -> dict[Any, Any]:
    """Return the dictionary in a pickle; its values are numbers, bytes, lists and byte arrays.

    Strings of Python 2 come as bytes, arrays as read-only uint8 arrays.

    Raises
    ------
    ValueError
        If it is no pickle, is damaged, or asks for anything else.
    """
    try:
        found = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        return {key: _array(value) if isinstance(value, _Record) else value
                for key, value in found.items()}
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError("expected a pickle of plain arrays, lists and strings, got something else "
                         f"({error}), of which nothing was executed") from error


def _array(record: _Record) -> np.ndarray:
    """Return the uint8 array that a record of `numpy._reconstruct` describes."""
    _version, shape, dtype, fortran_order, data = record.state
    if dtype.arguments[0] not in (b"u1", "u1") or fortran_order:
        raise ValueError("an array that does not hold bytes in C order")
    return np.frombuffer(data, np.uint8).reshape(shape)
