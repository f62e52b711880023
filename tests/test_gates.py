"""Gates: the masks of each by its definition, gradients, PyTorch, what each is a function of."""

import functools
import re
from dataclasses import FrozenInstanceError, dataclass, replace

import numpy as np
import pytest

from comet_np import kwta_mask
from comet_np.backends import reference
from comet_np.errors import UserError
from comet_np.functional.activations import activation
from comet_np.functional.linear import Linear, project
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
from comet_np.gates.bernoulli import masks_of_examples
from comet_np.models import mlp
from comet_np.models.mlp import MLPConfig
from comet_np.rng import key
from comet_np.selfcheck import check_mlp_gradients
from comet_np.tree import leaves
from tests import naive
from tests.tolerances import TOLERANCES, assert_close

WIDTHS = (6, 10, 9, 12, 4)
CAPPED = [Comet(), Comet(p_k=0.3, ties="threshold"), Comet(ties="index", g="tanh"),
          Comet(exact=True), Comet(p_k=0.3, ties="index", g="relu", exact=True),
          Layerwise(), Layerwise(p_k=0.3, ties="threshold"), TopK(), TopK(p_k=0.3, ties="index"),
          TopK(of="activation"), TopK(p_k=0.3, ties="threshold", of="activation")]
OF_EXAMPLES = [Bernoulli(), Bernoulli(p=0.3), ExampleTied(), ExampleTied(p=0.3, generalisation=0.4),
               ExampleTied(generalisation=0.0)]
both = pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "bodies"])


def network(gate, draw, batch=(5,), widths=WIDTHS, **settings):
    """Return a configuration, an input, parameters and fixed weights in float64."""
    config = MLPConfig(widths, gate=gate, **settings)
    params, fixed = mlp.init(config, seed=1, dtype="float64")
    return config, draw.standard_normal((*batch, widths[0])), params, fixed


def training(draw, n=5):
    return Pass(train=True, step=3, example=draw.permutation(100)[:n], seed=7)


def masks_of(gate, x, at, widths=WIDTHS, fixed=()):
    """Return the masks of a gate that depends on neither parameters nor activations."""
    return gate.masks(x, fixed, MLPConfig(widths, gate=gate), at)


# --- the definitions ----------------------------------------------------------------------------


