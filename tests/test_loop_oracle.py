"""The training loop against one that knows the truth: order, losses, rates, metrics, weights."""

import types
from dataclasses import dataclass, replace

import numpy as np
import pytest

from comet_np.backends import get_backend
from comet_np.experiments.tasks import Classification
from comet_np.experiments.training import RunConfig, examples, loop, record, step
from comet_np.experiments.training.run import Run
from comet_np.functional.routing import TIES
from comet_np.gates import Bernoulli, Comet, ExampleTied, Layerwise, TopK
from comet_np.optim import OPTIMIZERS, OptimizerConfig
from tests import oracle
from tests.oracle import ByHand, ByTorch
from tests.runs import MODEL, TRAINING, images, small_data, tied_data, trained
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("small_blocks")


@dataclass(frozen=True)
class Coarse(Comet):
    """COMET with V of -1 and 1: scores of bytes are sums of few values, of which many are equal."""

    def init(self, widths, seed, backend, dtype):
        return tuple(backend.xp.sign(V) for V in super().init(widths, seed, backend, dtype))


def run(optimizer=None, seed=0, model=None, **training):
    """Return a configuration with some changes."""
    return RunConfig(replace(MODEL, **(model or {})),
                     replace(TRAINING, optimizer=OptimizerConfig(**(optimizer or {})), **training),
                     seed)


GATES = (Comet(0.3), Comet(0.3, "index", "tanh"), Layerwise(0.3), Layerwise(0.3, "threshold"),
         TopK(0.3), TopK(0.3, of="activation"), Bernoulli(0.4), Bernoulli(0.4, "masks"),
         ExampleTied(0.4), ExampleTied(0.4, 0.2), ExampleTied(0.4, evaluation="all"))
CASES = {
    "the defaults": run(),
    "seed 3": run(seed=3),
    "cosine": run(schedule="cosine", epochs=3),
    "warm-up": run({"name": "momentum"}, schedule="warmup_cosine", warmup=5),
    "3 evaluations": run({"name": "momentum"}, evaluations=3, epochs=2),
    "more evaluations than steps": run(evaluations=9, batch=15),
    "steps": run({"name": "adam"}, steps=17, schedule="cosine", lr=0.01),
    "fewer steps than an epoch": run(steps=4, epochs=9, evaluations=2),
    "steps, evaluations, two mini-batches": run(steps=10, evaluations=4, accumulate=2,
                                                model={"dropout": 0.4}),
    "warm-up past an epoch": run(schedule="warmup_cosine", warmup=5, accumulate=2),
    "three mini-batches a step": run(accumulate=3, epochs=4),
    "mini-batches of unequal size": run(batch=9, accumulate=2),
    "three mini-batches a step, dropout": run(accumulate=3, model={"dropout": 0.4}),
    "dropout, masks of examples": run(model={"dropout": 0.4, "gate": Bernoulli(0.4)}),
    "dropout, COMET": run(model={"dropout": 0.4, "gate": Comet(0.3)}, seed=2),
    "no biases": run({"name": "adam", "l1": 0.01}, model={"bias": False}, lr=0.01),
    "sgd, L1": run({"l1": 0.01, "weight_decay": 0.1, "decay_biases": False}),
    "scale": run(model={"scale": 0.3, "activation": "tanh"}),
    "clip_value": run({"clip_value": 0.02}),
    "clip_norm": run({"clip_norm": 0.1}, accumulate=2),
    "all of it": run({"name": "adamw", "weight_decay": 0.1, "l1": 0.01, "clip_value": 0.05,
                      "clip_norm": 0.1, "decay_biases": False}, schedule="cosine", lr=0.01),
    **{f"{name}, decay, {'all' if biases else 'no biases'}": run(
        {"name": name, "weight_decay": 0.1, "decay_biases": biases}, lr=0.03)
       for name in OPTIMIZERS for biases in (True, False)},
    **{str(gate): run(seed=2, model={"gate": gate}) for gate in GATES},
    **{f"ties: {ties}": run(model={"gate": Coarse(0.3, ties)}) for ties in TIES},
    **{f"top-k, ties: {ties}": run(model={"gate": TopK(0.3, ties), "bias": False})
       for ties in TIES},
    "top-k of activations": run(model={"gate": TopK(0.9, of="activation"), "activation": "silu"}),
}


def data_for(config, task="classification"):
    """Return tied data for the gates whose rules for ties are tried."""
    return tied_data() if isinstance(config.model.gate, Coarse | TopK) else small_data(task)


