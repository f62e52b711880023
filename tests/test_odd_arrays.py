"""Odd arrays given to what users call: the right result, or one sentence, and nothing lost."""

import re

import numpy as np
import pytest

from comet_np import kwta_mask
from comet_np.backends import OPERATIONS, backend_of, reference
from comet_np.backends.cupy_backend import CupyBackend
from comet_np.backends.numpy_backend import NumpyBackend
from comet_np.errors import UserError
from comet_np.functional.activations import ACTIVATIONS, activation
from comet_np.functional.dropout import dropout_backward, dropout_forward
from comet_np.functional.hidden import hidden_backward, hidden_forward
from comet_np.functional.linear import Linear, linear_backward, linear_forward, project
from comet_np.functional.loss import (
    mean_squared_error_forward,
    softmax_cross_entropy,
    softmax_cross_entropy_backward,
    softmax_cross_entropy_forward,
)
from comet_np.functional.packing import pack_masks, unpack_masks
from comet_np.functional.routing import routing_forward
from comet_np.functional.tokens import TokenEmbedding, tokens_forward
from comet_np.gates import (
    Bernoulli,
    Comet,
    ExampleTied,
    Gate,
    Kept,
    Layerwise,
    Pass,
    TopK,
    keep,
)
from comet_np.models import mlp
from comet_np.optim import OPTIMIZERS, OptimizerConfig, OptimizerState, init_state, update
from comet_np.precision import rounded
from comet_np.rng import key
from comet_np.samples import SAMPLES, alike, map_arrays, outcome, samples
from comet_np.tree import flatten, leaves, zeros_like
from tests.tolerances import assert_close

KEY = key(0, "odd arrays")
modes = pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "bodies"])
operations = pytest.mark.parametrize("name", sorted(SAMPLES))
pytestmark = pytest.mark.usefixtures("bodies_or_kernels")


def refused(message):
    return pytest.raises(UserError, match=message)


def with_one_changed(arguments, change, where=lambda a: True):
    """Yield the arguments once for each array in them that may, which is then another one."""
    arrays = []
    map_arrays(lambda a: arrays.append(a) or a, arguments)
    for odd in filter(where, arrays):
        yield map_arrays(lambda a, odd=odd: change(a) if a is odd else a.copy(), arguments)


def of_its_own(name, dtype="float32"):
    """Return the typical arguments of an operation."""
    return map_arrays(np.copy, next(samples(name, dtype)))


# --- what is no plain array of numbers ----------------------------------------------------------


class Subclass(np.ndarray):
    """An array with a meaning of its own."""


def tensor(a):
    torch = pytest.importorskip("torch")
    return torch.from_numpy(a).requires_grad_(a.dtype.kind == "f")


NO_ARRAYS = {
    "masked": (np.ma.array, r"MaskedArray: convert it with x\.filled\(value\)"),
    "matrix": (lambda a: a.view(np.matrix), r"\.matrix: convert it with numpy\.asarray\(x\)"),
    "subclass": (lambda a: a.view(Subclass), r"\.Subclass: convert it with numpy\.asarray\(x\)"),
    "list": (lambda a: a.tolist(), r"got builtins\.list: convert it with numpy\.asarray\(x\)"),
    "tensor": (tensor, r"got torch\.Tensor: convert it with x\.detach\(\)\.cpu\(\)\.numpy\(\)"),
    "other byte order": (lambda a: a.astype(a.dtype.newbyteorder(">")),
                         r'byte order of this machine, got >[fi]\d .*x\.astype\("(int|float)\d\d"'),
    "objects": (lambda a: a.astype(object), r'of numbers .*got object .* x\.astype\("float32"\)'),
    "strings": (lambda a: a.astype(str), r'of numbers .*got <U\d+ .* x\.astype\("float32"\)'),
    "times": (lambda a: a.astype(int).astype("M8[s]"), r"of numbers .*got datetime64"),
}


def there_is(kind):
    """Return whether an array could be of that kind."""
    return lambda a: not ((kind == "matrix" and a.ndim != 2)
                          or (kind == "other byte order" and a.itemsize == 1))


@modes
@operations
@pytest.mark.parametrize("kind", NO_ARRAYS)
def test_what_is_no_array_of_numbers_is_refused_by_every_operation(kind, name, kernels):
    change, message = NO_ARRAYS[kind]
    for arguments in with_one_changed(of_its_own(name), change, there_is(kind)):
        with refused(message):
            OPERATIONS[name](*arguments)


