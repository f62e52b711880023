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
from comet_np.functional.activations import ACTIVATIONS, activation
from comet_np.functional.linear import Linear
from comet_np.precision import rounded
from comet_np.samples import SAMPLES, alike, in_every_layout, map_arrays, outcome, samples
from comet_np.tree import leaves, zeros_like
from tests.tolerances import TOLERANCES, assert_close

PACKAGE = Path(comet_np.__file__).parent
for module in pkgutil.walk_packages([str(PACKAGE)], "comet_np."):
    importlib.import_module(module.name)  # so that every operation is registered
KERNELS = get_backend("numpy").kernels


def copy(a):
    """Return a copy of an array in its own memory layout, gaps and all."""
    base = a if a.base is None else a.base
    offset = a.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    return np.ndarray(a.shape, a.dtype, base.copy(order="K"), offset, a.strides)


def assert_same(name, kernel, arguments):
    """Assert that a kernel returns and writes what the body of the operation `name` does."""
    body = OPERATIONS[name].body
    ours, spec = (outcome(function, arguments, copy)
                  for function in (lambda *given: kernel(body, *given), body))
    assert len(ours) == len(spec)
    for a, b in zip(ours, spec, strict=True):
        a, b = alike(a, b)
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
        for laid_out in in_every_layout(arguments):
            assert_same(name, KERNELS[name], laid_out)


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_kernel_has_the_signature_of_its_body(name):
    kernel, body = (inspect.signature(f).parameters for f in (KERNELS[name], OPERATIONS[name].body))
    assert [(p.name, p.kind, p.default) for p in kernel.values()][1:] == [
        (p.name, p.kind, p.default) for p in body.values()]


def with_floats(name, *dtypes):
    """Return sample arguments whose float arrays have these dtypes, in turn; and how many."""
    arguments, given = next(samples(name, "float64")), list(dtypes)

    def cast(a):
        return a.astype(given.pop(0) if len(given) > 1 else given[0]) if a.dtype.kind == "f" else a

    floats = [a for a in leaves(arguments) if isinstance(a, np.ndarray) and a.dtype.kind == "f"]
    return map_arrays(cast, arguments), len(floats)


def call(name, arguments):
    return KERNELS[name](OPERATIONS[name].body, *arguments)


OF_FLOATS = [name for name in sorted(KERNELS) if with_floats(name, "float32")[1]]
OF_SEVERAL = [name for name in OF_FLOATS if with_floats(name, "float32")[1] > 1]


@pytest.mark.parametrize("name", OF_FLOATS)
def test_kernel_refuses_float16(name):
    with pytest.raises(BackendError, match=r"float32.* got float16|got float16.*cast"):
        call(name, with_floats(name, "float16")[0])


@pytest.mark.parametrize("name", OF_SEVERAL)
def test_kernel_refuses_mixed_dtypes(name):
    with pytest.raises(BackendError, match=r"one dtype.*got float(32|64).* float(64|32)"):
        call(name, with_floats(name, "float64", "float32")[0])


# Their kernels are exact to the rounding of 1 only, as is the body of gelu and as differences are.
ROUNDED_AT_1 = {"sigmoid", "gelu", "gelu_new", "centred_sigmoid", "centred_softplus"}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_exact_to_its_own_size(name):
    """Each element for itself: beside f(80) no error of f(-80) would show."""
    f, a = activation(name), np.linspace(-80, 80, 3201, dtype="float32")
    p = Linear(np.eye(a.size, dtype="float32"), a)  # a comes in as the bias
    h, _ = call("hidden_forward", (np.zeros((1, a.size), "float32"), p, None, f))
    expected = f.forward(a.astype("float64"))
    tolerance = TOLERANCES["elementwise"]["float32"]
    allowed = tolerance * np.maximum(np.abs(expected), name in ROUNDED_AT_1)
    assert (np.abs(h[0] - expected) <= allowed).all()


