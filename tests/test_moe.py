"""The mixture of experts: number by number, its gradients, against PyTorch, in training, bad input.
"""

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from comet_np import interop
from comet_np.backends import BackendError, get_backend
from comet_np.errors import UserError
from comet_np.experiments.datasets import load
from comet_np.experiments.fit import trained_on
from comet_np.experiments.training import Diverged, RunConfig, TrainConfig
from comet_np.experiments.training.model import load_run
from comet_np.functional.loss import (
    softmax_cross_entropy_backward,
    softmax_cross_entropy_forward,
)
from comet_np.functional.mixture import one_hot, top_1, weight_forward
from comet_np.models import mlp, moe
from comet_np.models.moe import MoEConfig, MoEParams
from comet_np.optim import OPTIMIZERS, OptimizerConfig, init_state, update
from comet_np.selfcheck import check_moe_gradients
from comet_np.tree import flatten, leaves, named_leaves, tree_map, zeros_like
from tests import naive
from tests.runs import assert_bit_for_bit, small_data, stopped, trained
from tests.tolerances import TOLERANCES, assert_close

WEIGHTED = MoEConfig((6, 9, 8, 4), 3)
KINDS = {"weighted": WEIGHTED, "fixed": replace(WEIGHTED, trainable=False),
         "hard": replace(WEIGHTED, gate="hard")}
CONFIGS = {**KINDS, "no biases": replace(WEIGHTED, bias=False, gate_width=5),
           "tanh": replace(WEIGHTED, activation="tanh"),
           "a gate of tanh": replace(WEIGHTED, gate_activation="tanh"),
           "one expert": replace(WEIGHTED, experts=1),
           "one layer": MoEConfig((6, 4), 3), "many experts": MoEConfig((6, 4, 4), 8)}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
kinds = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


@pytest.fixture(params=[False, True], ids=["own examples", "all examples"])
def dense(request, monkeypatch):
    """Let experts compute their own examples, as on a CPU, or all of them, as on a device."""
    monkeypatch.setattr(get_backend("numpy"), "waits", request.param)
    return request.param


def point(config, draw, lead=(12,)):
    """Return an input, parameters and the fixed gate in float64."""
    return draw.standard_normal((*lead, config.widths[0])), *moe.init(config, 1, dtype="float64")


# --- forward ------------------------------------------------------------------------------------


def by_hand(x, gate, experts, config, choice=None):
    """Return the choice, its weight and the output for one x, number by number."""
    def network(params, f=config.activation):
        return naive.network(x, params, f, lambda layer, x, a: [True] * len(a))[1]

    scores = network(gate, config.gate_activation or config.activation)
    e = scores.index(max(scores)) if choice is None else choice
    weight = 1.0
    if config.gate == "weighted":
        weight = 1 / sum(math.exp(s - scores[e]) for s in scores)
    return e, weight, [weight * y for y in network(experts[e])]


@configs
@pytest.mark.parametrize("given", [False, True], ids=["the gate's choice", "a given choice"])
@pytest.mark.parametrize("lead", [(12,), (2, 5), ()], ids=str)
def test_the_output_number_by_number(config, given, lead, dense, draw):
    x, params, fixed = point(config, draw, lead)
    choice = draw.integers(0, config.experts, lead) if given else None
    y, cache = moe.forward(x, params, fixed, config, choice)
    assert y.shape == (*lead, 4)
    gate = fixed if params.gate is None else params.gate
    for row in np.ndindex(lead):
        e, weight, expected = by_hand(list(x[row]), gate, params.experts, config,
                                      None if choice is None else int(choice[row]))
        np.testing.assert_array_equal(cache.chosen[row], np.arange(config.experts) == e)
        assert_close(cache.weight[row], weight, "sum")
        assert_close(y[row], expected, "sum")


