"""The laws of extension hold on a GPU too, where steps are captured as graphs."""

import pytest

from ..test_extension import OWN, check_own


@pytest.mark.parametrize("name", OWN)
def test_what_is_of_ones_own_resumes_bit_for_bit(gpu, name, tmp_path):
    check_own(name, tmp_path, gpu, epochs=2)
