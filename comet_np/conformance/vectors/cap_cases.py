"""Cases of the cap: scores in, mask out."""

from functools import partial

import numpy as np

from ...functional.routing import TIES, kwta_mask
from .making import Draw, Made, case

SHAPES = {1: (1,), 2: (1, 2), 7: (1, 3, 6, 7), 10: (1, 5, 9), 101: (10, 50, 90)}  # N: all k
SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, 1, -1, np.inf, 0.0, -np.inf, 1])


def make(ties: str, N: int, k: int, draw: Draw) -> Made:
    """Return rows that are all distinct, with few values, all equal, and with infinities."""
    distinct = np.argsort(draw.integers("order", (4, N), 0, 2**32 - 1), kind="stable") / 8 - 2
    few = draw.grid("few", (4, N), 1, 1)
    equal = np.repeat(np.array([[0.0], [-1.5]]), N, axis=1)
    zeros = np.where(draw.integers("sign", (1, N), 0, 1) > 0, 0.0, -0.0)
    rows = [distinct, few, equal, zeros]
    if len(SPECIAL) == N:
        rows.append(SPECIAL[None])
    scores = np.concatenate(rows)
    return Made({"N": N, "k": k, "ties": ties}, {"scores": scores},
                {"mask": kwta_mask(scores, k, ties)}, {"mask": "cap"})


RULES = {"strict": "equal scores that straddle rank k all lose", "threshold": "they all win",
         "index": "exactly k win, the lowest index first"}
for ties in TIES:
    for N, every_k in SHAPES.items():
        for k in every_k:
            case(f"cap-{ties}-n{N}-k{k}", f"the cap, {RULES[ties]}", "(3)", "cap")(
                partial(make, ties, N, k))
