"""Transfer from one task to another: the few examples, both ways to learn them, the table."""

from dataclasses import replace

import numpy as np
import pytest

from comet_np.errors import UserError
from comet_np.experiments import transfer
from comet_np.experiments.cli import main
from comet_np.experiments.experiment import Place
from comet_np.experiments.files import write_result
from comet_np.experiments.lessons import Lessons, State
from comet_np.experiments.progress import Progress
from comet_np.experiments.sequences import Head
from comet_np.experiments.signals import Stop
from comet_np.experiments.transfer import TransferConfig
from tests.test_continual import NUMPY, small

SMALL = TransferConfig(models=("standard", "comet"), width=12, layers=3, lrs=(1e-3, 1e-2), train=40,
                       test=20, epochs=2, shots=(2, 5), classes=3, steps=6, seeds=2)


def test_some_classes_are_drawn_with_their_images():
    data, head = small(), Head(0, 10, 10)
    found, small_head = transfer.some_classes(data, head, 3, 10, 0)
    assert small_head == Head(0, 3, 3)
    assert set(found.y_train) == {0, 1, 2}
    assert len(found.x_train) == 3 * (20 + 10)  # of training and validation
    assert len(found.x_test) == 10
    of = {image.tobytes(): label for part in ("train", "val", "test") for image, label in zip(
        getattr(data, f"x_{part}"), getattr(data, f"y_{part}"), strict=True)}
    for part in ("train", "test"):
        pairs = {(label, of[image.tobytes()]) for image, label in zip(
            getattr(found, f"x_{part}"), getattr(found, f"y_{part}"), strict=True)}
        assert len(pairs) == 3
    held_out = {image.tobytes() for image in data.x_test}
    assert {image.tobytes() for image in found.x_test} < held_out
    assert held_out.isdisjoint(image.tobytes() for image in found.x_train)
    other, _ = transfer.some_classes(data, head, 3, 10, 1)
    assert {of[image.tobytes()] for image in other.x_train} != {
        of[image.tobytes()] for image in found.x_train}


def test_other_seeds_draw_other_examples_of_the_same_classes():
    sets = [transfer.few(*transfer.some_classes(small(), Head(0, 10, 10), 10, None, seed), 2)
            for seed in range(2)]
    one, other = ({image.tobytes() for image in each.x_train} for each in sets)
    assert len(one & other) < len(one) / 2


def test_fewer_examples_are_among_more():
    data, head = transfer.some_classes(small(), Head(0, 10, 10), 3, None, 0)
    two, five = (transfer.few(data, head, shots) for shots in (2, 5))
    assert np.bincount(two.y_train).tolist() == [2, 2, 2]
    assert np.bincount(five.y_train).tolist() == [5, 5, 5]
    assert {image.tobytes() for image in two.x_train} < {image.tobytes() for image in five.x_train}
    with pytest.raises(UserError, match="small has 30 images of a class outside its test set: give "
                                        "fewer --shots, got 31"):
        transfer.few(data, head, 31)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr("comet_np.experiments.lessons.load", lambda spec, place: small())
    return Place(tmp_path / "cell", NUMPY, None, Progress(1))


def test_a_cell_that_is_stopped_after_any_lesson_ends_alike(place, monkeypatch):
    spec = transfer.cell_of(SMALL, "glyphs/2", "comet", 1).spec
    whole = transfer.run_cell(spec, place._replace(folder=place.folder.with_name("whole")))
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
            result = transfer.run_cell(spec, place._replace(stop=Stop()))
        except KeyboardInterrupt:
            assert lessons <= 5
    assert result == whole
    assert [len(whole[name]) for name in ("first", "carried", "fresh")] == [1, 2, 2]


def test_what_is_carried_is_the_network_of_the_first_task(place, monkeypatch):
    """Fresh and carried networks begin with other weights, and learn the same."""
    begun, learn = [], Lessons.learn

    def watched(self, learner, task, examples, lr=None, epochs=None):
        before = learner.flat.copy()
        learn(self, learner, task, examples, lr, epochs)
        begun.append((task, lr, before, learner.flat.copy(), epochs, len(examples)))

    monkeypatch.setattr(Lessons, "learn", watched)
    spec = replace(transfer.cell_of(SMALL, "glyphs/2", "standard", 0).spec, lrs=(3e-3,))
    transfer.run_cell(spec, place)
    (first, *later) = begun
    assert [each[0] for each in begun] == [0, 1, 1, 1, 1]
    assert [each[1] for each in begun] == [3e-3, None, None, None, None]  # then the chosen one
    for carried, fresh, examples in ((later[0], later[1], 6), (later[2], later[3], 15)):
        np.testing.assert_array_equal(carried[2], first[3])
        np.testing.assert_array_equal(fresh[2], first[2])
        assert carried[4:] == fresh[4:] == (6, examples)  # epochs of one step each


@pytest.mark.parametrize(("changes", "message"), [
    ({"sequences": ("glyphs/5",)}, "goes from one task to another, got glyphs/5 with 5"),
    ({"sequences": ("glyphs-permuted/2",)}, "permuted pixels have the same ones"),
    ({"models": ("ewc",)}, 'unknown model "ewc"'), ({"shots": ()}, "--shots needs at least one"),
    ({"shots": (0,)}, "1 example a class"), ({"classes": 1}, "2 classes"),
    ({"steps": 0}, "at least 1 step")])
def test_bad_settings(changes, message):
    with pytest.raises(UserError, match=message):
        replace(SMALL, **changes)


CARRIED = {"standard": ([0.5, 0.6], [0.6, 0.7]), "comet": ([0.6, 0.7], [0.7, 0.8])}


def finished(out):
    for model, of_seeds in CARRIED.items():
        for seed, carried in enumerate(of_seeds):
            folder = transfer.cell_of(SMALL, "glyphs/2", model, seed).folder(out)
            folder.mkdir(parents=True)
            write_result(folder, {"parameters": 10, "lr": 1e-2, "first": [0.9], "carried": carried,
                                  "fresh": [0.4, 0.5]})


def test_the_table_and_the_figure_say_what_the_files_say(tmp_path, saved):
    finished(tmp_path)
    lines = transfer.table(SMALL, tmp_path).splitlines()
    assert lines[1].split() == [
        "glyphs/2", "standard", "0.01", "90.0", "+-0.0", "55.0", "+-63.5", "40.0", "+-0.0", "+15.0",
        "+-", "63.5", "65.0", "+-63.5", "50.0", "+-0.0", "+15.0", "+-", "63.5"]
    assert "standard +15.0 +- 63.5, comet +25.0 +- 63.5." in lines[-1]
    assert lines[-1].endswith("What it brings COMET is more than what it brings the standard model:"
                              " +10.0 +- 0.0 points, 2 seeds, paired.")
    transfer.draw(SMALL, tmp_path)
    left, right = saved[0].axes
    assert [line.get_xydata().tolist() for line in left.lines][:2] == [
        [[2, pytest.approx(0.55)], [5, pytest.approx(0.65)]], [[2, 0.4], [5, 0.5]]]
    assert [container[0].get_ydata().tolist() for container in right.containers] == [
        [pytest.approx(15)] * 2, [pytest.approx(25)] * 2]


def test_nothing_finished_is_a_sentence(tmp_path):
    for show in (transfer.table, transfer.draw):
        with pytest.raises(UserError, match="holds no finished cell of transfer: run it first"):
            show(SMALL, tmp_path)


def test_it_runs_from_the_command_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert main(["run", "transfer", "--preset", "smoke", "--jobs", "1", "--seeds", "1"]) == 0
    assert "2 cells run" in capsys.readouterr().out