def test_arguments_given_by_name_are_looked_at_too():
    x, p = np.ones((2, 3)), Linear(np.ones((4, 3)), None)
    with refused(r"got builtins\.list"):
        project(x=x, W=p.weight.tolist())
    with refused(r"got builtins\.list"):
        hidden_forward(x=x, p=p, f=activation("tanh"), mask=[[True] * 4] * 2)


@modes
def test_a_weight_that_is_none(kernels):
    """Only biases and masks may be left out."""
    x, f, p = np.ones((2, 4)), activation("tanh"), Linear(np.ones((3, 4)), None)
    none = Linear(None, np.ones(3))
    y, cache = linear_forward(x, p)
    for call in (lambda: project(x, None), lambda: linear_forward(x, none),
                 lambda: hidden_forward(x, none, None, f),
                 lambda: linear_backward(y, cache, none, zeros_like(p)),
                 lambda: linear_backward(y, cache, p, none)):
        with refused(r"expected a numpy\.ndarray or cupy\.ndarray, got builtins\.NoneType"):
            call()


CONFIG = mlp.MLPConfig((4, 6, 5, 3))
PARAMS, V = mlp.init(CONFIG)
X = np.linspace(-1, 1, 8, dtype="float32").reshape(2, 4)
ENTRIES = {
    "x of an MLP": lambda odd: mlp.forward(odd(X), PARAMS, V, CONFIG),
    "V of an MLP": lambda odd: mlp.forward(X, PARAMS, (odd(V[0]), V[1]), CONFIG),
    "x of a trace": lambda odd: mlp.trace(odd(X), PARAMS, V, CONFIG),
    "x of routing": lambda odd: routing_forward(odd(X), V, 0.5, "strict", activation("identity")),
    "logits": lambda odd: softmax_cross_entropy_forward(odd(X), np.zeros(2, int)),
    "labels": lambda odd: softmax_cross_entropy_forward(X, odd(np.zeros((2,), int))),
    "logits written over": lambda odd: softmax_cross_entropy_forward(
        odd(X.copy()), np.zeros(2, int), in_place=True),
    "tokens": lambda odd: tokens_forward(odd(np.zeros((2,), int)), TokenEmbedding(X, X)),
    "a table of tokens": lambda odd: tokens_forward(np.zeros((2,), int), TokenEmbedding(X, odd(X))),
    "target": lambda odd: mean_squared_error_forward(X, odd(X)),
    "dropout": lambda odd: dropout_forward(odd(X), 0.5, KEY, 0),
    "scores": lambda odd: kwta_mask(odd(X), 2),
    "masks to pack": lambda odd: pack_masks([X > 0, odd(X > 0)]),
    "numbers of examples": lambda odd: Bernoulli().masks(
        X, (), CONFIG, Pass(train=True, example=odd(np.arange(2)))),
    "a tree to flatten": lambda odd: flatten({"W": odd(X)}),
    "parameters to update": lambda odd: update(
        odd(X[0]), X[0].copy(), OptimizerState(0, None, None), 0.1, OptimizerConfig()),
    "gradients to update with": lambda odd: update(
        X[0].copy(), odd(X[0]), OptimizerState(0, None, None), 0.1, OptimizerConfig()),
}


