"""Compile CUDA source with NVRTC, which needs no GPU and no driver."""

import ctypes
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from comet_np.backends import cupy_backend

# CuPy adds -ftz=true to the options of all kernels (cupy/cuda/compiler.py).
OPTIONS = (*cupy_backend.OPTIONS, "-ftz=true")


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


def compile_kernels(nvrtc: ctypes.CDLL, source: str, names: Sequence[str],
                    arch: int) -> dict[str, Resources]:
    """Return the resources of the kernels `names` of `source`, compiled for sm_`arch`.

    Raises
    ------
    AssertionError
        With the compiler's log, if it does not compile.
    """
    program = ctypes.c_void_p()
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None,
                                   None))
    for name in names:
        check(nvrtc.nvrtcAddNameExpression(program, name.encode()))
    flags = [*OPTIONS, f"--gpu-architecture=sm_{arch}", "--ptxas-options=-v"]
    status = nvrtc.nvrtcCompileProgram(
        program, len(flags), (ctypes.c_char_p * len(flags))(*map(str.encode, flags)))
    size = ctypes.c_size_t()
    check(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    check(nvrtc.nvrtcGetProgramLog(program, text))
    log = text.value.decode()
    assert status == 0, log
    found = {}
    for name in names:
        mangled = ctypes.c_char_p()
        check(nvrtc.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(mangled)))
        assert mangled.value is not None
        found[name] = _resources(log, mangled.value.decode())
    check(nvrtc.nvrtcDestroyProgram(ctypes.byref(program)))
    return found


def ptx(nvrtc: ctypes.CDLL, source: str, name: str, arch: int) -> str:
    """Return the PTX of one kernel."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None,
                                   None))
    check(nvrtc.nvrtcAddNameExpression(program, name.encode()))
    flags = [flag.encode() for flag in (*OPTIONS, f"--gpu-architecture=compute_{arch}")]
    check(nvrtc.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags)))
    check(nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    check(nvrtc.nvrtcGetPTX(program, text))
    check(nvrtc.nvrtcDestroyProgram(ctypes.byref(program)))
    return text.value.decode()


def _resources(log: str, mangled: str) -> Resources:
    part = log.split(f"Compiling entry function '{mangled}'")[1].split("Compiling entry")[0]

    def number(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, part)))

    return Resources(number(r"Used (\d+) registers"), number(r"(\d+) bytes spill"),
                     number(r"(\d+) bytes smem"))


def check(status: Any) -> None:
    """Raise unless an NVRTC call has succeeded."""
    assert status == 0, f"NVRTC call failed with status {status}"
