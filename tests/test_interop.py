"""Against PyTorch in float64: the published network, built from scratch, one step and trained."""

import functools
import itertools
import math
import re
from collections import namedtuple
from dataclasses import dataclass, replace

import numpy as np
import pytest

from comet_np import interop
from comet_np.backends import BackendError
from comet_np.errors import UserError
from comet_np.functional.activations import ACTIVATIONS, activation
from comet_np.functional.loss import (
    mean_squared_error_backward,
    mean_squared_error_forward,
    softmax_cross_entropy_backward,
    softmax_cross_entropy_forward,
)
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
from comet_np.models.mlp import MLPConfig
from comet_np.optim import OPTIMIZERS, OptimizerConfig, init_state, update
from comet_np.rng import uniform
from comet_np.schedules import SCHEDULES, schedule
from comet_np.tree import flatten, leaves
from tests.tolerances import assert_close

torch = pytest.importorskip("torch", reason="PyTorch, the crosscheck extra, is not installed")
F = torch.nn.functional
torch.set_num_threads(1)  # its idle threads spin, and would slow down ours

TORCH_ACTIVATIONS = {
    "identity": lambda a: a, "relu": F.relu, "leaky_relu": functools.partial(
        F.leaky_relu, negative_slope=0.1), "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    # By default PyTorch takes log(1 + exp(a)) for a from 20 on, which is 2e-9 off.
    "softplus": functools.partial(F.softplus, threshold=40),
    "silu": F.silu, "gelu": F.gelu, "gelu_new": functools.partial(F.gelu, approximate="tanh"),
    "elu": F.elu, "selu": F.selu, "mish": F.mish,
    "centred_sigmoid": lambda a: torch.sigmoid(a) - 0.5,
    "centred_softplus": lambda a: F.softplus(a, threshold=40) - math.log(2),
}


class Published(torch.nn.Module):
    """The published COMET MLP: fc1..fcL trainable, spec_1..spec_{L-1} fixed and without bias."""

    def __init__(self, config):
        super().__init__()
        self.config, self.L = config, len(config.widths) - 1
        for layer in range(1, self.L + 1):
            shape = config.widths[layer - 1], config.widths[layer]
            setattr(self, f"fc{layer}", torch.nn.Linear(*shape, bias=config.bias))
            if config.gate is not None and layer < self.L:
                spec = torch.nn.Linear(*shape, bias=False)
                spec.weight.requires_grad_(False)
                setattr(self, f"spec_{layer}", spec)

    def forward(self, x):
        f = TORCH_ACTIVATIONS[self.config.activation]
        z, self.masks = x, []
        for layer in range(1, self.L):
            a = getattr(self, f"fc{layer}")(x)
            if self.config.gate is None:
                x = f(a)
                continue
            c = getattr(self, f"spec_{layer}")(z)
            k = max(1, int(self.config.gate.p_k * c.shape[-1]))
            m = c >= torch.topk(c, k).values[..., -1:]
            self.masks.append(m)
            z, x = m * c, m * f(a)
        return getattr(self, f"fc{self.L}")(x)


def published(config, seed=0):
    """Return the network in float64, and its arrays by name."""
    torch.manual_seed(seed)
    network = Published(config).double()
    return network, {name: p.detach().numpy().copy() for name, p in network.named_parameters()}


def gradients(network):
    """Return the gradients of all trainable parameters by name, as arrays."""
    return {name: p.grad.numpy() for name, p in network.named_parameters() if p.requires_grad}


PUBLISHED = Comet(ties="threshold")
NETWORK = MLPConfig((12, 20, 15, 17, 5), gate=PUBLISHED)
CONFIGS = [
    replace(NETWORK, gate=None),
    *(replace(NETWORK, gate=replace(PUBLISHED, p_k=p_k)) for p_k in (0.05, 0.1, 0.5, 0.9, 1.0)),
    *(replace(NETWORK, activation=name) for name in ACTIVATIONS),
    replace(NETWORK, bias=False),
    *(replace(NETWORK, widths=(12, *[18] * hidden, 5)) for hidden in (0, 1, 2, 6)),
]


