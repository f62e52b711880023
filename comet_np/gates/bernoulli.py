"""Masks that are a function of the training example's number: Bernoulli and example-tied."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..backends import backend_of, xp_of
from ..errors import UserError, unknown
from ..functional.dropout import example_mask
from ..functional.hidden import Mask
from ..rng import key
from .base import Array, Gate, Pass


def check_probability(name: str, p: float) -> None:
    """Raise a UserError unless p is a probability."""
    if not 0 <= p <= 1:
        raise UserError(f"{name} is a probability and must be in [0, 1], got {p}")


def examples(at: Pass, x: Array) -> Array:
    """Return the numbers of the pass's examples.

    Raises
    ------
    UserError
        If the pass does not say them, or not one for each example, or they are no integers, or (on
        the CPU; a GPU would have to wait) one is negative.
    """
    if at.example is None:
        raise UserError("the masks of this gate are a function of the example's number: say the "
                        "numbers of the examples with at=Pass(train=True, example=numbers)")
    waits = backend_of(at.example, x).waits
    if at.example.shape != x.shape[:1]:
        raise UserError(f"the pass needs the number of each example, shape {x.shape[:1]}, got "
                        f"{at.example.shape}")
    if at.example.dtype.kind not in "iu":
        raise UserError(f"the numbers of examples are integers, got dtype {at.example.dtype}")
    if not waits and at.example.size and (low := at.example.min()) < 0:
        raise UserError(f"the numbers of examples count from 0, got {low}")
    return at.example


def masks_of_examples(gate: str, p: float, x: Array, widths: tuple[int, ...],
                      at: Pass) -> list[Array]:
    """Return a mask of each hidden layer for each example, bool (B, ..., N_l)."""
    found = []
    for layer, N in enumerate(widths[1:-1], start=1):
        m = example_mask(examples(at, x), N, p, key(at.seed, gate, layer))  # (B, N_l)
        between = (1,) * (x.ndim - 2)  # axes of one example, as tokens, share its mask
        found.append(xp_of(x).broadcast_to(m.reshape(len(m), *between, N), (*x.shape[:-1], N)))
    return found


@dataclass(frozen=True)
class Bernoulli(Gate):
    """m_l ~ Bernoulli(p), drawn once for each training example.

    Attributes
    ----------
    p : float
        Probability that a neuron is active; the paper's p_k (its published code takes 0.5 always).
    evaluation : {"all", "masks"}
        What becomes of examples outside training, of which the paper says nothing: all neurons
        active, as in its published code, or a mask for each of these examples too.
    """

    p: float = 0.5
    evaluation: Literal["all", "masks"] = "all"
    depends_on: ClassVar[Literal["example"]] = "example"

    def __post_init__(self) -> None:
        check_probability("p", self.p)
        if self.evaluation not in ("all", "masks"):
            raise unknown("evaluation of Bernoulli masks", self.evaluation, ("all", "masks"))

    def masks(self, x: Array, fixed: tuple[()], config: Any, at: Pass) -> tuple[Mask, ...]:
        if not at.train and self.evaluation == "all":
            return (None,) * (len(config.widths) - 2)
        name = "Bernoulli" if at.train else "Bernoulli evaluation"
        return tuple(masks_of_examples(name, self.p, x, config.widths, at))


@dataclass(frozen=True)
class ExampleTied(Gate):
    """Example-tied dropout (Maini et al. 2023).

    m_l = 1 for the generalisation neurons, the first int(q N_l) of a layer; for the others
    m_l ~ Bernoulli(p), drawn once for each training example.

    Attributes
    ----------
    p : float
        Probability that one of the other neurons is active; the paper's p_k (its published code
        takes 0.2 always).
    generalisation : float or None
        q; None takes p. With 0 masks follow the law of Bernoulli masking.
    evaluation : {"generalisation", "all"}
        Which neurons are active outside training: the generalisation neurons alone, as in Maini et
        al. and in the paper's code, or all.
    """

    p: float = 0.5
    generalisation: float | None = None
    evaluation: Literal["generalisation", "all"] = "generalisation"
    depends_on: ClassVar[Literal["example"]] = "example"

    def __post_init__(self) -> None:
        check_probability("p", self.p)
        if self.generalisation is not None:
            check_probability("generalisation", self.generalisation)
        if self.evaluation not in ("generalisation", "all"):
            raise unknown("evaluation of example-tied dropout", self.evaluation,
                          ("generalisation", "all"))

    def masks(self, x: Array, fixed: tuple[()], config: Any, at: Pass) -> tuple[Mask, ...]:
        widths = config.widths
        if not at.train and self.evaluation == "all":
            return (None,) * (len(widths) - 2)
        q = self.p if self.generalisation is None else self.generalisation
        xp = xp_of(x)
        always = [xp.broadcast_to(xp.arange(N) < int(q * N), (*x.shape[:-1], N))
                  for N in widths[1:-1]]
        if not at.train:
            return tuple(always)
        drawn = masks_of_examples("ExampleTied", self.p, x, widths, at)
        return tuple(own | m for own, m in zip(always, drawn, strict=True))
