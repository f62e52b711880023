"""The experiment `ntk`: the kernel against whole Jacobians, eq. (9)-(11), and what it shows."""

from dataclasses import replace

import numpy as np
import pytest

from comet_np.backends import get_backend, reference
from comet_np.errors import UserError
from comet_np.experiments import ntk
from comet_np.experiments.datasets import Dataset
from comet_np.experiments.experiment import Place
from comet_np.experiments.files import finish as finish_folder
from comet_np.experiments.files import write_result
from comet_np.experiments.ntk import Curve, NtkConfig
from comet_np.experiments.progress import Progress
from comet_np.experiments.signals import Stop
from comet_np.experiments.training.model import load_run
from comet_np.functional.loss import softmax_cross_entropy
from comet_np.gates import Comet, TopK
from comet_np.models import mlp
from comet_np.tree import flatten, leaves, tree_map, zeros_like
from tests.tolerances import TOLERANCES, assert_close

COMET = mlp.MLPConfig((5, 8, 7, 3), "softplus", Comet(0.5))
ANALYTIC = replace(COMET, activation="tanh")
CONFIGS = {"standard": replace(ANALYTIC, gate=None), "comet": ANALYTIC,
           "comet without biases": replace(ANALYTIC, bias=False),
           "top-k": replace(ANALYTIC, gate=TopK(0.4)), "no hidden layer": mlp.MLPConfig((5, 3))}
networks = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "cell", get_backend("numpy"), None, Progress(1))


def drawn(config, draw, n=3):
    """Return examples, parameters and fixed weights in float64."""
    return (draw.standard_normal((n, config.widths[0])), *mlp.init(config, 1, dtype="float64"))


def kernel(one, other, config):
    """Return K(x, x') as the sum of all contributions."""
    return sum(W + (b if config.bias else 0) for W, b in (
        ntk.contribution(layer, one, other) for layer in range(len(one.x))))


def complex_jacobian(x, params, fixed, config):
    """Return d a_L / d theta, (n, N_L, P), number by number: Im a_L(theta + i h) / h."""
    _, cache = mlp.forward(x, params, fixed, config)
    flat, _ = flatten(tree_map(np.copy, params))
    columns = []
    with reference():
        for place in range(flat.size):
            moved = tree_map(lambda p: p.astype("complex128"), params)
            sizes = np.cumsum([0, *(p.size for p in leaves(params))])
            leaf = np.searchsorted(sizes, place, "right") - 1
            list(leaves(moved))[leaf].flat[place - sizes[leaf]] += 1e-30j
            a_L, _ = mlp.forward(x.astype("complex128"), moved, fixed, config, cache.masks)
            columns.append(a_L.imag / 1e-30)
    return np.stack(columns, axis=-1)


# --- the kernel ---------------------------------------------------------------------------------


@networks
@pytest.mark.parametrize("activation", ["softplus", "relu", "tanh"])
def test_contributions_are_those_of_the_full_jacobians(config, activation, draw):
    """Of each W_l, with a pass of our backward for each example and output."""
    config = replace(config, activation=activation)
    x, params, fixed = drawn(config, draw)
    found = ntk.factors(x, params, fixed, config)
    for layer, expected in enumerate(ntk.full_contributions(x, params, fixed, config)):
        assert expected.shape == (3, 3, config.widths[-1], config.widths[-1])
        assert_close(ntk.contribution(layer, found, found)[0], expected, "sum")
    assert ntk.difference_of_full(x, params, fixed, config) < TOLERANCES["sum"]["float64"]


@networks
def test_the_kernel_is_that_of_jacobians_by_complex_step(config, draw):
    """Between two sets of examples, W and b: K(x, x') = J(x') J(x)^T."""
    x, params, fixed = drawn(config, draw)
    other = draw.standard_normal((2, 5))
    J, of_other = (complex_jacobian(each, params, fixed, config) for each in (x, other))
    found = kernel(*(ntk.factors(each, params, fixed, config) for each in (x, other)), config)
    assert found.shape == (3, 2, config.widths[-1], config.widths[-1])
    for n in range(3):
        for m in range(2):
            assert_close(found[n, m], of_other[m] @ J[n].T, "sum")


