"""The register of operations: each NumPy kernel against its body, the specification."""

import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import comet_np
from comet_np.backends import OPERATIONS, BackendError, get_backend, reference
from tests.samples import SAMPLES, samples
from tests.tolerances import assert_close

PACKAGE = Path(comet_np.__file__).parent
for module in pkgutil.walk_packages([str(PACKAGE)], "comet_np."):
    importlib.import_module(module.name)  # so that every operation is registered
KERNELS = get_backend("numpy").kernels


def copies(arguments):
    """Return the arguments with every array copied in its own memory layout."""
    result = []
    for a in arguments:
        if isinstance(a, np.ndarray):
            base = a if a.base is None else a.base
            memory = base.copy(order="K")
            offset = a.__array_interface__["data"][0] - base.__array_interface__["data"][0]
            a = np.ndarray(a.shape, a.dtype, memory, offset, a.strides)
        result.append(a)
    return result


def arrays_of(returned, arguments):
    """Return all that an operation wrote: what it returned, and its arguments afterwards."""
    returned = returned if isinstance(returned, tuple) else (returned,)
    return [np.asarray(a) for a in (*returned, *arguments)
            if isinstance(a, np.ndarray | np.generic)]


def assert_same(name, kernel, arguments):
    """Assert that a kernel returns and writes what the body of the operation `name` does."""
    for_kernel, for_body = copies(arguments), copies(arguments)
    ours = arrays_of(kernel(*for_kernel), for_kernel)
    spec = arrays_of(OPERATIONS[name].body(*for_body), for_body)
    assert len(ours) == len(spec)
    for a, b in zip(ours, spec, strict=True):
        assert a.dtype == b.dtype
        if a.dtype.kind == "f":
            assert_close(a, b, "sum")
        else:
            assert a.shape == b.shape
            np.testing.assert_array_equal(a, b)


def test_every_operation_has_samples():
    assert set(SAMPLES) == set(OPERATIONS)
    assert set(KERNELS) <= set(OPERATIONS)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_kernel_agrees_with_its_body(name, dtype):
    for arguments in samples(name, dtype):
        assert_same(name, KERNELS[name], arguments)


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_kernel_has_the_signature_of_its_body(name):
    kernel, body = (inspect.signature(f).parameters for f in (KERNELS[name], OPERATIONS[name].body))
    assert [(p.name, p.kind, p.default) for p in kernel.values()] == [
        (p.name, p.kind, p.default) for p in body.values()]


def with_floats(name, *dtypes):
    """Return sample arguments whose float arrays have these dtypes, in turn."""
    arguments = list(next(iter(samples(name, "float64"))))
    floats = [i for i, a in enumerate(arguments)
              if isinstance(a, np.ndarray) and a.dtype.kind == "f"]
    for number, i in enumerate(floats):
        arguments[i] = arguments[i].astype(dtypes[min(number, len(dtypes) - 1)])
    return arguments, len(floats)


OF_FLOATS = [name for name in sorted(KERNELS) if with_floats(name, "float32")[1]]
OF_SEVERAL = [name for name in OF_FLOATS if with_floats(name, "float32")[1] > 1]


@pytest.mark.parametrize("name", OF_FLOATS)
def test_kernel_refuses_float16(name):
    with pytest.raises(BackendError, match=r"float32.* got float16|got float16.*cast"):
        KERNELS[name](*with_floats(name, "float16")[0])


@pytest.mark.parametrize("name", OF_SEVERAL)
def test_kernel_refuses_mixed_dtypes(name):
    with pytest.raises(BackendError, match=r"one dtype.*got float(32|64).* float(64|32)"):
        KERNELS[name](*with_floats(name, "float64", "float32")[0])


def mutant(name, change):
    """Return a wrong kernel: the body, whose arguments or results `change` spoils."""
    body = OPERATIONS[name].body

    def wrong(*arguments):
        return change(body, *arguments)

    return wrong