def test_of_equal_scores_the_lowest_expert_wins_and_nan_wins_all():
    scores = np.array([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0], [5.0, np.nan, 9.0]])
    np.testing.assert_array_equal(top_1(scores), [1, 0, 1])
    chosen = one_hot(top_1(scores), 3)
    np.testing.assert_array_equal(chosen, np.eye(3, dtype=bool)[[1, 0, 1]])
    weight, _ = weight_forward(scores, chosen)
    assert weight[1] == 1 / 3
    assert np.isnan(weight[2])  # so that training says that it diverged


def test_large_scores_do_not_overflow():
    scores = np.array([[1e300, -1e300], [-800.0, -801.0]])
    weight, _ = weight_forward(scores, one_hot(top_1(scores), 2))
    assert_close(weight, [1.0, 1 / (1 + math.exp(-1))], "elementwise")


def test_an_expert_computes_its_own_examples_only(draw):
    x, params, fixed = point(WEIGHTED, draw)
    choice = np.repeat([0, 2], 6)  # the expert between gets none
    _, cache = moe.forward(x, params, fixed, WEIGHTED, choice)
    first, second, third = cache.experts
    assert second is None
    np.testing.assert_array_equal(first.rows, np.arange(6))
    np.testing.assert_array_equal(third.cache.hidden[0].x, x[6:])


@configs
def test_no_examples_give_no_output(config, dense, draw):
    x, params, fixed = point(config, draw, (0,))
    y, cache = moe.forward(x, params, fixed, config)
    grads = zeros_like(params)
    assert y.shape == (0, 4)
    assert moe.backward(y, cache, params, grads, config).shape == (0, 6)
    assert not any(g.any() for g in leaves(grads))


@pytest.mark.parametrize("compute", ["tf32", "float16"])
def test_a_format_of_products_is_the_experts_only(compute, draw):
    x, params, fixed = point(WEIGHTED, draw)
    choice = draw.integers(0, 3, 12)
    whole, before = moe.forward(x, params, fixed, WEIGHTED, choice)
    short, after = moe.forward(x, params, fixed, replace(WEIGHTED, compute=compute), choice)
    np.testing.assert_array_equal(after.scores, before.scores)
    assert 0 < abs(short - whole).max() < 1e-2 * abs(whole).max()


# --- parameters ---------------------------------------------------------------------------------


@configs
def test_the_parameters_are_counted(config):
    params, fixed = moe.init(config, backend=get_backend("numpy"))
    assert moe.parameter_count(config) == sum(p.size for p in leaves(params))
    assert (params.gate is None) == bool(fixed) == (config.gate == "hard" or not config.trainable)
    gate = [p.shape for p in leaves(fixed or params.gate)]
    hidden = config.gate_width or config.widths[1]
    assert gate[0] == ((config.experts, 6) if config.gate == "hard" else (hidden, 6))
    assert gate[-1 - config.bias] == ((config.experts, 6 if config.gate == "hard" else hidden))


