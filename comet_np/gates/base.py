"""What a gate is, and what a forward pass knows besides its input."""

from typing import Any, ClassVar, Literal, NamedTuple

from ..backends import Backend
from ..functional.hidden import Mask

Array = Any
Tree = Any


class Pass(NamedTuple):
    """What a forward pass knows besides its input; the default is evaluation.

    Attributes
    ----------
    train : bool
        Whether to drop elements and mask examples as in training.
    step : int or 0-d int64 array
        Of which dropout is a function: another one in each pass of training.
    example : int64 array (B,) or None
        The number of each example in the data set, of which the masks of some gates are a function.
    seed : int
        Of dropout and of the masks of examples.
    """

    train: bool = False
    step: Array | int = 0
    example: Array | None = None
    seed: int = 0


EVALUATION = Pass()


class Gate:
    """Where the masks of the hidden layers come from; a gate of one's own derives from this.

    A gate is a frozen dataclass of its settings: it goes into configurations and records. It has no
    trained weights.

    Attributes
    ----------
    depends_on : {None, "input", "example"}
        If the masks of a fixed data set can be computed once and kept: whether they are a function
        of the network's input, or of the number of a training example. None: they cannot.
    """

    depends_on: ClassVar[Literal["input", "example"] | None] = None

    def init(self, widths: tuple[int, ...], seed: int, backend: Backend, dtype: str) -> Tree:
        """Return the gate's fixed weights, a tree of arrays, for layers of these widths."""
        return ()

    def shapes(self, widths: tuple[int, ...]) -> Tree:
        """Return the shapes of the fixed weights, a tree; None if they are not to be checked."""
        return () if type(self).init is Gate.init else None

    def masks(self, x: Array, fixed: Tree, config: Any, at: Pass) -> tuple[Mask, ...]:
        """Return one mask a hidden layer, as `hidden_forward` takes it: array, function or None.

        Parameters
        ----------
        x : array (..., N_0)
            The network's input.
        fixed : tree
            As `init` returns it.
        config : MLPConfig
            Of the network: its `widths` N_0..N_L, its activation `f`.
        at : Pass
        """
        raise NotImplementedError