MUTANTS = {
    "project, transposed": ("project", lambda body, x, W: body(x, W[::-1])),
    "project_back, float32": ("project_back", lambda body, dy, W: body(
        dy.astype("f"), W.astype("f")).astype(dy.dtype)),
    "accumulate_outer, overwrites": ("accumulate_outer", lambda body, dy, x, dW: (
        dW.fill(0), body(dy, x, dW))[1]),
    "accumulate_sum, mean": ("accumulate_sum", lambda body, dy, db: body(
        dy / max(1, len(dy)), db)),
    "kwta_mask, >= in strict": ("kwta_mask", lambda body, c, k, ties: body(
        c, k, "threshold" if ties == "strict" else ties)),
    "kwta_mask, index takes all ties": ("kwta_mask", lambda body, c, k, ties: body(
        c, k, "threshold" if ties == "index" else ties)),
    "kwta_mask, k + 1": ("kwta_mask", lambda body, c, k, ties: body(
        c, min(k + 1, c.shape[-1]), ties)),
    "unpack_masks, lowest bit first": ("unpack_masks", lambda body, bits, widths: body(
        np.packbits(np.unpackbits(bits, bitorder="little")).reshape(bits.shape), widths)),
    "activation without mask": ("bias_activation_mask", lambda body, s, b, m, f: body(
        s, b, None, f)),
    "gradient without mask": ("bias_activation_mask_gradient", lambda body, dx, a, m, f, db: body(
        dx, a, None, f, db)),
    "gradient without db": ("bias_activation_mask_gradient", lambda body, dx, a, m, f, db: body(
        dx, a, m, f, None)),
    "loss summed": ("softmax_cross_entropy", lambda body, a, labels: (
        body(a, labels)[0] * labels.size, body(a, labels)[1])),
    "sgd without weight decay": ("sgd", lambda body, p, g, lr, decay, scale: body(
        p, g, lr, 0, scale)),
    "momentum restarted": ("momentum", lambda body, p, g, v, *rest: body(p, g, 0 * v, *rest)),
    "adam without bias correction": ("adam", lambda body, p, g, u, v, step, *rest: body(
        p, g, u, v, 10**6, *rest)),
    "adamw coupled": ("adam", lambda body, *arguments: body(*arguments[:-2], False, arguments[-1])),
    "squared_norm in the dtype of g": ("squared_norm", lambda body, g: (g * g).sum()),
}


def test_every_kernel_has_a_mutant():
    assert {name for name, _ in MUTANTS.values()} == set(KERNELS)


@pytest.mark.parametrize(("name", "change"), MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(name, change):
    with pytest.raises(AssertionError):
        for dtype in ("float32", "float64"):
            for arguments in samples(name, dtype):
                assert_same(name, mutant(name, change), arguments)


def test_reference_turns_kernels_off(monkeypatch):
    monkeypatch.setitem(KERNELS, "kwta_mask", lambda scores, k, ties="strict": "kernel")
    scores = np.array([1.0, 2.0, 3.0])
    assert comet_np.kwta_mask(scores, 1) == "kernel"
    with reference():
        with reference():
            pass
        np.testing.assert_array_equal(comet_np.kwta_mask(scores, 1), [False, False, True])
    assert comet_np.kwta_mask(scores, 1) == "kernel"


@pytest.mark.parametrize(("value", "used"), [("1", "body"), ("0", "kernel"), ("", "kernel")])
def test_the_environment_turns_kernels_off(value, used):
    program = ("import numpy as np; from comet_np import kwta_mask, backends\n"
               "backends.get_backend('numpy').kernels['kwta_mask'] = lambda c, k: 'kernel'\n"
               "print('kernel' if isinstance(kwta_mask(np.ones(3), 1), str) else 'body')")
    printed = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, text=True,
                             check=True, env={**os.environ, "COMET_NP_REFERENCE": value},
                             capture_output=True)
    assert printed.stdout.strip() == used
