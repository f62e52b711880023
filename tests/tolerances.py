"""How far two computations of the same thing may be apart: one table for all tests."""

import numpy as np

# Relative to the largest magnitude in the expected array, so that a zero never passes for a value.
TOLERANCES = {
    # a few roundings an element
    "elementwise": {"float16": 2e-3, "float32": 1e-6, "float64": 2e-15},
    # sums and products of up to some thousand terms, and what is made of them
    "sum": {"float32": 1e-5, "float64": 1e-14},
    # central differences in a random direction, and the complex step (comet_np.gradcheck)
    "difference": {"float64": 1e-7},
    "difference of a network": {"float64": 1e-6},
    "complex step": {"float64": 1e-14},
    # against PyTorch: one step, and twenty of them (the project's promise)
    "torch": {"float64": 1e-12},
    "training": {"float64": 1e-10},
}


def relative_error(actual, expected, summed=None):
    """Return the largest difference over the largest expected magnitude; infinities must agree.

    `summed`: the sums of the magnitudes of what was added up, in place of the expected magnitudes
    where terms may cancel: rounding is as large as the terms are, not as their sum.
    """
    actual, expected = np.asarray(actual), np.asarray(expected, dtype="float64")
    assert actual.shape == expected.shape
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite])
    difference = np.abs(actual[finite].astype("float64") - expected[finite]).max(initial=0)
    if difference == 0:
        return 0.0
    largest = np.abs((expected if summed is None else summed)[finite]).max(initial=0)
    return difference / largest if largest else np.inf  # NaN, too, is above every tolerance


def assert_close(actual, expected, operation, summed=None):
    """Assert that `actual` agrees with `expected` as well as its dtype and operation allow."""
    error = relative_error(actual, expected, summed)
    allowed = TOLERANCES[operation][str(np.asarray(actual).dtype)]
    assert error <= allowed, f"relative error {error:.2e}, allowed for {operation}: {allowed:.0e}"
