"""Every kernel against its body: values, masks bit for bit, odd sizes, ties, extremes, errors."""

import inspect

import numpy as np
import pytest

from comet_np.backends import OPERATIONS, BackendError, get_backend, reference
from comet_np.errors import UserError
from comet_np.functional.activations import ACTIVATIONS, activation, masked, scaled
from comet_np.functional.attention import AttentionCache, attention_backward, attention_forward
from comet_np.functional.dropout import dropout_factor, example_mask
from comet_np.functional.hidden import HiddenCache, hidden_backward, hidden_forward
from comet_np.functional.linear import Linear, LinearCache, linear_backward, linear_forward, project
from comet_np.functional.loss import (
    softmax_cross_entropy_backward,
    softmax_cross_entropy_forward,
)
from comet_np.functional.norm import Norm, NormCache, norm_backward, norm_forward
from comet_np.functional.packing import pack_masks
from comet_np.functional.routing import cap, kwta_mask
from comet_np.functional.tokens import (
    TokenCache,
    TokenEmbedding,
    tokens_backward,
    tokens_forward,
)
from comet_np.rng import key, random_bits
from comet_np.samples import (
    SAMPLES,
    alike,
    in_every_layout,
    in_tf32,
    map_arrays,
    outcome,
    samples,
)
from comet_np.tree import leaves

from ..tolerances import TOLERANCES, assert_close, relative_error
from .strict_cupy import stands_for

FLOATS = ("float32", "float64")
KEY = key(0, "test kernels")


def random(*shape, dtype="float32", seed=0, scale=1.0):
    return np.random.default_rng((seed, *shape)).normal(0, scale, shape).astype(dtype)


def compare(gpu, name, arguments):
    """Compare an operation on the GPU with its body on NumPy: its result and changed arguments."""
    ours = outcome(OPERATIONS[name], arguments, lambda a: gpu.asarray(a.copy("K")))
    bodys = outcome(OPERATIONS[name].body, arguments, lambda a: a.copy("K"))
    for mine, theirs in zip(ours, bodys, strict=True):
        mine, theirs = alike(gpu.to_host(mine), theirs)
        assert mine.dtype == theirs.dtype
        if mine.dtype.kind != "f":
            np.testing.assert_array_equal(mine, theirs)
        elif in_tf32(arguments) and not stands_for(gpu):
            assert relative_error(mine, theirs) < 2**-9
        else:
            assert_close(mine, theirs, "sum")


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
            bits = gpu.to_host(cap(on_device, k, rule))
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


def check_nan(gpu, N, column, dtype="float32"):
    scores = random(5, N, dtype=dtype)
    scores[3, column] = scores[4, 1] = np.nan
    kwta_mask(gpu.asarray(scores), 7)
    with pytest.raises(UserError, match=f"score {column} of example 3 is NaN"):
        gpu.check_errors()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("N", "column"), [(33, 32), (500, 131), (1100, 1099), (9300, 9000)])
def test_cap_tells_of_a_nan_when_asked(gpu, N, column, dtype):
    check_nan(gpu, N, column, dtype)
    gpu.check_errors()  # told once


def test_cap_refuses_what_its_body_refuses(gpu):
    scores = gpu.asarray(random(2, 8))
    for wrong in (lambda: kwta_mask(scores, 0), lambda: kwta_mask(scores, 9),
                  lambda: kwta_mask(scores, 3.0),
                  lambda: kwta_mask(scores, 3, "random"), lambda: kwta_mask(scores[0, 0], 1),
                  lambda: cap(scores, 9)):
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


