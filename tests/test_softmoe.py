"""The experiment `softmoe`: its network, its data, which experts are kept, and what it shows."""

import json
from dataclasses import replace

import numpy as np
import pytest

from comet_np.backends import get_backend
from comet_np.errors import UserError
from comet_np.experiments import pooled, softmoe
from comet_np.experiments.cli import main
from comet_np.experiments.datasets import Dataset
from comet_np.experiments.experiment import Place
from comet_np.experiments.files import finish as finish_folder
from comet_np.experiments.files import write_result
from comet_np.experiments.pooled import PooledConfig
from comet_np.experiments.progress import Progress
from comet_np.experiments.signals import Stop
from comet_np.experiments.softmoe import Kind, SoftMoESettings
from comet_np.experiments.training import RunConfig
from comet_np.experiments.training.model import load_run
from comet_np.functional.routing import kwta_mask
from comet_np.gradcheck import check_gradients
from comet_np.models.soft_moe import SoftMoEConfig
from comet_np.tree import leaves, zeros_like
from tests.tolerances import TOLERANCES, assert_close

IMAGES = pooled.of_images(16, 3, 4, 5, 10, "tanh")
FLAT = PooledConfig(SoftMoEConfig((3, 5, 2), 4), 6, 2)
networks = pytest.mark.parametrize("config", [IMAGES, FLAT], ids=str)


# --- the network --------------------------------------------------------------------------------


