"""Every kernel against its body: values, masks bit for bit, odd sizes, ties, extremes, errors."""

import numpy as np
import pytest

from comet_np import optim  # noqa: F401 (registers its operations)
from comet_np.backends import OPERATIONS, BackendError, get_backend, reference
from comet_np.errors import UserError
from comet_np.functional.activations import (
    ACTIVATIONS,
    activation,
    bias_activation_mask,
    bias_activation_mask_gradient,
)
from comet_np.functional.dropout import dropout_factor  # noqa: F401 (registered)
from comet_np.functional.linear import accumulate_sum
from comet_np.functional.loss import softmax_cross_entropy_forward
from comet_np.functional.routing import kwta_bits, kwta_mask, pack_masks

from ..samples import SAMPLES, samples
from ..tolerances import assert_close

FLOATS = ("float32", "float64")


def random(*shape, dtype="float32", seed=0, scale=1.0):
    return np.random.default_rng((seed, *shape)).normal(0, scale, shape).astype(dtype)


def compare(gpu, operation, arguments):
    """Compare an operation on the GPU with its body on NumPy: its result and changed arguments."""
    on_device = [gpu.asarray(a.copy("K")) if isinstance(a, np.ndarray) else a for a in arguments]
    on_host = [a.copy("K") if isinstance(a, np.ndarray) else a for a in arguments]
    result, expected = OPERATIONS[operation](*on_device), OPERATIONS[operation].body(*on_host)
    for ours, bodys in zip(arrays(result, on_device), arrays(expected, on_host), strict=True):
        ours = gpu.to_host(ours)
        assert ours.dtype == bodys.dtype
        if ours.dtype.kind == "f":
            assert_close(ours, bodys, "sum")
        else:
            np.testing.assert_array_equal(ours, bodys)


def arrays(result, arguments):
    """Return the arrays among the result, which may be a tuple, and the arguments."""
    results = result if isinstance(result, tuple) else (result,)
    return [value for value in (*results, *arguments) if hasattr(value, "dtype")]


# --- the cap ------------------------------------------------------------------------------------


def awkward_rows(N, dtype):
    """Return rows of N scores that a cap may get wrong."""
    rng = np.random.default_rng(N)
    normal = rng.normal(size=N)
    tiny = np.finfo(dtype).smallest_subnormal
    rows = [normal, np.round(normal), np.zeros(N), np.full(N, -np.inf), np.maximum(normal, 0),
            np.where(rng.random(N) < 0.5, 0.0, -0.0), rng.integers(-3, 4, N) * float(tiny),
            np.where(rng.random(N) < 0.3, rng.choice([-np.inf, np.inf], N), normal),
            1e30 * normal, np.exp(3 * normal), -np.arange(N), np.where(np.arange(N), 1.0, 1e9)]
    return np.array(rows).astype(dtype)


def check_cap(gpu, scores, ks, ties=("strict", "threshold", "index")):
    on_device = gpu.asarray(scores)
    for k in ks:
        for rule in ties:
            expected = kwta_mask.body(scores, k, rule)
            ours = gpu.to_host(kwta_mask(on_device, k, rule))
            np.testing.assert_array_equal(ours, expected, f"N = {scores.shape[-1]}, {k = }, {rule}")
            bits = gpu.to_host(kwta_bits(on_device, k, rule))
            packed = pack_masks((expected.reshape(-1, scores.shape[-1]),))
            np.testing.assert_array_equal(bits, packed.reshape(bits.shape))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("N", [1, 2, 3, 9, 31, 33])
def test_cap_for_every_k(gpu, N, dtype):
    check_cap(gpu, awkward_rows(N, dtype), range(1, N + 1))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("N", [128, 250, 500, 1000, 1500, 2047, 3000, 4096, 6001, 9216, 9217])
