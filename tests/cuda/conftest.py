"""The GPU of a test: the stand-in, or with the marker `gpu` a real one."""

import pytest

from comet_np.backends import BackendError, get_backend

from . import shim
from .strict_cupy import strict_cupy


@pytest.fixture(params=["stand-in", pytest.param("device", marks=pytest.mark.gpu)])
def gpu(request):
    """Yield the CuPy backend."""
    if request.param == "device":
        try:
            yield get_backend("cupy")
        except BackendError as error:
            pytest.skip(str(error))
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
