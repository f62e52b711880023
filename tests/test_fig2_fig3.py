"""Figures 2 and 3: drawn by the paper's laws, counted right, and shown as the files have them."""

import numpy as np
import pytest

from comet_np.backends import get_backend
from comet_np.errors import UserError
from comet_np.experiments import fig2, fig3
from comet_np.experiments.experiment import Place
from comet_np.experiments.files import write_result
from comet_np.experiments.progress import Progress
from comet_np.experiments.signals import Stop
from comet_np.functional.routing import winners
from comet_np.gates import Comet
from comet_np.models import mlp
from tests import naive
from tests.tolerances import assert_close


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path, get_backend("numpy"), None, Progress(1))


def finish(config, out, module, results):
    """Write the results of finished cells."""
    for cell, result in zip(module.cells(config), results, strict=False):
        cell.folder(out).mkdir(parents=True)
        write_result(cell.folder(out), result)


def within(values, mean, std, errors=5):
    """Whether the mean of values lies where it should, give or take some standard errors."""
    return abs(np.mean(values) - mean) < errors * std / np.size(values) ** 0.5


def rows(table):
    """Return the words of a table's rows."""
    return [line.split() for line in table.splitlines()]


# --- Figure 2 -----------------------------------------------------------------------------------


def spec_of(**changes):
    settings = {"first": 0, "last": 1, "networks": 1, "p_k": (0.25, 1.0), "inputs": 7, "width": 12,
                "hidden": 3, "std": 25.0, "activation": "softplus", "seed": 0}
    return fig2.Fig2Spec(**settings | changes)


def test_inputs_have_an_integer_mean_from_0_to_100_each_its_own():
    spec = spec_of(inputs=10, std=1e-3)
    mu = np.array([fig2.input_pair(spec, pair).mean(axis=1) for pair in range(1000)])
    np.testing.assert_allclose(mu, mu.round(), atol=2e-3)
    mu = mu.round()
    assert (mu.min(), mu.max()) == (0, 100)
    assert within(mu, 50, 850**0.5)  # the variance of an integer in 0..100 is (101^2 - 1) / 12
    assert within((mu - 50) ** 2, 850, 760)
    assert within((mu[:, 0] - 50) * (mu[:, 1] - 50), 0, 850)


def test_inputs_are_normal_around_their_mean():
    x = np.array([fig2.input_pair(spec_of(inputs=200), pair) for pair in range(200)])
    assert x.shape == (200, 2, 200)
    deviations = x - x.mean(axis=-1, keepdims=True)
    assert (deviations**2).sum() / (400 * 199) == pytest.approx(25**2, rel=0.03)
    assert (deviations**4).mean() / (deviations**2).mean() ** 2 == pytest.approx(3, rel=0.05)
    assert within(deviations[:, 0] * deviations[:, 1], 0, 25**2)


def test_weights_are_uniform_by_the_number_of_inputs_of_their_layer(place):
    spec = spec_of(inputs=30, width=200)
    params, V = fig2.Networks(spec, place.backend).draw(0, 0)
    assert [p.weight.shape for p in params] == [(200, 30), (200, 200), (200, 200), (1, 200)]
    assert [V_l.shape for V_l in V] == [p.weight.shape for p in params[:-1]]
    assert all(p.bias is None for p in params)  # eq. (7)
    for drawn in (*(p.weight for p in params[:-1]), *V):
        bound = drawn.shape[1] ** -0.5
        assert 0.99 * bound < drawn.max() <= bound
        assert -bound <= drawn.min() < -0.99 * bound
        assert within(drawn, 0, bound / 3**0.5)
        assert within(drawn**2, bound**2 / 3, bound**2 * (4 / 45) ** 0.5)


def test_every_network_is_another_one_and_each_always_the_same(place):
    def drawn(pair, network, seed=0):
        params, V = fig2.Networks(spec_of(seed=seed), place.backend).draw(pair, network)
        return [array.copy() for array in (*(p.weight for p in params), *V)]

    first = drawn(0, 0)
    assert all(np.array_equal(*same) for same in zip(first, drawn(0, 0), strict=True))
    for other in (drawn(0, 1), drawn(1, 0), drawn(0, 0, seed=1)):
        assert not any(np.array_equal(*both) for both in zip(first, other, strict=True))
    assert not np.array_equal(first[0], first[4])  # W_1 and V_1


def test_cosine():
    assert fig2.cosine(np.array([[1.0, 0.0], [1.0, 1.0]])) == pytest.approx(0.5**0.5)
    masks = np.array([[True, True, False, False], [True, False, True, False]])
    assert fig2.cosine(masks) == 0.5  # the share of one's active neurons that are the other's