@modes
@pytest.mark.parametrize("kind", ["masked", "subclass", "list", "tensor", "objects",
                                  "other byte order"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_no_array_of_numbers_is_refused_where_users_call(entry, kind, kernels):
    if entry == "masks to pack" and kind == "other byte order":
        return  # bytes have none
    change, message = NO_ARRAYS[kind]
    told = {("V of an MLP", "list"): "widths .* shapes", ("labels", "objects"): "dtype object"}
    with refused(told.get((entry, kind), message)):
        ENTRIES[entry](change)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_what_they_are_no_functions_of(name):
    """Whole numbers would lose what lies between them, in a derivative too."""
    f = activation(name)
    for function in f.forward, f.derivative:
        for odd, message in (([1.0], r"got builtins\.list"), (np.arange(3), "floats, got int64")):
            with refused(message):
                function(odd)


@pytest.mark.parametrize("name", ["numpy", "cupy"])
def test_a_mask_of_numpy_is_not_lost_where_arrays_are_made(name):
    make = {"numpy": NumpyBackend, "cupy": CupyBackend}[name].asarray
    with refused(r"would lose its mask: make it with x\.filled\(value\)"):
        make(None, np.ma.array([1.0, 2.0], mask=[True, False]))


# --- where arrays lie ---------------------------------------------------------------------------


def unaligned(a):
    """Return a copy that begins one byte beside where its numbers should."""
    copy = np.zeros(a.nbytes + 1, "u1")[1:].view(a.dtype).reshape(a.shape)
    copy[...] = a
    return copy


def reversed_in_memory(a):
    return np.flip(np.flip(a).copy())


def one_for_all(a):
    """Return the first element, repeated by a stride of 0."""
    return np.broadcast_to(a.reshape(-1)[:1].reshape((1,) * a.ndim), a.shape)


def read_only(a):
    return np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape)


@pytest.fixture
def mapped(tmp_path):
    """Return a function that puts an array into a file, and maps it in a mode."""
    def map_file(a, mode="r"):
        file = tmp_path / "map"
        a.tofile(file)
        return np.memmap(file, a.dtype, mode, shape=a.shape)

    return map_file


PLACES = {"unaligned": unaligned, "reversed": reversed_in_memory, "one for all": one_for_all,
          "read-only": read_only, "read-only file": None, "file": None}
CANNOT_BE_WRITTEN = ("one for all", "read-only", "read-only file")


@modes
@operations
@pytest.mark.parametrize("place", PLACES)
def test_an_array_may_lie_anywhere_that_its_use_allows(place, name, kernels, mapped):
    change = PLACES[place] or (lambda a: mapped(a, "r" if place == "read-only file" else "r+"))
    written = [index for index, (before, after) in enumerate(zip(
        leaves(of_its_own(name)), outcome_of_arguments(name), strict=True))
        if isinstance(before, np.ndarray) and not np.array_equal(before, after)]
    arrays = [index for index, leaf in enumerate(leaves(of_its_own(name)))
              if isinstance(leaf, np.ndarray)]
    for index, arguments in zip(arrays, with_one_changed(of_its_own(name), change), strict=True):
        copies = map_arrays(np.array, arguments)
        if index in written and place in CANNOT_BE_WRITTEN:
            with refused("read-only"):
                OPERATIONS[name](*arguments)
            for a, b in zip(leaves(arguments), leaves(copies), strict=True):
                assert not isinstance(a, np.ndarray) or np.array_equal(a, b)
            continue
        with reference():
            expected = outcome(OPERATIONS[name].body, copies, np.array)
        for a, b in zip(outcome(OPERATIONS[name], arguments, lambda a: a), expected, strict=True):
            a, b = alike(np.asarray(a), b)
            if a.dtype.kind == "f":
                assert_close(a, b, "sum")
            else:
                np.testing.assert_array_equal(a, b)


def outcome_of_arguments(name):
    """Return the arguments of an operation as it leaves them."""
    arguments = of_its_own(name)
    OPERATIONS[name].body(*arguments)
    return leaves(arguments)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("which", ["p", "first", "g"])
def test_an_update_of_what_cannot_be_written_changes_nothing(which, name):
    config = OptimizerConfig(name, clip_value=0.5) if which == "g" else OptimizerConfig(name)
    p, g = np.ones(3, "float32"), np.ones(3, "float32")
    state = init_state(p, config)
    array = {"p": p, "g": g, "first": state.first}[which]
    if array is None:
        return
    array.flags.writeable = False
    kept = map_arrays(np.copy, (p, g, tuple(state)))
    with refused("read-only"):
        update(p, g, state, 0.1, config)
    for a, b in zip(leaves((p, g, tuple(state))), leaves(kept), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_network_on_a_read_only_file(mapped):
    """As weights of a published model, or a data set that is larger than the memory."""
    expected, _ = mlp.forward(X, PARAMS, V, CONFIG)
    ours, theirs = (mlp.forward(x, PARAMS, V, CONFIG) for x in (mapped(X), X))
    np.testing.assert_array_equal(ours[0], expected)
    grads = zeros_like(PARAMS)
    mlp.backward(np.ones_like(expected), ours[1], PARAMS, grads, CONFIG)
    read_only_params = map_arrays(read_only, PARAMS)
    np.testing.assert_array_equal(mlp.forward(X, read_only_params, V, CONFIG)[0], expected)
    with refused("that of the weight is read-only"):
        mlp.backward(np.ones_like(expected), theirs[1], PARAMS, read_only_params, CONFIG)
    assert backend_of(mapped(X)) is backend_of(X)


# --- nothing, and no axes -----------------------------------------------------------------------

GATES = {"none": None, "Comet": Comet(), "Layerwise": Layerwise(), "TopK": TopK(),
         "TopK of the activation": TopK(of="activation"), "Bernoulli": Bernoulli(),
         "ExampleTied": ExampleTied(), "Kept": Kept()}


def no_examples(gate, shape, place=np.asarray, dropout=0.0):
    """Run a network, its backward pass included, on no examples, and check that nothing comes."""
    config = mlp.MLPConfig((4, 6, 9, 3), gate=gate, dropout=dropout)
    at = Pass(train=True, step=0, example=place(np.zeros(shape[0], int)))
    params, fixed = mlp.init(config)
    if isinstance(gate, Kept):
        fixed = np.zeros((5, *shape[1:-1], 3), "uint8")
    x = place(np.zeros(shape, "float32"))
    params, fixed = map_arrays(place, (params, fixed))
    a_L, cache = mlp.forward(x, params, fixed, config, at=at)
    assert a_L.shape == (*shape[:-1], 3)
    assert [m if m is None else m.shape for m in cache.masks] in (
        [None, None], [(*shape[:-1], N) for N in (6, 9)])
    grads = map_arrays(lambda a: a + 1, zeros_like(params))
    dx = mlp.backward(a_L, cache, params, grads, config)
    assert dx.shape == shape
    return grads


@modes
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(0, 4), (0, 2, 4), (5, 0, 4)])
@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_no_examples_have_no_outputs_and_add_nothing(gate, shape, dropout, kernels):
    for g in leaves(no_examples(gate, shape, dropout=dropout)):
        np.testing.assert_array_equal(g, 1)


