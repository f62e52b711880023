"""What all tests share."""

import pytest

from comet_np.rng import stream


@pytest.fixture
def draw(request):
    """Return a random stream of the test's own, so that a new test does not move its neighbours."""
    return stream(0, request.node.name)