def check_layer(gpu, f, x, mask_kind):
    """Compare a layer whose weight is the identity, so that its input comes through whole."""
    dtype, N = str(x.dtype), x.shape[-1]
    mask, argument = mask_of(mask_kind, x.shape)
    dh, eye = random(*x.shape, dtype=dtype, seed=2), np.eye(N, dtype=dtype)
    for b, seed in ((None, None), (random(N, dtype=dtype, seed=1), 3)):
        def g(seed=seed):
            return Linear(random(N, N, dtype=dtype, seed=9),
                          None if seed is None else random(N, dtype=dtype, seed=seed))

        on_device = map_arrays(gpu.asarray, (x, Linear(eye, b), argument, dh, g()))
        ours = hidden_forward(*on_device[:3], f)
        bodys = hidden_forward.body(x, Linear(eye, b), mask, f)
        assert_close(gpu.to_host(ours[0]), bodys[0], "elementwise")
        assert_close(gpu.to_host(ours[1].a), bodys[1].a, "elementwise")
        _, p, _, dh_there, g_there = on_device
        dx, g_here = hidden_backward(dh_there, ours[1], p, g_there, f), g()
        body = hidden_backward.body(dh, bodys[1], Linear(eye, b), g_here, f)
        assert_close(gpu.to_host(dx), body, "elementwise")
        # The weight is the identity, so that dx is da: what the sums add up, by magnitude.
        added = [np.abs(y).reshape(-1, N) for y in (body, x)]
        summed = [added[0].T @ added[1], added[0].sum(axis=0)]
        for there, here, start, terms in zip(leaves(g_there), leaves(g_here), leaves(g()),
                                             summed, strict=seed is not None):
            assert_close(gpu.to_host(there), here, "sum", np.abs(start) + terms)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(gpu, name, dtype):
    for i, shape in enumerate(SHAPES):
        check_layer(gpu, activation(name), random(*shape, dtype=dtype, scale=3), MASKS[i % 3])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_far_out(gpu, name, dtype):
    tiny = np.finfo(dtype).smallest_normal  # CuPy lets its kernels take smaller ones for 0
    a = np.array([[-1e4, -100, -20, -tiny, -0.0, 0.0, tiny, 20, 100, 1e4]], dtype).repeat(3, 0)
    check_layer(gpu, activation(name), a, None)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_exact_to_its_own_size(gpu, name):
    """Each element for itself: beside f(80) no error of f(-80) would show."""
    a, f = np.linspace(-80, 80, 3201, dtype="float32"), activation(name)
    bits = gpu.asarray(np.packbits(np.ones(a.size, bool)))
    expected = f.forward(a.astype("float64"))
    differences = name.startswith(("gelu", "centred"))  # exact to the rounding of 1
    allowed = TOLERANCES["elementwise"]["float32"] * np.maximum(np.abs(expected), differences)
    assert (np.abs(gpu.to_host(masked(gpu.asarray(a), bits, f)) - expected) <= allowed).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_let_nan_through(gpu, name):
    a, m = gpu.asarray(np.array([[np.nan, 1.0]])), gpu.asarray(np.ones((1, 2), bool))
    assert np.isnan(gpu.to_host(masked(a, m, activation(name)))[0, 0])


def test_activations_without_a_kernel_run_as_they_stand(gpu):
    f = scaled(activation("softplus"), 0.5)
    for kind in MASKS:
        check_layer(gpu, f, random(3, 5), kind)
    x, W = random(3, 7), random(5, 7)
    on_device = gpu.asarray(x), Linear(gpu.asarray(W), None), None, f
    captured = gpu.capture(lambda: hidden_forward(*on_device)[0])
    for _ in range(3):
        assert_close(gpu.to_host(captured()), hidden_forward.body(x, Linear(W, None), None, f)[0],
                     "sum")


def test_masks_whose_rows_lie_otherwise(gpu):
    """Their axes swapped, with gaps within rows and between, and one row for all."""
    xp, f, c = gpu.xp, activation("tanh"), random(2, 3, 40)
    mask = np.broadcast_to(np.arange(40) % 3 > 0, c.shape)
    places = (xp.ones((3, 2, 40), dtype=bool).swapaxes(0, 1),
              xp.ones((2, 3, 80), dtype=bool)[..., ::2], xp.ones((2, 6, 40), dtype=bool)[:, :3])
    for on_device in places:
        on_device[...] = gpu.asarray(mask)
    row = xp.broadcast_to(gpu.asarray(np.arange(40) % 3 > 0), c.shape)
    for on_device in (*places, row):
        ours = masked(gpu.asarray(c), on_device, f)
        assert_close(gpu.to_host(ours), masked.body(c, mask, f), "elementwise")