@pytest.mark.parametrize("gate", [None, Comet(0.5)])
def test_a_small_step_changes_the_output_by_minus_the_kernel(gate, draw):
    """Eq. (9), whose sign is that of a loss that falls: Delta a_L = -alpha K grad L."""
    config, alpha = replace(COMET, gate=gate), 1e-6
    x, params, fixed = drawn(config, draw, 1)
    test = x + 0.1 * draw.standard_normal(x.shape)
    before, _ = mlp.forward(test, params, fixed, config)
    a_L, cache = mlp.forward(x, params, fixed, config)
    gradient = softmax_cross_entropy(a_L, np.array([1]))[1][0] - np.eye(3)[1]
    K = kernel(ntk.factors(x, params, fixed, config), ntk.factors(test, params, fixed, config),
               config)[0, 0]
    grads = zeros_like(params)
    mlp.backward(gradient[None], cache, params, grads, config)
    after, _ = mlp.forward(test, tree_map(lambda p, g: p - alpha * g, params, grads), fixed, config)
    np.testing.assert_allclose((after - before)[0] / alpha, -K @ gradient, rtol=1e-4)


@pytest.mark.parametrize("gate", [None, Comet(0.5)])
def test_equation_11_holds_with_the_masked_activations_only(gate, draw):
    """With a_{l-1} as printed it is wrong at each l > 1, more so where x_{l-1} is masked."""
    config = replace(COMET, gate=gate)
    x, params, fixed = drawn(config, draw)
    found = ntk.factors(x, params, fixed, config)
    printed = found._replace(x=found.a)
    for layer, expected in enumerate(ntk.full_contributions(x, params, fixed, config)):
        off = abs(ntk.contribution(layer, printed, found)[0] - expected).max()
        assert (off > 0.05 * abs(expected).max()) == (layer > 0)


def test_equation_11_holds_as_printed_where_x_is_a(draw):
    """Without masks and with the identity for f."""
    config = replace(COMET, gate=None, activation="identity")
    x, params, fixed = drawn(config, draw)
    found = ntk.factors(x, params, fixed, config)
    printed = found._replace(x=found.a)
    for layer, expected in enumerate(ntk.full_contributions(x, params, fixed, config)):
        assert_close(ntk.contribution(layer, printed, printed)[0], expected, "sum")


# --- what is measured ---------------------------------------------------------------------------


