"""Tasks: what a batch, a loss and a metric are."""

from ...errors import unknown
from .base import Batch, Task
from .classification import Classification
from .language import Language
from .regression import Regression

__all__ = ["TASKS", "Batch", "Classification", "Language", "Regression", "Task", "task"]

TASKS: dict[str, Task] = {"classification": Classification(), "regression": Regression(),
                          "language": Language()}


def task(name: "str | Task") -> Task:
    """Return the task of this name, or the task itself.

    Raises
    ------
    UserError
        If there is none of that name.
    """
    if isinstance(name, Task):
        return name
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]