@modes
def test_the_loss_of_no_examples(kernels):
    logits, labels = np.zeros((0, 3)), np.zeros(0, int)
    losses, q = softmax_cross_entropy(logits, labels)
    assert losses.shape == (0,) and q.shape == (0, 3)
    with refused("mean loss of no examples is undefined"):
        softmax_cross_entropy_forward(logits, labels)
    with refused("mean loss of no examples is undefined"):
        mean_squared_error_forward(logits, logits)
    for shape in (), (2, 0):
        with refused(re.escape(f"(..., C) with at least one class, got {shape}")):
            softmax_cross_entropy_forward(np.zeros(shape), np.zeros(shape[:-1], int))
        with refused(re.escape(f"(..., C) with at least one class, got {shape}")):
            softmax_cross_entropy(np.zeros(shape), np.zeros(shape[:-1], int))


@modes
def test_layers_of_no_features_or_no_axes(kernels):
    f, grad = activation("tanh"), np.ones(2)
    for W in np.ones((0, 4)), np.ones((3, 0)), np.ones(4), np.ones((2, 3, 4)), np.ones(()):
        x, p = np.ones((2, W.shape[-1] if W.ndim else 1)), Linear(W, None)
        for layer in (lambda x=x, W=W: project(x, W), lambda x=x, p=p: linear_forward(x, p),
                      lambda x=x, p=p: hidden_forward(x, p, None, f)):
            with refused(re.escape(f"shape (N_out, N_in), both at least 1, got {W.shape}")):
                layer()
    p = Linear(np.ones((3, 4)), None)
    for x in np.ones(()), np.ones((2, 0)):
        for layer in (lambda x=x: project(x, p.weight), lambda x=x: linear_forward(x, p),
                      lambda x=x: hidden_forward(x, p, None, f)):
            with refused(re.escape(f"x must have shape (..., 4) for a weight of shape (3, 4), got "
                                   f"{x.shape}")):
                layer()
    for b in np.ones(()), np.ones(1), np.ones((1, 3)):
        for layer in (lambda b=b: linear_forward(np.ones((2, 4)), Linear(p.weight, b)),
                      lambda b=b: hidden_forward(np.ones((2, 4)), Linear(p.weight, b), None, f)):
            with refused(re.escape(f"the bias must have shape (3,) for a weight of shape (3, 4), "
                                   f"got {b.shape}")):
                layer()
    with refused("must have shape"):
        mlp.forward(grad[0], PARAMS, V, CONFIG)


