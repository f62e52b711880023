"""Named arrays in files of the format safetensors, which hold no code, by the package of that name.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..backends import backend_of
from ..checkpoint import CheckpointError, write_atomically
from ..errors import UserError, of_system, one_line, user_path
from .torch_mlp import check_backend, check_mapping

Array = Any


def save_safetensors(file: str | Path, named: Mapping[str, Array]) -> None:
    """Write named arrays, as of `named_weights`, which PyTorch reads as tensors.

    Raises
    ------
    UserError
        If the package is not installed, a name or an array does not go into such a file, or it
        cannot be written.
    BackendError
        If a value is no array of a backend.
    """
    check_mapping(named)
    for name, array in named.items():
        if not isinstance(name, str):
            raise UserError(f"the names of arrays are strings, got {name!r}")
        check_backend(name, array)
        if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
            raise UserError(f'"{name}" must hold real numbers of at most 8 bytes, got '
                            f"{array.dtype}: convert it, or write its parts")
    host = {name: np.ascontiguousarray(backend_of(array).to_host(array))
            for name, array in named.items()}
    write(user_path(file), _package().numpy.save(host, metadata={"format": "pt"}))


def write(file: Path, content: bytes) -> None:
    """Write a file whose path a function was called with, whole or not at all.

    Raises
    ------
    UserError
        If it cannot be written.
    """
    try:
        write_atomically(file, content)
    except CheckpointError as error:
        cause: Any = error.__cause__
        raise UserError(of_system("write", file, cause, "")) from None


def load_safetensors(file: str | Path) -> dict[str, np.ndarray]:
    """Return the arrays of a safetensors file by name.

    Raises
    ------
    UserError
        If the package is not installed, or the file cannot be read, or holds something else.
    """
    file, package = user_path(file), _package()
    try:
        return {name: np.array(array)
                for name, array in package.numpy.load(file.read_bytes()).items()}
    except OSError as error:
        raise UserError(of_system("read", file, error, "")) from None
    except package.SafetensorError as error:
        raise UserError(f"{file} is no whole safetensors file ({one_line(error)}): get it again"
                        ) from None
    except KeyError as error:  # what NumPy has no type for: bfloat16, say
        raise UserError(f"{file} holds numbers of the type {error.args[0]}, which NumPy does not "
                        "know: save it again in PyTorch after .float()") from None


def _package() -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        raise UserError("safetensors files need the package safetensors: "
                        "python -m pip install safetensors") from None
    return safetensors