def number(gate, seed, layer, example, neuron):
    """Return a number in [0, 1), from NumPy's own generator."""
    philox = np.random.Philox(key=np.array(key(seed, gate, layer), "u8"),
                              counter=np.array([0, 0, example, 0], "u8"))
    word = int(philox.random_raw(neuron // 2 + 1)[-1])
    return (word >> 32 if neuron % 2 else word & 0xFFFFFFFF) / 2**32


def naive_mask(gate, x, fixed, config, example, seed):
    """Return ``mask_of(layer, x_{l-1}, a_l)`` of one training example, for `naive.network`."""
    f = naive.ACTIVATIONS[config.activation]
    layers = config.widths[1:-1]
    if isinstance(gate, Comet):
        z, found = x, []
        for V in fixed:
            z = naive.on_grid(z) if gate.exact else z
            c = naive.product(V, z)  # eq. (4)
            m = naive.cap(c, max(1, int(gate.p_k * len(c))), gate.ties)  # eq. (5)
            z = [naive.ACTIVATIONS[gate.g](c_i) if m_i else 0.0
                 for c_i, m_i in zip(c, m, strict=True)]  # eq. (6)
            found.append(m)
        return lambda layer, x, a: found[layer]
    if isinstance(gate, Layerwise | TopK):
        def of_scores(layer, x, a):
            if isinstance(gate, Layerwise):
                scores = naive.product(fixed[layer], x)
            else:
                scores = a if gate.of == "pre-activation" else [f(a_i) for a_i in a]
            return naive.cap(scores, max(1, int(gate.p_k * len(a))), gate.ties)

        return of_scores
    name, always = type(gate).__name__, [0] * len(layers)
    if isinstance(gate, ExampleTied):
        q = gate.p if gate.generalisation is None else gate.generalisation
        always = [int(q * N) for N in layers]
    return lambda layer, x, a: [
        i < always[layer] or number(name, seed, layer + 1, example, i) < gate.p
        for i in range(len(a))]


def of_integers(gate, draw):
    """Return a network whose scores are small whole numbers, so that many are equal."""
    config, x, params, fixed = network(gate, draw, activation="identity")

    def whole(*shape):
        return draw.integers(-1, 2, shape).astype("float64")

    params = tuple(Linear(whole(*p.weight.shape), whole(*p.bias.shape)) for p in params)
    return config, whole(*x.shape), params, tuple(whole(*V.shape) for V in fixed)


def check_definition(gate, draw, definition=None):
    """Assert that a gate's masks and its network's output are those of the definition."""
    definition = definition or gate
    cases = [network(gate, draw, activation="gelu"), network(gate, draw, activation="softplus")]
    if isinstance(definition, Comet | Layerwise | TopK):
        cases += [of_integers(gate, draw) for _ in range(3)]
    for config, x, params, fixed in cases:
        at = training(draw)
        x = 5 * x  # where gelu falls, too
        a_L, cache = mlp.forward(x, params, fixed, config, at=at)
        for row in range(len(x)):
            mask_of = naive_mask(definition, x[row], fixed, config, int(at.example[row]), at.seed)
            masks, expected = naive.network(x[row], params, config.activation, mask_of)
            for ours, theirs in zip(cache.masks, masks, strict=True):
                np.testing.assert_array_equal(ours[row], theirs)
            assert_close(a_L[row], expected, "sum")


@both
@pytest.mark.parametrize("gate", CAPPED + OF_EXAMPLES, ids=str)
def test_masks_and_output_one_by_one(gate, kernels, draw):
    with np.errstate() if kernels else reference():
        check_definition(gate, draw)


def capped(scores, gate):
    return kwta_mask(scores, max(1, int(gate.p_k * scores.shape[-1])), gate.ties)


def cap_instead(change):
    """Return the class of a gate whose ``change(gate, z or x, a, V, activation)`` says scores."""
    def masks(self, x, fixed, config, at):
        f = activation(config.activation)
        return tuple(functools.partial(lambda V, x_l, a: capped(
            change(self, x, x_l, a, V, f), self), V) for V in fixed or [None] * 3)

    return masks


def comet(step):
    """Return `masks` of a wrong Comet: ``step(gate, c, m, layer)`` says z."""
    def masks(self, x, fixed, config, at):
        z, found = x, []
        for layer, V in enumerate(fixed):
            c = project(z, V)
            found.append(capped(c, self))
            z = step(self, c, found[-1], layer)
        return tuple(found)

    return masks


def of_examples(change):
    """Return `masks` of a wrong gate of examples: ``change(gate, x, config.widths, at)``."""
    return lambda self, x, fixed, config, at: change(self, x, config.widths, at)


def tied(combine):
    """Return `masks` of a wrong ExampleTied: ``combine(always, drawn)``."""
    def change(gate, x, widths, at):
        drawn = masks_of_examples("ExampleTied", gate.p, x, widths, at)
        return tuple(combine(np.arange(m.shape[-1]) < int(gate.p * m.shape[-1]), m) for m in drawn)

    return of_examples(change)


def bernoulli(gate, x, widths, at):
    return masks_of_examples("Bernoulli", gate.p, x, widths, at)


MUTANTS = {
    "right Comet": (Comet(), comet(lambda gate, c, m, layer: m * c), True),
    "z not masked": (Comet(), comet(lambda gate, c, m, layer: c), False),
    "z without g": (Comet(g="tanh"), comet(lambda gate, c, m, layer: m * c), False),
    "g before the mask's scores": (Comet(g="sigmoid"), comet(
        lambda gate, c, m, layer: np.where(m, activation("sigmoid").forward(c), 0.5)), False),
    "z of the losers": (Comet(), comet(lambda gate, c, m, layer: ~m * c), False),
    "another rule for ties": (Comet(), lambda self, *rest: Comet(ties="threshold").masks(*rest),
                              False),
    "one more winner": (Comet(), lambda self, *rest: Comet(p_k=0.6).masks(*rest), False),
    "Comet on each layer's input": (Comet(), cap_instead(
        lambda gate, x, x_l, a, V, f: project(x_l, V)), False),
    "right Layerwise": (Layerwise(), cap_instead(
        lambda gate, x, x_l, a, V, f: project(x_l, V)), True),
    "Layerwise by W": (Layerwise(), cap_instead(lambda gate, x, x_l, a, V, f: a), False),
    "Layerwise with the routing network": (Layerwise(), comet(
        lambda gate, c, m, layer: m * c), False),
    "Layerwise of the smallest": (Layerwise(), cap_instead(
        lambda gate, x, x_l, a, V, f: -project(x_l, V)), False),
    "right TopK": (TopK(), cap_instead(lambda gate, x, x_l, a, V, f: a), True),
    "TopK at the wrong place": (TopK(), cap_instead(
        lambda gate, x, x_l, a, V, f: f.forward(a)), False),
    "TopK at the other wrong place": (TopK(of="activation"), cap_instead(
        lambda gate, x, x_l, a, V, f: a), False),
    "TopK of magnitudes": (TopK(), cap_instead(lambda gate, x, x_l, a, V, f: abs(a)), False),
    "right Bernoulli": (Bernoulli(0.3), of_examples(bernoulli), True),
    "by the place in the batch": (Bernoulli(0.3), of_examples(lambda gate, x, widths, at: bernoulli(
        gate, x, widths, at._replace(example=np.arange(5)))), False),
    "by the step": (Bernoulli(0.3), of_examples(lambda gate, x, widths, at: bernoulli(
        gate, x, widths, at._replace(seed=at.seed + at.step))), False),
    "p for 1 - p": (Bernoulli(0.3), of_examples(lambda gate, x, widths, at: [
        ~m for m in bernoulli(gate, x, widths, at)]), False),
    "always one half": (Bernoulli(0.3), of_examples(lambda gate, x, widths, at: bernoulli(
        Bernoulli(), x, widths, at)), False),
    "one stream for all layers": (Bernoulli(0.3), of_examples(lambda gate, x, widths, at: [
        bernoulli(gate, x, (6, N, 4), at)[0] for N in widths[1:-1]]), False),
    "right ExampleTied": (ExampleTied(0.3), tied(np.logical_or), True),
    "nothing generalises": (ExampleTied(0.3), tied(lambda always, m: m), False),
    "generalisation neurons drawn too": (ExampleTied(0.3), tied(np.logical_and), False),
    "the last neurons generalise": (ExampleTied(0.3), tied(
        lambda always, m: always[::-1] | m), False),
}


@pytest.mark.parametrize(("gate", "masks", "ok"), MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(gate, masks, ok, draw):
    mutant = type("Mutant", (type(gate),), {"masks": masks})(**vars(gate))
    if ok:
        check_definition(mutant, draw, definition=gate)
    else:
        with pytest.raises(AssertionError):
            check_definition(mutant, draw, definition=gate)


# --- gradients ----------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
@pytest.mark.parametrize("gate", [*CAPPED, *OF_EXAMPLES, Kept()], ids=str)
def test_gradients(gate, frozen, kernels, draw):
    config, x, params, fixed = network(gate, draw, activation="gelu")
    at = training(draw)
    with np.errstate() if kernels else reference():
        if isinstance(gate, Kept):
            fixed = keep(Bernoulli(), [(draw.standard_normal((100, 6)), Pass(
                True, example=np.arange(100)))], (), config)
        masks = mlp.forward(x, params, fixed, config, at=at)[1].masks if frozen else None
        result = check_mlp_gradients(x, params, fixed, config, masks, at)
    assert result.error <= TOLERANCES["difference of a network"]["float64"], result
    assert not result.flips
    if frozen or isinstance(gate, Bernoulli | ExampleTied | Kept):  # no step can flip these
        assert not check_mlp_gradients(x, params, fixed, config, masks, at, step=0.5).flips


# --- against PyTorch ----------------------------------------------------------------------------


def torch_network(config, x, params, fixed, given):
    """Return the output and the masks of an MLP as one would write it in PyTorch."""
    import torch
    from torch.nn import functional as F

    f = {"gelu": F.gelu, "softplus": functools.partial(F.softplus, threshold=40)}[config.activation]
    gate, z, masks = config.gate, x, []

    def top(scores):
        k = max(1, int(gate.p_k * scores.shape[-1]))
        return scores >= torch.topk(scores, k).values[..., -1:]

    for layer, (W, b) in enumerate(params[:-1]):
        a = F.linear(x, W, b)
        if isinstance(gate, Comet):
            c = F.linear(z, fixed[layer])
            m = top(c)
            z = m * c
        elif isinstance(gate, Layerwise):
            m = top(F.linear(x, fixed[layer]))
        elif isinstance(gate, TopK):
            m = top(a if gate.of == "pre-activation" else f(a))
        else:
            m = given[layer]
        masks.append(m)
        x = m * f(a)
    return F.linear(x, *params[-1]), masks


@both
@pytest.mark.parametrize("name", ["gelu", "softplus"])
@pytest.mark.parametrize("gate", [
    *(kind(p_k=p_k, ties="threshold") for kind in (Comet, Layerwise, TopK) for p_k in (0.3, 0.5)),
    TopK(ties="threshold", of="activation"), Bernoulli(), ExampleTied(p=0.3)], ids=str)
def test_pytorch_agrees(gate, name, kernels, draw):
    torch = pytest.importorskip("torch", reason="PyTorch, the crosscheck extra, is not installed")
    torch.set_num_threads(1)
    config, x, params, fixed = network(gate, draw, (16,), activation=name)
    da_L, at = draw.standard_normal((16, 4)), training(draw, 16)
    with np.errstate() if kernels else reference():
        a_L, cache = mlp.forward(x, params, fixed, config, at=at)
        grads = mlp.zeros_like(params)
        dx = mlp.backward(da_L, cache, params, grads, config)

    def tensor(array):
        return torch.tensor(array, requires_grad=array.dtype == "float64")

    their_x, their_params = tensor(x), [(tensor(W), tensor(b)) for W, b in params]
    theirs, masks = torch_network(config, their_x, their_params, list(map(torch.tensor, fixed)),
                                  [torch.tensor(m) for m in cache.masks])
    theirs.backward(torch.tensor(da_L))
    for ours, other in zip(cache.masks, masks, strict=True):
        np.testing.assert_array_equal(ours, other.numpy())
    assert_close(a_L, theirs.detach().numpy(), "torch")
    for ours, other in zip((dx, *leaves(grads)), (their_x, *sum(their_params, ())), strict=True):
        assert_close(ours, other.grad.numpy(), "torch")


def test_where_top_k_takes_its_mask_matters_for_gelu_and_not_for_softplus(draw):
    for name, same in ("gelu", False), ("softplus", True):
        _, x, params, _ = network(TopK(), draw, (50,))
        before, after = (mlp.forward(x, params, (), MLPConfig(
            WIDTHS, name, TopK(of=of)))[1].masks for of in ("pre-activation", "activation"))
        assert all((m == n).all() for m, n in zip(before, after, strict=True)) == same


# --- the masks of examples ----------------------------------------------------------------------


def table(gate, examples, layer=0, N=40, seed=7, train=True):
    """Return the masks of these examples in a layer."""
    widths = (6, *[N] * (layer + 1), 4)
    at = Pass(train=train, example=np.asarray(examples), seed=seed)
    return masks_of(gate, np.zeros((len(examples), 6)), at, widths)[layer]


KINDS = [Bernoulli(), ExampleTied(p=0.5, generalisation=0.0), ExampleTied()]


@both
@pytest.mark.parametrize("gate", KINDS, ids=str)
def test_an_example_has_one_mask_whatever_the_batch(gate, kernels, draw):
    with np.errstate() if kernels else reference():
        masks = table(gate, range(300))
        for examples in (draw.permutation(300), [5], [7, 7, 299, 7], range(255, -1, -1), []):
            examples = np.array(examples, int)
            np.testing.assert_array_equal(table(gate, examples), masks[examples])
        if gate != ExampleTied():  # whose generalisation neurons are a share of the layer
            np.testing.assert_array_equal(table(gate, range(10), N=17), masks[:10, :17])
        config, x, params, fixed = network(gate, draw)
        at = training(draw)
        first = mlp.forward(x, params, fixed, config, at=at)[1].masks
        again = mlp.forward(2 * x, params, fixed, config, at=at._replace(step=99))[1].masks
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)  # of neither the input nor the step


@pytest.mark.parametrize("gate", KINDS[:2], ids=str)
def test_examples_layers_seeds_and_gates_have_masks_of_their_own(gate):
    masks = table(gate, range(100))
    assert len({m.tobytes() for m in masks}) == 100
    others = [table(gate, range(100, 200)), table(gate, range(100), layer=1),
              table(gate, range(100), seed=8), table(gate, range(2**40, 2**40 + 100)),
              table(KINDS[gate == KINDS[0]], range(100))]
    for other in others:
        assert abs((other != masks).mean() - 0.5) < 5 * (0.25 / masks.size) ** 0.5


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9])
@pytest.mark.parametrize("kind", [Bernoulli, functools.partial(ExampleTied, generalisation=0.0)])
def test_neurons_are_active_with_probability_p(kind, p):
    masks = table(kind(p), range(400), N=500)
    variance = p * (1 - p)
    assert abs(masks.mean() - p) < 5 * (variance / masks.size) ** 0.5
    for axis, others in (0, 400), (1, 500):  # no neuron and no example is another than the rest
        shares = masks.mean(axis=axis)
        assert np.abs(shares - p).max() < 6 * (variance / others) ** 0.5
        assert abs(shares.var() / (variance / others) - 1) < 5 * (2 / shares.size) ** 0.5


