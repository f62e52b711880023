"""All test vectors, a module a family: their functions are registered when it is imported."""

from collections.abc import Iterator

from . import (  # noqa: F401  (registers them)
    cap_cases,
    layer_cases,
    mlp_cases,
    model_cases,
    training_cases,
)
from .files import Case
from .making import every


def generate(large: bool = False) -> Iterator[Case]:
    """Yield all cases, sorted by name: the small set, or with it the large one.

    Raises
    ------
    UserError
        If another machine might write another file.
    """
    yield from every(large)
