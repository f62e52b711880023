"""Cases of the cap: scores in, mask out."""

from functools import partial

import numpy as np

from ...functional.routing import TIES, kwta_mask
from .making import Draw, Made, case

SHAPES = {1: (1,), 2: (1, 2), 7: (1, 3, 6, 7), 10: (1, 5, 9), 101: (10, 50, 90)}  # N: all k
LARGE = {1000: (100, 500, 900), 3000: (300, 1500, 2700), 9000: (900, 4500, 8100)}
SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, 1, -1, np.inf, 0.0, -np.inf, 1])


def make(ties: str, N: int, k: int, draw: Draw) -> Made:
    """Return rows that are all distinct, with few values, all equal, and with infinities."""
    order = np.argsort(draw.integers("order", (4, N), 0, 2**32 - 1), kind="stable")
    distinct = (order - N // 2) / 8
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

def flags(ties: str, N: int, k: int) -> set[str]:
    """Return the mistakes that a case catches."""
    found = {"cap-over-batch"} | ({"k-one-less"} if k > 1 else set())
    if k < N:
        found |= {"cap-magnitude", "cap-smallest", "k-one-more",
                  *(f"ties-{other}" for other in TIES if other != ties)}
    return found


for ties in TIES:
    for N, every_k in (SHAPES | LARGE).items():
        for k in every_k:
            case(f"cap-{ties}-n{N}-k{k}", f"the cap, {RULES[ties]}", "(3)", "cap",
                 flags(ties, N, k), large=N in LARGE)(partial(make, ties, N, k))