@both
def test_p_0_and_1_are_exact(kernels):
    with np.errstate() if kernels else reference():
        assert not table(Bernoulli(0.0), range(200), N=1000).any()
        assert table(Bernoulli(1.0), range(200), N=1000).all()
        assert table(ExampleTied(1.0), range(200)).all()
        assert table(ExampleTied(0.0, generalisation=1.0), range(200)).all()
        assert not table(ExampleTied(0.0), range(200)).any()


def test_generalisation_neurons_are_the_first_and_the_others_are_drawn():
    q, p, N = 0.37, 0.2, 100  # int(0.37 N) = 37
    masks = table(ExampleTied(p, generalisation=q), range(2000), N=N)
    assert masks[:, :37].all()
    rest = masks[:, 37:]
    assert abs(rest.mean() - p) < 5 * (p * (1 - p) / rest.size) ** 0.5
    for N in 100, 29:  # q = p if not said, rounded down
        always = table(ExampleTied(0.29), range(2000), N=N).all(axis=0)
        np.testing.assert_array_equal(always, np.arange(N) < int(0.29 * N))


def test_outside_training(draw):
    x = draw.standard_normal((5, 6))
    at = Pass(example=np.arange(5), seed=7)
    assert masks_of(Bernoulli(), x, at) == masks_of(Bernoulli(), x, Pass()) == (None,) * 3
    assert masks_of(ExampleTied(evaluation="all"), x, Pass()) == (None,) * 3
    for N, m in zip(WIDTHS[1:-1], masks_of(ExampleTied(0.3, generalisation=0.5), x, Pass()),
                    strict=True):
        np.testing.assert_array_equal(m, np.tile(np.arange(N) < int(0.5 * N), (5, 1)))
    drawn = table(Bernoulli(evaluation="masks"), range(300), train=False)
    trained = table(Bernoulli(evaluation="masks"), range(300))
    np.testing.assert_array_equal(trained, table(Bernoulli(), range(300)))
    for mean in drawn.mean(), (drawn != trained).mean():  # other examples, other masks
        assert abs(mean - 0.5) < 5 * (0.25 / drawn.size) ** 0.5


