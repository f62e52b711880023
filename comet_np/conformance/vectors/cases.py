"""All test vectors, a module a family: their functions are registered when it is imported."""

from collections.abc import Callable, Iterator
from pathlib import Path

from ...errors import UserError
from . import (  # noqa: F401  (registers them)
    cap_cases,
    layer_cases,
    mlp_cases,
    model_cases,
    training_cases,
)
from .files import Case, write
from .making import CASES, made

BESIDE = ("FORMAT.md", "schema.json", "reader.c")


def names(large: bool = False) -> list[str]:
    """Return the names of all cases, sorted: of the small set, or of the large one."""
    return sorted(name for name, entry in CASES.items() if large or not entry.large)


def count(large: bool = False) -> int:
    """Return how many cases there are."""
    return len(names(large))


def generate(large: bool = False) -> Iterator[Case]:
    """Yield all cases, sorted by name: the small set, or with it the large one.

    Raises
    ------
    UserError
        If another machine might write another file.
    """
    return map(made, names(large))


def write_all(folder: Path, large: bool = False,
              told: Callable[[float, str], None] = lambda work, text: None) -> int:
    """Write all cases, and what says how to read them, into a new or empty folder.

    Parameters
    ----------
    folder : Path
    large : bool
    told : function
        Called after each case with 1 and its name.

    Returns
    -------
    int : the bytes of all files

    Raises
    ------
    UserError
        If the folder is not empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError(f"{folder} is not empty, and test vectors are written into a new or empty "
                        "folder: name another one")
    for name in BESIDE:
        (folder / name).write_bytes(Path(__file__).with_name(name).read_bytes())
    for case in generate(large):
        write(folder / case.id, case)
        told(1, case.id)
    return sum(file.stat().st_size for file in folder.rglob("*.*") if file.is_file())
