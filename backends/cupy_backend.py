"""The GPU backend: CuPy, cuBLAS, and the CUDA kernels of ``kernels/``, compiled when first used.

The kernels never make the host wait. What they find wrong (a NaN among routing scores, a label that
is no class) they note on the device, and `check_errors` raises it: `to_host` and `synchronize` call
it, a training loop should whenever it reads its losses.
"""

import functools
import math
import os
from collections.abc import Callable
from numbers import Integral
from pathlib import Path
from statistics import NormalDist
from types import ModuleType
from typing import Any

import numpy as np

from .base import OPERATIONS, Backend, BackendError, backend_of, register_backend
from .cublas import Cublas
from .cuda_graph import CapturedWork

Array = Any  # cupy.ndarray

KERNELS = Path(__file__).resolve().parent / "kernels"
OPTIONS = ("--std=c++17",)
CTYPES = {"f": "float", "d": "double"}
NULL = np.uint64(0)
OLDEST_CUDA = 12  # that there is an extra for

WARP = 32
BLOCK_ROWS = 8  # of activation.cu: a block is WARP columns by BLOCK_ROWS rows
LOSS_ROWS = 4  # of loss.cu
THREADS = 256  # a block, of the kernels over flat buffers
MOST_BLOCKS = 1024  # of these: each thread then takes several elements
MOST_GRID_ROWS = 65535  # CUDA's limit for the second axis of a grid
SUM_BLOCKS, SUM_ROWS = 128, 32  # column sums: at most so many blocks over the rows, of so many

# masks.cu: the longest row for which `warps` warps hold it in registers, `items` scores a thread.
CAPS = {32: (1, 1), 128: (1, 4), 256: (1, 8), 512: (1, 16), 1024: (1, 32), 1536: (4, 12),
        2048: (4, 16), 3072: (4, 24), 4096: (4, 32), 6144: (8, 24), 9216: (8, 36)}
LONG_CAP = (16, 0)  # the row stays in memory
TIES = {"strict": 0, "threshold": 1, "index": 2}

# activation.cu
ACTIVATIONS = ("identity", "relu", "leaky_relu", "tanh", "sigmoid", "softplus", "silu", "gelu",
               "elu", "selu", "mish")
NO_MASK, BYTES, BITS = 0, 1, 2

NO_ERROR = np.uint64(2**64 - 1)
ERRORS = (
    "routing score {low} of example {row} is NaN, which has no rank: look for NaN or infinity in "
    "the input or in the routing weights",
    "the label of example {row} is {low}, which is no class of the network: check its number of "
    "classes or the labels of the data set",
)


@functools.cache
def load() -> "CupyBackend":
    """Return the CuPy backend.

    Raises
    ------
    BackendError
        If CuPy, one of CUDA's libraries, the driver or a GPU is missing (the message says how to
        install it), or the driver is too old for this CuPy.
    """
    try:
        import cupy
    except ImportError as error:
        raise BackendError('the backend "cupy" needs CuPy: pip install "comet-np[cuda13]", or '
                           '"comet-np[cuda12]" for a driver of CUDA 12') from error
    check_device(cupy.cuda.runtime)
    try:
        import cupy.cublas
        from cupyx.scipy.special import erf
    except ImportError as error:
        major = cupy.cuda.runtime.runtimeGetVersion() // 1000
        raise BackendError(f"CuPy cannot load a library of CUDA ({str(error).splitlines()[0]}): "
                           f'pip install "cupy-cuda{major}x[ctk]"') from error
    backend = CupyBackend(cupy, erf)
    register_backend(cupy.ndarray, backend)
    return backend


