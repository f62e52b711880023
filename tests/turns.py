"""Long lists of cases, of which a part runs always."""

import pytest


def in_turn(values, options):
    """Return (value, option) for each pair, as parameters of a test.

    Each value comes with one option in the ordinary run, in turn, and with the others in a long
    one.
    """
    return [pytest.param(value, option, marks=() if i % len(options) == j else pytest.mark.long)
            for i, value in enumerate(values) for j, option in enumerate(options)]