@both
@pytest.mark.parametrize("gate", [Bernoulli(), ExampleTied(0.3), Kept()], ids=str)
def test_the_axes_of_an_example_share_its_mask(gate, kernels, draw):
    with np.errstate() if kernels else reference():
        config, x, params, fixed = network(gate, draw, (4, 3, 2))
        at = training(draw, 4)
        if gate == Kept():
            fixed = keep(Comet(), [(draw.standard_normal((100, 3, 2, 6)), at)],
                         mlp.init(MLPConfig(WIDTHS), dtype="float64")[1], config)
        a_L, cache = mlp.forward(x, params, fixed, config, at=at)
        dx = mlp.backward(a_L, cache, params, mlp.zeros_like(params), config)
    assert (a_L.shape, dx.shape) == ((4, 3, 2, 4), x.shape)
    for m, N in zip(cache.masks, WIDTHS[1:-1], strict=True):
        assert m.shape == (4, 3, 2, N)
        if gate != Kept():  # which keeps what there was, here a mask a token
            assert (m == m[:, :1, :1]).all()
            assert (m[0] != m[1]).any()


@pytest.mark.parametrize("gate", CAPPED[:1] + CAPPED[3:4] + CAPPED[5:6], ids=str)
def test_the_tokens_of_an_example_have_masks_of_their_own(gate, draw):
    config, x, params, fixed = network(gate, draw, (4, 3))
    _, cache = mlp.forward(x, params, fixed, config)
    for row, token in np.ndindex(4, 3):
        alone = mlp.forward(x[row, token], params, fixed, config)[1].masks
        for m, expected in zip(cache.masks, alone, strict=True):
            np.testing.assert_array_equal(m[row, token], expected)
    assert any((m[:, 0] != m[:, 1]).any() for m in cache.masks)


