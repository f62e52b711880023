"""Learning-rate schedules: the rate of a step as a fraction of the highest one."""

import math

from .errors import UserError, unknown

SCHEDULES = ("constant", "cosine", "warmup_cosine")


def schedule(name: str, step: int, total: int, warmup: int = 0) -> float:
    """Return the factor by which the learning rate of step `step` (from 0) is multiplied.

    ``constant``: 1.  ``cosine``: (1 + cos(pi step / total)) / 2.
    ``warmup_cosine``: step / warmup for the first `warmup` steps, then the cosine over the rest.

    Raises
    ------
    UserError
        If the name is unknown, or `warmup` is not in 0..total.
    """
    if name not in SCHEDULES:
        raise unknown("schedule", name, SCHEDULES)
    if not 0 <= warmup <= total:
        raise UserError(f"the warm-up must be 0 to {total} steps long, the length of the run, got "
                        f"{warmup}")
    if name == "constant":
        return 1.0
    if name == "cosine":
        warmup = 0
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