def test_tokens_are_patches_with_their_positions(draw):
    """Pixel by pixel: the planes of red, green and blue, each 32x32."""
    x = draw.standard_normal((2, 3072))
    X = pooled.tokens_of(x, pooled.of_images(8, 1, 1, 1, 1, "relu"))
    assert X.shape == (2, 16, 3 * 64 + 16)
    for n, t, colour, row, column in ((0, 0, 0, 0, 0), (1, 6, 2, 3, 7), (0, 15, 1, 7, 2)):
        pixel = (8 * (t // 4) + row) * 32 + 8 * (t % 4) + column
        assert X[n, t, 64 * colour + 8 * row + column] == x[n, 1024 * colour + pixel]
    np.testing.assert_array_equal(X[..., -16:], [np.eye(16)] * 2)


@networks
def test_gradients(config, draw):
    params, _ = pooled.init(config, dtype="float64")
    x = draw.standard_normal((3, config.inputs))

    def backward(dy, cache, at):
        g = zeros_like(at["params"])
        return {"x": pooled.backward(dy, cache, at["params"], g, config), "params": g}

    result = check_gradients(lambda at: pooled.forward(at["x"], at["params"], (), config), backward,
                             {"x": x, "params": params})
    assert result.error <= TOLERANCES["difference of a network"]["float64"], result
    assert pooled.parameter_count(config) == sum(a.size for a in leaves(params))


@networks
def test_the_output_is_read_from_the_mean_of_the_tokens(config, draw):
    params, _ = pooled.init(config, dtype="float64")
    x = draw.standard_normal((3, config.inputs))
    y, cache = pooled.forward(x, params, (), config)
    Y = cache.mixture.combine.weights @ cache.mixture.combine.slots
    W, b = params.readout
    assert_close(y, Y.mean(axis=1) @ W.T + b, "sum")


@networks
def test_combining_kept_experts_is_a_forward_pass_with_them(config, draw):
    params, _ = pooled.init(config, dtype="float64")
    x, E = draw.standard_normal((4, config.inputs)), config.mixture.experts
    kept = kwta_mask(draw.random((4, E)), 2, "index")
    _, cache = pooled.forward(x, params, (), config)
    expected, _ = pooled.forward(x, params, (), config, kept)
    assert_close(pooled.combined(cache, params, config, kept), expected, "sum")


# --- cells --------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [1, 3, 8])
@pytest.mark.parametrize(("D", "D_out"), [(4, 1), (208, 32)])
def test_experts_share_the_parameters(experts, D, D_out):
    """As many as there are, and no neuron more would fit."""
    H = softmoe.hidden_width(20_000, experts, D, D_out)
    counts = [PooledConfig(SoftMoEConfig((D, width, D_out), experts), 4, 1)
              for width in (H, H + 1)]
    at_most, too_many = (pooled.parameter_count(each) - D_out - 1 for each in counts)
    assert at_most <= 20_000 < too_many


def test_the_norm_is_that_of_all_numbers():
    data = softmoe.norms(3, 2, seed=1)
    assert data.x_train.shape == (20_000, 6)
    assert abs(data.x_train.mean()) < 0.01
    assert data.x_train.std() == pytest.approx(1, abs=0.01)
    norm = np.linalg.norm(data.x_val, axis=1)
    assert np.corrcoef(norm, data.y_val[:, 0])[0, 1] == pytest.approx(1)
    assert np.concatenate([data.y_train, data.y_val]).std() == pytest.approx(1, rel=1e-4)
    assert (softmoe.norms(3, 2, seed=2).x_val != data.x_val).all()


def test_the_experts_of_the_largest_total_weight_are_kept():
    """By hand: two tokens, three experts of two slots."""
    C = np.array([[[0.1, 0.1, 0.5, 0.0, 0.1, 0.2], [0.3, 0.3, 0.1, 0.1, 0.2, 0.0]],
                  [[0.0, 0.0, 0.1, 0.1, 0.4, 0.4], [0.9, 0.0, 0.1, 0.0, 0.0, 0.0]]])
    total = softmoe.total_weights(C, 3)
    np.testing.assert_allclose(total, [[0.8, 0.7, 0.5], [0.9, 0.3, 0.8]])
    assert kwta_mask(total, 1, "index").tolist() == [[True, False, False]] * 2
    assert kwta_mask(total, 2, "index").tolist() == [[True, True, False], [True, False, True]]


def test_shares_of_experts():
    assert list(softmoe.counts(8, (0.5, 0.25, 0.3, 0.1))) == [4, 2]  # less than one is left out


def small(n, draw):
    """Return a data set of images of noise."""
    x, y = draw.integers(0, 256, (n, 3072), dtype="uint8"), draw.integers(0, 10, n)
    return Dataset("noise", "classification", x, y, x, y, x, y, 10, 2 / 255, -1.0)


def test_accuracies_are_those_of_counting_one_by_one(draw, monkeypatch):
    monkeypatch.setattr(softmoe, "BLOCK", 7)
    data, E = small(40, draw), IMAGES.mixture.experts
    params, _ = pooled.init(IMAGES)
    params.mixture.slots[:] *= 20  # of weights that differ
    params.readout.bias[:] = 0
    for expert in params.mixture.experts:
        expert[-1].weight[:] *= 20
    said_by_all, _ = pooled.forward(data.x_test * np.float32(2 / 255) - 1, params, (), IMAGES)
    data = replace(data, y_test=said_by_all.argmax(axis=1))
    spec = softmoe.SpecialistCell("noise", None, (0.4, 0.8), 3, RunConfig(IMAGES))
    found = softmoe.accuracies(spec, params, data, get_backend("numpy"))
    assert [(each["K"], len(each["random"])) for each in found] == [(2, 3), (4, 3)]
    for each in found:
        hits, chance = 0, np.zeros(3)
        for i, (x, label) in enumerate(zip(data.x_test, data.y_test, strict=True)):
            x = (x * np.float32(2 / 255) - 1)[None]
            _, cache = pooled.forward(x, params, (), IMAGES)
            total = cache.mixture.combine.weights[0].sum(axis=0)
            chosen = [total] + [softmoe.stream(0, "random experts", number).random(
                (40, E), "float32")[i] for number in range(3)]
            said = []
            for scores in chosen:
                kept = np.zeros((1, E), bool)
                kept[0, np.argsort(scores)[-each["K"]:]] = True
                said.append(pooled.forward(x, params, (), IMAGES, kept)[0].argmax() == label)
            hits, chance = hits + said[0], chance + said[1:]
        assert each["specialised"] == hits / 40
        assert each["random"] == (chance / 40).tolist()
    assert 0 < max(found[0]["random"]) < found[0]["specialised"] < found[1]["specialised"]


SMALL = SoftMoESettings(experts=(2, 4), parameters=60_000, shares=(0.5, 0.25), patch=16, features=3,
                        train=64, epochs=1, norm_experts=(1, 2), norm_larger=(4,), norm_slots=(3,),
                        norm_epochs=1, draws=2, seeds=2)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(softmoe, "NORMS", 500)
    monkeypatch.setattr(softmoe, "HELD_OUT", 100)
    return Place(tmp_path / "cell", get_backend("numpy"), None, Progress(1))


@pytest.mark.parametrize("kind", [Kind("norm-E1-S3", 1, slots=3), Kind("glyphs-E4", 4, "glyphs")])
def test_a_stopped_cell_goes_on_and_is_a_model_that_can_be_used(kind, place, draw, monkeypatch):
    monkeypatch.setattr(softmoe, "_images", lambda *given: small(64, draw))
    draw_again = draw.bit_generator.state
    spec, stop = softmoe.cell_of(SMALL, kind, 1).spec, Stop()
    whole = softmoe.run_cell(spec, place._replace(folder=place.folder.with_name("whole")))
    stop.ask()
    draw.bit_generator.state = draw_again
    with pytest.raises(KeyboardInterrupt):
        softmoe.run_cell(spec, place._replace(stop=stop))
    draw.bit_generator.state = draw_again
    result = softmoe.run_cell(spec, place)
    finish_folder(place.folder, result)
    for each in whole, result:
        del each["seconds"], each["last"]["seconds"]
    assert result == whole
    model = load_run(place.folder)
    assert model.config == spec.run.model
    assert model.output(np.zeros((2, model.config.inputs))).shape == (2, model.config.outputs)


def test_cells_are_all_networks_and_seeds():
    names = [cell.name for cell in softmoe.cells(SMALL)]
    assert names == [f"{name}-seed{seed}" for seed in range(2) for name in (
        "norm-E1", "norm-E2", "norm-E1-x4", "norm-E1-S3", "glyphs-E2", "glyphs-E4")]
    sizes = {cell.name: pooled.parameter_count(cell.spec.run.model)
             for cell in softmoe.cells(SMALL)}
    assert sizes["norm-E1-x4-seed0"] == pytest.approx(4 * sizes["norm-E1-seed0"], rel=0.01)
    assert sizes["norm-E1-S3-seed0"] == pytest.approx(sizes["norm-E1-seed0"], rel=0.01)
    assert sizes["norm-E2-seed0"] == pytest.approx(sizes["norm-E1-seed0"], rel=0.02)
    assert all(cell.work > 0 for cell in softmoe.cells(SMALL))


@pytest.mark.parametrize(("changes", "message"), [
    ({"datasets": ("arm",)}, 'unknown data set of 32x32 images "arm"'),
    ({"patch": 5}, "patches of 5x5 pixels do not fill an image"),
    ({"patch": 0}, "patches of 0x0 pixels"),
    ({"experts": (0,)}, "at least 1 expert, got 0"),
    ({"parameters": 1000}, "1,000 parameters are too few for 2 experts from 772 to 3 numbers, "
                           "which need 3,102"),
    ({"shares": (1.0,)}, "between 0 and 1"),
    ({"shares": ()}, "between 0 and 1"),
    ({"seeds": 0}, "must each be at least 1"),
    ({"norm_slots": (5,)}, r"1 to T = 4 slots, got norm_slots = \(5,\)"),
    ({"norm_larger": (0,)}, "must each be at least 1"),
    ({"epochs": -1}, "0 or more epochs"),
    ({"activation": "tanhh"}, "unknown activation")])
def test_bad_settings(changes, message):
    with pytest.raises(UserError, match=message):
        replace(SMALL, **changes)


# --- figure and table, from files made by hand --------------------------------------------------

ERRORS = {"norm-E1": (0.6, 0.8), "norm-E2": (0.01, 0.03), "norm-E1-x4": (0.5, 0.7),
          "norm-E1-S3": (0.1, 0.3)}
ACCURACIES = {"glyphs-E2": ((0.5, {1: (0.25, (0.1, 0.2))}),) * 2,
              "glyphs-E4": ((0.6, {2: (0.6, (0.2, 0.4)), 1: (0.3, (0.1, 0.1))}),
                            (0.4, {2: (0.4, (0.1, 0.3)), 1: (0.3, (0.1, 0.1))}))}


def finished(out, kinds=("norm", "glyphs")):
    for kind in softmoe.kinds(SMALL):
        if kind.name.split("-")[0] not in kinds:
            continue
        for seed in range(2):
            if kind.dataset is None:
                result = {"parameters": 1600, "last": {"val_loss": ERRORS[kind.name][seed]}}
            else:
                accuracy, kept = ACCURACIES[kind.name][seed]
                result = {"parameters": 60_000, "test_accuracy": accuracy, "kept": [
                    {"K": K, "specialised": best, "random": random}
                    for K, (best, random) in kept.items()]}
            folder = softmoe.cell_of(SMALL, kind, seed).folder(out)
            folder.mkdir(parents=True)
            write_result(folder, result)


def test_intervals_are_those_of_students_t():
    mean, half = softmoe.interval([1.0, 2.0, 6.0])
    assert (mean, half) == (3.0, pytest.approx(4.302653 * 7**0.5 / 3**0.5))
    assert np.isnan(softmoe.interval([1.0])[1])


def test_the_table_says_what_the_files_say(tmp_path):
    finished(tmp_path)
    lines = softmoe.table(SMALL, tmp_path).splitlines()
    assert [line.split() for line in lines[1:5]] == [
        ["1", "1", "1,600", "0.7000", "0.6000-0.8000"],
        ["2", "1", "1,600", "0.0200", "0.0100-0.0300"],
        ["1", "1", "1,600", "0.6000", "0.5000-0.7000"],
        ["1", "3", "1,600", "0.2000", "0.1000-0.3000"]]
    assert lines[6:8] == [
        "one expert of one slot, of whatever size, leaves at least 0.5 of the variance, 2 experts "
        "of one at most 0.03",
        "one expert of several slots leaves at least 0.1 of the variance, 2 experts of one at most "
        "0.03"]
    assert lines[10].split() == ["2", "60,000", "50.0", "+-0.0", "25.0", "+-0.0", "15.0", "+-0.0",
                                "-", "-"]
    assert lines[11].split()[:4] == ["4", "60,000", "50.0", "+-127.1"]
    assert lines[11].split()[-4:] == ["30.0", "+-0.0", "10.0", "+-0.0"]
    assert lines[13:] == [
        "of 2 experts the best 1 have 50% of the accuracy of all, as many random ones 30%",
        "of 4 experts the best 2, 1 have 100%, 60% of the accuracy of all, as many random ones "
        "50%, 20%"]


def test_the_figure_shows_what_the_files_say(tmp_path, saved):
    finished(tmp_path)
    softmoe.draw(SMALL, tmp_path)
    norm, kept = ({container.get_label(): container[0].get_xydata().tolist()
                   for container in axes.containers} for axes in saved[0].axes)
    assert norm == {"one slot each": [[1, pytest.approx(0.7)], [2, pytest.approx(0.02)]],
                    "one expert, 4 times the size": [[1, pytest.approx(0.6)]],
                    "one expert of 3 slots": [[1, pytest.approx(0.2)]]}
    assert {label: [x for x, _ in line] for label, line in kept.items()} == {
        "all": [2, 4], r"E $\times$ 0.5 of the largest weights": [2, 4],
        r"E $\times$ 0.5 at random": [2, 4], r"E $\times$ 0.25 of the largest weights": [4],
        r"E $\times$ 0.25 at random": [4]}
    assert [y for _, y in kept["all"]] == [pytest.approx(0.5)] * 2
    assert kept[r"E $\times$ 0.25 of the largest weights"] == [[4, pytest.approx(0.3)]]
    assert [y for _, y in kept[r"E $\times$ 0.5 at random"]] == [pytest.approx(0.15),
                                                                pytest.approx(0.25)]


@pytest.mark.parametrize("kinds", [("norm",), ("glyphs",)])
def test_a_part_of_the_cells_is_shown(kinds, tmp_path, saved):
    finished(tmp_path, kinds)
    softmoe.draw(SMALL, tmp_path)
    assert ("(a)" in softmoe.table(SMALL, tmp_path)) == (kinds == ("norm",))


def test_nothing_finished_is_a_sentence(tmp_path):
    pytest.importorskip("matplotlib")
    for show in (softmoe.table, softmoe.draw):
        with pytest.raises(UserError, match="holds no finished cell of softmoe: run it first"):
            show(SMALL, tmp_path)


def test_it_runs_from_the_command_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert main(["run", "softmoe", "--preset", "smoke", "--jobs", "1", "--seeds", "1"]) == 0
    out = capsys.readouterr().out
    assert "6 cells run" in out
    record = json.loads((tmp_path / "runs/softmoe-smoke/run.json").read_text())
    assert record["config"]["experts"] == [4, 8]
    assert "its numbers mean nothing" in out
