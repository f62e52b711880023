"""The test vectors, computed by the CuPy backend."""

import pytest

from comet_np.conformance.conform import conform
from comet_np.conformance.ours import Ours
from comet_np.conformance.vectors import read_all


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_our_own_adapter_passes_all(gpu, dtype):
    cases = read_all()
    report = conform(Ours(dtype, "cupy"), cases)
    assert report.ok, str(report)
    assert report.cases == len(cases)