def check(config, data, folder, network=ByHand, backend=None):
    """Assert that `train` does what the oracle does."""
    ours, expected = trained(config, data, folder, backend), oracle.train(config, data, network)
    tests = {name: value for name, value in ours.result.items() if name.startswith("test_")}
    for mine, theirs in zip([*ours.lines, tests], [*expected.lines, expected.test], strict=True):
        assert set(mine) == set(theirs)
        for name, value in theirs.items():
            assert_close(float(mine[name]), value, "training")
    params, to_host = ours.run.learner.params, ours.run.backend.to_host
    weights = [p.weight for p in params] + [p.bias for p in params if p.bias is not None]
    for mine, theirs in zip(weights, expected.weights, strict=True):
        assert_close(to_host(mine), theirs, "training")
    return ours


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_a_loop_by_hand_agrees(config, tmp_path):
    check(config, data_for(config), tmp_path)


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_a_loop_in_pytorch_agrees(config, tmp_path):
    pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    check(config, data_for(config), tmp_path, ByTorch)


@pytest.mark.parametrize("name", ["the defaults", "cosine", "three mini-batches a step",
                                  "all of it", str(GATES[0]), str(GATES[6]), str(GATES[8])])
@pytest.mark.parametrize("network", [ByHand, ByTorch])
def test_regression_agrees(name, network, tmp_path):
    if network is ByTorch:
        pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    check(CASES[name], small_data("regression"), tmp_path, network)


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_steps_from_the_devices_memory_agree(config, tmp_path, monkeypatch):
    """Which the CuPy backend captures as a graph; here it is NumPy that is asked for them."""
    monkeypatch.setattr(get_backend("numpy"), "waits", True)
    check(config, data_for(config), tmp_path)


def test_the_coarse_gates_scores_do_tie(tmp_path):
    """Or the three tie rules would be one."""
    data, winners = tied_data(), {}
    for ties in TIES:
        config = run(model={"gate": Coarse(0.3, ties)}, epochs=0)
        net = ByHand(config)
        x = data.x_val.astype("float64")
        net.output(x)
        winners[ties] = np.array([factor.sum() for _, _, factor in net.seen[:-1]])
    assert (winners["strict"] < winners["index"]).all()
    assert (winners["index"] < winners["threshold"]).all()


@pytest.mark.parametrize("augment", [None, "flip"])
def test_every_epoch_goes_through_all_examples_in_an_order_of_its_own(augment, tmp_path):
    orders = {}
    for seed in 0, 1:
        rows = []

        def watch(run, rows=rows):
            batch = run.training.batch

            def watched(chosen, *choices):
                rows.extend(chosen)
                return batch(chosen, *choices)

            run.training.batch = watched

        trained(run(seed=seed, model={"widths": (3072, 5)}, augment=augment), images(),
                tmp_path / str(seed), prepare=watch)
        for epoch, order in enumerate(np.reshape(rows, (2, 50))):
            np.testing.assert_array_equal(np.sort(order), np.arange(50))
            orders[seed, epoch] = tuple(order.tolist())
    assert len(set(orders.values())) == 4


# --- divergence in a group of steps -------------------------------------------------------------


def diverged_at(number, folder, waits):
    """Return the run, and the message, when the loss of step `number` is not a number."""
    runs = []

    def sabotage(run):
        runs.append(run)
        task = run.learner.task
        right = task.loss_forward

        def loss_forward(output, y):
            loss, cache = right(output, y)
            return np.where(run.learner.state.step == number, np.nan, loss), cache

        run.learner.task = types.SimpleNamespace(
            loss_forward=loss_forward, loss_backward=task.loss_backward, counts=task.counts,
            measures=task.measures)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_backend("numpy"), "waits", waits)
        with pytest.raises(record.Diverged) as caught:
            trained(CASES["warm-up"], small_data(), folder, prepare=sabotage)
    return runs[0], str(caught.value).replace(str(folder), "FOLDER")


@pytest.mark.parametrize("number", [1, 4, 5, 9, 13])
def test_a_group_that_diverged_is_looked_at_again_from_the_weights_before_it(number, tmp_path):
    """Step by step: the same step, message and weights as where every loss is looked at."""
    (one, message), (many, again) = (diverged_at(number, tmp_path / str(waits), waits)
                                     for waits in (False, True))
    assert f"at step {number} " in message and "the loss itself" in message
    assert message == again
    assert one.step == many.step == number
    for name, array in one.learner.arrays().items():
        np.testing.assert_array_equal(array, many.learner.arrays()[name])


