"""The surface of cupy that the stand-in imitates, read off the real package and kept in a file.

``python tests/cuda/surface.py`` writes the file afresh; it needs cupy, but no GPU. Kept is what has
a double of the same name in NumPy, and what the stand-in has besides (`EXTRAS`). A signature is
kept as the names of its parameters, with ``=`` behind those that have a default.
"""

import inspect
import json
import re
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).resolve().parent / "cupy_surface.json"
EXTRAS = ("asnumpy", "RawModule.get_function", "ndarray.get", "cuda.get_current_stream",
          "cuda.using_allocator", "cuda.MemoryPool.malloc", "cuda.MemoryPool.free_all_blocks",
          "get_default_memory_pool", "cuda.Stream.__init__",
          "cuda.Stream.begin_capture", "cuda.Stream.end_capture", "cuda.Stream.synchronize",
          "cuda.Graph.launch", "cuda.Event.__init__", "cuda.Event.record", "cuda.Event.synchronize",
          "cuda.get_elapsed_time", "cuda.runtime.getDeviceCount", "cuda.runtime.getDevice",
          "cuda.runtime.getDeviceProperties", "cuda.runtime.driverGetVersion",
          "cuda.runtime.runtimeGetVersion")


def read() -> dict[str, Any]:
    """Return the surface of the installed cupy."""
    import cupy

    surface: dict[str, Any] = {"version": cupy.__version__, "ufuncs": [], "functions": {},
                               "values": [], "methods": {}, "attributes": [],
                               "extras": {}}
    for name in EXTRAS:
        surface["extras"][name] = parameters(attrgetter(name)(cupy))
    for name in dir(cupy):
        value = getattr(cupy, name)
        if name.startswith("_") or not hasattr(np, name) or inspect.ismodule(value):
            continue
        if isinstance(value, cupy.ufunc):
            surface["ufuncs"].append(name)
        elif callable(value) and not isinstance(value, type):
            surface["functions"][name] = parameters(value)
        elif name != "ndarray":
            surface["values"].append(name)
    for name in dir(cupy.ndarray):
        value = getattr(cupy.ndarray, name)
        if name.startswith("_") or not hasattr(np.ndarray, name):
            continue
        if callable(value):
            surface["methods"][name] = parameters(value)
        else:
            surface["attributes"].append(name)
    return surface


def parameters(function: Callable[..., Any]) -> str:
    """Return the names of a function's parameters, from its signature or its documentation."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in Cython: the first line of its documentation is the signature
        inside = re.search(r"\((.*)\)", (function.__doc__ or "").splitlines()[0])
        assert inside is not None, function
        parts = [part.partition("=") for part in inside[1].split(", ")]
        return ", ".join(name.split()[-1] + equals for name, equals, _ in parts if name)
    bare = [p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else None)
            for p in signature.parameters.values()]
    return str(inspect.Signature(bare))[1:-1].replace("=None", "=")


if __name__ == "__main__":
    FILE.write_text(json.dumps(read(), indent=0, sort_keys=True) + "\n", encoding="utf-8")