def test_activations_in_other_layouts(gpu):
    a, mask = random(7, 40), random(7, 40) > 0
    f = activation("tanh")
    ours = masked(gpu.asarray(a.T), gpu.asarray(mask).T, f)
    assert_close(gpu.to_host(ours), np.tanh(a.T) * mask.T, "elementwise")
    for wrong in (mask[:, :39], mask.astype("float32"), np.packbits(mask, axis=-1)[:, :4]):
        with pytest.raises(BackendError, match="a mask for activations"):
            masked(gpu.asarray(a), gpu.asarray(wrong), f)


# --- random masks -------------------------------------------------------------------------------


def check_threshold(gpu):
    """At a rate whose threshold is a drawn number, that one is kept, and no example has it."""
    bits = random_bits(KEY, 40, np.array(3))
    j = int(np.argmin(np.abs(bits.astype("float64") - 2**31)))
    p = int(bits[j]) / 2**32
    factor = gpu.to_host(dropout_factor(gpu.asarray(np.ones(40)), p, KEY, 3))
    np.testing.assert_array_equal(factor > 0, bits >= bits[j])
    mask = gpu.to_host(example_mask(gpu.asarray(np.array([3])), 40, p, KEY))
    np.testing.assert_array_equal(mask[0], bits < bits[j])
    assert factor[j] > 0 and not mask[0, j]


def check_dropout(gpu, dtype="float32"):
    """The numbers are those of NumPy bit for bit, at every step and for every example."""
    x, examples = random(3, 21, dtype=dtype), np.array([5, 2**40, 0, 5])
    for step in (0, 1, 2**40):
        expected = dropout_factor(x, 0.3, KEY, step)
        for here in (step, gpu.asarray(np.array(step))):
            ours = dropout_factor(gpu.asarray(x), 0.3, KEY, here)
            np.testing.assert_array_equal(gpu.to_host(ours), expected)
    for N in (1, 8, 21):
        mask = gpu.to_host(example_mask(gpu.asarray(examples), N, 0.4, KEY))
        np.testing.assert_array_equal(mask, example_mask(examples, N, 0.4, KEY))


@pytest.mark.parametrize("dtype", FLOATS)
def test_random_masks_are_those_of_numpy(gpu, dtype):
    check_dropout(gpu, dtype)


def test_the_number_at_the_threshold(gpu):
    check_threshold(gpu)


# --- the register of operations -----------------------------------------------------------------

SMALL = 10_000  # elements: the stand-in runs a thread for each


def small_samples(name, dtype):
    """Yield the samples that are small, each in one memory layout, all of which have their turn."""
    small = [arguments for arguments in samples(name, dtype) if
             sum(a.size for a in leaves(arguments) if isinstance(a, np.ndarray)) < SMALL]
    for i, arguments in enumerate(small):
        layouts = list(in_every_layout(arguments))
        yield layouts[i % len(layouts)]


