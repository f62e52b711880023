"""Compile CUDA source with NVRTC, which needs no GPU and no driver."""

import ctypes
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from comet_np.backends import cupy_kernels

# CuPy adds -ftz=true to the options of all kernels (cupy/cuda/compiler.py).
OPTIONS = (*cupy_kernels.OPTIONS, "-ftz=true")


class Resources(NamedTuple):
    """What one compiled kernel needs: registers a thread, bytes spilled, bytes of shared memory."""

    registers: int
    spilled: int
    shared: int


def library() -> ctypes.CDLL | None:
    """Return NVRTC from the wheel `nvidia-cuda-nvrtc`, or None if it is not installed."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    found = sorted(file for folder in folders for file in folder.glob("*/lib/libnvrtc.so.*"))
    if not found:
        return None
    for builtins in found[-1].parent.glob("libnvrtc-builtins.so.*"):  # not found otherwise
        ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(found[-1]))


class Program:
    """CUDA source compiled for the kernels `names`, with `OPTIONS` and further flags.

    Raises
    ------
    AssertionError
        With the compiler's log, if it does not compile.
    """

    def __init__(self, nvrtc: ctypes.CDLL, source: str, names: Sequence[str], *flags: str) -> None:
        self._nvrtc, self._program = nvrtc, ctypes.c_void_p()
        check(nvrtc.nvrtcCreateProgram(ctypes.byref(self._program), source.encode(), b"kernels.cu",
                                       0, None, None))
        for name in names:
            check(nvrtc.nvrtcAddNameExpression(self._program, name.encode()))
        options = [flag.encode() for flag in (*OPTIONS, *flags)]
        status = nvrtc.nvrtcCompileProgram(self._program, len(options),
                                           (ctypes.c_char_p * len(options))(*options))
        assert status == 0, self.result("ProgramLog").decode()

    def result(self, kind: str) -> bytes:
        """Return the "ProgramLog", "PTX" or "CUBIN"."""
        size = ctypes.c_size_t()
        check(getattr(self._nvrtc, f"nvrtcGet{kind}Size")(self._program, ctypes.byref(size)))
        content = ctypes.create_string_buffer(size.value)
        check(getattr(self._nvrtc, f"nvrtcGet{kind}")(self._program, content))
        return content.raw

    def mangled(self, name: str) -> bytes:
        """Return the name of a kernel in the compiled code."""
        found = ctypes.c_char_p()
        check(self._nvrtc.nvrtcGetLoweredName(self._program, name.encode(), ctypes.byref(found)))
        assert found.value is not None
        return found.value

    def __del__(self) -> None:
        self._nvrtc.nvrtcDestroyProgram(ctypes.byref(self._program))


def compile_kernels(nvrtc: ctypes.CDLL, source: str, names: Sequence[str],
                    arch: int) -> dict[str, Resources]:
    """Return the resources of the kernels `names` of `source`, compiled for sm_`arch`."""
    program = Program(nvrtc, source, names, f"--gpu-architecture=sm_{arch}", "--ptxas-options=-v")
    log = program.result("ProgramLog").decode()
    return {name: _resources(log, program.mangled(name).decode()) for name in names}


def _resources(log: str, mangled: str) -> Resources:
    part = log.split(f"Compiling entry function '{mangled}'")[1].split("Compiling entry")[0]

    def number(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, part)))

    return Resources(number(r"Used (\d+) registers"), number(r"(\d+) bytes spill"),
                     number(r"(\d+) bytes smem"))


def check(status: Any) -> None:
    """Raise unless an NVRTC call has succeeded."""
    assert status == 0, f"NVRTC call failed with status {status}"