# --- kept masks ---------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("tokens", [(), (3,)])
@pytest.mark.parametrize("gate", [Comet(), Comet(p_k=0.2, ties="index", g="tanh"), Bernoulli(0.3),
                                  ExampleTied()], ids=str)
def test_kept_masks_are_the_gates_own_in_any_order(gate, tokens, kernels, draw):
    n = 300
    config, data, params, fixed = network(gate, draw, (n, *tokens))
    kept = replace(config, gate=Kept())
    numbers = np.arange(n)
    with np.errstate() if kernels else reference():
        blocks = np.split(numbers, [7, 8, 270])
        bits = keep(gate, [(data[block], Pass(True, example=block, seed=7)) for block in blocks],
                    fixed, config)
        assert (bits.dtype, bits.shape) == ("uint8", (n, *tokens, 2 + 2 + 2))
        for order in (draw.permutation(n)[:32], numbers[::-1], np.array([5, 5, 299, 0]),
                      numbers[:0]):
            at = Pass(train=True, example=order, seed=7)
            a_L, cache = mlp.forward(data[order], params, fixed, config, at=at)
            ours, ours_cache = mlp.forward(data[order], params, bits, kept, at=at._replace(seed=0))
            for m, expected in zip(ours_cache.masks, cache.masks, strict=True):
                np.testing.assert_array_equal(m, expected)
            np.testing.assert_array_equal(ours, a_L)
            if len(order) == 32:
                shifted = mlp.forward(data[order], params, bits[1:], kept, at=at._replace(
                    example=np.minimum(order, n - 2)))[1].masks  # a mutant: one row beside
                assert any((m != n).any() for m, n in zip(shifted, cache.masks, strict=True))


