"""Work captured as a CUDA graph: from the second call on, one launch instead of hundreds."""

import contextlib
import gc
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

_one_at_a_time = threading.Lock()  # captures of several threads would get in each other's way


class CapturedWork:
    """A function without arguments, replayed as a CUDA graph.

    The first call runs it as it is, so that kernels are compiled; the second records it, and it
    and all later ones launch the graph. What the function reads and writes must stay where it is,
    and numbers that the host computes are those of the recording for ever; what it allocates comes
    from a pool of the graph's own and is overwritten by the next call.

    Parameters
    ----------
    cupy : module
    work : function () -> result
    """

    def __init__(self, cupy: ModuleType, work: Callable[[], Any]) -> None:
        self._cupy, self._work = cupy, work
        self._compiled = False
        self._graph: Any = None

    def __call__(self) -> Any:
        if not self._compiled:
            self._compiled = True
            return self._work()
        if self._graph is None:
            with _one_at_a_time:
                self._record()
        self._graph.launch()
        return self._result

    def __del__(self) -> None:
        if self._graph is not None:
            self._graph = self._result = None
            self._pool.free_all_blocks()  # a pool keeps its memory even when it goes

    def _record(self) -> None:
        cuda = self._cupy.cuda
        gc.collect()  # graphs that lie in cycles go now, rather than during the capture
        # The first call left its intermediates idle in the shared pool: the graph needs as much.
        self._cupy.get_default_memory_pool().free_all_blocks(cuda.get_current_stream())
        stream = cuda.Stream(non_blocking=True)
        self._pool = cuda.MemoryPool()  # kept, as the graph uses its memory
        with stream, cuda.using_allocator(self._pool.malloc):
            stream.begin_capture()
            try:
                self._result = self._work()
            except BaseException:
                with contextlib.suppress(Exception):  # the work's own error says more
                    stream.end_capture()
                raise
            self._graph = stream.end_capture()