def check_device(runtime: ModuleType) -> None:
    """Raise a BackendError unless `cupy.cuda.runtime` sees a GPU and a driver that fits it."""
    try:
        runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        built, driver = runtime.runtimeGetVersion() // 1000, runtime.driverGetVersion() // 1000
        if "cudaErrorNoDevice" in str(error):
            raise BackendError("CUDA sees no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES, or "
                               "use --backend numpy") from error
        if 0 < driver < OLDEST_CUDA:
            raise BackendError(f"the driver supports CUDA {driver}, and CuPy needs {OLDEST_CUDA} "
                               "or newer: update the driver, or use --backend numpy") from error
        if 0 < driver < built:
            raise BackendError(
                f"this CuPy was built for CUDA {built}, but the driver supports CUDA {driver}: pip "
                f'uninstall cupy-cuda{built}x, then pip install "comet-np[cuda{driver}]"'
            ) from error
        raise BackendError(f"there is no usable NVIDIA driver ({error}): install it (on Ubuntu: "
                           "sudo ubuntu-drivers install), or use --backend numpy") from error


class CupyBackend(Backend):
    """CuPy on one NVIDIA GPU, the current device when it is loaded."""

    name = "cupy"
    losses_at_once = 100
    reads_packed_masks = True

    def __init__(self, cupy: ModuleType, erf: Callable[[Array], Array]) -> None:
        self.xp = cupy
        self._erf = erf
        self.kernels = {
            kernel.__name__: kernel
            for kernel in (self.project, self.project_back, self.accumulate_outer,
                           self.accumulate_sum, self.kwta_mask, self.kwta_bits,
                           self.bias_activation_mask, self.bias_activation_mask_gradient,
                           self.check_label_range, self.softmax_cross_entropy,
                           self.softmax_cross_entropy_gradient, self.dropout_factor, self.sgd,
                           self.momentum, self.adam, self.squared_norm)}
        self._compiled: dict[tuple[str, str], Callable[..., None]] = {}
        self._errors = cupy.full(len(ERRORS), NO_ERROR, dtype=np.uint64)
        self._nan_score, self._bad_label = self._errors[:1], self._errors[1:]

    def asarray(self, values: Any, dtype: Any = None) -> Array:
        return self.xp.asarray(values, dtype=dtype)

    def to_host(self, array: Array) -> np.ndarray:
        self.check_errors()
        return self.xp.asnumpy(array)

    def erf(self, a: Array) -> Array:
        return self._erf(a)

    def synchronize(self) -> None:
        self.xp.cuda.get_current_stream().synchronize()
        self.check_errors()

    def check_errors(self) -> None:
        found = self.xp.asnumpy(self._errors)
        for place, message in zip(found, ERRORS, strict=True):
            if place != NO_ERROR:
                self._errors.fill(NO_ERROR)
                row, low = divmod(int(place), 2**32)
                raise BackendError(message.format(row=row, low=np.uint32(low).view(np.int32)))

    def describe(self) -> dict[str, Any]:
        runtime = self.xp.cuda.runtime
        device = runtime.getDeviceProperties(runtime.getDevice())
        return {"backend": self.name, "device": device["name"].decode(),
                "memory": device["totalGlobalMem"], "driver": runtime.driverGetVersion(),
                "cuda": runtime.runtimeGetVersion(), "cupy": self.xp.__version__,
                "numpy": np.__version__}

    def capture(self, work: Callable[[], Any]) -> Callable[[], Any]:
        if os.environ.get("COMET_NP_GRAPHS", "1") == "0":
            return work
        return CapturedWork(self.xp, work)

    def lacks_memory(self, error: Exception) -> bool:
        return (super().lacks_memory(error)  # CuPy's own is a MemoryError
                or "cudaErrorMemoryAllocation" in str(error))

    # --- what every kernel needs ---

    def _launch(self, file: str, kernel: str, grid: tuple[int, ...], block: tuple[int, ...],
                *arguments: Any) -> None:
        """Start a kernel, compiled if this is its first use; CuPy keeps compiled ones on disk.

        Arguments are arrays and NumPy scalars of the very types of the kernel's parameters, since
        CuPy converts nothing.
        """
        compiled = self._compiled.get((file, kernel))
        if compiled is None:
            module = self.xp.RawModule(code=source(file), options=OPTIONS,
                                       name_expressions=(kernel,))
            compiled = self._compiled[file, kernel] = module.get_function(kernel)
        compiled(grid, block, arguments)

    def _check(self, operation: str, *arrays: Array | None, kinds: str = "fd") -> np.dtype:
        """Return the one dtype of `arrays` (None is left out), which must be among `kinds`."""
        present = [array for array in arrays if array is not None]
        if not all(isinstance(array, self.xp.ndarray) for array in present):
            backend_of(*present)  # names what is mixed
        dtypes = {array.dtype for array in present}
        if len(dtypes) > 1 or present[0].dtype.char not in kinds:
            known = ", ".join(str(np.dtype(kind)) for kind in kinds)
            raise BackendError(f"{operation} on CuPy takes arrays of one dtype of {known}, got "
                               f"{', '.join(sorted(map(str, dtypes)))}: cast them with .astype()")
        return present[0].dtype

    def _check_in_place(self, operation: str, *arrays: Array) -> np.dtype:
        """Return the dtype of flat `arrays` that are changed in place or read beside such."""
        dtype = self._check(operation, *arrays)
        if any(not a.flags.c_contiguous or a.shape != arrays[0].shape for a in arrays):
            raise BackendError(f"{operation} on CuPy takes C-contiguous arrays of one shape, got "
                               f"{', '.join(str(a.shape) for a in arrays)}: copy them with "
                               ".copy() before")
        return dtype

    def _check_shape(self, operation: str, array: Array, shape: tuple[int, ...]) -> None:
        if array.shape != shape:
            raise BackendError(f"{operation} on CuPy expected shape {shape}, got {array.shape}")

    def _number(self, value: Any) -> tuple[Any, np.float64]:
        """Return the arguments of `number` in common.cuh: a place on the device, and a value."""
        if isinstance(value, self.xp.ndarray):
            self._check_shape("a number on the device", value, ())
            return value.astype(np.float64, copy=False), np.float64(0)
        return NULL, np.float64(value)

    # --- matrix products, by cuBLAS; routing scores are never TF32, which would flip masks ---

    @functools.cached_property
    def _cublas(self) -> Cublas:
        return Cublas(self.xp)

    def _gemm(self, operation: str, trans_a: bool, trans_b: bool, a: Array, b: Array, c: Array,
              beta: float, tf32: bool) -> None:
        """c = op(a) op(b) + beta c for matrices, or for S of them side by side."""
        self._check(operation, a, b, c, kinds="f" if tf32 else "fd")
        rows, inner = a.shape[-2:][::-1] if trans_a else a.shape[-2:]
        inner_too, columns = b.shape[-2:][::-1] if trans_b else b.shape[-2:]
        S = c.shape[:-2]
        if (inner != inner_too or c.shape[-2:] != (rows, columns) or c.ndim > 3
                or any(m.shape[:-2] not in ((), S) for m in (a, b))):
            raise BackendError(f"{operation}: the shapes {a.shape}, {b.shape} and {c.shape} do not "
                               "fit together")
        if 0 not in (a.size, c.size):  # cuBLAS refuses empty operands
            self._cublas.gemm(trans_a, trans_b, a, b, c, beta, tf32)

    def _product(self, operation: str, trans: bool, x: Array, W: Array, tf32: bool) -> Array:
        """Return x op(W): x (..., K) and a matrix W, or W (S, ., .) and x (B, K) or (S, B, K)."""
        N = W.shape[-2 if trans else -1]
        rows = x.reshape(-1, x.shape[-1]) if W.ndim == 2 else x
        y = self.xp.empty((*W.shape[:-2], rows.shape[-2], N), dtype=x.dtype)
        self._gemm(operation, False, trans, rows, W, y, 0.0, tf32)
        return y.reshape(*x.shape[:-1], N) if W.ndim == 2 else y

    def project(self, x: Array, W: Array, tf32: bool = False) -> Array:
        return self._product("project", True, x, W, tf32)

    def project_back(self, dy: Array, W: Array, tf32: bool = False) -> Array:
        return self._product("project_back", False, dy, W, tf32)

    def accumulate_outer(self, dy: Array, x: Array, dW: Array, tf32: bool = False) -> None:
        if dW.ndim == 2:
            dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        sums = self._sums_of(dW)
        self._gemm("accumulate_outer", True, False, dy, x, sums, 1.0, tf32)
        if sums is not dW:
            dW += sums

    def _sums_of(self, total: Array) -> Array:
        """Return `total` to be added to in place, or zeros if its memory is not contiguous."""
        return total if total.flags.c_contiguous else self.xp.zeros(total.shape, total.dtype)

    # --- masks ---

    def kwta_mask(self, scores: Array, k: int, ties: str = "strict") -> Array:
        return self._cap(scores, k, ties, packed=False)

    def kwta_bits(self, scores: Array, k: int, ties: str = "strict") -> Array:
        return self._cap(scores, k, ties, packed=True)

    def _cap(self, scores: Array, k: int, ties: str, packed: bool) -> Array:
        N = scores.shape[-1] if scores.ndim else 0
        if ties not in TIES or not isinstance(k, Integral) or not 1 <= k <= N:
            OPERATIONS["kwta_mask"].body(scores, k, ties)  # raises what is wrong with them
        T = self._check("kwta_mask", scores).type
        mask = self.xp.empty((*scores.shape[:-1], -(-N // 8) if packed else N),
                             dtype=np.uint8 if packed else bool)
        rows = scores.size // N
        warps, items = cap_shape(N)
        quantile = gap = 0.0
        if k < N:
            quantile = NormalDist().inv_cdf(1 - k / N)
            # 1.6 times the mean distance of scores at the quantile: the second guess shall
            # overshoot, so that the answer lies between the two.
            gap = 1.6 / (N * NormalDist().pdf(quantile))
        if rows:
            self._launch("masks", f"kwta<{CTYPES[scores.dtype.char]}, {warps}, {items}>",
                         (-(-rows // max(1, 4 // warps)),), (max(4, warps) * WARP,),
                         self.xp.ascontiguousarray(scores), NULL if packed else mask,
                         mask if packed else NULL, np.int64(rows), np.int32(N), np.int32(k),
                         np.int32(TIES[ties]), T(quantile), T(gap), self._nan_score)
        return mask

    # --- bias, activation, mask; column sums: of one network, or of S side by side ---

    def _mask_arguments(self, m: Array | None, shape: tuple[int, ...]) -> tuple[Any, ...]:
        """Return a mask, bool or bit-packed or None, its kind, and the bytes from row to row."""
        if m is None:
            return NULL, np.int32(NO_MASK), np.int64(0)
        packed = m.dtype == np.uint8
        expected = (*shape[:-1], -(-shape[-1] // 8)) if packed else shape
        if m.shape != expected or m.dtype not in (bool, np.uint8):
            raise BackendError(f"a mask for activations of shape {shape} is bool of that shape or "
                               f"bit-packed uint8, got {m.dtype} {m.shape}")
        pitch = m.strides[-2] if m.ndim > 1 else m.size
        if not _rows_apart_equally(m):
            m, pitch = self.xp.ascontiguousarray(m), m.shape[-1]
        return m, np.int32(BITS if packed else BYTES), np.int64(pitch)

    def _networks(self, b: Array | None, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return S, and the examples and neurons of each network, from a bias and its layer."""
        S, N = 1 if b is None or b.ndim < 3 else len(b), shape[-1]
        if b is not None:
            self._check_shape("the bias", b, (N,) if b.ndim < 3 else (shape[0], 1, N))
        return S, math.prod(shape[:-1]) // max(S, 1), N

    def bias_activation_mask(self, s: Array, b: Array | None, m: Array | None, f: Any) -> Any:
        if f.name not in ACTIVATIONS:
            return OPERATIONS["bias_activation_mask"].body(s, b, m, f)
        dtype = self._check("bias_activation_mask", s, b)
        S, rows, N = self._networks(b, s.shape)
        s = self.xp.ascontiguousarray(s)
        x = self.xp.empty_like(s)
        a = s if b is None else self.xp.empty_like(s)
        if s.size:
            self._launch("activation", f"forward<{CTYPES[dtype.char]}, f_{f.name}>",
                         *cells(rows, N, S=S), s, NULL if b is None else
                         self.xp.ascontiguousarray(b), *self._mask_arguments(m, s.shape), a, x,
                         np.int64(rows), np.int32(N))
        return a, x

    def bias_activation_mask_gradient(self, dx: Array, a: Array, m: Array | None, f: Any,
                                      db: Array | None) -> Array:
        if f.name not in ACTIVATIONS:
            return OPERATIONS["bias_activation_mask_gradient"].body(dx, a, m, f, db)
        dtype = self._check("bias_activation_mask_gradient", dx, a, db)
        self._check_shape("dx", dx, a.shape)
        S, rows, N = self._networks(db, a.shape)
        da = self.xp.empty(a.shape, dtype=dtype)
        if da.size:
            kernel = f"gradient<{CTYPES[dtype.char]}, f_{f.name}>"
            inputs = (self.xp.ascontiguousarray(dx), self.xp.ascontiguousarray(a),
                      *self._mask_arguments(m, a.shape), da)
            if db is None:
                self._launch("activation", kernel, *cells(rows, N), *inputs, NULL, np.int64(rows),
                             np.int32(N))
            else:
                self._sum_columns(kernel, inputs, (S, rows, N), db)
        return da

    def accumulate_sum(self, dy: Array, db: Array) -> None:
        dtype = self._check("accumulate_sum", dy, db)
        shape = self._networks(db, dy.shape)
        if dy.size:
            self._sum_columns(f"column_sum<{CTYPES[dtype.char]}>",
                              (self.xp.ascontiguousarray(dy),), shape, db)

    def _sum_columns(self, kernel: str, inputs: tuple[Any, ...], shape: tuple[int, int, int],
                     db: Array) -> None:
        """Launch a kernel of activation.cu that adds column sums to db, in a fixed order."""
        S, rows, N = shape
        total = self._sums_of(db)
        grid, block = cells(rows, N, min(SUM_BLOCKS, -(-rows // SUM_ROWS)), S)
        blocks = grid[1]
        sums = self.xp.empty((S, blocks, N), dtype=db.dtype) if blocks > 1 else total
        self._launch("activation", kernel, grid, block, *inputs, sums, np.int64(rows), np.int32(N))
        if blocks > 1:
            self._launch("activation", f"column_sum<{CTYPES[db.dtype.char]}>", (grid[0], 1, S),
                         block, sums, total, np.int64(blocks), np.int32(N))
        if total is not db:
            db += total

    # --- loss ---

    def check_label_range(self, labels: Array, C: int) -> None:
        """Do nothing: `softmax_cross_entropy` notes bad labels on the device."""

    def softmax_cross_entropy(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        dtype = self._check("softmax_cross_entropy", logits)
        self._check_shape("labels", labels, logits.shape[:-1])
        q = self.xp.empty(logits.shape, dtype=dtype)
        losses = self.xp.empty(labels.shape, dtype=dtype)
        self._launch("loss", f"softmax_cross_entropy<{CTYPES[dtype.char]}>",
                     (-(-labels.size // LOSS_ROWS),), (LOSS_ROWS * WARP,),
                     self.xp.ascontiguousarray(logits), self._labels(labels), q, losses,
                     np.int64(labels.size), np.int32(logits.shape[-1]), self._bad_label)
        return losses, q

    def softmax_cross_entropy_gradient(self, q: Array, labels: Array, scale: Any) -> Array:
        dtype = self._check("softmax_cross_entropy_gradient", q)
        self._check_shape("labels", labels, q.shape[:-1])
        dlogits = self.xp.empty(q.shape, dtype=dtype)
        rows, C = labels.size, q.shape[-1]
        self._launch("loss", f"softmax_cross_entropy_gradient<{CTYPES[dtype.char]}>",
                     *cells(rows, C), self.xp.ascontiguousarray(q), self._labels(labels), dlogits,
                     *self._number(scale), np.int64(rows), np.int32(C))
        return dlogits

    def _labels(self, labels: Array) -> Array:
        if labels.dtype.kind not in "iu":
            raise BackendError(f"labels on CuPy are integers, got {labels.dtype}")
        return self.xp.ascontiguousarray(labels, dtype=np.int64)

    # --- dropout ---

    def dropout_factor(self, x: Array, rate: float, key: Any) -> Array:
        dtype = self._check("dropout", x)
        factor = self.xp.empty(x.shape, dtype=dtype)
        if factor.size:
            self._launch("dropout", f"dropout_factor<{CTYPES[dtype.char]}>",
                         (-(-factor.size // (4 * THREADS)),), (THREADS,), factor,
                         np.int64(factor.size), np.uint32(key.k0), np.uint32(key.k1),
                         np.uint64(round(rate * 2**32)), dtype.type(1) / dtype.type(1 - rate))
        return factor

    # --- optimizers ---

    def _launch_flat(self, operation: str, arrays: tuple[Array, ...], *numbers: Any) -> None:
        """Launch a kernel of optimizer.cu; its first parameters are flat arrays and their size."""
        dtype, n = self._check_in_place(operation, *arrays), arrays[0].size
        if n:
            self._launch("optimizer", f"{operation}<{CTYPES[dtype.char]}>", flat_grid(n),
                         (THREADS,), *arrays, np.int64(n), *numbers)

    def sgd(self, p: Array, g: Array, lr: Any, weight_decay: float, scale: Any) -> None:
        self._launch_flat("sgd", (p, g), *self._number(lr), *self._number(scale),
                          p.dtype.type(weight_decay))

    def momentum(self, p: Array, g: Array, v: Array, lr: Any, mu: float, weight_decay: float,
                 scale: Any) -> None:
        T = p.dtype.type
        self._launch_flat("momentum", (p, g, v), *self._number(lr), *self._number(scale), T(mu),
                          T(weight_decay))

    def adam(self, p: Array, g: Array, first: Array, second: Array, step: Any, lr: Any,
             beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool,
             scale: Any) -> None:
        on_device = isinstance(step, self.xp.ndarray)
        if on_device and (step.shape != () or step.dtype != np.int64):
            raise BackendError("the step of adam on CuPy is a Python integer or a 0-d int64 array, "
                               f"got {step.dtype} of shape {step.shape}")
        self._launch_flat("adam", (p, g, first, second), *self._number(lr), *self._number(scale),
                          step if on_device else NULL, np.int64(0 if on_device else step),
                          np.float64(beta1), np.float64(beta2), p.dtype.type(eps),
                          np.float64(weight_decay), np.int32(decoupled))

    def squared_norm(self, g: Array) -> Array:
        dtype = self._check_in_place("squared_norm", g)
        parts = self.xp.empty(flat_grid(g.size), dtype=np.float64)
        self._launch("optimizer", f"squared_norm<{CTYPES[dtype.char]}>", parts.shape, (THREADS,),
                     g, parts, np.int64(g.size))
        return parts.sum()


def source(file: str) -> str:
    """Return the CUDA source of ``kernels/<file>.cu`` with what all kernels share before it."""
    return "".join((KERNELS / name).read_text(encoding="utf-8")
                   for name in ("common.cuh", f"{file}.cu"))


def cap_shape(N: int) -> tuple[int, int]:
    """Return the warps a row and the scores a thread with which `kwta` takes rows of N scores."""
    return next((shape for longest, shape in CAPS.items() if longest >= N), LONG_CAP)


def cells(rows: int, N: int, blocks: int = MOST_GRID_ROWS,
          S: int = 1) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """Return grid and block of WARP x BLOCK_ROWS threads, with at most `blocks` over the rows."""
    return (-(-N // WARP), min(blocks, -(-rows // BLOCK_ROWS)), S), (WARP, BLOCK_ROWS)


def _rows_apart_equally(m: Array) -> bool:
    """Return whether the rows of m (..., N) each lie whole, all equally far from the next."""
    strides = m.strides
    return strides[-1:] == (1,) and all(strides[i] == strides[i + 1] * m.shape[i + 1]
                                        for i in range(m.ndim - 2))


def flat_grid(n: int) -> tuple[int]:
    """Return the grid of a kernel over n elements; a thread takes several if n is large."""
    return (max(1, min(MOST_BLOCKS, -(-n // THREADS))),)
