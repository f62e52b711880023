"""Tasks in sequence: data, heads, elastic weight consolidation, measures, resuming, the table."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from comet_np import checkpoint
from comet_np.backends import get_backend
from comet_np.errors import UserError
from comet_np.experiments import continual, ewc
from comet_np.experiments.cli import main
from comet_np.experiments.continual import ContinualConfig, measures
from comet_np.experiments.datasets import Dataset
from comet_np.experiments.ewc import Anchored
from comet_np.experiments.experiment import Place
from comet_np.experiments.files import write_result
from comet_np.experiments.lessons import Lessons, State
from comet_np.experiments.progress import Progress
from comet_np.experiments.sequences import Head, datasets_of, sequence
from comet_np.experiments.signals import Stop
from comet_np.experiments.tasks import Batch
from comet_np.experiments.training import RunConfig, TrainConfig
from comet_np.experiments.training.examples import Examples
from comet_np.experiments.training.step import Learner
from comet_np.gradcheck import check_gradients
from comet_np.models import mlp
from comet_np.models.mlp import MLPConfig
from comet_np.optim import OptimizerConfig
from comet_np.rng import seed_of, stream
from tests.naive import softmax
from tests.tolerances import TOLERANCES, assert_close

NUMPY = get_backend("numpy")


def small(classes=10, n=200, side=32):
    """Return images of noise around a picture of each class."""
    draw = np.random.default_rng(classes)
    pictures = draw.integers(0, 200, (classes, 3 * side**2))
    parts = []
    for count in (n, n // 2, n // 2):
        y = draw.permutation(np.arange(count) % classes)
        x = (pictures[y] + draw.integers(0, 50, (count, 3 * side**2))).astype("uint8")
        parts += [x, y]
    return Dataset("small", "classification", *parts, classes, 2 / 255, -1.0, image=(3, side, side))


# --- sequences ----------------------------------------------------------------------------------


def test_classes_are_split_into_groups_that_the_seed_draws():
    data, tasks = small(), sequence("glyphs/5")
    assert tasks.bounds == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
    groups = {}
    for seed in range(2):
        of_seed, seen = [], 0
        for number, (first, last) in enumerate(tasks.bounds):
            task = tasks.task(number, seed, lambda name: data)
            assert set(task.y_train) == set(task.y_test) == {first, first + 1} == {first, last - 1}
            assert task.outputs == 10
            seen += len(task.x_train)
            of_seed.append(frozenset(_labels(data, task).values()))
            assert len(_labels(data, task)) == 2  # one class for each label
        assert seen == len(data.x_train)
        assert frozenset.union(*of_seed) == frozenset(range(10))
        groups[seed] = of_seed
    assert groups[0] != groups[1]


def _labels(data, task):
    """Return of each label of a task the class of the same images."""
    of = {image.tobytes(): label for image, label in zip(data.x_train, data.y_train, strict=True)}
    found = {}
    for image, label in zip(task.x_train, task.y_train, strict=True):
        assert found.setdefault(label, of[image.tobytes()]) == of[image.tobytes()]
    return found


def test_pixels_are_permuted_alike_in_all_images_and_colours():
    data, tasks = small(), sequence("glyphs-permuted/3")
    assert tasks.bounds == [(0, 10)] * 3
    first, second, third = (tasks.task(number, 0, lambda name: data) for number in range(3))
    np.testing.assert_array_equal(first.x_train, data.x_train)
    order = stream(0, "pixels", 1).permutation(1024)
    for pixel in (0, 5, 1023):
        for colour in range(3):
            for part in ("x_train", "x_val", "x_test"):
                np.testing.assert_array_equal(
                    getattr(second, part)[:, 1024 * colour + pixel],
                    getattr(data, part)[:, 1024 * colour + order[pixel]])
    assert (second.x_train != third.x_train).any()
    np.testing.assert_array_equal(second.y_train, data.y_train)


def test_data_sets_follow_each_other_with_outputs_of_their_own(monkeypatch):
    sets = {"glyphs": small(), "cifar100": small(100)}
    tasks = sequence("glyphs+cifar100")
    assert tasks.bounds == [(0, 10), (10, 110)]
    second = tasks.task(1, 0, sets.get)
    np.testing.assert_array_equal(second.y_test, sets["cifar100"].y_test + 10)
    np.testing.assert_array_equal(second.x_test, sets["cifar100"].x_test)


def test_only_so_many_images_of_a_task():
    task = sequence("glyphs/2").task(1, 0, lambda name: small(), 30, 20)
    assert (len(task.x_train), len(task.x_val), len(task.x_test)) == (30, 20, 20)
    assert sequence("glyphs/2").examples(0, 30) == 30
    assert sequence("cifar10/5").examples(0, None) == 8000
    assert sequence("cifar10-permuted/5").examples(0, None) == 40_000


@pytest.mark.parametrize(("name", "message"), [
    ("glyphs", 'got "glyphs"'), ("glyphs/1", "at least 2 tasks"), ("glyphs/x", "at least 2 tasks"),
    ("glyphs/3", "the 10 classes of glyphs are split into equal groups of at least 2, got 3 tasks"),
    ("glyphs/10", "at least 2, got 10 tasks"), ("arm/2", 'unknown data set of 32x32 images "arm"'),
    ("glyphs+", "unknown data set"), ("glyphs+glyphs", "each data set once, got glyphs.glyphs"),
    ("glyphs-permuted", "at least 2 tasks")])
def test_what_is_no_sequence_is_a_sentence(name, message):
    with pytest.raises(UserError, match=message):
        sequence(name)


def test_a_head_knows_its_classes_alone(draw):
    head = Head(2, 5, 6)
    output, y = draw.standard_normal((7, 8)), np.array([2, 3, 4, 4, 3, 2, 2])
    loss, cache = head.loss_forward(output, y)
    q = np.array([softmax(row) for row in output[:, 2:5]])
    assert_close(loss, -np.log(q[np.arange(7), y - 2]).mean(), "sum")
    result = check_gradients(lambda at: head.loss_forward(at["a"], y),
                             lambda dy, cache, at: {"a": head.loss_backward(dy, cache)},
                             {"a": output})
    assert result.error <= TOLERANCES["difference of a network"]["float64"], result
    gradient = head.loss_backward(1.0, cache)
    assert not gradient[:, :2].any()
    assert not gradient[:, 5:].any()
    found = head.counts(output, y)
    assert found["accuracy"] == sum(row[2:5].argmax() + 2 == label
                                    for row, label in zip(output, y, strict=True))
    assert found["among_met"] == sum(row[:6].argmax() == label
                                     for row, label in zip(output, y, strict=True))


# --- elastic weight consolidation ---------------------------------------------------------------

MODEL = MLPConfig((3, 4, 5), gate=None)


def run_config(optimizer="momentum", momentum=0.0):
    return RunConfig(MODEL, TrainConfig(OptimizerConfig(optimizer, momentum), precision="float64"))


def batch(draw, n=6):
    return Batch(draw.standard_normal((n, 3)), draw.integers(0, 5, n), np.arange(n))


class NoMasks:
    """Examples of a network without a gate."""

    model, fixed = MODEL, ()


def test_a_step_goes_down_the_loss_and_the_penalty(draw):
    """Of plain gradient descent: the change is -lr times the numerical gradient of both."""
    head, given, lr, strength = Head(0, 5, 5), batch(draw), 1e-3, 3.0
    learner = Anchored(run_config(), head, NUMPY, strength)
    F, anchor = draw.random(learner.flat.size), draw.standard_normal(learner.flat.size)
    learner.importance[...], learner.anchor[...] = F, anchor
    start = learner.flat.copy()

    def both(p):
        learner.flat[...] = p
        return float(learner.forward(given, NoMasks).loss) + strength / 2 * (
            F * (p - anchor) ** 2).sum()

    gradient = np.array([(both(start + e) - both(start - e)) / 2e-6
                         for e in 1e-6 * np.eye(len(start))])
    learner.flat[...] = start
    learner.step([given], NoMasks, lr)
    np.testing.assert_allclose((start - learner.flat) / lr, gradient, rtol=1e-5, atol=1e-7)


def test_remembering_adds_up_the_penalties_of_all_tasks(draw):
    learner = Anchored(run_config(), Head(0, 5, 5), NUMPY, 1.0)
    n = learner.flat.size
    tasks = [(draw.random(n) * (draw.random(n) < 0.7), draw.standard_normal(n)) for _ in range(3)]
    for F, p in tasks:
        learner.flat[...] = p
        learner.remember(F)
    p = draw.standard_normal(n)
    expected = sum(F * (p - theirs) for F, theirs in tasks)
    np.testing.assert_allclose(learner.importance * (p - learner.anchor), expected, rtol=1e-10,
                               atol=1e-12)


def test_importance_is_the_fisher_information(draw):
    """Of one input, many times: the mean over drawn labels is near that over all, by their q."""
    config, head, n = run_config(), Head(1, 4, 5), 3000
    learner = Learner(config, Head(0, 5, 5), NUMPY)
    x = np.tile(draw.standard_normal(3), (n, 1)).astype("float32")
    data = Dataset("one", "classification", x, np.ones(n, int), None, None, None, None, 5)
    examples = Examples(x, data.y_train, data, learner.model, learner.fixed, NUMPY, "float64")
    found = ewc.importance(learner, head, examples, n, 0)
    start, expected = learner.flat.copy(), np.zeros(learner.flat.size)

    def log_q(p, label):
        learner.flat[...] = p
        one = Batch(x[:1].astype("float64"), np.array([label]), np.arange(1))
        return -float(learner.forward(one, examples).loss)

    for label in (1, 2, 3):
        gradient = np.array([(log_q(start + e, label) - log_q(start - e, label)) / 2e-6
                             for e in 1e-6 * np.eye(len(start))])
        expected += np.exp(log_q(start, label)) * gradient**2
    learner.flat[...] = start
    np.testing.assert_allclose(found, expected, rtol=0.15, atol=1e-10)
    assert expected.max() > 0.01
    assert len({*found}) > 10


# --- cells --------------------------------------------------------------------------------------

SMALL = ContinualConfig(models=("standard", "comet", "ewc"), sequences=("glyphs/5",), width=12,
                        layers=3, lrs=(1e-3, 1e-2), train=40, test=20, epochs=2, fisher=5, seeds=1)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr("comet_np.experiments.lessons.load", lambda spec, place: small())
    return Place(tmp_path / "cell", NUMPY, None, Progress(1))


@pytest.mark.parametrize("model", ["comet", "dropout", "ewc"])
def test_a_cell_that_is_stopped_after_any_lesson_ends_alike(model, place, monkeypatch):
    config = replace(SMALL, sequences=("glyphs-permuted/3",), models=(model,))
    spec = continual.cells(config)[0].spec
    whole = continual.run_cell(spec, place._replace(folder=place.folder.with_name("whole")))
    lessons, save = 0, State.save

    def save_and_stop(state, where):
        nonlocal lessons
        save(state, where)
        lessons += 1
        where.stop.ask()

    monkeypatch.setattr(State, "save", save_and_stop)
    result = None
    while result is None:
        try:
            result = continual.run_cell(spec, place._replace(stop=Stop()))
        except KeyboardInterrupt:
            assert lessons <= 7
    assert result == whole
    assert lessons == 2 + 1 + 2 * 2
    assert np.shape(whole["within"]) == np.shape(whole["among"]) == (3, 3)
    assert len(whole["alone"]) == 2


def test_a_cell_that_is_stopped_within_a_lesson_ends_alike(place, monkeypatch):
    spec = continual.cells(replace(SMALL, models=("comet",)))[0].spec
    whole = continual.run_cell(spec, place._replace(folder=place.folder.with_name("whole")))
    steps, step, stop = 0, Learner.step, Stop()

    def watched(self, *given):
        nonlocal steps
        steps += 1
        if steps == 17:
            stop.ask()
        return step(self, *given)

    monkeypatch.setattr(Learner, "step", watched)
    with pytest.raises(KeyboardInterrupt):
        continual.run_cell(spec, place._replace(stop=stop))
    assert steps == 17
    assert continual.run_cell(spec, place) == whole


def test_a_checkpoint_of_other_data_is_refused(place, monkeypatch):
    spec = continual.cells(SMALL)[0].spec
    continual.run_cell(spec, place)
    monkeypatch.setattr("comet_np.experiments.lessons.load", lambda spec, place: small(n=220))
    with pytest.raises(UserError, match="is of other data or another backend"):
        continual.run_cell(spec, place)


@pytest.mark.parametrize("changed", [
    {"taken": "x"}, {"best": None}, {"found": {}}, {"found": []}, {"settings": 3}, {"more": 1}])
def test_a_checkpoint_of_another_form_is_refused(place, changed):
    spec = continual.cells(SMALL)[0].spec
    continual.run_cell(spec, place)
    file = place.folder / "checkpoint"
    arrays, description, _ = checkpoint.load_latest(file)
    checkpoint.save(file, arrays, description | changed)
    with pytest.raises(UserError, match="does not hold what this experiment writes"):
        continual.run_cell(spec, place)


def test_without_strength_ewc_is_the_standard_model_and_with_much_it_forgets_nothing(place):
    results = {}
    for name, model, strength in (("standard", "standard", 1.0), ("none", "ewc", 0.0),
                                  ("much", "ewc", 1e12)):
        config = replace(SMALL, models=(model,), strength=strength)
        results[name] = continual.run_cell(continual.cells(config)[0].spec, place._replace(
            folder=place.folder.with_name(name)))
    assert results["none"] == results["standard"]
    moved, held = (np.array(results[name]["within"]) for name in ("standard", "much"))
    assert abs(moved[-1, 0] - moved[0, 0]) > 0 or (moved[-1] != moved[0]).any()
    assert held[-1, 0] >= held[0, 0] - 0.06


@pytest.mark.parametrize(("model", "name"), [
    ("standard", "glyphs/5"), ("ewc", "glyphs/5"), ("standard", "glyphs-permuted/3")])
def test_the_accuracies_are_those_of_the_networks(model, name, place):
    """R and S by networks that are trained here one after the other."""
    config = replace(SMALL, models=(model,), sequences=(name,), strength=30.0)
    spec = in_float64(replace(continual.cells(config)[0].spec, lrs=(3e-3,)))
    found = continual.run_cell(spec, place)
    lessons, data, bounds = taught(spec, place)
    learner = None
    for task in range(len(bounds)):
        before, learner = learner, lessons.fresh(task)
        if before is not None:
            learner.flat[...] = before.flat
            if model == "ewc":
                learner.importance[...] = before.importance
                learner.anchor[...] = before.anchor
                learner.remember(ewc.importance(
                    before, lessons.heads[task - 1], lessons.training[task - 1], 5,
                    seed_of(0, "task", task - 1)))
        lessons.learn(learner, task, lessons.training[task])
        for other, (first, last) in enumerate(bounds):
            x = data[other].x_test * (2 / 255) - 1
            a, _ = mlp.forward(x, learner.params, (), learner.model)
            y, met = data[other].y_test, max(last, bounds[task][1])
            assert found["within"][task][other] == (a[:, first:last].argmax(axis=1) + first
                                                    == y).mean()
            assert found["among"][task][other] == (a[:, :met].argmax(axis=1) == y).mean()
        if task:
            fresh = lessons.fresh(task)
            lessons.learn(fresh, task, lessons.training[task])
            assert found["alone"][task - 1] == lessons.accuracy(fresh, task, lessons.test[task])[0]


    last, _, _ = checkpoint.load_latest(place.folder / "checkpoint")
    assert_close(last["flat"], learner.flat, "training")


def in_float64(spec):
    """Return a cell whose network is trained in float64."""
    run = spec.run
    return replace(spec, run=replace(run, training=replace(run.training, precision="float64")))


def taught(spec, place, from_all=False):
    """Return the lessons of a cell, made by hand, with the data and bounds of its tasks."""
    tasks = sequence(spec.sequence)
    data = [tasks.task(i, 0, lambda name: small(), spec.train, spec.test)
            for i in range(tasks.tasks)]
    heads = [Head(first, last, last) for first, last in tasks.bounds]
    losses = [replace(head, first=0) if from_all else head for head in heads]
    new = Learner if spec.penalty is None else partial(Anchored, strength=spec.penalty[0])
    return (Lessons(spec, heads, losses, data, State({}, ()), place, Stop(), new), data,
            tasks.bounds)


def test_a_learning_rate_is_judged_on_the_validation_images_of_the_first_task(place):
    spec = continual.cells(replace(SMALL, sequences=("glyphs/2",)))[0].spec
    lessons, data, _ = taught(spec, place)
    score, learner = lessons.first(3e-3)
    right = {}
    for part in ("val", "test"):
        x = getattr(data[0], f"x_{part}") * np.float32(2 / 255) - 1
        a, _ = mlp.forward(x, learner.params, (), learner.model)
        right[part] = (a[:, :5].argmax(axis=1) == getattr(data[0], f"y_{part}")).mean()
    assert score == right["val"] != right["test"]


def test_dropout_is_drawn_anew_for_each_task(place):
    lessons, _, _ = taught(continual.cells(SMALL)[0].spec, place)
    assert len({lessons.fresh(task).config.seed for task in range(5)}) == 5


@pytest.mark.parametrize(("over", "moves"), [("task", False), ("met", True)])
def test_the_loss_compares_the_classes_of_the_task_or_all_met(over, moves, place):
    """The outputs of earlier tasks change only if their classes are compared."""
    config = replace(SMALL, sequences=("glyphs/2",), loss_over=over, lrs=(1e-2,))
    spec = in_float64(continual.cells(config)[0].spec)
    continual.run_cell(spec, place)
    lessons, _, _ = taught(spec, place, from_all=moves)
    first, second = lessons.fresh(0), lessons.fresh(1)
    lessons.learn(first, 0, lessons.training[0])
    second.flat[...] = first.flat
    lessons.learn(second, 1, lessons.training[1])
    changed = second.params[-1].bias != first.params[-1].bias
    assert changed[5:].all()
    assert changed[:5].all() == changed[:5].any() == moves
    last, _, _ = checkpoint.load_latest(place.folder / "checkpoint")
    assert_close(last["flat"], second.flat, "training")


def test_the_learning_rate_is_that_of_the_best_first_task(place, monkeypatch):
    tried = {1e-3: 0.5, 1e-2: 0.7, 1e-1: None, 3e-2: 0.7}
    spec = replace(continual.cells(SMALL)[0].spec, lrs=tuple(tried))
    monkeypatch.setattr(Lessons, "first", lambda self, lr: (
        None if tried[lr] is None else (tried[lr], self.fresh(0))))
    assert continual.run_cell(spec, place)["lr"] == 1e-2


def test_all_rates_diverged_is_a_sentence(place, monkeypatch):
    monkeypatch.setattr(Lessons, "first", lambda self, lr: None)
    with pytest.raises(UserError, match="diverged with all learning rates: give lower --lrs"):
        continual.run_cell(continual.cells(SMALL)[0].spec, place)


@pytest.mark.parametrize(("changes", "message"), [
    ({"models": ("ewd",)}, 'unknown model "ewd"'), ({"models": ()}, "--models needs at least one"),
    ({"sequences": ("glyphs/2", "glyphs/2")}, "--sequences needs at least one value, each given"),
    ({"lrs": (-1.0,)}, "the learning rate must be positive"), ({"seeds": 0}, "--seeds must be"),
    ({"loss_over": "all"}, "unknown set of classes"), ({"strength": -1.0}, "strength of 0 or more"),
    ({"fisher": 0}, "at least 1 image"), ({"train": 0}, "--train must be at least 1"),
    ({"p_k": 0.0, "models": ("comet",)}, "p_k"), ({"layers": 0}, "--layers must be")])
def test_bad_settings(changes, message):
    with pytest.raises(UserError, match=message):
        replace(SMALL, **changes)


# --- what the files say -------------------------------------------------------------------------


def test_measures_by_hand():
    R = np.array([[0.8, 0.5, 0.4], [0.9, 0.7, 0.5], [0.6, 0.85, 1.0]])
    found = measures(R, np.array([0.6, 0.8]))
    assert found.learnt == pytest.approx((0.8 + 0.7 + 1.0) / 3)
    assert found.final == pytest.approx((0.6 + 0.85 + 1.0) / 3)
    assert found.old == pytest.approx((0.6 + 0.85) / 2)
    assert found.backward == pytest.approx((-0.2 + 0.15) / 2)
    assert found.forgetting == pytest.approx((0.3 - 0.15) / 2)
    assert found.forward == pytest.approx((0.1 + 0.2) / 2)


HAND = replace(SMALL, models=("standard", "comet"), sequences=("glyphs/2",), seeds=2)
FINAL = {("standard", 0): 0.5, ("standard", 1): 0.6, ("comet", 0): 0.7, ("comet", 1): 0.78}


def finished(out, models=("standard", "comet")):
    for model in models:
        for seed in range(2):
            folder = continual.cell_of(HAND, "glyphs/2", model, seed).folder(out)
            folder.mkdir(parents=True)
            write_result(folder, {
                "parameters": 10, "lr": 1e-2, "within": [[0.9, 0.4], [FINAL[model, seed], 0.8]],
                "among": [[0.9, 0.0], [0.2, 0.6]], "alone": [0.7]})


def test_the_table_says_what_the_files_say(tmp_path):
    finished(tmp_path)
    lines = continual.table(HAND, tmp_path).splitlines()
    assert lines[0] == "glyphs/2, 2 tasks"
    assert lines[2].split() == ["standard", "0.01", "85.0", "+-0.0", "67.5", "+-31.8", "-35.0",
                                "+-63.5", "35.0", "+-63.5", "10.0", "+-0.0", "40.0", "+-0.0"]
    assert lines[-3].split() == ["glyphs/2", "+0.0", "+-", "0.0", "+19.0", "+-", "12.7", "+19.0",
                                 "+-", "12.7", "+0.0", "+-", "0.0"]
    assert lines[-1].startswith(
        "Compared with the standard model COMET keeps more of the old tasks: +19.0 +- 12.7 points")
    assert lines[-1].endswith("are in the mean: comet 74.0 %, standard 55.0 %.")


def test_a_part_of_the_cells_is_shown_and_nothing_is_a_sentence(tmp_path, saved):
    for show in (continual.table, continual.draw):
        with pytest.raises(UserError, match="holds no finished cell of continual: run it first"):
            show(HAND, tmp_path)
    finished(tmp_path, ("comet",))
    assert "not finished from one seed" in continual.table(HAND, tmp_path)
    continual.draw(HAND, tmp_path)


def test_the_figure_shows_what_the_files_say(tmp_path, saved):
    finished(tmp_path)
    continual.draw(HAND, tmp_path)
    above, below = saved[0].axes
    assert "EWC" not in saved[0].get_suptitle()
    curves = {line.get_label(): line.get_xydata().tolist() for line in above.lines}
    assert curves == {"standard": [[1, 0.9], [2, pytest.approx(0.675)]],
                      "COMET": [[1, 0.9], [2, pytest.approx(0.77)]]}
    backward = [container[0].get_xydata()[0].tolist() for container in below.containers][::2]
    assert backward == [[pytest.approx(-35), pytest.approx(-0.15)],
                        [pytest.approx(-16), pytest.approx(0.85)]]


def test_the_title_of_the_figure_says_the_strength_and_the_loss_of_the_run(tmp_path, saved):
    for strength in (1e3, 250.0):
        config = replace(HAND, models=("ewc",), strength=strength, seeds=1, loss_over="met")
        folder = continual.cells(config)[0].folder(tmp_path)
        folder.mkdir(parents=True)
        write_result(folder, {"parameters": 10, "lr": 1e-2, "within": [[0.9, 0.4], [0.5, 0.8]],
                              "among": [[0.9, 0.0], [0.2, 0.6]], "alone": [0.7]})
        continual.draw(config, tmp_path)
        title = saved[-1].get_suptitle().replace("\n", " ")
        assert f"loss over all classes met, EWC of strength {strength:g}; 1 seed" in title


def test_data_sets_of_sequences():
    assert datasets_of(("glyphs/2", "cifar10+cifar100", "cifar10/5")) == (
        "glyphs", "cifar10", "cifar100")


def test_it_runs_from_the_command_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert main(["run", "continual", "--preset", "smoke", "--jobs", "1", "--seeds", "1",
                 "--sequences", "glyphs/2"]) == 0
    assert "3 cells run" in capsys.readouterr().out
