"""Learning-rate schedules: the values at every step, and what cannot be scheduled."""

import math

import pytest

from comet_np.errors import UserError
from comet_np.schedules import SCHEDULES, schedule

COSINE = [0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(5)]
EXPECTED = {
    "constant": [1] * 7,
    "cosine": [0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(7)],
    "warmup_cosine": [0, 0.5, *COSINE],
}


def test_the_list_is_complete():
    assert set(EXPECTED) == set(SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_step(name):
    values = [schedule(name, step, total=6, warmup=2) for step in range(7)]
    assert values == EXPECTED[name]
    assert all(isinstance(value, float) for value in values)


def test_warmup_only_and_none():
    assert [schedule("warmup_cosine", step, 3, 3) for step in range(4)] == [0, 1 / 3, 2 / 3, 1]
    assert schedule("warmup_cosine", 1, 4) == schedule("cosine", 1, 4)
    assert schedule("warmup_cosine", 0, 0) == 1


def test_bad_arguments():
    with pytest.raises(UserError, match='unknown schedule "cosin"; did you mean "cosine"'):
        schedule("cosin", 0, 10)
    for warmup in (-1, 11):
        with pytest.raises(UserError, match=f"0 to 10 steps long.* got {warmup}"):
            schedule("warmup_cosine", 0, 10, warmup)