@modes
def test_caps_dropout_and_bits_of_nothing(kernels):
    with refused(r"between 1 and N = 0 .*shape \(5, 0\)"):
        kwta_mask(np.zeros((5, 0)), 1)
    assert kwta_mask(np.zeros((0, 7)), 3).shape == (0, 7)
    for shape in (), (0,), (3, 0), (0, 3):
        y, cache = dropout_forward(np.ones(shape), 0.5, KEY, 0)
        assert y.shape == dropout_backward(y, cache).shape == shape
        if shape:
            bits = pack_masks([np.ones(shape, bool), np.ones((*shape[:-1], 9), bool)])
            widths = (shape[-1], 9)
            assert [m.shape for m in unpack_masks(bits, widths)] == [
                (*shape[:-1], N) for N in widths]
    with refused(r"bool arrays \(\.\.\., N_l\) .*got bool \(\)"):
        pack_masks([np.ones((), bool)])
    with refused("no masks to pack"):
        pack_masks([])


# --- labels, masks, examples --------------------------------------------------------------------


@modes
@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint16", "int32", "int64", "uint64"])
def test_labels_of_every_integer_dtype(dtype, kernels, draw):
    logits, labels = draw.standard_normal((5, 3)), np.array([0, 2, 1, 1, 0])
    loss, cache = softmax_cross_entropy_forward(logits, labels.astype(dtype))
    expected, expected_cache = softmax_cross_entropy_forward(logits, labels)
    assert loss == expected
    np.testing.assert_array_equal(softmax_cross_entropy_backward(1.0, cache),
                                  softmax_cross_entropy_backward(1.0, expected_cache))
    top = np.iinfo(dtype).max
    with refused(rf"labels must lie in 0\.\.2 for 3 classes, got 0\.\.{top}"):
        softmax_cross_entropy_forward(logits, np.array([0, 1, 2, 0, top], dtype))
    if dtype.startswith("int"):
        with refused(r"labels must lie in 0\.\.2 for 3 classes, got -128\.\.2"):
            softmax_cross_entropy_forward(logits, np.array([0, 1, 2, 0, -128], dtype))


@modes
@pytest.mark.parametrize("labels", [np.zeros(5), np.zeros(5, bool), np.zeros(5, complex)])
def test_labels_of_other_dtypes(labels, kernels):
    for loss in softmax_cross_entropy_forward, softmax_cross_entropy:
        with refused(f"must be integer class indices, got dtype {labels.dtype}"):
            loss(np.zeros((5, 3)), labels)


M = np.arange(12).reshape(2, 6) % 3 > 0
BAD_MASKS = {
    "floats": (M.astype("float32"), r"float32 \(2, 6\)"),
    "whole numbers": (M.astype(int), r"int64 \(2, 6\)"),
    "one for all": (M[0], r"bool \(6,\)"),
    "no axes": (np.array(True), r"bool \(\)"),
    "unpacked bytes": (M.astype("uint8"), r"uint8 \(2, 6\)"),
    "list": (M.tolist(), r"builtins\.list"),
    "masked": (np.ma.array(M), r"MaskedArray"),
    "subclass": (M.view(Subclass), r"\.Subclass"),
}


class Given(Gate):
    """A gate whose mask is a function, which gives what it was given."""

    def __init__(self, mask):
        self.mask = mask

    def masks(self, x, fixed, config, at):
        return (lambda x, a: self.mask, None)


@modes
@pytest.mark.parametrize(("mask", "message"), BAD_MASKS.values(), ids=BAD_MASKS)
def test_masks_that_are_none(mask, message, kernels):
    f = activation("tanh")
    with refused(f"(masks must be bool arrays|expected a numpy.ndarray) .* got .*{message}"):
        mlp.forward(X, PARAMS, V, CONFIG, (mask, None))
    with refused(message):
        mlp.forward(X, PARAMS, (), mlp.MLPConfig(CONFIG.widths, gate=Given(mask)))
    with refused(message):
        hidden_forward(X, PARAMS[0], mask, f)
    with refused(message):
        OPERATIONS["masked"](X @ PARAMS[0].weight.T, mask, f)