def test_weights_that_are_not_restored_are_noticed(tmp_path, monkeypatch):
    taken = loop._taken_on_device

    def forgets(run, *arguments):
        arrays = run.learner.arrays
        run.learner.arrays = lambda: {name: array.copy() for name, array in arrays().items()}
        done = taken(run, *arguments)
        run.learner.arrays = arrays
        return done

    monkeypatch.setattr(loop, "_taken_on_device", forgets)
    with pytest.raises(AssertionError):
        test_a_group_that_diverged_is_looked_at_again_from_the_weights_before_it(4, tmp_path)


# --- mutants ------------------------------------------------------------------------------------

report, evaluate, rate = record.report, step.evaluate, Run.rate


def argmin(task, output, y):
    return {"accuracy": (output.argmin(axis=-1) == y).sum()}


def validation_as_test(run):
    run.test = run.validation
    return record.finish(run)


def numbered_from_0_in_each_block(self, ranks=None):
    for block in examples.blocks(len(self), examples.BLOCK):
        x = self._task.inputs(self.x[block], *self._scale, self._dtype)
        yield step.Batch(x, self.y[block], self.rows[:len(x)])


class OneBlock:
    """A block of examples as if it were all."""

    def __init__(self, examples, batch):
        self.model, self.fixed, self.batch = examples.model, examples.fixed, batch

    def blocks(self, ranks):
        return [self.batch]

    def __len__(self):
        return len(self.batch.rows)


def mean_of_blocks(learner, examples, check):
    blocks = [evaluate(learner, OneBlock(examples, batch), check) for batch in examples.blocks()]
    return {name: np.mean([block[name] for block in blocks]) for name in blocks[0]}


def never_reset(run):
    before = run.loss_sum
    report(run)
    run.loss_sum = before


def divided_by_the_batch(run):
    run.loss_sum *= run.steps_an_epoch / run.config.training.batch
    report(run)


def rate_of_the_next_step(run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "rate", lambda run, step: rate(run, step + 1))
        report(run)


MUTANTS = {
    "argmin": (Classification, "counts", argmin, "the defaults"),
    "validation metrics sold as test metrics": (loop, "finish", validation_as_test,
                                                "the defaults"),
    "one order for all seeds": (loop, "stream", lambda seed, *name: oracle.stream(0, *name),
                                "seed 3"),
    "one order for all epochs": (loop, "stream", lambda seed, name, epoch: oracle.stream(
        seed, name, 0), "the defaults"),
    "the first block's masks for every block, COMET": (
        examples.Examples, "blocks", numbered_from_0_in_each_block, str(GATES[0])),
    "the first block's masks for every block, Bernoulli": (
        examples.Examples, "blocks", numbered_from_0_in_each_block, str(GATES[7])),
    "a mean over blocks of unequal size": (record, "evaluate", mean_of_blocks, "the defaults"),
    "losses never forgotten": (loop, "report", never_reset, "the defaults"),
    "losses divided by the batch": (loop, "report", divided_by_the_batch, "the defaults"),
    "the schedule a step early": (Run, "rate", lambda run, step: rate(run, step + 1), "cosine"),
    "no schedule": (Run, "rate", lambda run, step: run.config.training.lr, "cosine"),
    "the next step's rate in the record": (loop, "report", rate_of_the_next_step, "cosine"),
}


@pytest.mark.parametrize(("where", "name", "wrong", "case"), MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(where, name, wrong, case, tmp_path, monkeypatch):
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(AssertionError):
        check(CASES[case], small_data(), tmp_path)


FORGETTING = {
    "momentum": ("warm-up", lambda config: replace(config, training=replace(
        config.training, optimizer=replace(config.training.optimizer, momentum=0.0)))),
    "ties": ("ties: index", lambda config: replace(config, model=replace(
        config.model, gate=replace(config.model.gate, ties="strict")))),
    "accumulate": ("three mini-batches a step", lambda config: replace(config, training=replace(
        config.training, accumulate=1))),
    "seed": ("seed 3", lambda config: replace(config, seed=0)),
}


@pytest.mark.parametrize("name", FORGETTING)
def test_a_setting_that_is_ignored_is_noticed(name, tmp_path, monkeypatch):
    case, forget = FORGETTING[name]
    train = loop.Run.__init__
    monkeypatch.setattr(Run, "__init__", lambda run, config, *rest: train(run, forget(config),
                                                                          *rest))
    with pytest.raises(AssertionError):
        check(CASES[case], data_for(CASES[case]), tmp_path)