def losses(task, draw, batch):
    """Return our pair, PyTorch's function, and a target, for classes or for values."""
    if task == "classes":
        return (softmax_cross_entropy_forward, softmax_cross_entropy_backward, F.cross_entropy,
                draw.integers(0, 5, batch))
    return (mean_squared_error_forward, mean_squared_error_backward, F.mse_loss,
            draw.standard_normal((batch, 5)))


@pytest.mark.parametrize("task", ["classes", "values"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_masks_output_loss_and_every_gradient(config, task, draw):
    network, named = published(config)
    loss_forward, loss_backward, torch_loss, target = losses(task, draw, 16)
    x = torch.tensor(draw.standard_normal((16, 12)), requires_grad=True)
    theirs = network(x)
    their_loss = torch_loss(theirs, torch.tensor(target))
    their_loss.backward()

    params, fixed = interop.mlp_from_torch(named, config)
    ours, cache = mlp.forward(x.detach().numpy(), params, fixed, config)
    loss, loss_cache = loss_forward(ours, target)
    grads = mlp.zeros_like(params)
    dx = mlp.backward(loss_backward(1.0, loss_cache), cache, params, grads, config)

    for m, their_m in zip(cache.masks, network.masks or [None] * len(cache.masks), strict=True):
        np.testing.assert_array_equal(m, their_m if their_m is None else their_m.numpy())
    assert_close(ours, theirs.detach().numpy(), "torch")
    assert_close(loss, their_loss.item(), "torch")
    assert_close(dx, x.grad.numpy(), "torch")
    named_grads, their_grads = interop.mlp_to_torch(grads), gradients(network)
    assert set(named_grads) == set(their_grads)
    for name, grad in named_grads.items():
        assert_close(grad, their_grads[name], "torch")


def test_tied_scores_win_in_both(draw):
    """Equal fixed weights tie neurons on either side of rank k."""
    network, named = published(NETWORK)
    for name in ("spec_1.weight", "spec_2.weight"):
        named[name][1::2] = named[name][:-1:2][:len(named[name][1::2])]
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.copy_(torch.tensor(named[name]))
    x = draw.standard_normal((16, 12))
    network(torch.tensor(x))
    params, fixed = interop.mlp_from_torch(named, NETWORK)
    _, cache = mlp.forward(x, params, fixed, NETWORK)
    for m, theirs in zip(cache.masks, network.masks, strict=True):
        np.testing.assert_array_equal(m, theirs.numpy())
    winners = cache.masks[1].sum(axis=1)
    assert (winners > 7).any()  # k = 7 is odd, and all but one neuron come in pairs


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    a = torch.linspace(-30, 30, 601, dtype=torch.float64, requires_grad=True)  # 0 included
    y = TORCH_ACTIVATIONS[name](a)
    y.sum().backward()
    f = activation(name)
    assert_close(f.forward(a.detach().numpy()), y.detach().numpy(), "torch")
    assert_close(f.derivative(a.detach().numpy()), a.grad.numpy(), "torch")


# --- training -----------------------------------------------------------------------------------

STEPS, WARMUP, LR = 20, 5, 0.05
TRAINED = MLPConfig((12, 20, 15, 5), gate=PUBLISHED)


def torch_optimizer(network, config):
    trainable = [p for p in network.parameters() if p.requires_grad]
    if config.name in ("adam", "adamw"):
        kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
        return kind(trainable, LR, betas=(config.beta1, config.beta2), eps=config.eps,
                    weight_decay=config.weight_decay)
    return torch.optim.SGD(trainable, LR, weight_decay=config.weight_decay,
                           momentum=config.momentum if config.name == "momentum" else 0)


def torch_schedule(optimizer, name):
    if name == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    def factor(step):
        if name == "constant":
            return 1.0
        if step < WARMUP:
            return step / WARMUP
        return 0.5 + 0.5 * math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_torch(network, x, labels, config, schedule_name):
    optimizer = torch_optimizer(network, config)
    rates = torch_schedule(optimizer, schedule_name)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(network(x), labels).backward()
        if config.clip_value is not None:
            torch.nn.utils.clip_grad_value_(network.parameters(), config.clip_value)
        if config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
        optimizer.step()
        rates.step()


def train(params, fixed, x, labels, config, schedule_name):
    """Train for STEPS steps and return the parameters."""
    flat, params = flatten(params)
    flat_grads, grads = flatten(mlp.zeros_like(params))
    state = init_state(flat, config)
    for step in range(STEPS):
        flat_grads.fill(0)
        logits, cache = mlp.forward(x, params, fixed, TRAINED)
        _, loss_cache = softmax_cross_entropy_forward(logits, labels)
        mlp.backward(softmax_cross_entropy_backward(1.0, loss_cache), cache, params, grads, TRAINED)
        lr = LR * schedule(schedule_name, step, STEPS, WARMUP)
        state = update(flat, flat_grads, state, lr, config)
    return params


@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize("settings", [
    {}, {"weight_decay": 0.1}, {"clip_norm": 0.05}, {"clip_value": 0.002},
    {"weight_decay": 0.1, "clip_norm": 0.05, "clip_value": 0.01}], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_twenty_steps(name, settings, schedule_name, draw):
    config = OptimizerConfig(name, **settings)
    network, named = published(TRAINED)
    x, labels = draw.standard_normal((16, 12)), draw.integers(0, 5, 16)
    train_torch(network, torch.tensor(x), torch.tensor(labels), config, schedule_name)
    params, fixed = interop.mlp_from_torch(named, TRAINED)
    trained = interop.mlp_to_torch(train(params, fixed, x, labels, config, schedule_name))
    for parameter, p in network.named_parameters():
        if p.requires_grad:
            assert_close(trained[parameter], p.detach().numpy(), "training")
            assert not np.array_equal(trained[parameter], named[parameter])


@pytest.mark.parametrize(("name", "settings", "mutant"), [
    ("adam", {"weight_decay": 0.1}, OptimizerConfig("adamw", weight_decay=0.1)),
    ("momentum", {}, OptimizerConfig("momentum", momentum=0.901)),
    ("sgd", {"clip_norm": 0.05}, OptimizerConfig("sgd", clip_norm=0.0501)),
    ("adamw", {}, OptimizerConfig("adamw", eps=1e-7)),
])
def test_slightly_other_optimizers_are_told_apart(name, settings, mutant, draw):
    network, named = published(TRAINED)
    x, labels = draw.standard_normal((16, 12)), draw.integers(0, 5, 16)
    train_torch(network, torch.tensor(x), torch.tensor(labels), OptimizerConfig(name, **settings),
                "cosine")
    params, fixed = interop.mlp_from_torch(named, TRAINED)
    trained = interop.mlp_to_torch(train(params, fixed, x, labels, mutant, "cosine"))
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(trained["fc2.weight"], network.fc2.weight.detach().numpy(), "training")


# --- the names ----------------------------------------------------------------------------------


def test_the_contract(draw):
    """The calls that outside scripts make, as they were promised to them."""
    widths = (3072, 64, 64, 64, 10)
    W1, W2, W3, W4 = (draw.uniform(-1, 1, (n, n_in)) / n_in**0.5
                      for n_in, n in itertools.pairwise(widths))
    V1, V2, V3 = (draw.uniform(-1, 1, W.shape) for W in (W1, W2, W3))
    b1, b2, b3, b4 = (np.zeros(n) for n in widths[1:])
    x, dlogits = draw.standard_normal((32, 3072)), draw.standard_normal((32, 10))
    named = {
        "fc1.weight": W1, "fc1.bias": b1, "fc2.weight": W2, "fc2.bias": b2, "fc3.weight": W3,
        "fc3.bias": b3, "fc4.weight": W4, "fc4.bias": b4, "spec_1.weight": V1, "spec_2.weight": V2,
        "spec_3.weight": V3}

    from comet_np import gates, interop, kwta_mask
    from comet_np.models import mlp
    config = mlp.MLPConfig(widths=(3072, 64, 64, 64, 10), activation="softplus",
                           gate=gates.Comet(p_k=0.5, ties="threshold"))
    params, fixed = interop.mlp_from_torch(named, config)
    logits, cache = mlp.forward(x, params, fixed, config)
    grads = mlp.zeros_like(params)
    dx = mlp.backward(dlogits, cache, params, grads, config)
    named = interop.mlp_to_torch(grads)

    assert (logits.shape, dx.shape) == ((32, 10), (32, 3072))
    assert list(named) == [f"fc{layer}.{kind}" for layer in (1, 2, 3, 4)
                           for kind in ("weight", "bias")]
    assert all(type(array) is np.ndarray and array.any() for array in named.values())
    assert [(m.dtype, m.shape) for m in cache.masks] == [(np.dtype(bool), (32, 64))] * 3
    np.testing.assert_array_equal(cache.masks[0], kwta_mask(x @ V1.T, 32, ties="strict"))
    others = (cache.masks[0], None, ~cache.masks[2])
    outside, _ = mlp.forward(x, params, fixed, config, masks=others)
    assert not np.array_equal(outside, logits)
    outside, _ = mlp.forward(x, params, fixed, config, masks=cache.masks)
    np.testing.assert_array_equal(outside, logits)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gate", [None, Comet(), Layerwise(), TopK(), Bernoulli(), ExampleTied(),
                                  Kept()], ids=str)
def test_names_come_back_for_every_gate(gate, bias):
    config = MLPConfig((12, 20, 15, 5), gate=gate, bias=bias)
    params, fixed = mlp.init(config)
    named = interop.mlp_to_torch(params, fixed)
    routed = isinstance(gate, Comet | Layerwise)
    assert set(named) == {f"fc{layer}.{kind}" for layer in (1, 2, 3)
                          for kind in (("weight", "bias") if bias else ("weight",))} | {
        f"spec_{layer}.weight" for layer in (1, 2) if routed}
    back, back_fixed = interop.mlp_from_torch(named, config)
    assert len(back_fixed) == len(fixed) == (2 if routed else 0)
    for ours, theirs in zip(leaves((back, back_fixed)), leaves((params, fixed)), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
        assert not np.shares_memory(ours, theirs)


def given(network, kind):
    """Return what a user has in hand of a PyTorch module."""
    if kind == "state_dict":
        return network.state_dict()
    named = dict(network.named_parameters())  # which have gradients
    return named if kind == "parameters" else {
        name: p.detach().numpy() for name, p in named.items()}


@pytest.mark.parametrize("kind", ["state_dict", "parameters", "arrays"])
def test_training_one_side_does_not_move_the_other(kind):
    network, _ = published(NETWORK)
    params, fixed = interop.mlp_from_torch(given(network, kind), NETWORK)
    ours = [leaf.copy() for leaf in leaves((params, fixed))]
    theirs = [p.detach().numpy().copy() for p in network.parameters()]
    with torch.no_grad():
        for p in network.parameters():
            p += 1
    for leaf, before in zip(leaves((params, fixed)), ours, strict=True):
        assert type(leaf) is np.ndarray
        assert leaf.dtype == "float64"
        np.testing.assert_array_equal(leaf, before)
        leaf += 2
    for p, before in zip(network.parameters(), theirs, strict=True):
        np.testing.assert_array_equal(p.detach().numpy(), before + 1)


def test_tensors_with_gradients_give_the_network_itself(draw):
    network, _ = published(NETWORK)
    x = draw.standard_normal((16, 12))
    params, fixed = interop.mlp_from_torch(dict(network.named_parameters()), NETWORK)
    assert_close(mlp.forward(x, params, fixed, NETWORK)[0],
                 network(torch.tensor(x)).detach().numpy(), "torch")


def test_gradients_under_their_names_are_the_arrays_themselves():
    params, fixed = mlp.init(NETWORK)
    named = interop.mlp_to_torch(params, fixed)
    for array, leaf in zip(named.values(), leaves((params, fixed)), strict=True):
        assert array is leaf


def test_routing_weights_of_the_output_layer_are_passed_over():
    """The published model has a spec_L and never uses it."""
    for gate in PUBLISHED, Layerwise():
        for widths in (12, 20, 15, 17, 5), (12, 5):
            config = MLPConfig(widths, gate=gate)
            named = interop.mlp_to_torch(*mlp.init(config))
            named[f"spec_{len(widths) - 1}.weight"] = torch.zeros(7, dtype=torch.int64)
            assert len(interop.mlp_from_torch(named, config)[1]) == len(widths) - 2


@dataclass(frozen=True)
class Unnamed(Gate):
    """A gate whose fixed weights are no tuple of one array a layer."""

    def init(self, widths, seed, backend, dtype):
        return {"V": backend.asarray(np.ones(widths[1], dtype))}

    def masks(self, x, fixed, config, at):
        return (x @ np.ones((12, 20)) > fixed["V"],)


@pytest.mark.parametrize(("gate", "said"), [
    (None, "None"), (TopK(), "TopK"), (Kept(), "Kept"), (Bernoulli(), "Bernoulli"),
    (Unnamed(), "Unnamed")], ids=lambda each: each if isinstance(each, str) else "")
def test_routing_weights_that_the_gate_does_not_use_are_refused(gate, said):
    _, named = published(NETWORK)
    with pytest.raises(UserError, match=re.escape(
            "routing weights are given (spec_1.weight, spec_2.weight, spec_3.weight) and the gate "
            f"of the config, {said}, has none of these names: pass a config with "
            "gate=gates.Comet(p_k=...), or leave them out")):
        interop.mlp_from_torch(named, replace(NETWORK, gate=gate))
    with pytest.raises(UserError, match=r"are given \(spec_4\.weight\)"):
        interop.mlp_from_torch({"spec_4.weight": named["spec_1.weight"]},
                               replace(NETWORK, gate=gate))


@dataclass(frozen=True)
class Nearest(Gate):
    """A gate of one's own: a neuron is active near a point of its own in the input's space."""

    def shapes(self, widths):
        return tuple((np.int64(N), widths[0], 2) for N in widths[1:-1])

    def init(self, widths, seed, backend, dtype):
        return tuple(uniform(backend, dtype, 1, shape, seed, "point", layer)
                     for layer, shape in enumerate(self.shapes(widths)))

    def masks(self, x, fixed, config, at):
        return tuple(((x[:, None] - V[..., 0]) ** 2).sum(axis=-1) < 3 for V in fixed)


def test_names_of_a_gate_of_ones_own(draw):
    config = MLPConfig((3, 20, 15, 5), gate=Nearest())
    params, fixed = mlp.init(config)
    named = interop.mlp_to_torch(params, fixed)
    assert {name: array.shape for name, array in named.items() if name.startswith("spec")} == {
        "spec_1.weight": (20, 3, 2), "spec_2.weight": (15, 3, 2)}
    back = interop.mlp_from_torch(named | {"spec_3.weight": 0}, config)
    x = draw.standard_normal((8, 3), dtype="float32")
    np.testing.assert_array_equal(mlp.forward(x, *back, config)[0],
                                  mlp.forward(x, params, fixed, config)[0])
    exact = interop.mlp_from_torch(named | {"spec_1.weight": np.arange(120).reshape(20, 3, 2)},
                                   config)[1]
    assert exact[0].dtype == np.int64  # the gate's business
    with pytest.raises(UserError, match=re.escape('"spec_2.weight" must have shape (15, 3, 2)')):
        interop.mlp_from_torch(named | {"spec_2.weight": fixed[0]}, config)


def test_fixed_weights_without_names_are_not_written():
    config = MLPConfig((12, 20, 5), gate=Unnamed())
    params, fixed = mlp.init(config)
    assert interop.mlp_from_torch(interop.mlp_to_torch(params), config)[1] == ()
    bits = keep(Comet(), [(np.ones((7, 12), "float32"), Pass())],
                mlp.init(replace(config, gate=Comet()))[1], config)
    Point = namedtuple("Point", "V")
    for other, kind in ((bits, r"an array of uint8 \(7, 3\)"), (fixed, "dict"),
                        (Point(bits), "Point"), ((fixed,), "a tuple of dict"),
                        ([bits], "list")):
        with pytest.raises(UserError, match=f"a tuple of one array .* got .*{kind}.*: leave them"):
            interop.mlp_to_torch(params, other)


def test_parameters_that_are_none_are_not_written():
    for other, kind in ((mlp.init(NETWORK), "a tuple of tuple, tuple"),
                        (list(mlp.init(NETWORK)[0]), "list"), ((np.ones(3),), "tuple of ndarray")):
        with pytest.raises(UserError, match=f"tuple of Linear, one a layer, .* got .*{kind}"):
            interop.mlp_to_torch(other)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_not_finite_comes_through(dtype):
    network, _ = published(NETWORK)
    with torch.no_grad():
        network.fc2.weight[3, 4], network.fc2.weight[0, 1] = math.nan, -math.inf
    network.to(getattr(torch, dtype))
    params, _ = interop.mlp_from_torch(network.state_dict(), NETWORK)
    assert params[1].weight.dtype == dtype
    np.testing.assert_array_equal(params[1].weight, network.fc2.weight.detach().numpy())


def test_tensors_of_a_class_of_ones_own_and_in_any_order_of_memory():
    class Own(torch.nn.Parameter):
        pass

    Own.__module__ = "elsewhere"
    _, named = published(NETWORK)
    for transposed in (Own(torch.tensor(named["fc1.weight"].T.copy())).T,
                       Own(torch.tensor(named["fc1.weight"])),
                       np.asfortranarray(named["fc1.weight"])):
        (first, *_), _ = interop.mlp_from_torch(named | {"fc1.weight": transposed}, NETWORK)
        assert first.weight.flags.c_contiguous
        np.testing.assert_array_equal(first.weight, named["fc1.weight"])


def without_bias(named):
    return {name: array for name, array in named.items() if not name.endswith("bias")}


def test_biases_and_the_config():
    _, named = published(NETWORK)
    with pytest.raises(UserError, match=r'"fc1\.bias" of shape \(20,\) is missing .*; a network '
                                        r"without biases needs MLPConfig\(\.\.\., bias=False\)$"):
        interop.mlp_from_torch(without_bias(named), NETWORK)
    with pytest.raises(UserError, match=r'"fc1\.bias" is given and the config has no biases: pass '
                                        r"MLPConfig\(\.\.\., bias=True\), or leave"):
        interop.mlp_from_torch(named, replace(NETWORK, bias=False))
    params, _ = interop.mlp_from_torch(without_bias(named), replace(NETWORK, bias=False))
    assert [p.bias for p in params] == [None] * 4


def without(name):
    return lambda named: {key: array for key, array in named.items() if key != name}


@pytest.mark.parametrize(("change", "error", "message"), [
    (without("fc2.bias"), UserError,
     'the parameter "fc2.bias" of shape (15,) is missing (given: fc1.weight, '),
    (without("spec_1.weight"), UserError,
     'the parameter "spec_1.weight" of shape (20, 12) is missing (given: '),
    (without("spec_1.weight"), UserError,
     "; a network without routing needs MLPConfig(..., gate=None)"),
    (lambda named: named | {"spec_1.bias": np.zeros(20)}, UserError,
     '"spec_1.bias" is given, and routing has no bias, c = V z of eq. (4): make its layers by '
     "torch.nn.Linear(..., bias=False)"),
    (lambda named: {f"module.{name}": array for name, array in named.items()}, UserError,
     '"module.fc1.weight" has a prefix before "fc1.weight": pass '
     '{name.removeprefix("module."): array for name, array in named.items()}'),
    (lambda named: {f"a.b.{name}": array for name, array in named.items()
                    if name.startswith("spec")} | named, UserError, 'removeprefix("a.b.")'),
    (lambda named: list(named.values()), UserError,
     "arrays must be given by name, as a module's state_dict() does, got list"),
    (lambda named: torch.nn.Linear(2, 3), UserError, "state_dict() does, got Linear"),
    (lambda named: named | {3: named["fc1.weight"]}, UserError, 'is called "3"'),
    (lambda named: {}, UserError, "is missing (given: none)"),
    (lambda named: named | {"fc1.wieght": named["fc1.weight"]}, UserError,
     'no parameter of this MLP is called "fc1.wieght"; did you mean "fc1.weight"? (expected fc1.w'),
    (lambda named: named | {"fc5.weight": named["fc1.weight"]}, UserError, 'called "fc5.weight"'),
    (lambda named: named | {"fc1.weight": named["fc1.weight"].T}, UserError,
     '"fc1.weight" must have shape (20, 12) for the widths (12, 20, 15, 17, 5), got (12, 20), '
     "its transpose: pass it as .T"),
    (lambda named: named | {"fc1.weight": named["fc2.weight"]}, UserError, "got (15, 20)"),
    (lambda named: named | {"fc2.weight": named["fc2.weight"].astype(int)}, UserError,
     '"fc2.weight" must be float32 or float64, got int64: convert it'),
    (lambda named: {name: torch.tensor(array).half() for name, array in named.items()}, UserError,
     '"fc1.weight" must be float32 or float64, got float16'),
    (lambda named: named | {"fc2.bias": torch.ones(15, dtype=torch.bool)}, UserError, "got bool"),
    (lambda named: named | {"fc2.bias": np.ones(15, complex)}, UserError, "got complex128"),
    (lambda named: named | {"fc2.bias": np.ones(15, ">f8")}, UserError, "got >f8"),
    (lambda named: named | {"spec_2.weight": np.ones((15, 20), "float32")}, UserError,
     '"spec_2.weight" is float32 and "fc1.weight" float64: bring all to one dtype'),
    (lambda named: named | {"fc1.bias": torch.ones(20, dtype=torch.bfloat16)}, UserError,
     '"fc1.bias", a tensor of torch.bfloat16 and torch.strided, cannot be read by NumPy (Got '
     "unsupported ScalarType BFloat16): convert it, by .float() or .to_dense()"),
    (lambda named: named | {"fc1.bias": torch.ones(20).to_sparse()}, UserError,
     '"fc1.bias", a tensor of torch.float32 and torch.sparse_coo, cannot be read by NumPy ('),
    (lambda named: named | {"fc1.bias": torch.ones(20, device="meta")}, UserError,
     '"fc1.bias", a tensor of torch.float32 and torch.strided, cannot be read by NumPy ('),
    (lambda named: named | {"spec_2.weight": torch.zeros(20, 15)}, UserError,
     '"spec_2.weight" must have shape (15, 20) for the widths (12, 20, 15, 17, 5), got (20, 15)'),
    (lambda named: named | {"fc1.bias": [0.0] * 20}, BackendError,
     '"fc1.bias": expected a numpy.ndarray or cupy.ndarray, got builtins.list'),
])
def test_bad_parameters(change, error, message):
    _, named = published(NETWORK)
    with pytest.raises(error, match=re.escape(message)):
        interop.mlp_from_torch(change(named), NETWORK)


def test_a_tensor_as_input_is_refused():
    _, named = published(NETWORK)
    params, fixed = interop.mlp_from_torch(named, NETWORK)
    with pytest.raises(BackendError, match=r"expected a numpy\.ndarray .* got torch\.Tensor"):
        mlp.forward(torch.zeros(3, 12), params, fixed, NETWORK)
    with pytest.raises(BackendError, match=r"expected a numpy\.ndarray .* got torch\.Tensor"):
        softmax_cross_entropy_forward(np.zeros((3, 5)), torch.zeros(3, dtype=torch.int64))
