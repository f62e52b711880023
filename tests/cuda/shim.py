"""Compile the CUDA kernels for the CPU with g++ (see cuda_shim.h), and launch them."""

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comet_np.backends import cupy_kernels
from comet_np.backends.cupy_kernels import source

HERE = Path(__file__).resolve().parent
GXX = shutil.which("g++")
# The sanitizers' own libraries are not linked: shim_runtime.cpp implements their hooks. Without
# -fno-gnu-unique all libraries of a process would share their kernels' shared arrays.
KERNEL_FLAGS = ("-O1", "-fsanitize=thread,bounds,alignment", "-fno-gnu-unique", "-Wall", "-Werror",
                "-Wno-unknown-pragmas", "-Wno-tsan")
RUNTIME_FLAGS = ("-O2", "-Wall", "-Werror", "-U_FORTIFY_SOURCE")  # which forbids jumps of stacks

# The instances of a kernel template that the backend may ask for, by its parameters.
FLOATS = ("float", "double")
ARGUMENTS = {
    "": [""],
    "class T": [f"<{T}>" for T in FLOATS],
    "class T, class F": [f"<{T}, f_{name}>" for T in FLOATS for name in cupy_kernels.ACTIVATIONS],
    "class T, int WARPS": [f"<{T}, {warps}>" for T in FLOATS
                           for warps in (1, cupy_kernels.ROW_WARPS)],
    "class T, int WARPS, int ITEMS": [
        f"<{T}, {warps}, {items}>" for T in FLOATS
        for warps, items in (*cupy_kernels.CAPS.values(), cupy_kernels.LONG_CAP)],
}
KERNEL = r"(?:template <(.*)>\s+)?__global__ void\s+(?:__launch_bounds__.*\s+)?(\w+)\("
INSTANCES: dict[str, list[str]] = {
    file.stem: [name + arguments for parameters, name in re.findall(KERNEL, source(file.stem))
                for arguments in ARGUMENTS[parameters]]
    for file in sorted(cupy_kernels.FOLDER.glob("*.cu"))}

_one_at_a_time = threading.RLock()  # the runtime of a library is one machine


class Parameter(ctypes.Structure):
    """ShimType of cuda_shim.h."""

    _fields_ = (("name", ctypes.c_char_p), ("pointer", ctypes.c_bool))


class Memory(ctypes.Structure):
    """Array of shim_runtime.cpp."""

    _fields_ = (("begin", ctypes.c_void_p), ("bytes", ctypes.c_size_t))


class Kernel:
    """One compiled kernel: `parameters` are pairs of a dtype's name and whether it is a pointer."""

    def __init__(self, library: ctypes.CDLL, number: int) -> None:
        self._library, self._number = library, number
        found = library.shim_parameters(number)
        self.parameters = [(found[i].name.decode(), bool(found[i].pointer))
                           for i in range(library.shim_parameter_count(number))]

    def launch(self, grid: tuple[int, ...], block: tuple[int, ...], values: Sequence[Any],
               watch: bool, seed: int) -> None:
        """Run the kernel on NumPy arrays and scalars whose types are those of its parameters.

        Raises
        ------
        RuntimeError
            If it does what shim_runtime.cpp lists as errors.
        """
        arrays = [value for value in values if isinstance(value, np.ndarray)]
        cells = [ctypes.c_void_p(value.ctypes.data) if isinstance(value, np.ndarray)
                 else ctypes.create_string_buffer(value.tobytes(), value.nbytes)
                 for value in values]
        bounds = [np.lib.array_utils.byte_bounds(a) for a in arrays]
        memory = (Memory * len(arrays))(*((low, high - low) for low, high in bounds))
        pointers = (ctypes.c_void_p * len(cells))(*(ctypes.addressof(cell) for cell in cells))
        sizes = ctypes.c_uint * 3
        with _one_at_a_time:
            if self._library.shim_launch(self._number, sizes(*(*grid, 1, 1)[:3]),
                                         sizes(*(*block, 1, 1)[:3]), pointers, memory,
                                         len(arrays), int(watch), ctypes.c_uint64(seed)):
                raise RuntimeError(self._library.shim_error().decode())


def kernel(code: str, name: str) -> Kernel:
    """Return the kernel `name` of a source, compiled with all other instances of its file."""
    whole = [tuple(names) for file, names in INSTANCES.items() if code == source(file)]
    with _one_at_a_time:
        return compiled(code, whole[0] if whole else (name,))[name]  # else it is a mutant


@functools.cache
def compiled(code: str, names: tuple[str, ...]) -> dict[str, Kernel]:
    """Return the kernels `names` of the CUDA source `code`, by name."""
    exports = "".join(f'static ShimCall<{name}> shim_{i}("{name}");\n'
                      for i, name in enumerate(names))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "kernels.cpp").write_text(f'#include "cuda_shim.h"\n{code}\n{exports}')
        gxx("-c", *KERNEL_FLAGS, path / "kernels.cpp", "-o", path / "kernels.o")
        (path / "runtime.o").write_bytes(runtime())
        gxx("-shared", path / "kernels.o", path / "runtime.o", "-o", path / "kernels.so")
        library = ctypes.CDLL(str(path / "kernels.so"))
    library.shim_error.restype = library.shim_name.restype = ctypes.c_char_p
    library.shim_parameters.restype = ctypes.POINTER(Parameter)
    return {library.shim_name(i).decode(): Kernel(library, i)
            for i in range(library.shim_count())}


@functools.cache
def runtime() -> bytes:
    """Return shim_runtime.cpp as an object file."""
    with tempfile.TemporaryDirectory() as folder:
        gxx("-c", *RUNTIME_FLAGS, HERE / "shim_runtime.cpp", "-o", f"{folder}/runtime.o")
        return Path(folder, "runtime.o").read_bytes()


def gxx(*arguments: str | Path) -> None:
    """Run g++.

    Raises
    ------
    AssertionError
        With its messages, if it fails.
    """
    assert GXX is not None
    done = subprocess.run([GXX, "-std=c++17", "-fPIC", f"-I{HERE}", *map(str, arguments)],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
