"""The GPU of a test: the stand-in, or with the marker `gpu` a real one.

COMET_NP_REQUIRE_GPU=1 lets tests fail, rather than be skipped, for want of a real one.
"""

import os

import pytest

from comet_np.backends import BackendError, get_backend

from . import shim
from .strict_cupy import strict_cupy


def real_gpu():
    """Return the CuPy backend on a real GPU, or skip the test."""
    try:
        return get_backend("cupy")
    except BackendError as error:
        missing = pytest.fail if os.environ.get("COMET_NP_REQUIRE_GPU") == "1" else pytest.skip
        missing(str(error))


@pytest.fixture(params=["stand-in", pytest.param("device", marks=pytest.mark.gpu)])
def gpu(request):
    """Yield the CuPy backend."""
    if request.param == "device":
        yield real_gpu()
        return
    if shim.GXX is None:
        pytest.skip("g++ compiles the kernels for the CPU, and is not installed")
    with strict_cupy():
        yield get_backend("cupy")


@pytest.fixture
def machine():
    """Yield the stand-in's `Machine`, for what a real GPU cannot show."""
    if shim.GXX is None:
        pytest.skip("g++ compiles the kernels for the CPU, and is not installed")
    with strict_cupy() as machine:
        yield machine