def test_cosines_are_those_of_the_definitions(place):
    """Of masks and activations of all hidden layers, mean over the networks."""
    spec = spec_of(first=3, last=5, networks=2)
    result = fig2.run_cell(spec, place)
    networks = fig2.Networks(spec, place.backend)
    for row, pair in enumerate(range(3, 5)):
        x = fig2.input_pair(spec, pair)
        expected = np.zeros((2, 2))
        for network in range(2):
            params, V = networks.draw(pair, network)
            for i, k in enumerate((3, 12)):
                both = [naive_activations(x_i, params, V, k) for x_i in x]
                for what in range(2):
                    u, v = both[0][what], both[1][what]
                    expected[what, i] += u @ v / (u @ u * (v @ v)) ** 0.5 / 2
        u, v = x.astype("float64")
        assert result["input"][row] == pytest.approx(u @ v / (u @ u * (v @ v)) ** 0.5)
        assert_close(np.float32([result["mask"][row], result["activation"][row]]), expected, "sum")
    assert result["mask"] == [[pytest.approx(m), 1.0] for m, _ in result["mask"]]  # p_k = 1: all


def naive_activations(x, params, V, k):
    """Return masks and activations of an input, all hidden layers side by side."""
    z, masks, activations = x, [], []
    for p, V_l in zip(params, V, strict=False):
        c = naive.product(V_l, z)
        m = naive.cap(c, k)
        z = [c_i if won else 0.0 for c_i, won in zip(c, m, strict=True)]
        a = naive.product(p.weight, x)
        x = [naive.softplus(a_i) if won else 0.0 for a_i, won in zip(a, m, strict=True)]
        masks.append(m)
        activations.append(x)
    return np.concatenate(masks).astype(float), np.concatenate(activations)


def test_more_similar_inputs_have_more_similar_masks(place):
    result = fig2.run_cell(spec_of(last=12, networks=2, inputs=100, width=64), place)
    mask, activation = np.array(result["mask"]), np.array(result["activation"])
    assert np.corrcoef(result["input"], mask[:, 0])[0, 1] > 0.5
    assert (activation[:, 0] < activation[:, 1]).all()  # sparser tells inputs apart more sharply


CONFIG2 = fig2.Fig2Config(pairs=60, p_k=(0.1, 1.0))


def finished_fig2(out):
    """Write the files of two cells: of pair i the input cosine is i / 59, and so on."""
    finish(CONFIG2, out, fig2, [
        {"input": [i / 59 for i in pairs], "mask": [[i / 100, 1.0] for i in pairs],
         "activation": [[i / 200, 1 - i / 590] for i in pairs]}
        for pairs in (range(50), range(50, 60))])


def test_the_table_of_figure_2_compares_the_most_similar_pairs_with_the_least(tmp_path):
    """Of 60 pairs the first and the last twelve."""
    finished_fig2(tmp_path)
    table = rows(fig2.table(CONFIG2, tmp_path))
    assert table[1] == ["0.1", "0.055", "0.535", "0.028", "0.268", "1.000"]
    assert table[2] == ["1", "1.000", "1.000", "0.991", "0.909", "-1.000"]


def test_figure_2_shows_all_finished_pairs(tmp_path, saved):
    finished_fig2(tmp_path)
    assert fig2.draw(CONFIG2, tmp_path) == [tmp_path / "fig2.png"]
    figure, = saved
    i = np.arange(60)
    for axes, drawn in zip(figure.axes, ([i / 100, i * 0 + 1.0], [i / 200, 1 - i / 590]),
                           strict=True):
        for points, expected in zip(axes.collections, drawn, strict=True):
            np.testing.assert_allclose(points.get_offsets(), np.transpose([i / 59, expected]))
    assert figure.get_suptitle().startswith("fig2: 60 pairs, 10 networks of 10 x 512 a pair")


@pytest.mark.parametrize(("module", "config", "parts"), [
    (fig2, fig2.Fig2Config(pairs=120), [(0, 50), (50, 100), (100, 120)]),
    (fig2, fig2.Fig2Config(pairs=50), [(0, 50)]),
    (fig3, fig3.Fig3Config(networks=51), [(0, 25), (25, 50), (50, 51)])])
def test_cells_are_parts_of_the_whole(module, config, parts):
    cells = module.cells(config)
    assert [(cell.spec.first, cell.spec.last) for cell in cells] == parts
    for cell in cells:
        share = (cell.spec.last - cell.spec.first) / parts[-1][1]
        assert cell.work == pytest.approx(share * sum(cell.work for cell in cells))


