"""`comet-np check`: gradients against finite differences, kernels against their bodies, here."""

from typing import Any

import numpy as np

from ..backends import OPERATIONS, Backend
from ..functional.activations import ACTIVATIONS
from ..functional.routing import pack_masks
from ..gradcheck import check_model_gradients
from ..rng import key, stream

TOLERANCE = 1e-5  # of float32 after sums of some hundred terms
B, N, N_IN = 65, 301, 129  # odd sizes, past one block of anything


def _samples(backend: Backend) -> dict[str, list[tuple[Any, ...]]]:
    """Return arguments for every operation."""
    draw = stream(0, "check")

    def normal(*shape: int) -> Any:
        return backend.asarray(draw.standard_normal(shape, dtype="float32"))

    def mask() -> Any:
        return backend.asarray(draw.random((B, N)) < 0.5)

    ties = backend.asarray(draw.integers(0, 9, (B, N)).astype("float32"))
    labels = backend.asarray(draw.integers(0, N, B))
    capped = [(scores, k, rule) for scores in (normal(B, N), ties) for k in (1, 150, N)
              for rule in ("strict", "threshold", "index")]
    flat = [normal(10_001) for _ in range(2)]
    second = normal(10_001) ** 2
    activations = list(ACTIVATIONS.values())
    return {
        "project": [(normal(B, N_IN), normal(N, N_IN))],
        "project_back": [(normal(B, N), normal(N, N_IN))],
        "accumulate_outer": [(normal(B, N), normal(B, N_IN), normal(N, N_IN))],
        "accumulate_sum": [(normal(B, N), normal(N))],
        "kwta_mask": capped,
        "kwta_bits": capped,
        "unpack_masks": [(pack_masks([mask(), mask()]), (N, N))],
        "bias_activation_mask": [(normal(B, N), normal(N), mask(), f) for f in activations],
        "bias_activation_mask_gradient": [(normal(B, N), normal(B, N), mask(), f, normal(N))
                                          for f in activations],
        "check_label_range": [(labels, N)],
        "softmax_cross_entropy": [(normal(B, N), labels)],
        "softmax_cross_entropy_gradient": [(normal(B, N), labels, 0.5)],
        "dropout_factor": [(normal(B, N), 0.3, key(0, "check"))],
        "sgd": [(normal(10_001), flat[0], 0.1, 0.01, 0.5)],
        "momentum": [(normal(10_001), flat[0], flat[1], 0.1, 0.9, 0.01, 0.5)],
        "adam": [(normal(10_001), flat[0], flat[1], second, 3, 0.1, 0.9, 0.999, 1e-8, 0.01,
                  decoupled, 0.5) for decoupled in (False, True)],
        "squared_norm": [(normal(10_001),)],
    }


def _difference(name: str, arguments: tuple[Any, ...], backend: Backend) -> float:
    """Return the largest relative difference of a kernel from its body, over all it writes."""
    results = []
    for function in (OPERATIONS[name].body, backend.kernels[name]):
        copies = tuple(a.copy() if hasattr(a, "dtype") else a for a in arguments)
        returned = function(*copies)
        arrays = returned if isinstance(returned, tuple) else (returned,)
        results.append([np.asarray(backend.to_host(a), dtype="float64")
                        for a in (*arrays, *copies) if hasattr(a, "dtype")])
    differences = [0.0]
    for spec, ours in zip(*results, strict=True):
        if spec.shape != ours.shape:
            return np.inf
        differences.append(np.abs(ours - spec).max() / max(np.abs(spec).max(), 1e-30))
    return float(np.max(differences))  # NaN if any is


def run_checks(backend: Backend) -> int:
    """Run all checks, print a line for each, and return 0 if all pass, else 1."""
    failed = 0

    def line(name: str, ok: bool, text: str) -> None:
        nonlocal failed
        failed += not ok
        print(f"{'ok    ' if ok else 'FAILED'}  {name:51}  {text}", flush=True)

    for name, result in check_model_gradients(backend):
        line(f"gradient: {name}", result.ok, result.summary)
    for name, samples in _samples(backend).items():
        if name in backend.kernels:
            worst = float(np.max([_difference(name, arguments, backend) for arguments in samples]))
            line(f"kernel against body: {name}", worst < TOLERANCE,
                 f"relative difference {worst:.1e}")
    print(f"{'all checks passed' if not failed else f'{failed} checks FAILED'} on "
          f"{backend.describe()['device']} ({backend.name})")
    return 1 if failed else 0