def test_kept_masks_are_read_in_evaluation_too(draw):
    config, data, params, fixed = network(Comet(), draw, (9,))
    bits = keep(Comet(), [(data, Pass())], fixed, config)
    at = Pass(example=np.array([8, 2]))
    ours, _ = mlp.forward(data[[8, 2]], params, bits, replace(config, gate=Kept()), at=at)
    np.testing.assert_array_equal(ours, mlp.forward(data[[8, 2]], params, fixed, config)[0])


# --- values and errors --------------------------------------------------------------------------


@dataclass(frozen=True)
class Forgetful(Gate):
    """A gate of one's own that forgets the last layer."""

    def masks(self, x, fixed, config, at):
        return (None,) * (len(config.widths) - 3)


@pytest.mark.parametrize("gate", [*CAPPED, *OF_EXAMPLES, Kept()], ids=str)
def test_gates_are_values(gate):
    twin = type(gate)(**vars(gate))
    assert (gate, hash(gate)) == (twin, hash(twin))
    assert len({gate, twin, *CAPPED, *OF_EXAMPLES, Kept()}) == len(CAPPED) + len(OF_EXAMPLES) + 1
    assert "(" in repr(gate)
    for name in vars(gate):
        with pytest.raises(FrozenInstanceError):
            setattr(gate, name, 1)
    assert gate.depends_on == {Comet: "input", Bernoulli: "example", ExampleTied: "example",
                               Kept: "example"}.get(type(gate))