@pytest.mark.parametrize("compute", ["tf32", "float16", "bfloat16"])
def test_products_in_a_format_are_those_of_rounded_operands(compute):
    if compute == "bfloat16":
        pytest.importorskip("ml_dtypes")
    x, p, compute = next(given for given in samples("linear_forward", "float32")
                         if given[-1] == compute)
    y, _ = call("linear_forward", (x, p, compute))
    exact = rounded(x, compute).astype("d") @ rounded(p.weight, compute).T.astype("d") + p.bias
    assert_close(y, exact, "sum")
    assert np.abs(y - (x.astype("d") @ p.weight.T.astype("d") + p.bias)).max() > 1e-4


def mutant(change):
    """Return a wrong kernel: the body, whose arguments or results `change` spoils."""
    return lambda body, *arguments: change(body, *arguments)


def update_first(body, dy, cache, p, g, *rest):
    """Add the gradient before dx is taken, which matters where `g` is `p`."""
    body(dy, cache, p, g, *rest[:-1], False)
    return body(dy, cache, p, zeros_like(g), *rest)


def firsts(tokens):
    """Return whether each token is the first of its kind."""
    first = np.zeros(tokens.size, bool)
    first[np.unique(tokens, return_index=True)[1]] = True
    return first.reshape(tokens.shape)