def test_each_array_is_drawn_for_itself():
    params, _ = moe.init(WEIGHTED, 3)
    arrays = [*leaves(params), *leaves(mlp.init(WEIGHTED.expert, 3)[0])]
    assert len({array.tobytes() for array in arrays}) == len(arrays)
    more, _ = moe.init(replace(WEIGHTED, experts=5), 3)
    for ours, theirs in zip(leaves(params.experts), leaves(more.experts[:3]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    _, fixed = moe.init(KINDS["fixed"], 3)
    for ours, theirs in zip(leaves(params.gate), leaves(fixed), strict=True):
        np.testing.assert_array_equal(ours, theirs)


# --- gradients ----------------------------------------------------------------------------------


@configs
@pytest.mark.parametrize("given", [False, True], ids=["live", "frozen"])
@pytest.mark.parametrize("lead", [(12,), (2, 5), ()], ids=str)
def test_gradients_by_differences(config, given, lead, dense, draw):
    x, params, fixed = point(config, draw, lead)
    choice = draw.integers(0, config.experts, lead) if given else None
    result = check_moe_gradients(x, params, fixed, config, choice)
    assert not result.flips
    assert result.error <= TOLERANCES["difference of a network"]["float64"], result


@pytest.mark.parametrize("name", ["weighted", "fixed", "hard"])
def test_gradients_by_complex_step(name, draw):
    config = replace(KINDS[name], activation="tanh")
    x, params, fixed = point(config, draw)
    result = check_moe_gradients(x, params, fixed, config, draw.integers(0, 3, 12),
                                 complex_step=True)
    assert result.error <= TOLERANCES["complex step"]["float64"], result


def test_a_flip_of_the_choice_is_found_with_its_margin(draw):
    x, params, fixed = point(WEIGHTED, draw)
    result = check_moe_gradients(x, params, fixed, WEIGHTED, step=1.0)
    assert result.flips
    assert all(flip.margin > 0 and len(flip.neurons) == 2 for flip in result.flips)


@pytest.mark.parametrize("mutant", ["no gradient through g", "g is not a factor", "the sign",
                                    "the choice flows"])
def test_wrong_gradients_are_caught(mutant, draw, monkeypatch):
    right = moe.weight_backward
    wrong = {
        "no gradient through g": lambda dweight, cache: 0 * right(dweight, cache),
        "g is not a factor": lambda dweight, cache: dweight[..., None] * (cache.chosen - cache.g),
        "the sign": lambda dweight, cache: -right(dweight, cache),
        "the choice flows": lambda dweight, cache: right(dweight, cache) + cache.chosen}
    monkeypatch.setattr(moe, "weight_backward", wrong[mutant])
    x, params, fixed = point(WEIGHTED, draw)
    result = check_moe_gradients(x, params, fixed, WEIGHTED)
    failed = {array.name for array in result.arrays if array.verdict == "WRONG"}
    assert "x" in failed
    assert failed > {name for name, _ in named_leaves({"params": params}) if ".gate" in name}
    assert not any("experts" in name for name in failed)


@configs
def test_an_expert_without_examples_learns_nothing(config, dense, draw):
    x, params, fixed = point(config, draw)
    y, cache = moe.forward(x, params, fixed, config, np.zeros(12, int))
    grads = zeros_like(params)
    moe.backward(draw.standard_normal(y.shape), cache, params, grads, config)
    assert all(g.any() for g in leaves(grads.experts[0]))
    assert not any(g.any() for g in leaves(grads.experts[1:]))


@configs
@pytest.mark.parametrize("input_gradient", [True, False])
def test_sgd_in_the_backward_pass_is_the_buffers(config, input_gradient, dense, draw):
    x, params, fixed = point(config, draw)
    y, cache = moe.forward(x, params, fixed, config)
    dy, grads, lr = draw.standard_normal(y.shape), zeros_like(params), 0.1
    dx = moe.backward(dy, cache, params, grads, config)
    expected = tree_map(lambda p, g: p - lr * g, params, grads)
    own = tree_map(lambda a: a.copy(), fixed)
    moved = moe.backward(-lr * dy, cache, params, params, config, input_gradient)
    for ours, theirs in zip(leaves(params), leaves(expected), strict=True):
        assert_close(ours, theirs, "sum")
    for ours, theirs in zip(leaves(fixed), leaves(own), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    if input_gradient:
        assert_close(moved, -lr * dx, "sum")
    else:
        assert moved is None


# --- against PyTorch ----------------------------------------------------------------------------


def published(config, seed=0):
    """Return the network in PyTorch in float64, under the names of the published code."""
    torch = pytest.importorskip("torch", reason="PyTorch, the crosscheck extra, is not installed")
    torch.set_num_threads(1)

    class MLP(torch.nn.Module):
        def __init__(self, widths, f="softplus"):
            super().__init__()
            self.f = {"softplus": lambda a: torch.nn.functional.softplus(a, threshold=40),
                      "tanh": torch.tanh}[f]
            self.L = len(widths) - 1
            for layer in range(1, self.L + 1):
                setattr(self, f"fc{layer}", torch.nn.Linear(*widths[layer - 1:layer + 1],
                                                            bias=config.bias))

        def forward(self, x):
            for layer in range(1, self.L):
                x = self.f(getattr(self, f"fc{layer}")(x))
            return getattr(self, f"fc{self.L}")(x)

    class Mixture(torch.nn.Module):
        def __init__(self):
            super().__init__()
            hard = config.gate == "hard"
            hidden = () if hard else (config.gate_width or config.widths[1],)
            self.experts = torch.nn.ModuleList(MLP(config.widths) for _ in range(config.experts))
            self.gating_network = MLP((config.widths[0], *hidden, config.experts),
                                      config.gate_activation or "softplus")
            if not hard and not config.trainable:
                self.gating_network.requires_grad_(False)

        def forward(self, x):
            g = torch.softmax(self.gating_network(x), dim=-1)
            choice = g.argmax(dim=-1)
            y = torch.zeros((len(x), config.widths[-1]), dtype=x.dtype)
            for e, expert in enumerate(self.experts):
                rows = torch.nonzero(choice == e)[:, 0]
                if len(rows):
                    weight = 1.0 if config.gate == "hard" else g[rows, e, None]
                    y[rows] = weight * expert(x[rows])
            return y

    torch.manual_seed(seed)
    return Mixture().double()


@pytest.mark.parametrize("config", [*KINDS.values(), CONFIGS["no biases"], CONFIGS["many experts"],
                                    CONFIGS["one expert"], CONFIGS["one layer"],
                                    CONFIGS["a gate of tanh"]], ids=str)
def test_output_and_every_gradient_are_pytorchs(config, dense, draw):
    network = published(config)
    torch = pytest.importorskip("torch")
    x, target = torch.tensor(draw.standard_normal((16, 6)), requires_grad=True), np.arange(16) % 4
    output = network(x)
    torch.nn.functional.cross_entropy(output, torch.tensor(target)).backward()

    params, fixed = interop.moe_from_torch(network.state_dict(), config)
    y, cache = moe.forward(x.detach().numpy(), params, fixed, config)
    grads = zeros_like(params)
    dy = softmax_cross_entropy_backward(1.0, softmax_cross_entropy_forward(y, target)[1])
    dx = moe.backward(dy, cache, params, grads, config)
    assert_close(y, output.detach().numpy(), "torch")
    assert_close(dx, x.grad.numpy(), "torch")
    ours = interop.moe_to_torch(grads)
    learned = {name: p for name, p in network.named_parameters() if not name.startswith("gating")
               or config.trains_gate}
    assert set(ours) == set(learned)
    for name, p in network.named_parameters():
        if name not in learned:
            assert p.grad is None  # of a hard gate too, which is meant to be trained
        elif p.grad is None or not p.grad.any():  # no example chose this expert; one expert's gate
            assert not ours[name].any()
        else:
            assert_close(ours[name], p.grad.numpy(), "torch")


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@kinds
def test_ten_steps_are_pytorchs(config, optimizer, draw):
    network = published(config)
    torch = pytest.importorskip("torch")
    rule, lr = {"sgd": (torch.optim.SGD, 0.5), "adam": (torch.optim.Adam, 0.01)}[optimizer]
    theirs = rule([p for p in network.parameters() if p.requires_grad], lr)
    settings = OptimizerConfig(optimizer)
    params, fixed = interop.moe_from_torch(network.state_dict(), config)
    flat, params = flatten(params)
    state, choices = init_state(flat, settings), set()
    x, target = draw.standard_normal((10, 16, 6)), draw.integers(0, 4, (10, 16))
    for inputs, labels in zip(x, target, strict=True):
        for p in network.parameters():  # PyTorch leaves out a parameter without one: ours is 0
            p.grad = torch.zeros_like(p)
        torch.nn.functional.cross_entropy(network(torch.tensor(inputs)),
                                          torch.tensor(labels)).backward()
        theirs.step()
        y, cache = moe.forward(inputs, params, fixed, config)
        loss_cache = softmax_cross_entropy_forward(y, labels)[1]
        flat_grads, grads = flatten(zeros_like(params))
        moe.backward(softmax_cross_entropy_backward(1.0, loss_cache), cache, params, grads, config,
                     False)
        state = update(flat, flat_grads, state, lr, settings)
        choices |= {tuple(cache.chosen.sum(axis=0))}
    assert len(choices) > 3
    named = interop.moe_to_torch(params, fixed)
    for name, p in network.named_parameters():
        assert_close(named[name], p.detach().numpy(), "training")


def test_names_go_there_and_back():
    for config in CONFIGS.values():
        params, fixed = moe.init(config, 2)
        named = interop.moe_to_torch(params, fixed)
        assert "experts.0.fc1.weight" in named
        assert {name for name in named if name.startswith("gating_network")} == {
            f"gating_network.fc{layer}.{what}"
            for layer in range(1, 2 if config.gate == "hard" else 3)
            for what in ("weight", "bias")[:1 + config.bias]}
        again = interop.moe_from_torch(named, config)
        for ours, theirs in zip(leaves(again), leaves((params, fixed)), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def renamed(named, old, new):
    return {name.replace(old, new): array for name, array in named.items()}


@pytest.mark.parametrize(("change", "said"), [
    (lambda named: [1], r"by name, as a module's state_dict\(\) does, got list"),
    (lambda named: {}, 'experts.0: the parameter "fc1.weight" of shape .* is missing'),
    (lambda named: renamed(named, "experts.1.", "experts.3."),
     'called "experts.3.fc1.weight" .expected experts.0 to experts.2 and gating_network'),
    (lambda named: renamed(named, "gating_network", "gate"), 'called "gate.fc1.weight"'),
    (lambda named: named | {"experts.0.fc9.bias": np.zeros(3)}, "experts.0: no parameter of this"),
    (lambda named: named | {7: np.zeros(3)}, 'is called "7"'),
    (lambda named: named | {"experts.2.fc1.bias": np.zeros(3, "float32")},
     r'experts.2: "fc1.bias" must have shape \(9,\) .* got \(3,\)'),
    (lambda named: {name: array.astype("float64") if "gating" in name else array
                    for name, array in named.items()}, "of one dtype, got float32 and float64"),
])
def test_names_and_arrays_that_do_not_fit_are_refused(change, said):
    named = interop.moe_to_torch(*moe.init(WEIGHTED))
    with pytest.raises(UserError, match=said):
        interop.moe_from_torch(change(named), WEIGHTED)


def test_what_is_no_array_is_refused():
    named = interop.moe_to_torch(*moe.init(WEIGHTED))
    with pytest.raises(BackendError, match=r'experts\.1: "fc2\.bias"'):
        interop.moe_from_torch(named | {"experts.1.fc2.bias": [1.0]}, WEIGHTED)


# --- training -----------------------------------------------------------------------------------

MIXTURE = MoEConfig((12, 10, 8, 5), 3)
RUN = RunConfig(MIXTURE, TrainConfig(lr=0.1, batch=8, epochs=2))
RUNS = {
    **{name: replace(RUN, training=replace(RUN.training, optimizer=OptimizerConfig(name)))
       for name in OPTIMIZERS},
    "fixed": replace(RUN, model=replace(MIXTURE, trainable=False)),
    "hard": replace(RUN, model=replace(MIXTURE, gate="hard")),
    "two mini-batches a step": replace(RUN, training=replace(RUN.training, accumulate=2)),
    "float16": replace(RUN, training=replace(RUN.training, precision="float16")),
    "one expert": replace(RUN, model=replace(MIXTURE, experts=1)),
}


@pytest.mark.parametrize("config", RUNS.values(), ids=RUNS)
def test_stopped_anywhere_a_run_goes_on_bit_for_bit(config, dense, tmp_path, small_blocks):
    data, stops = small_data(), 0
    whole = trained(config, data, tmp_path / "whole")
    while stopped(config, data, tmp_path / "parts"):
        stops += 1
    assert stops >= whole.run.step / 3
    assert_bit_for_bit(trained(config, data, tmp_path / "parts"), whole)


@kinds
def test_the_share_of_each_expert_is_a_metric(config, tmp_path, small_blocks):
    model = replace(config, widths=(12, 10, 5), experts=4, activation="tanh")
    ours = trained(replace(RUN, model=model), small_data(), tmp_path)
    learner, validation = ours.run.learner, ours.run.validation
    scores = [by_hand(list(x), learner.fixed or learner.params.gate, learner.params.experts, model)
              for batch in validation.blocks() for x in batch.x.astype("float64")]
    for e in range(4):
        share = sum(chosen == e for chosen, *_ in scores) / 25
        assert ours.lines[-1][f"val_load_{e}"] == pytest.approx(share)
    for line in ours.lines:
        assert sum(line[f"val_load_{e}"] for e in range(4)) == pytest.approx(1)
    assert sum(ours.result[f"test_load_{e}"] for e in range(4)) == pytest.approx(1)
    assert any(0 < share < 1 for name, share in ours.lines[-1].items() if "load" in name)


def test_of_examples_with_axes_of_their_own_the_share_is_counted(draw):
    x, params, fixed = point(WEIGHTED, draw, (4, 6))
    choice = np.array([[0] * 6, [1] * 6, [0, 0, 0, 1, 1, 2], [2] * 6])
    counts = moe.counts(moe.forward(x, params, fixed, WEIGHTED, choice)[1], WEIGHTED)
    assert [float(counts[f"load_{e}"]) for e in range(3)] == pytest.approx(
        [1.5, 1 + 2 / 6, 1 + 1 / 6])


@kinds
def test_it_learns(config, tmp_path):
    data = load("arm", train=500)
    model = replace(config, widths=(21, 20, 20, 1))
    training = TrainConfig(OptimizerConfig("adam"), epochs=10)
    result = trained(RunConfig(model, training), data, tmp_path)
    assert result.lines[-1]["val_loss"] < 0.2  # of the variance; before, above 1
    assert result.result["parameters"] == moe.parameter_count(model)


@kinds
def test_only_what_is_trained_moves(config, tmp_path):
    model = replace(config, widths=(12, 10, 5))
    learner = trained(replace(RUN, model=model), small_data(), tmp_path).run.learner
    params, fixed = moe.init(model)
    for ours, theirs in zip(leaves(learner.fixed), leaves(fixed), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    moved = {name: (ours != theirs).any() for (name, ours), theirs in zip(
        named_leaves(learner.params), leaves(params), strict=True)}
    assert all(moved[name] for name in moved if "gate" in name)
    assert any(moved[name] for name in moved if "experts" in name)


@kinds
def test_a_finished_run_is_read_again(config, tmp_path):
    data = small_data()
    config = replace(config, widths=(12, 10, 5))
    model = trained_on(data, RunConfig(config, RUN.training), folder=tmp_path)
    again = load_run(tmp_path)
    assert again.config == config
    assert again.result == model.result
    assert "val_load_2" in again.metrics[-1]
    for ours, theirs in zip(leaves((again.params, again.fixed)),
                            leaves((model.params, model.fixed)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(again.output(data.x_test), model.output(data.x_test))
    with np.load(tmp_path / "weights.npz") as named:
        assert set(named) == set(interop.moe_to_torch(model.params, model.fixed))


@pytest.mark.parametrize(("place", "said"), [
    (lambda learner: learner.params.gate[1].weight, "W_2 of layer 2 of the gate"),
    (lambda learner: learner.params.experts[1][0].weight, "W_1 of layer 1 of expert 1")])
def test_divergence_names_what_is_not_finite(place, said, tmp_path):
    def spoil(run):
        place(run.learner)[0, 0] = np.inf

    with pytest.raises(Diverged, match=rf"not finite is {said};"):
        trained(RUN, small_data(), tmp_path, prepare=spoil)


def test_the_quantities_are_all_of_a_forward_pass(draw):
    x, params, fixed = point(KINDS["fixed"], draw)
    y, cache = moe.forward(x, params, fixed, KINDS["fixed"], np.zeros(12, int))
    names = dict(moe.quantities(params, cache, y))
    assert next(iter(names)) == "x_0 of layer 1 of the gate"
    assert "a_2 of layer 2 of the gate" in names
    assert "a_3 of layer 3 of expert 0" in names
    assert not any("expert 1" in name for name in names)
    assert [*names][-1] == "the output y"


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "said"), [
    ({"experts": 0}, "experts is how many there are, an integer of at least 1, got 0"),
    ({"experts": 2.5}, "got 2.5"),
    ({"widths": (6,)}, r"widths are .* at least two .* got \(6,\)"),
    ({"widths": (6, 0, 4)}, "each an integer of at least 1"),
    ({"gate": "soft"}, 'unknown gate of a mixture of experts "soft"'),
    ({"gate": None}, 'unknown gate of a mixture of experts "None"'),
    ({"gate_width": 0}, "gate_width is how many neurons .* got 0"),
    ({"gate": "hard", "gate_width": 5}, "leave gate_width out, got 5"),
    ({"gate": "hard", "gate_activation": "tanh"}, "leave gate_activation out, got tanh"),
    ({"gate_activation": "tan"}, 'did you mean "tanh"'),
    ({"activation": "softplu"}, 'did you mean "softplus"'),
    ({"compute": "float8"}, "float8")])
def test_settings_without_a_meaning_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        replace(WEIGHTED, **settings)


@pytest.mark.parametrize(("change", "said"), [
    ({"choice": np.zeros(11, int)}, r"an integer array of shape \(12,\), got int64 \(11,\)"),
    ({"choice": np.zeros(12)}, r"an integer array of shape \(12,\), got float64 \(12,\)"),
    ({"choice": np.full(12, 3)}, r"choice must lie in 0\.\.2 for 3 experts, got 3\.\.3"),
    ({"choice": np.arange(-1, 11)}, r"got -1\.\.10"),
    ({"choice": [0] * 12}, "list"),
    ({"x": np.zeros((12, 5))}, r"x must have shape \(\.\.\., 6\)"),
    ({"x": [1.0] * 6}, "list"),
    ({"fixed": moe.init(WEIGHTED)[0].gate}, r"no fixed weights, expected \(\).*trainable=False"),
    ({"params": moe.init(KINDS["fixed"])[0]}, "gate that is trained need parameters, 22 arrays: "),
    ({"params": moe.init(replace(WEIGHTED, experts=2))[0]}, "3 experts of widths"),
    ({"params": moe.init(replace(WEIGHTED, bias=False))[0]}, "with bias=True"),
    ({"params": mlp.init(WEIGHTED.expert)[0]}, "3 experts of widths"),
    ({"config": KINDS["hard"]}, "a gate that is fixed need parameters, 18 arrays: gate")])
def test_arguments_that_do_not_fit_are_refused(change, said, draw):
    x, params, fixed = point(WEIGHTED, draw)
    arguments = {"x": x, "params": params, "fixed": fixed, "config": WEIGHTED} | change
    with pytest.raises(UserError, match=said):
        moe.forward(**arguments)


def test_a_fixed_gate_must_be_given(draw):
    x, params, _ = point(KINDS["hard"], draw)
    with pytest.raises(UserError, match="gate that is fixed need fixed weights, of the gate"):
        moe.forward(x, params, (), KINDS["hard"])


def test_gradients_that_do_not_fit_are_refused(draw):
    x, params, fixed = point(WEIGHTED, draw)
    y, cache = moe.forward(x, params, fixed, WEIGHTED)
    with pytest.raises(UserError, match=re.escape("the layer's output, (12, 4), got (12, 3)")):
        moe.backward(y[:, :3], cache, params, zeros_like(params), WEIGHTED)
    with pytest.raises(UserError, match="gradients of a mixture of experts need arrays"):
        moe.backward(y, cache, params, MoEParams(None, params.experts), WEIGHTED)