def test_ways_lead_from_each_input_to_the_next(draw):
    x = draw.standard_normal((3, 4))
    points = ntk.with_ways(x)
    i, j = ntk.compared(3)
    assert len(points) == 3 * (1 + len(ntk.WAY)) == j.max() + 1
    assert list(zip(i[:3], j[:3], strict=True)) == [(0, 1), (0, 2), (1, 2)]
    for number, (a, b) in enumerate(zip(i[3:], j[3:], strict=True)):
        share = ntk.WAY[number // 3]
        assert a == number % 3
        assert_close(points[b], x[a] + share * (x[(a + 1) % 3] - x[a]), "elementwise")


def test_the_centred_kernel_is_that_of_jacobians_less_their_mean(draw):
    J = draw.standard_normal((7, 20))
    less = J - J[:4].mean(axis=0)
    assert_close(ntk.centred(J @ J.T, 4), less @ less.T, "sum")


def test_a_normalised_kernel_is_a_cosine():
    K = np.array([[4.0, 3.0, 0.0], [3.0, 9.0, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(ntk.normalised(K), [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 0]])


@networks
def test_what_is_measured_is_what_full_jacobians_say_pair_by_pair(config, place, draw):
    x, params, fixed = drawn(config, draw, 4)
    classes = np.array([0, 1, 0, 1])
    result = ntk.measure(x, classes, params, fixed, config, place)
    points = ntk.with_ways(x)
    J = complex_jacobian(points, params, fixed, config).reshape(len(points), -1)
    less = J - J[:4].mean(axis=0)
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    pairs += [(i, 4 + 4 * way + i) for way in range(len(ntk.WAY)) for i in range(4)]
    expected = {name: np.zeros(ntk.BINS) for name in ("pairs", "kernel", "centred")}

    def cosine(u, v):
        return u @ v / (u @ u * (v @ v)) ** 0.5

    for i, j in pairs:
        where = int(np.degrees(np.arccos(cosine(points[i], points[j]))) // 5)
        expected["pairs"][where] += 1
        expected["kernel"][where] += cosine(J[i], J[j])
        expected["centred"][where] += cosine(less[i], less[j])
    for name, sums in expected.items():
        np.testing.assert_allclose(result[name], sums, atol=1e-12)
    within = [cosine(J[i], J[j]) for i, j in ((0, 2), (1, 3))]
    between = [cosine(J[i], J[j]) for i in (0, 2) for j in (1, 3)]
    assert result["classes"][1] == np.mean([[one > other for one in within] for other in between])
    found = ntk.factors(points, params, fixed, config)
    for layer in range(len(params)):
        u, v = found.x[layer], found.J[layer].reshape(len(points), -1)
        for name, factor in (("forward", u), ("backward", v)):
            sums = np.bincount([int(np.degrees(np.arccos(cosine(points[i], points[j]))) // 5)
                                for i, j in pairs],
                               [cosine(factor[i], factor[j]) for i, j in pairs], ntk.BINS)
            np.testing.assert_allclose(result[name][layer], sums, atol=1e-12)
    of_W = sum(result["share"])
    assert of_W == pytest.approx(1) if not config.bias else 0 < of_W < 1


def test_how_far_the_printed_equation_is_off(draw):
    """Of all pairs of different inputs; the other sign counted by hand."""
    a, x, J = (draw.standard_normal((4, size)) for size in (5, 5, 6))
    off, sign = ntk._printed(*(u @ u.T for u in (a, x, J)), 3)
    true = [x[i] @ x[j] * (J[i] @ J[j]) for i in range(3) for j in range(3) if i != j]
    printed = [a[i] @ a[j] * (J[i] @ J[j]) for i in range(3) for j in range(3) if i != j]
    difference = np.subtract(printed, true)
    assert off == pytest.approx((difference @ difference / np.dot(true, true)) ** 0.5)
    assert sign == np.mean(np.sign(printed) != np.sign(true))


def test_pairs_of_a_class_are_told_from_others(draw):
    values, within = draw.integers(0, 5, 40).astype(float), draw.random(40) < 0.3
    chances = [(one > other) + 0.5 * (one == other)
               for one in values[within] for other in values[~within]]
    assert ntk.told_apart(values, within) == pytest.approx(np.mean(chances))


def test_a_linear_kernel_is_half_at_60_degrees_and_2_over_pi_high():
    angles = np.arange(2.5, 180, 5)
    curve = Curve(angles, np.cos(np.radians(angles)))
    assert curve.half == pytest.approx(60, abs=0.1)
    assert curve.height == pytest.approx(2 / np.pi, abs=1e-3)


@pytest.mark.parametrize(("values", "half", "height"), [
    ((1.0, 1.0), np.inf, 1.0), ((0.6, 0.6), np.inf, (0.8 * 10 + 0.6 * 80) / 90),
    ((0.8, 0.2), 30.0, (0.9 * 10 + 0.5 * 40 + 0.2 * 40) / 90),
    ((0.0, 0.0), 5.0, 0.5 * 10 / 90)])
def test_narrowness_by_hand(values, half, height):
    curve = Curve(np.array([10.0, 50.0]), np.array(values))
    assert (curve.half, curve.height) == (pytest.approx(half), pytest.approx(height, abs=1e-3))


# --- cells --------------------------------------------------------------------------------------

SMALL = NtkConfig(models=("standard", "comet"), p_k=(0.5,), points=6, width=16, hidden=2,
                  dataset="glyphs", images=8, image_width=12, image_hidden=1, train=64,
                  validation=20, seeds=3, training=ntk.TrainConfig(epochs=1))
HERE = ntk.networks(SMALL)


def test_cells_are_all_networks_and_seeds():
    assert [tuple(network) for network in HERE] == [
        (dataset, *rest) for dataset in (None, "glyphs")
        for rest in (("standard", None), ("comet", 0.5))]
    found = {cell.name: cell for cell in ntk.cells(SMALL)}
    assert list(found) == [
        f"{name}-seed{seed}" for seed in range(3) for name in (
            "random-standard", "random-comet-pk0.5", "glyphs-standard", "glyphs-comet-pk0.5")]
    random, trained = found["random-comet-pk0.5-seed1"].spec, found["glyphs-standard-seed2"].spec
    assert random.model == mlp.MLPConfig((100, 16, 16, 1), gate=Comet(0.5), bias=False)
    assert trained.run.model == mlp.MLPConfig((3072, 12, 10), gate=None)
    assert (random.seed, trained.run.seed) == (1, 2)


def test_all_networks_of_a_seed_see_the_same_inputs(place, monkeypatch):
    """And start from the same W; those of another seed see others."""
    seen = []
    monkeypatch.setattr(ntk, "measure", lambda x, classes, params, *rest: seen.append(
        (x, params[0].weight)) or {})
    for network, seed in ((HERE[0], 0), (HERE[1], 0), (HERE[0], 1)):
        ntk.run_cell(ntk.cell_of(SMALL, network, seed).spec, place)
    (x, W), same, other = seen
    assert x.shape == (6, 100)
    assert all(np.array_equal(*both) for both in zip((x, W), same, strict=True))
    assert not any(np.array_equal(*both) for both in zip((x, W), other, strict=True))


def test_each_seed_is_measured_on_images_of_its_own_while_they_last():
    specs = [ntk.cell_of(SMALL, HERE[2], seed).spec for seed in range(3)]
    rows = [ntk.images_of(spec, 20).tolist() for spec in specs]
    assert rows == [list(range(8)), list(range(8, 16)), [16, 17, 18, 19, 0, 1, 2, 3]]
    assert ntk.images_of(specs[1], 5).tolist() == list(range(5))


def noise(draw, n=64):
    x, y = draw.integers(0, 256, (n, 3072), dtype="uint8"), draw.integers(0, 10, n)
    return Dataset("noise", "classification", x, y, x, y, x, y, 10, 2 / 255, -1.0)


def test_a_stopped_cell_goes_on_and_leaves_a_model(place, draw, monkeypatch):
    data = noise(draw)
    monkeypatch.setattr(ntk, "load", lambda *given: data)
    spec, stop = ntk.cell_of(SMALL, HERE[3], 1).spec, Stop()
    whole = ntk.run_cell(spec, place._replace(folder=place.folder.with_name("whole")))
    stop.ask()
    with pytest.raises(KeyboardInterrupt):
        ntk.run_cell(spec, place._replace(stop=stop))
    result = ntk.run_cell(spec, place)
    finish_folder(place.folder, result)
    for each in whole, result:
        del each["seconds"], each["last"]["seconds"]
    assert result == whole
    assert result["before"]["pairs"] == result["after"]["pairs"]
    assert result["before"]["kernel"] != result["after"]["kernel"]
    assert load_run(place.folder).config == spec.run.model


def test_a_random_cell_ends_when_asked_to(place):
    stop = Stop()
    stop.ask()
    with pytest.raises(KeyboardInterrupt):
        ntk.run_cell(ntk.cell_of(SMALL, HERE[0], 0).spec, place._replace(stop=stop))


@pytest.mark.parametrize(("changes", "message"), [
    ({"models": ("dropout",)}, 'unknown model "dropout"'),
    ({"dataset": "arm"}, "arm has no classes"),
    ({"p_k": (0.5, 0.5)}, "each given once"), ({"models": ()}, "--models needs at least one"),
    ({"points": 1}, "at least 2"), ({"images": 1}, "at least 2"), ({"seeds": 0}, "at least 1"),
    ({"p_k": (0.0,)}, "p_k"), ({"activation": "tanhh"}, "unknown activation")])
def test_bad_settings(changes, message):
    with pytest.raises(UserError, match=message):
        replace(SMALL, **changes)


# --- figure and table, from files made by hand --------------------------------------------------


def stored(height, layers, classes):
    """Return a measurement of a kernel that is `height` high at 7.5 and 92.5 degrees."""
    pairs = np.zeros(ntk.BINS)
    pairs[[1, 18]] = 2, 4

    def sums(value):
        return (value * pairs).tolist()

    return {"pairs": pairs.tolist(), "kernel": sums(height), "centred": sums(height / 2),
            "forward": layers * [sums(height)], "backward": layers * [sums(1.0)],
            "share": layers * [1 / layers],
            "printed": [[0.5 + layer, 0.1 * layer] for layer in range(layers - 1)],
            **({"classes": classes} if classes else {})}


def finished(out, heights, datasets=(None, "glyphs")):
    """Write the files of all cells: of seed s kernels are `heights[model] + s / 10` high."""
    for network in HERE:
        if network.dataset not in datasets:
            continue
        for seed in range(3):
            height = heights[network.model] + seed / 10
            result = {"before": stored(height, 3, None), "full": 1e-15 * (1 + seed)}
            if network.dataset:
                result = {"before": stored(height, 2, [0.5, 0.25, 0.75]), "test_accuracy": 0.25,
                          "after": stored(height / 2, 2, [0.5, 0.5, 0.5])}
            folder = ntk.cell_of(SMALL, network, seed).folder(out)
            folder.mkdir(parents=True)
            write_result(folder, result)


def test_the_table_says_what_the_files_say(tmp_path):
    finished(tmp_path, {"standard": 0.7, "comet": 0.2})
    lines = ntk.table(SMALL, tmp_path).splitlines()
    standard, comet = (line.split() for line in lines[2:4])
    # t_{2, 0.975} = 4.303; the heights are (7.5 (1 + h) / 2 + 82.5 h) / 90, 0.1 apart: 0.0958
    assert standard == ["standard", "-", "never", "0.81", "+-0.24", "-", "0.81", "+-0.24", "1.00",
                        "+-0.00", "6", "+-1"]
    assert comet[:8] == ["comet", "0.5", "5", "+-2", "0.33", "+-0.24", "-0.48", "+-0.00"]
    assert lines[7].split()[-6:] == ["0.50", "+-0.00", "0.25", "+-0.00", "0.75", "+-0.00"]
    assert lines[12].split()[-2:] == ["0.25", "+-0.00"]
    text = "\n".join(lines)
    assert ("standard: with x_{l-1} within 3e-15 of the full Jacobian; with a_{l-1} off by 50 % to "
            "150 % (l = 2..L), of the other sign for up to 10 % of the pairs") in text
    assert ("Before training 2 of 2 kernels of COMET are lower than the standard network's "
            "(interval without 0), from which they differ by -0.48 to -0.48.") in text
    assert "Before training 2 of 2 centred kernels of COMET" in text
    assert "After training 1 of 1 kernels of COMET" in text


def test_a_kernel_that_is_no_narrower_is_not_called_so(tmp_path):
    finished(tmp_path, {"standard": 0.2, "comet": 0.7})
    assert "Before training 0 of 2 kernels of COMET" in ntk.table(SMALL, tmp_path)


def test_the_figure_shows_what_the_files_say(tmp_path, saved):
    finished(tmp_path, {"standard": 0.7, "comet": 0.2})
    assert ntk.draw(SMALL, tmp_path) == [tmp_path / "ntk.png"]
    panels = saved[0].axes
    lines = {line.get_label(): line.get_xydata() for line in panels[0].lines}
    np.testing.assert_allclose(lines["standard"], [[0, 1], [7.5, 0.8], [92.5, 0.8]])
    np.testing.assert_allclose(lines["COMET, $p_k$ = 0.5"], [[0, 1], [7.5, 0.3], [92.5, 0.3]])
    after = {line.get_label(): line.get_xydata() for line in panels[4].lines}
    np.testing.assert_allclose(after["standard"], [[0, 1], [7.5, 0.4], [92.5, 0.4]])


@pytest.mark.parametrize("dataset", [None, "glyphs"])
def test_a_part_of_the_cells_is_shown(dataset, tmp_path, saved):
    finished(tmp_path, {"standard": 0.7, "comet": 0.2}, (dataset,))
    ntk.draw(SMALL, tmp_path)
    assert ("random networks" in ntk.table(SMALL, tmp_path)) == (dataset is None)


def test_nothing_finished_is_a_sentence(tmp_path):
    pytest.importorskip("matplotlib")
    for show in (ntk.table, ntk.draw):
        with pytest.raises(UserError, match="holds no finished cell of ntk: run it first"):
            show(SMALL, tmp_path)


def test_a_damaged_result_is_a_sentence(tmp_path):
    finished(tmp_path, {"standard": 0.7, "comet": 0.2})
    folder = ntk.cell_of(SMALL, HERE[0], 0).folder(tmp_path)
    for change in ({"kernel": [1.0]}, {"pairs": ntk.BINS * [0]}, {"share": [1.0]},
                   {"centred": ntk.BINS * [float("nan")]}, {"printed": None}):
        write_result(folder, {"before": stored(0.5, 3, None) | change})
        with pytest.raises(UserError, match="is damaged: "):
            ntk.table(SMALL, tmp_path)