def test_masks_that_are_not_one_for_each_layer():
    for masks, got in ((M, r"must be a tuple .*, got bool \(2, 6\)"), ((), r"got \[\]")):
        with refused(got):
            mlp.forward(X, PARAMS, V, CONFIG, masks)
    with refused(r"of the same examples.*got bool \(2, 6\), bool \(6,\)"):
        pack_masks([M, M[0]])
    with refused(r"got float64 \(2, 6\)"):
        pack_masks([M.astype(float)])


@modes
@pytest.mark.parametrize("rows", [2, 500])
def test_bits_of_other_widths(rows, kernels):
    for bits, got in ((np.zeros((rows, 3), "uint8"), rf"uint8 \({rows}, 3\)"),
                      (np.zeros((rows, 2), bool), rf"bool \({rows}, 2\)"),
                      (np.array(0, "uint8"), r"uint8 \(\)")):
        with refused(rf"widths \(6, 5\) are packed as uint8 \(\.\.\., 2\), got {got}"):
            unpack_masks(bits, (6, 5))


BITS = pack_masks([M, M[:, :5]])
NUMBERS = {
    "too large": (np.array([0, 2]), r"masks of 2 examples were kept, numbers 0 to 1: got 2"),
    "negative": (np.array([0, -1]), "numbers of examples count from 0, got -1"),
    "floats": (np.array([0.0, 1.0]), "numbers of examples are integers, got dtype float64"),
    "flags": (np.array([True, False]), "numbers of examples are integers, got dtype bool"),
    "too few": (np.array([0]), r"the number of each example, shape \(2,\), got \(1,\)"),
    "list": ([0, 1], r"got builtins\.list"),
}


@modes
@pytest.mark.parametrize("gate", [Kept(), Bernoulli(), ExampleTied()], ids=str)
@pytest.mark.parametrize(("numbers", "message"), NUMBERS.values(), ids=NUMBERS)
def test_numbers_of_examples_that_cannot_be(numbers, message, gate, kernels):
    config = mlp.MLPConfig(CONFIG.widths, gate=gate)
    at = Pass(train=True, example=numbers)
    fixed = BITS if isinstance(gate, Kept) else ()
    if "were kept" in message and not isinstance(gate, Kept):
        mlp.forward(X, PARAMS, fixed, config, at=at)  # these draw for every number
        return
    with refused(message):
        mlp.forward(X, PARAMS, fixed, config, at=at)


def test_bits_that_are_none():
    config = mlp.MLPConfig(CONFIG.widths, gate=Kept())
    at = Pass(example=np.arange(2))
    for bits, got in ((BITS.astype(int), r"int64 \(2, 2\)"), (BITS[0], r"uint8 \(2,\)"),
                      (BITS.view(Subclass), "Subclass"), (BITS.tolist(), r"builtins\.list")):
        with refused(rf"got .*{got}"):
            mlp.forward(X, PARAMS, bits, config, at=at)


def test_nothing_to_keep():
    with refused("there are no inputs whose masks could be kept"):
        keep(Comet(), [], V, CONFIG)
    with refused("the gate Bernoulli gives no masks in evaluation"):
        keep(Bernoulli(), [(X, Pass())], (), CONFIG)


def test_fixed_weights_without_a_gate_are_not_ignored():
    config = mlp.MLPConfig(CONFIG.widths, gate=None)
    expected, _ = mlp.forward(X, PARAMS, (), config)
    np.testing.assert_array_equal(mlp.forward(X, PARAMS, None, config)[0], expected)
    for fixed in V, V[0], list(V):
        for run in mlp.forward, mlp.trace:
            with refused(r"without a gate has no fixed weights, expected \(\): got some"):
                run(X, PARAMS, fixed, config)


def test_a_step_of_dropout_that_counts_nothing():
    for step in -1, 1.5, np.array([1]), np.array(1.0), None:
        with refused("the step of dropout is an integer of at least 0"):
            dropout_forward(X, 0.5, KEY, step)
    for step in 1, np.int64(1), np.array(1):
        dropout_forward(X, 0.5, KEY, step)


# --- dtypes -------------------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("dtype", ["float64", "float16", "longdouble", "int64", "bool",
                                   "complex64"])