def test_gates_of_another_kind_or_setting_differ():
    assert Comet() != Layerwise() != TopK() != Bernoulli() != ExampleTied()
    assert Comet(0.5) == Comet(p_k=0.5) != Comet(p_k=0.4)


PROPORTION = r"p_k is the proportion .* must be in \(0, 1\], got "


@pytest.mark.parametrize(("make", "message"), [
    *((functools.partial(kind, p_k=p_k), PROPORTION + str(p_k)) for kind in (Comet, Layerwise, TopK)
      for p_k in (0, -0.1, 1.5, float("nan"))),
    *((functools.partial(kind, ties="index "), 'unknown tie rule "index "; did you mean "index"')
      for kind in (Comet, Layerwise, TopK)),
    (lambda: Comet(g="identitty"), 'unknown activation "identitty"; did you mean "identity"'),
    (lambda: TopK(of="pre"), r'unknown place of the top-k mask "pre".*known: activation, pre-act'),
    *((functools.partial(kind, p=p), rf"p is a probability and must be in \[0, 1\], got {p}")
      for kind in (Bernoulli, ExampleTied) for p in (-0.1, 1.5, float("nan"))),
    (lambda: ExampleTied(generalisation=2), r"generalisation is a probability .* got 2"),
    (lambda: Bernoulli(evaluation="mask"),
     'unknown evaluation of Bernoulli masks "mask"; did you mean "masks"'),
    (lambda: ExampleTied(evaluation="masks"),
     'unknown evaluation of example-tied dropout "masks"'),
])
def test_bad_settings(make, message):
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


NO_NUMBERS = "say the numbers of the examples with at=Pass(train=True, example=numbers)"


@pytest.mark.parametrize("gate", [Bernoulli(), ExampleTied(), Kept()], ids=str)
@pytest.mark.parametrize(("example", "message"), [
    (None, NO_NUMBERS),
    (np.arange(4), "needs the number of each example, shape (5,), got (4,)"),
    (np.arange(10).reshape(5, 2), "needs the number of each example, shape (5,), got (5, 2)"),
    (np.array(3), "needs the number of each example, shape (5,), got ()"),
])
def test_examples_without_their_numbers(gate, example, message, draw):
    config, x, params, fixed = network(gate, draw)
    bits = np.zeros((100, 6), "uint8") if gate == Kept() else fixed
    with pytest.raises(UserError, match=re.escape(message)):
        mlp.forward(x, params, bits, config, at=Pass(train=True, example=example))


def test_masks_that_cannot_be_kept(draw):
    for gate in Layerwise(), TopK():
        config, x, _, fixed = network(gate, draw)
        with pytest.raises(UserError, match=f"masks of the gate {type(gate).__name__} change"):
            keep(gate, [(x, Pass())], fixed, config)


@pytest.mark.parametrize("bits", [np.zeros((100, 5), "uint8"), np.zeros((100, 7), "uint8"), ()],
                         ids=["few", "many", "none"])
def test_bits_of_another_network(bits, draw):
    config, x, params, _ = network(Kept(), draw)
    with pytest.raises(UserError, match=re.escape(
            f"uint8 (n, ..., 6) for a network of widths {WIDTHS}, got uint8 {np.shape(bits)}"
            if len(bits) else "got builtins.tuple")):
        mlp.forward(x, params, bits, config, at=training(draw))


def test_fixed_weights_of_another_network(draw):
    for gate in Comet(), Layerwise():
        config, x, params, fixed = network(gate, draw)
        with pytest.raises(UserError, match=rf"{type(gate).__name__} .* needs fixed weights V of"):
            mlp.forward(x, params, fixed[::-1], config)


def test_a_gate_that_forgets_a_layer(draw):
    config, x, params, fixed = network(Forgetful(), draw)
    with pytest.raises(UserError, match="the gate Forgetful must give a mask for each of the"):
        mlp.forward(x, params, fixed, config)