def test_cap_of_every_size(gpu, N, dtype):
    rows = awkward_rows(N, dtype)
    check_cap(gpu, rows[:2], [1, N // 2], ["index"])
    check_cap(gpu, rows[[0, 4]], [N // 10], ["strict", "threshold"])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("N", [1030, 9300])
def test_cap_of_awkward_rows_of_several_warps(gpu, N, dtype):
    check_cap(gpu, awkward_rows(N, dtype), [N // 2], ["index"])
    check_cap(gpu, awkward_rows(N, dtype)[:1], [N - 1, N], ["strict"])


def test_cap_in_any_order_of_threads(machine):
    gpu = get_backend("cupy")
    scores = awkward_rows(1100, "float32")[:3]
    for machine.seed in range(2, 7):
        check_cap(gpu, scores, [500], ["index"])


def test_cap_of_other_shapes_and_layouts(gpu):
    scores = random(2, 3, 40)
    check_cap(gpu, scores, [13])
    check_cap(gpu, scores.transpose(2, 0, 1), [1])
    check_cap(gpu, scores[0, 0], [13])
    assert kwta_mask(gpu.asarray(scores[:0]), 5).shape == (0, 3, 40)


def test_cap_tells_of_a_nan_when_asked(gpu):
    scores = random(5, 33)
    scores[3, 32] = scores[4, 1] = np.nan
    kwta_mask(gpu.asarray(scores), 7)
    with pytest.raises(BackendError, match="score 32 of example 3 is NaN"):
        gpu.check_errors()
    gpu.check_errors()  # told once


def test_cap_refuses_what_its_body_refuses(gpu):
    scores = gpu.asarray(random(2, 8))
    for wrong in (lambda: kwta_mask(scores, 0), lambda: kwta_mask(scores, 9),
                  lambda: kwta_mask(scores, 3.0),
                  lambda: kwta_mask(scores, 3, "random"), lambda: kwta_mask(scores[0, 0], 1),
                  lambda: kwta_bits(scores, 9)):
        with pytest.raises(UserError):
            wrong()
    with pytest.raises(BackendError, match="float16: cast"):
        kwta_mask(scores.astype("float16"), 3)


# --- bias, activation, mask ---------------------------------------------------------------------

SHAPES = [(1, 4), (3, 5), (2, 3, 33), (70, 64), (40, 1)]
MASKS = [None, "bool", "bits"]


def mask_of(kind, shape):
    """Return a random mask, and the argument that stands for it."""
    if kind is None:
        return None, None
    mask = np.random.default_rng(shape).random(shape) < 0.5
    packed = np.packbits(mask, axis=-1)
    return mask, packed if kind == "bits" else mask


def check_layer(gpu, name, a, mask_kind):
    dtype, f = str(a.dtype), activation(name)
    mask, argument = mask_of(mask_kind, a.shape)
    b, dx = random(a.shape[-1], dtype=dtype, seed=1), random(*a.shape, dtype=dtype, seed=2)
    db = random(a.shape[-1], dtype=dtype, seed=3)
    device = {n: None if v is None else gpu.asarray(v)
              for n, v in {"a": a, "m": argument, "b": b, "dx": dx, "db": db.copy()}.items()}
    for bias in (None, "b"):
        ours = bias_activation_mask(device["a"], device.get(bias), device["m"], f)
        bodys = bias_activation_mask.body(a, {"b": b}.get(bias), mask, f)
        for mine, yours in zip(ours, bodys, strict=True):
            assert_close(gpu.to_host(mine), yours, "elementwise")
    ours = bias_activation_mask_gradient(device["dx"], device["a"], device["m"], f, device["db"])
    body = bias_activation_mask_gradient.body(dx, a, mask, f, db)
    assert_close(gpu.to_host(ours), body, "elementwise")
    assert_close(gpu.to_host(device["db"]), db, "sum")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(gpu, name, dtype):
    for i, shape in enumerate(SHAPES):
        check_layer(gpu, name, random(*shape, dtype=dtype, scale=3), MASKS[i % 3])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_far_out(gpu, name, dtype):
    tiny = np.finfo(dtype).smallest_normal  # CuPy lets its kernels take smaller ones for 0
    a = np.array([[-1e4, -100, -20, -tiny, -0.0, 0.0, tiny, 20, 100, 1e4]], dtype).repeat(3, 0)
    check_layer(gpu, name, a, None)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_let_nan_through(gpu, name):
    a = gpu.asarray(np.array([[np.nan, 1.0]]))
    f = activation(name)
    assert np.isnan(gpu.to_host(bias_activation_mask(a, None, None, f)[1])[0, 0])


def test_activations_without_a_kernel_run_their_body(gpu):
    check_layer(gpu, "0.5*softplus", random(3, 5), "bool")


def test_masks_whose_rows_lie_otherwise(gpu):
    """Of networks with one example each: their axes swapped, with gaps within rows and between."""
    xp, f, s, b = gpu.xp, activation("tanh"), random(2, 1, 40), random(2, 1, 40, seed=1)
    mask = np.broadcast_to(np.arange(40) % 3 > 0, (2, 1, 40))
    for on_device in (xp.ones((1, 2, 40), dtype=bool).swapaxes(0, 1),
                      xp.ones((2, 1, 80), dtype=bool)[..., ::2],
                      xp.ones((2, 2, 40), dtype=bool)[:, :1]):
        on_device[...] = gpu.asarray(mask)
        ours = bias_activation_mask(gpu.asarray(s), gpu.asarray(b), on_device, f)[1]
        assert_close(gpu.to_host(ours), bias_activation_mask.body(s, b, mask, f)[1], "elementwise")


def test_activations_in_other_layouts(gpu):
    a, mask = random(7, 40), random(7, 40) > 0
    f = activation("tanh")
    ours = bias_activation_mask(gpu.asarray(a.T), None, gpu.asarray(mask).T, f)[1]
    assert_close(gpu.to_host(ours), np.tanh(a.T) * mask.T, "elementwise")
    for wrong in (mask[:, :39], mask.astype("float32"), np.packbits(mask, axis=-1)[:, :4]):
        with pytest.raises(BackendError, match="a mask for activations"):
            bias_activation_mask(gpu.asarray(a), None, gpu.asarray(wrong), f)


# --- the register of operations -----------------------------------------------------------------

SMALL = 10_000  # elements: the stand-in runs a thread for each


def more_samples(name, dtype):
    """Yield arguments for sums over many blocks, and for large logits."""
    if name == "accumulate_sum":
        yield random(4200, 2, dtype=dtype), random(2, dtype=dtype)
    if name == "squared_norm":
        yield (random(300_000, dtype=dtype),)
    if name == "softmax_cross_entropy":
        yield random(9, 100, dtype=dtype, scale=1e4), np.arange(9, dtype="uint8")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", SAMPLES)
def test_kernel_equals_body(gpu, name, dtype):
    small = [arguments for arguments in samples(name, dtype)
             if sum(a.size for a in arguments if isinstance(a, np.ndarray)) < SMALL]
    for arguments in [*small[::1 + len(small) // 200], *more_samples(name, dtype)]:
        compare(gpu, name, arguments)


@pytest.mark.parametrize("name", SAMPLES)
def test_bodies_run_on_cupy(gpu, name):
    small = [arguments for arguments in samples(name, "float64")
             if sum(a.size for a in arguments if isinstance(a, np.ndarray)) < SMALL]
    with reference():
        for arguments in small[::1 + len(small) // 50]:
            compare(gpu, name, arguments)


def test_every_operation_has_a_kernel(gpu):
    # Training reads bit-packed masks, and the body is one call of cupy a layer.
    assert set(gpu.kernels) == set(OPERATIONS) - {"unpack_masks"}


@pytest.mark.parametrize("dtype", FLOATS)
def test_numbers_from_the_device(gpu, dtype):
    """Learning rate, scale and step may lie on the device, so that a graph sees them change."""
    p, g, u, v = (random(40, dtype=dtype, seed=i) for i in range(4))
    lr, scale, step = (gpu.asarray(value) for value in (0.1, 0.5, 3))
    for name, arrays, host, device in (
            ("sgd", (p, g), (0.1, 0.01, 0.5), (lr, 0.01, scale)),
            ("momentum", (p, g, u), (0.1, 0.9, 0.01, 0.5), (lr, 0.9, 0.01, scale)),
            ("adam", (p, g, u, v * v), (3, 0.1, 0.9, 0.99, 1e-8, 0.01, True, 0.5),
             (step, lr, 0.9, 0.99, 1e-8, 0.01, True, scale))):
        results = []
        for numbers in (host, device):
            copies = [gpu.asarray(a.copy()) for a in arrays]
            OPERATIONS[name](*copies, *numbers)
            results.append([gpu.to_host(a) for a in copies])
        np.testing.assert_array_equal(*results)
    q, labels = gpu.asarray(random(3, 4, dtype=dtype)), gpu.asarray(np.array([0, 3, 1]))
    gradient = OPERATIONS["softmax_cross_entropy_gradient"]
    np.testing.assert_array_equal(gpu.to_host(gradient(q, labels, 0.5)),
                                  gpu.to_host(gradient(q, labels, scale)))


def test_bad_label_is_told_when_asked(gpu):
    logits = gpu.asarray(random(4, 3))
    for bad in (3, -1):
        labels = np.array([0, 1, bad, 2])
        loss = softmax_cross_entropy_forward(logits, gpu.asarray(labels))[0]
        with pytest.raises(BackendError, match=f"label of example 2 is {bad}"):
            gpu.to_host(loss)
        assert np.isnan(gpu.to_host(loss))


def test_sums_are_the_same_bit_for_bit(machine):
    gpu = get_backend("cupy")
    dy, sums = gpu.asarray(random(500, 3)), set()
    for machine.seed in range(3):
        db = gpu.asarray(np.zeros(3, "float32"))
        accumulate_sum(dy, db)
        sums.add(gpu.to_host(db).tobytes())
    assert len(sums) == 1


def test_wrong_arrays_are_refused(gpu):
    p, wide = gpu.asarray(random(6)), gpu.asarray(random(6, dtype="float64"))
    matrix = gpu.asarray(random(4, 6))
    wrong = {
        "one dtype": lambda: OPERATIONS["sgd"](p, wide, 0.1, 0.0, 1.0),
        "two backends": lambda: OPERATIONS["momentum"](p, p, random(6), 0.1, 0.9, 0.0, 1.0),
        "C-contiguous arrays of one shape": lambda: OPERATIONS["sgd"](p, p[:3], 0.1, 0.0, 1.0),
        "expected shape": lambda: accumulate_sum(matrix, p[:5]),
        "do not fit together": lambda: OPERATIONS["project"](matrix, matrix.T),
        "float32, float64, got float16": lambda: OPERATIONS["project"](
            matrix.astype("float16"), matrix.astype("float16")),
        r"got int32 of shape \(\)": lambda: OPERATIONS["adam"](
            p, p, p, p, gpu.asarray(3, "int32"), 0.1, 0.9, 0.99, 1e-8, 0.0, False, 1.0),
        r"a number on the device on CuPy expected shape \(\), got": lambda: OPERATIONS["sgd"](
            p, p, p, 0.0, 1.0),
        "labels on CuPy are integers, got float32": lambda: OPERATIONS["softmax_cross_entropy"](
            matrix, matrix[:, 0]),
    }
    for message, operation in wrong.items():
        with pytest.raises(BackendError, match=message):
            operation()
    with pytest.raises(BackendError, match="C-contiguous"):
        OPERATIONS["sgd"](matrix[:, :3], matrix[:, 3:], 0.1, 0.0, 1.0)