@pytest.mark.parametrize("which", ["x", "weight", "bias", "V"])
def test_a_network_of_several_dtypes_computes_by_numpys_rules_or_is_refused(which, dtype, kernels):
    x, params, fixed = X, PARAMS, V
    if which == "x":
        x = X.astype(dtype)
    elif which == "V":
        fixed = tuple(v.astype(dtype) for v in V)
    else:
        params = (PARAMS[0]._replace(**{which: getattr(PARAMS[0], which).astype(dtype)}),
                  *PARAMS[1:])
    try:
        a_L, cache = mlp.forward(x, params, fixed, CONFIG)
    except UserError:
        assert kernels or dtype in ("int64", "bool")
        return
    assert not kernels
    wide = map_arrays(lambda a: a.astype("complex128" if a.dtype.kind == "c" else "float64"),
                      (x, params))
    expected, _ = mlp.forward(*wide, (), CONFIG, cache.masks)
    np.testing.assert_allclose(a_L, expected, rtol=0, atol=1e-2)


@modes
@pytest.mark.parametrize("backward", [linear_backward, hidden_backward])
@pytest.mark.parametrize("field", Linear._fields)
def test_gradients_that_would_lose_what_is_added_are_refused(field, backward, kernels):
    p, f = PARAMS[0], (activation("tanh"),) * (backward is hidden_backward)
    _, cache = hidden_forward(X, p, None, *f) if f else linear_forward(X, p)
    dy = np.ones((2, 6), "float32")
    whole = zeros_like(p)._replace(**{field: np.zeros(getattr(p, field).shape, int)})
    with refused("got float32, int64|float32 cannot be added into the .*, of int64"):
        backward(dy, cache, p, whole, *f)
    for shape in (), (1,), (2, *getattr(p, field).shape):
        g = zeros_like(p)._replace(**{field: np.zeros(shape, "float32")})
        with refused(f"the gradient of the {field} must have its shape, "):
            backward(dy, cache, p, g, *f)
    with refused(r"gradients for each of the 3 layers, .*got 2"):
        mlp.backward(dy, None, PARAMS, zeros_like(PARAMS)[:2], CONFIG)


@modes
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_of_arrays_that_do_not_fit_together(name, kernels):
    config = OptimizerConfig(name)

    def one(dtype="float32", shape=(3,)):
        return np.ones(shape, dtype)

    for p, g in ((one(), one("float64")), (one("float64"), one()), (one(int), one(int)),
                 (one("complex64"), one("complex64")), (one(), one(shape=(1,))),
                 (one(shape=(3, 1)), one(shape=(3, 1))), (one(shape=()), one(shape=()))):
        kept = p.copy()
        with refused("flat arrays of one shape and one dtype of floats.*got "):
            update(p, g, init_state(p, config), 0.1, config)
        np.testing.assert_array_equal(p, kept)
    state = init_state(one(), config)
    other = OptimizerConfig("sgd" if name == "adam" else "adam")
    with refused(f"the optimizer {other.name} has a state of .*make it with init_state"):
        update(one(), one(), OptimizerState(0, one(), None), 0.1, other)
    if state.first is not None:
        with refused("flat arrays of one shape"):
            update(one(), one(), state._replace(first=one(shape=(1,))), 0.1, config)


@modes
def test_losses_of_whole_numbers_would_lose_what_lies_between(kernels):
    for dtype in int, "uint8", bool:
        with refused("float"):
            softmax_cross_entropy_forward(X.astype(dtype), np.zeros(2, int))
    for dtype in int, "uint8":
        with refused(f"a loss is taken of floats, got {np.dtype(dtype)}"):
            mean_squared_error_forward(X.astype(dtype), X.astype(dtype))
    target = np.array([[0, 1, 2, 3]] * 2, "uint8")
    loss, cache = mean_squared_error_forward(X, target)
    assert_close(loss, ((X - target) ** 2).mean(), "sum")
    assert (cache.e < 0).any()


@pytest.mark.parametrize("compute", ["tf32", "float16"])
def test_only_floats_are_rounded(compute):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    with refused(r'got bfloat16 \(2, 4\): convert it with x\.astype\("float32"\)'):
        project(X.astype(bfloat16), PARAMS[0].weight)
    for dtype in int, bool, complex:
        with refused(f"in the format {compute} takes arrays of floats, got {np.dtype(dtype)}"):
            rounded(X.astype(dtype), compute)