@pytest.mark.parametrize(("module", "spec"), [
    (fig2, spec_of()), (fig3, fig3.Fig3Spec(0, 1, 2, ("arm", "arm"), 0))])
def test_a_cell_ends_when_asked_to(module, spec, place):
    stop = Stop()
    stop.ask()
    with pytest.raises(KeyboardInterrupt):
        module.run_cell(spec, place._replace(stop=stop))


@pytest.mark.parametrize(("module", "config"), [(fig2, fig2.Fig2Config()),
                                                (fig3, fig3.Fig3Config())])
def test_nothing_finished_is_a_sentence(tmp_path, module, config):
    pytest.importorskip("matplotlib")
    for show in (module.table, module.draw):
        with pytest.raises(UserError, match=r"holds no finished cell of fig[23]: run it first"):
            show(config, tmp_path)


# --- Figure 3 -----------------------------------------------------------------------------------


def test_networks_are_drawn_by_the_laws_of_the_paper():
    """N_l ~ U(100, 1000), 1 - p_k ~ U(0.05, 1)."""
    configs = [fig3.network(0, index, 3072) for index in range(3000)]
    assert {(len(config.widths), config.widths[0]) for config in configs} == {(5, 3072)}
    N = np.array([config.widths[1:-1] for config in configs])
    assert (N.min(), N.max()) == (100, 1000)
    assert within(N, 550, 901 / 12**0.5)
    assert abs(np.corrcoef(N.T)[np.triu_indices(3, 1)]).max() < 0.1  # each its own
    inactive = 1 - np.array([config.gate.p_k for config in configs])
    assert 0.05 <= inactive.min() < 0.06
    assert 0.99 < inactive.max() <= 1
    assert within(inactive, 0.525, 0.95 / 12**0.5)
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert np.quantile(inactive, share) == pytest.approx(0.05 + 0.95 * share, abs=0.04)


def test_utilisation_is_what_counting_one_by_one_gives(place, monkeypatch, draw):
    monkeypatch.setattr(fig3, "BLOCK", 7)
    config = mlp.MLPConfig((5, 11, 9, 1), gate=Comet(0.3))
    _, V = mlp.init(config)
    x = draw.integers(0, 256, (20, 5)).astype("uint8")
    expected = [np.zeros(11, int), np.zeros(9, int)]
    for image in x:
        z = image * (2 / 255) - 1
        for count, V_l, k in zip(expected, V, (3, 2), strict=True):
            c = naive.product(V_l, z)
            m = naive.cap(c, k)
            z = [c_i if won else 0.0 for c_i, won in zip(c, m, strict=True)]
            count += m
    found = fig3.utilisation(x, 2 / 255, -1.0, V, config, place)
    for count, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(count, wanted)


def test_a_cell_counts_sleepers_and_those_that_wake(place, monkeypatch):
    """The second data set has another number of images."""
    config = mlp.MLPConfig((6, 4, 2, 3, 1), gate=Comet(0.5))
    images = {"first": np.zeros((10, 6), "uint8"), "second": np.zeros((40, 6), "uint8")}
    counts = {10: [[0, 10, 0, 5], [5, 5], [0, 1, 10]], 40: [[1, 0, 0, 40], [0, 40], [7, 0, 0]]}
    monkeypatch.setattr(fig3, "network", lambda seed, index, inputs: config)
    monkeypatch.setattr(fig3, "_images", lambda name, place, count: (images[name], 1.0, 0.0))
    monkeypatch.setattr(fig3, "utilisation", lambda x, *rest: [np.array(c) for c in counts[len(x)]])
    result = fig3.run_cell(fig3.Fig3Spec(0, 1, None, ("first", "second"), 0), place)
    network, = result["networks"]
    assert (network["p_k"], list(network["widths"])) == (0.5, [4, 2, 3])
    assert (network["never"], network["woken"]) == (3, 2)
    for quantiles, shares in zip(network["quantiles"], ([0, 0, 0.5, 1], [0.5, 0.5], [0, 0.1, 1]),
                                 strict=True):
        assert len(quantiles) == 101
        assert (quantiles[0], quantiles[-1]) == (shares[0], shares[-1])
        assert quantiles[50] == pytest.approx(np.median(shares))


