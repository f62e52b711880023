"""Odd arrays on the GPU: no work is launched for nothing, and what is no array there is refused."""

import re

import numpy as np
import pytest

from comet_np.backends import OPERATIONS, BackendError, get_backend
from comet_np.errors import UserError
from comet_np.functional.activations import activation
from comet_np.functional.hidden import hidden_forward
from comet_np.functional.linear import Linear, linear_forward, project
from comet_np.functional.loss import softmax_cross_entropy
from comet_np.functional.packing import pack_masks, unpack_masks
from comet_np.gates import Kept, Pass
from comet_np.models import mlp
from comet_np.samples import map_arrays, samples
from comet_np.tree import leaves

from ..test_odd_arrays import GATES, no_examples
from ..tolerances import assert_close


@pytest.mark.parametrize("shape", [(0, 4), (5, 0, 4)])
@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_no_examples_have_no_outputs_and_add_nothing(gpu, gate, shape):
    for g in leaves(no_examples(gate, shape, gpu.asarray, dropout=0.5)):
        np.testing.assert_array_equal(gpu.to_host(g), 1)


def test_losses_of_nothing(gpu):
    logits, labels = gpu.xp.zeros((0, 3)), gpu.xp.zeros(0, dtype="int64")
    losses, q = softmax_cross_entropy(logits, labels)
    assert (losses.shape, q.shape) == ((0,), (0, 3))
    assert OPERATIONS["softmax_cross_entropy_gradient"](q, labels, 1.0).shape == (0, 3)
    assert gpu.to_host(OPERATIONS["squared_norm"](labels.astype("float32"))) == 0
    with pytest.raises(UserError, match=re.escape("at least one class, got (2, 0)")):
        softmax_cross_entropy(gpu.xp.zeros((2, 0)), gpu.xp.zeros(2, dtype="int64"))


def test_layers_and_labels_that_do_not_fit_are_refused_as_on_the_cpu(gpu):
    x, W, f = gpu.xp.ones((2, 4)), gpu.xp.ones((3, 4)), activation("tanh")
    wrong = {
        "both at least 1, got (3, 0)": lambda: project(x[:, :0], W[:, :0]),
        "both at least 1, got (4,)": lambda: linear_forward(x, Linear(W[0], None)),
        "the bias must have shape (3,)": lambda: linear_forward(x, Linear(W, W[0, 0])),
        "the bias must have shape (3,) ": lambda: hidden_forward(x, Linear(W, W[:1, 0]), None, f),
        "integer class indices, got dtype float64": lambda: softmax_cross_entropy(x, x[:, 0]),
        "less the class axis, (2,), got (1,)": lambda: softmax_cross_entropy(
            x, gpu.xp.zeros(1, dtype="int64")),
        "packed as uint8 (..., 1), got uint8 (2, 2)": lambda: unpack_masks(
            gpu.xp.zeros((2, 2), dtype="uint8"), (3,)),
    }
    for message, operation in wrong.items():
        with pytest.raises(UserError, match=re.escape(message)):
            operation()


@pytest.mark.parametrize("name", OPERATIONS)
def test_arrays_of_the_host_are_refused_by_every_operation(gpu, name):
    arguments, arrays = next(samples(name, "float32")), []
    map_arrays(lambda a: arrays.append(a) or a, arguments)
    for host in arrays[1:]:  # of the first the backend follows
        for odd, message in ((host, r"two backends are mixed \(cupy and numpy\)"),
                             (host.tolist(), r"got builtins\.list")):
            mixed = map_arrays(lambda a, host=host, odd=odd: odd if a is host else gpu.asarray(a),
                               arguments)
            with pytest.raises(BackendError, match=message):
                OPERATIONS[name](*mixed)


def test_a_mask_of_the_host_is_refused_wherever_it_comes_from(gpu):
    x, p = gpu.xp.ones((2, 4)), Linear(gpu.xp.ones((3, 4)), None)
    for mask in np.ones((2, 3), bool), [[True] * 3] * 2:
        for given in mask, lambda x, a, mask=mask: mask:
            with pytest.raises(BackendError):
                hidden_forward(x, p, given, activation("tanh"))


def test_kept_masks_are_read_modulo_the_number_of_examples_without_waiting(machine):
    gpu = get_backend("cupy")
    config = mlp.MLPConfig((4, 6, 3), gate=Kept())
    params, _ = mlp.init(config, backend=gpu)
    bits = gpu.asarray(pack_masks([np.arange(12).reshape(2, 6) % 5 > 2]))
    x, numbers = gpu.xp.ones((2, 4), dtype="float32"), gpu.asarray(np.array([0, -1]))
    expected, _ = mlp.forward(x, params, bits, config, at=Pass(example=gpu.asarray(np.arange(2))))
    with machine.no_waiting():
        a_L, _ = mlp.forward(x, params, bits, config, at=Pass(example=numbers))
    assert_close(gpu.to_host(a_L), gpu.to_host(expected), "sum")