MUTANTS = {
    "project, transposed": ("project", lambda body, x, W: body(x, W[::-1])),
    "shrunk, magnitudes": ("shrunk", lambda body, out, p, decay, penalty: body(
        out, np.abs(p), decay, penalty)),
    "linear_forward without bias": ("linear_forward", lambda body, x, p, compute: body(
        x, p._replace(bias=None), compute)),
    "linear_forward in whole numbers": ("linear_forward", lambda body, x, p, compute: body(x, p)),
    "linear_backward, dW overwritten": (
        "linear_backward", lambda body, dy, cache, p, g, *rest: (
            g is p or g.weight.fill(0), body(dy, cache, p, g, *rest))[1]),
    "linear_backward, db a mean": ("linear_backward", lambda body, dy, cache, p, g, *rest: body(
        dy, cache, p, g if g.bias is None else g._replace(bias=g.bias / max(1, len(dy))), *rest)),
    "linear_backward, dW before dx": ("linear_backward", update_first),
    "linear_backward, always dx": ("linear_backward", lambda body, *given: body(*given[:5], None)),
    "hidden_forward without mask": ("hidden_forward", lambda body, x, p, mask, *rest: body(
        x, p, None, *rest)),
    "hidden_forward without bias": ("hidden_forward", lambda body, x, p, *rest: body(
        x, p._replace(bias=None), *rest)),
    "hidden_forward in whole numbers": ("hidden_forward", lambda body, *given: body(*given[:-1])),
    "hidden_backward without mask": ("hidden_backward", lambda body, dh, cache, *rest: body(
        dh, cache._replace(m=None), *rest)),
    "hidden_backward without db": ("hidden_backward", lambda body, dh, cache, p, g, *rest: body(
        dh, cache, p, g._replace(bias=None), *rest)),
    "hidden_backward, dW before dx": ("hidden_backward", update_first),
    "kwta_mask, >= in strict": ("kwta_mask", lambda body, c, k, ties: body(
        c, k, "threshold" if ties == "strict" else ties)),
    "kwta_mask, index takes all ties": ("kwta_mask", lambda body, c, k, ties: body(
        c, k, "threshold" if ties == "index" else ties)),
    "kwta_mask, k + 1": ("kwta_mask", lambda body, c, k, ties: body(
        c, min(k + 1, c.shape[-1]), ties)),
    "unpack_masks, lowest bit first": ("unpack_masks", lambda body, bits, widths: body(
        np.packbits(np.unpackbits(bits, bitorder="little")).reshape(bits.shape), widths)),
    "norm_forward with the unbiased variance": ("norm_forward", lambda body, x, p, eps: body(
        x, p, eps + x.var(axis=-1, keepdims=True) / max(1, x.shape[-1] - 1))),
    "norm_forward without eps": ("norm_forward", lambda body, x, p, eps: body(x, p, 0.0)),
    "norm_forward without bias": ("norm_forward", lambda body, x, p, eps: body(
        x, p._replace(bias=0 * p.bias), eps)),
    "norm_backward, means left out": ("norm_backward", lambda body, dy, cache, p, g: (
        body(dy, cache, p, g), dy * p.gain * cache.inverse)[1]),
    "norm_backward, dgain before dx": ("norm_backward", lambda body, dy, cache, p, g: (
        body(dy, cache, p, g), body(dy, cache, p, zeros_like(g)))[1]),
    "norm_backward, gradients overwritten": ("norm_backward", lambda body, dy, cache, p, g: (
        g is p or [total.fill(0) for total in g], body(dy, cache, p, g))[1]),
    "attention_forward never causal": ("attention_forward", lambda body, qkv, heads, causal, *rest:
                                       body(qkv, heads, False, *rest)),
    "attention_forward without dropout": ("attention_forward", lambda body, *given: body(
        *given[:3], None, given[4])),
    "attention_forward in whole numbers": ("attention_forward", lambda body, *given: body(
        *given[:4])),
    "attention_forward, heads taken for one": ("attention_forward", lambda body, qkv, heads, *rest:
                                               body(qkv, 1, rest[0])),
    "attention_backward without dropout": ("attention_backward", lambda body, dy, cache, *rest:
                                           body(dy, cache._replace(factor=None), *rest)),
    "attention_backward in whole numbers": ("attention_backward", lambda body, *given: body(
        *given[:3])),
    "attention_backward, keys as queries": ("attention_backward", lambda body, dy, cache, *rest:
                                            body(dy, cache._replace(qkv=np.roll(
                                                cache.qkv, cache.qkv.shape[-1] // 3, -1)), *rest)),
    "tokens_backward, a token that comes again forgotten": (
        "tokens_backward", lambda body, dx, cache, g, first: body(
            dx * firsts(cache.tokens)[..., None], cache, g, first)),
    "tokens_backward, always from the first position": (
        "tokens_backward", lambda body, dx, cache, g, first: body(dx, cache, g)),
    "tokens_backward, gradients overwritten": (
        "tokens_backward", lambda body, dx, cache, g, first: (
            [total.fill(0) for total in g], body(dx, cache, g, first))[1]),
    "loss summed": ("softmax_cross_entropy", lambda body, a, labels, *rest: (
        body(a, labels, *rest)[0] * labels.size, body(a, labels, *rest)[1])),
    "loss of ignored labels": ("softmax_cross_entropy", lambda body, a, labels, ignored, *rest:
                               body(a, labels % a.shape[-1], None, *rest)),
    "loss never in place": ("softmax_cross_entropy", lambda body, *given: body(*given[:3], False)),
    "gradient of the loss without the labels": (
        "softmax_cross_entropy_gradient", lambda body, q, labels, scale, *rest: scale * q),
    "gradient of ignored labels": (
        "softmax_cross_entropy_gradient", lambda body, q, labels, scale, ignored, *rest:
        body(q, labels % q.shape[-1], scale, None, *rest)),
    "gradient of the loss never in place": (
        "softmax_cross_entropy_gradient", lambda body, *given: body(*given[:4], False)),
    "dropout of the same elements at each step": (
        "dropout_factor", lambda body, x, rate, key, step: body(x, rate, key, 0)),
    "dropout unscaled": ("dropout_factor", lambda body, *given: (body(*given) > 0).astype(
        given[0].dtype)),
    "one mask for all examples": ("example_mask", lambda body, example, *rest: body(
        0 * example, *rest)),
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
                assert_same(name, mutant(change), arguments)


def test_reference_turns_kernels_off(monkeypatch):
    monkeypatch.setitem(KERNELS, "kwta_mask", lambda body, scores, k, ties="strict": "kernel")
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
               "backends.get_backend('numpy').kernels['kwta_mask'] = lambda body, c, k: 'kernel'\n"
               "print('kernel' if isinstance(kwta_mask(np.ones(3), 1), str) else 'body')")
    printed = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, text=True,
                             check=True, env={**os.environ, "COMET_NP_REFERENCE": value},
                             capture_output=True)
    assert printed.stdout.strip() == used