def more_samples(name, dtype):
    """Yield arguments for sums over many blocks, and for large logits."""
    if name == "linear_backward":
        p = Linear(random(2, 3, dtype=dtype), random(2, dtype=dtype))
        yield random(4200, 2, dtype=dtype), LinearCache(random(4200, 3, dtype=dtype)), p, p
    if name == "attention_forward":
        yield random(40, 12, dtype=dtype), 2, True, abs(random(2, 40, 40, dtype=dtype))
    if name == "attention_backward":
        cache = AttentionCache(random(2, 40, 12, dtype=dtype), random(2, 2, 40, 40, dtype=dtype),
                               random(2, 2, 40, 40, dtype=dtype, seed=1))
        yield random(2, 40, 4, dtype=dtype), cache, 2
    if name == "squared_norm":
        yield (random(300_000, dtype=dtype),)
    if name == "softmax_cross_entropy":
        yield random(9, 100, dtype=dtype, scale=1e4), np.arange(9, dtype="uint8")
        yield np.where(random(2, 40) > 0, -np.inf, 1).astype(dtype), np.array([-1, -1]), -1, True
    if name == "tokens_backward":
        tokens = np.arange(900).reshape(3, 300) ** 2 % 11
        yield (random(3, 300, 5, dtype=dtype), TokenCache(tokens),
               TokenEmbedding(random(11, 5, dtype=dtype), random(300, 5, dtype=dtype)))
        yield (random(3, 1100, dtype=dtype), TokenCache(np.array([1, 0, 1])),
               TokenEmbedding(random(2, 1100, dtype=dtype), random(4, 1100, dtype=dtype)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", SAMPLES)
def test_kernel_equals_body(gpu, name, dtype):
    for arguments in (*small_samples(name, dtype), *more_samples(name, dtype)):
        compare(gpu, name, arguments)


@pytest.mark.parametrize("name", SAMPLES)
def test_bodies_run_on_cupy(gpu, name):
    with reference():
        for arguments in small_samples(name, "float64"):
            compare(gpu, name, arguments)


def test_every_operation_has_a_kernel_of_its_signature(gpu):
    assert set(gpu.kernels) == set(OPERATIONS)
    for name, kernel in gpu.kernels.items():
        ours, bodys = (inspect.signature(function).parameters.values()
                       for function in (kernel, OPERATIONS[name].body))
        assert [(p.name, p.default) for p in ours][1:] == [(p.name, p.default) for p in bodys]


@pytest.mark.parametrize("dtype", FLOATS)
def test_numbers_from_the_device(gpu, dtype):
    """Learning rate, scale and step may lie on the device, so that a graph sees them change."""
    p, g, u, v = (random(40, dtype=dtype, seed=i) for i in range(4))
    lr, scale, step = (gpu.asarray(value) for value in (0.1, 0.5, 3))
    for name, arrays, host, device in (
            ("shrunk", (p, g), (0.1, 0.5), (lr, scale)),
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
        with pytest.raises(UserError, match=f"label of example 2 is {bad}"):
            gpu.to_host(loss)
        assert np.isnan(gpu.to_host(loss))


def test_bad_token_is_told_when_asked(gpu):
    p = map_arrays(gpu.asarray, TokenEmbedding(random(5, 3), random(4, 3)))
    for bad in (5, -1):
        x, _ = tokens_forward(gpu.asarray(np.array([[0, 1], [bad, 4]])), p)
        with pytest.raises(UserError, match=f"token 2 of the batch is {bad}, which is not in"):
            gpu.to_host(x)
        np.testing.assert_array_equal(np.isnan(gpu.to_host(x)).any(axis=-1), [[0, 0], [1, 0]])


def test_tokens_and_the_loss_in_place_are_the_same_within_a_graph(gpu):
    """With labels that do not count, whose number stays on the device."""
    labels = gpu.asarray(np.array([[0, -100, 2], [-100, 3, 1]]))
    tokens, dx = gpu.asarray(np.array([[0, 1, 1], [4, 1, 0]])), gpu.asarray(random(2, 3, 6))
    p = map_arrays(gpu.asarray, TokenEmbedding(random(5, 6), random(4, 6)))
    g = TokenEmbedding(*(gpu.xp.zeros((*a.shape, 2), dtype="float32")[..., 0] for a in p))

    def work():
        x, cache = tokens_forward(tokens, p, 1)
        tokens_backward(dx, cache, g, 1)
        logits = x * 2
        loss, cache = softmax_cross_entropy_forward(logits, labels, -100, in_place=True)
        assert cache.q is logits
        dlogits = softmax_cross_entropy_backward(1.0, cache)
        assert dlogits is logits
        return loss, dlogits, *g

    captured, results = gpu.capture(work), []
    for _ in ("ordinary", "captured"):
        for total in g:
            total.fill(0)
        results.append([gpu.to_host(a) for a in captured()])
    for ordinary, replayed in zip(*results, strict=True):
        np.testing.assert_array_equal(ordinary, replayed)
        assert np.abs(replayed).max() > 0
    rows = np.abs(results[0][1]).max(axis=-1)
    np.testing.assert_array_equal(rows > 0, gpu.to_host(labels) >= 0)


def test_the_loss_of_labels_that_are_all_ignored_is_told_by_a_nan(gpu):
    logits, labels = gpu.asarray(random(2, 5)), gpu.asarray(np.array([-1, -1]))
    with np.errstate(invalid="ignore", divide="ignore"):  # the stand-in's; a GPU has no warnings
        loss, cache = softmax_cross_entropy_forward(logits, labels, -1)
        dlogits = softmax_cross_entropy_backward(1.0, cache)
    assert np.isnan(gpu.to_host(loss))
    np.testing.assert_array_equal(gpu.to_host(dlogits), 0)


def test_the_loss_in_place_keeps_to_memory_of_any_order(gpu):
    logits, labels = random(4, 3), np.array([0, 1, 2, 0])
    for columns in (gpu.asarray(logits.T.copy()).T, gpu.asarray(logits.repeat(2, 1))[:, ::2]):
        _, cache = softmax_cross_entropy_forward(columns, gpu.asarray(labels), None, True)
        assert softmax_cross_entropy_backward(1.0, cache) is columns
        expected = softmax_cross_entropy_forward(logits, labels)[1]
        assert_close(gpu.to_host(columns), softmax_cross_entropy_backward(1.0, expected), "sum")


def test_norm_and_attention_are_the_same_within_a_graph(gpu):
    """With gradients in memory that is not contiguous, and weights that are dropped."""
    x, dy = (gpu.asarray(random(3, 40, 6, seed=seed)) for seed in range(2))
    qkv, F = gpu.asarray(random(3, 40, 18)), gpu.asarray(abs(random(3, 2, 40, 40)))
    p = map_arrays(gpu.asarray, Norm(random(6, seed=2), random(6, seed=3)))
    g = Norm(*gpu.xp.zeros((6, 2), dtype="float32").T)

    def work():
        y, cache = norm_forward(x, p)
        dx = norm_backward(dy, cache, p, g)
        weighed, of_heads = attention_forward(qkv, 2, True, F)
        return y, dx, *g, weighed, attention_backward(dy, of_heads, 2)

    captured, results = gpu.capture(work), []
    for _ in ("ordinary", "captured"):
        for total in g:
            total.fill(0)
        results.append([gpu.to_host(a) for a in captured()])
    for ordinary, replayed in zip(*results, strict=True):
        np.testing.assert_array_equal(ordinary, replayed)
        assert np.abs(replayed).max() > 0


def test_sums_are_the_same_bit_for_bit(machine):
    gpu = get_backend("cupy")
    dy, cache = gpu.asarray(random(500, 3)), LinearCache(gpu.asarray(random(500, 2)))
    p, sums = Linear(gpu.asarray(random(3, 2)), None), set()
    for machine.seed in range(3):
        g = map_arrays(gpu.asarray, Linear(np.zeros((3, 2), "float32"), np.zeros(3, "float32")))
        linear_backward(dy, cache, p, g)
        sums.add(gpu.to_host(g.bias).tobytes())
    assert len(sums) == 1
    dy, of_norm = gpu.asarray(random(300, 5)), NormCache(
        gpu.asarray(random(300, 5, seed=1)), gpu.asarray(random(300, 1)))
    p, sums = map_arrays(gpu.asarray, Norm(random(5), random(5, seed=1))), set()
    for machine.seed in range(3):
        g = map_arrays(gpu.asarray, Norm(np.zeros(5, "float32"), np.zeros(5, "float32")))
        dx = norm_backward(dy, of_norm, p, g)
        sums.add(b"".join(gpu.to_host(a).tobytes() for a in (dx, *g)))
    assert len(sums) == 1
    dx, tokens, sums = gpu.asarray(random(300, 5)), gpu.asarray(np.arange(300) % 7), set()
    for machine.seed in range(3):
        g = map_arrays(gpu.asarray, TokenEmbedding(np.zeros((7, 5), "f"), np.zeros((300, 5), "f")))
        tokens_backward(dx, TokenCache(tokens), g)
        sums.add(b"".join(gpu.to_host(a).tobytes() for a in g))
    assert len(sums) == 1


def test_shapes_that_the_bodies_refuse_are_refused(gpu):
    x, p = gpu.asarray(random(4, 6)), Linear(gpu.asarray(random(5, 6)), None)
    cache = HiddenCache(x, gpu.asarray(random(4, 5)), None)
    for wrong in (lambda: project(x[:, :5], p.weight), lambda: linear_forward(x[:, :5], p),
                  lambda: hidden_forward(x[:, :5], p, None, activation("tanh")),
                  lambda: linear_backward(x, LinearCache(x), p, p),
                  lambda: hidden_backward(x, cache, p, p, activation("tanh"))):
        with pytest.raises(UserError, match="must have"):
            wrong()
    norm, weights = Norm(x[0], x[1]), gpu.asarray(random(1, 4, 4))
    of_norm = NormCache(x, x[:, :1])
    of_heads = AttentionCache(x, weights, None)
    short = Norm(x[0, :5], x[1, :5])
    for wrong in (lambda: norm_forward(x[:, :5], norm), lambda: norm_forward(x, short),
                  lambda: norm_backward(x[:3], of_norm, norm, norm),
                  lambda: norm_backward(x, of_norm, norm, short),
                  lambda: attention_forward(x, 4), lambda: attention_forward(x, 1, False, x),
                  lambda: attention_backward(x, of_heads, 1)):
        with pytest.raises(UserError, match=r"needs|must (have|be)|added in place"):
            wrong()


def test_wrong_arrays_are_refused(gpu):
    p, wide = gpu.asarray(random(6)), gpu.asarray(random(6, dtype="float64"))
    matrix = gpu.asarray(random(4, 6))
    cache = LinearCache(gpu.asarray(random(4, 2)))
    g = Linear(gpu.asarray(random(6, 2)), p[:5])
    wrong = {
        "one dtype": lambda: OPERATIONS["sgd"](p, wide, 0.1, 0.0, 1.0),
        "arrays of two backends are mixed": lambda: OPERATIONS["momentum"](
            p, p, random(6), 0.1, 0.9, 0.0, 1.0),
        "C-contiguous arrays of one shape": lambda: OPERATIONS["sgd"](p, p[:3], 0.1, 0.0, 1.0),
        r"the bias's gradient on CuPy expected shape \(6,\)": lambda: linear_backward(
            matrix, cache, g, g),
        "do not fit together": lambda: linear_backward(
            matrix, cache, g, Linear(g.weight[:, :1], None)),
        "got float16: cast": lambda: OPERATIONS["project"](
            matrix.astype("float16"), matrix.astype("float16")),
        r"got int32 of shape \(\)": lambda: OPERATIONS["adam"](
            p, p, p, p, gpu.asarray(3, "int32"), 0.1, 0.9, 0.99, 1e-8, 0.0, False, 1.0),
        r"got int64 of shape \(1,\)": lambda: dropout_factor(
            matrix, 0.1, KEY, gpu.asarray(np.array([3]))),
        r"a number on the device on CuPy expected shape \(\), got": lambda: OPERATIONS["sgd"](
            p, p, p, 0.0, 1.0),
    }
    for message, operation in wrong.items():
        with pytest.raises(BackendError, match=message):
            operation()
    with pytest.raises(BackendError, match="C-contiguous"):
        OPERATIONS["sgd"](matrix[:, :3], matrix[:, 3:], 0.1, 0.0, 1.0)
