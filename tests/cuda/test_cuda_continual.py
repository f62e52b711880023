"""Learning in sequence and transfer on a GPU: NumPy's accuracies and weights."""

from dataclasses import replace

import pytest

from comet_np import checkpoint
from comet_np.backends import get_backend
from comet_np.experiments import continual, transfer
from comet_np.experiments.experiment import Place
from comet_np.experiments.progress import Progress

from ..test_continual import SMALL, in_float64, small
from ..test_transfer import SMALL as FEW
from ..tolerances import assert_close

CASES = {
    "pixels in another order": (continual, replace(
        SMALL, models=("comet",), sequences=("glyphs-permuted/2",), epochs=1)),
    "groups of classes": (continual, replace(SMALL, models=("ewc",), epochs=1, fisher=3)),
    "all classes met": (continual, replace(SMALL, models=("dropout",), epochs=1, loss_over="met")),
    "transfer": (transfer, replace(FEW, models=("comet",), epochs=1))}


@pytest.mark.parametrize("case", CASES)
def test_a_cell_equals_numpys(gpu, case, tmp_path, monkeypatch):
    module, config = CASES[case]
    spec = in_float64(replace(module.cells(config)[0].spec, lrs=(1e-2,)))
    model = replace(spec.run.model, widths=(48, *spec.run.model.widths[1:]))
    spec = replace(spec, run=replace(spec.run, model=model))
    monkeypatch.setattr("comet_np.experiments.lessons.load", lambda spec, place: small(side=4))
    results, arrays = [], []
    for backend in (gpu, get_backend("numpy")):
        folder = tmp_path / backend.name
        results.append(module.run_cell(spec, Place(folder, backend, None, Progress(1))))
        arrays.append(checkpoint.load_latest(folder / "checkpoint")[0])
    assert results[0] == results[1]
    assert arrays[0].keys() == arrays[1].keys()
    for name, array in arrays[0].items():
        assert_close(array, arrays[1][name], "training")