def test_every_network_has_a_shape_and_weights_of_its_own(place, monkeypatch):
    """Whichever cell it is in."""
    init, drawn = mlp.init, []
    monkeypatch.setattr(fig3.mlp, "init", lambda *given: drawn.append(given[:2]) or init(*given))
    monkeypatch.setattr(fig3, "_images", lambda *given: (np.zeros((2, 5), "uint8"), 1.0, 1.0))
    for first, last in ((0, 3), (0, 1), (1, 3)):
        fig3.run_cell(fig3.Fig3Spec(first, last, None, ("a", "b"), 0), place)
    assert drawn[:3] == drawn[3:]
    configs, seeds = zip(*drawn[:3], strict=True)
    assert len(set(configs)) == len(set(seeds)) == 3
    assert configs == tuple(fig3.network(0, index, 5) for index in range(3))


def test_the_mean_utilisation_is_the_share_of_winners(place, monkeypatch, draw):
    images = draw.integers(0, 256, (60, 50)).astype("uint8")
    monkeypatch.setattr(fig3, "_images", lambda name, place, count: (images, 2 / 255, -1.0))
    result = fig3.run_cell(fig3.Fig3Spec(0, 3, None, ("a", "b"), 0), place)
    for network in result["networks"]:
        for quantiles, N in zip(network["quantiles"], network["widths"], strict=True):
            assert np.mean(quantiles) == pytest.approx(winners(network["p_k"], N) / N, abs=0.02)


def test_all_images_are_those_of_all_splits(place, monkeypatch):
    parts = {f"{xy}_{part}": np.full((n, 2), n, "uint8") for xy in "xy"
             for part, n in (("train", 5), ("val", 3), ("test", 2))}
    data = fig3.datasets.Dataset("a", "classification", outputs=1, scale=0.5, shift=0.25, **parts)
    monkeypatch.setattr(fig3.datasets, "load", lambda name, folder: data)
    x, *scale = fig3._images("a", place, None)
    assert (x[:, 0].tolist(), scale) == (5 * [5] + 3 * [3] + 2 * [2], [0.5, 0.25])
    assert fig3._images("a", place, 6)[0][:, 0].tolist() == 5 * [5] + [3]


def test_statistics_of_sleepers():
    networks = [{"never": 0, "widths": [100, 200]}] * 99 + [{"never": 3, "widths": [100, 200]}]
    found = fig3.statistics(networks)
    # A bootstrap sample has the one network 0 times with probability 0.37, at most 3 times with
    # 0.98, and at most 2 times with 0.92.
    assert found["never active"] == pytest.approx((3 / 30_000, 0, 9 / 30_000))
    z, p, n = 1.959964, 0.01, 100  # Wilson 1927
    middle, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    assert found["models with one"] == pytest.approx(
        (p, (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)))


CONFIG3 = fig3.Fig3Config(networks=27, images=1000)


def finished_fig3(out):
    """Write the files of two cells, 27 networks of 1000 neurons each, of which 2 have sleepers."""
    networks = [{"p_k": 0.03 * (i + 1), "widths": [500, 300, 200],
                 "never": {3: 30, 26: 24}.get(i, 0), "woken": {3: 20, 26: 1}.get(i, 0),
                 "quantiles": 3 * [101 * [i / 27]]} for i in range(27)]
    finish(CONFIG3, out, fig3, [{"networks": networks[:25]}, {"networks": networks[25:]}])


def test_the_table_of_figure_3_counts_networks_and_neurons(tmp_path):
    finished_fig3(tmp_path)
    table = fig3.table(CONFIG3, tmp_path)
    never, some = rows(table)[1:3]
    assert never[:6] == ["never", "active", "0.00076", "%", "0.2", "%"]  # 54 of 27,000
    assert some[:7] == ["models", "with", "one", "2", "%", "7.4", "%"]  # 2 of 27
    assert table.endswith("27 networks, 1000 images of cifar10: 54 of 27000 neurons never active; "
                          "21 of them are active on 1000 images of cifar100")


def test_figure_3_shows_a_sparse_network_a_dense_one_and_all_sleepers(tmp_path, saved):
    finished_fig3(tmp_path)
    assert fig3.draw(CONFIG3, tmp_path) == [tmp_path / "fig3.png"]
    sparse, dense, sleepers = saved[0].axes
    for axes, shown in ((sparse, 2), (dense, 16)):  # p_k = 0.09 and 0.51, nearest to 0.1 and 0.5
        assert f"$p_k$ = {0.03 * (shown + 1):.2f}" in axes.get_title()
        np.testing.assert_array_equal(axes.lines[0].get_ydata(), 101 * [shown / 27])
    share = {3: 3.0, 26: 2.4}
    np.testing.assert_allclose(sleepers.collections[0].get_offsets(),
                               [[0.03 * (i + 1), share.get(i, 0)] for i in range(27)])
