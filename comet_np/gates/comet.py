"""The gate of COMET, eq. (4)-(6): a fixed random routing network on the network's input."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

from ..backends import Backend, backend_of
from ..errors import UserError, unknown
from ..functional.activations import activation
from ..functional.linear import check_features
from ..functional.routing import (
    TIES,
    RoutingTrace,
    Ties,
    routing_forward,
    weight_on_grid,
    winners,
)
from .base import Array, Gate, Pass, Tree
from .routers import ROUTERS, Router

Weights = tuple[Any, ...]  # V_l, one a hidden layer: an array, or what a router has in its place
EXACT = ("identity", "relu")  # g that do not round


@dataclass(frozen=True)
class Capped(Gate):
    """What gates with a cap share.

    Attributes
    ----------
    p_k : float
        Proportion of neurons that stay active, in (0, 1].
    ties : {"strict", "threshold", "index"}
        See `comet_np.kwta_mask`.
    """

    p_k: float = 0.5
    ties: Ties = "strict"

    def __post_init__(self) -> None:
        winners(self.p_k, 1)
        if self.ties not in TIES:
            raise unknown("tie rule", self.ties, TIES)


@dataclass(frozen=True)
class Routed(Capped):
    """What gates with fixed random weights V share: ``V_l ~ U(-1/sqrt(N_{l-1}), 1/sqrt(N_{l-1}))``.
    """

    def _routes(self) -> Router:
        return ROUTERS["dense"]

    def shapes(self, widths: tuple[int, ...]) -> tuple[Tree, ...]:
        return tuple(self._routes().shapes(N_in, N, layer) for layer, N_in, N in layers(widths))

    def init(self, widths: tuple[int, ...], seed: int, backend: Backend, dtype: str) -> Weights:
        return tuple(self._routes().init(N_in, N, seed, layer, backend, dtype)
                     for layer, N_in, N in layers(widths))

    def multiply_adds(self, widths: tuple[int, ...]) -> int:
        """Return the multiply-adds of one row's routing."""
        return sum(self._routes().multiply_adds(N_in, N, layer)
                   for layer, N_in, N in layers(widths))


def layers(widths: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Yield l, N_{l-1} and N_l of each hidden layer."""
    for layer, (N_in, N) in enumerate(pairwise(widths[:-1]), start=1):
        yield layer, N_in, N


@dataclass(frozen=True)
class Comet(Routed):
    """m_l = C_k(c_l) with c_l = V_l z_{l-1}, z_l = m_l o g(c_l), z_0 = x: eq. (4)-(6).

    Attributes
    ----------
    p_k, ties
        Proportion of active neurons, in (0, 1]; rule for ties, see `comet_np.kwta_mask`.
    g : str
        The routing network's own activation, of eq. (6); the paper uses the identity.
    exact : bool
        Whether V and each z lie on a fixed-point grid on which every sum is exact, see
        `comet_np.functional.routing.on_grid`. The masks of an input are then the same bits on every
        machine and in float32 and float64, which near-ties otherwise prevent; they are those of a
        slightly other routing network than without. Within a transformer's block that holds for the
        block's input, which is not exact itself.
    router : str
        By what map c is computed: "dense", the paper's, or another one of
        `comet_np.gates.routers.ROUTERS`, of which some cost next to nothing.
    """

    g: str = "identity"
    exact: bool = False
    router: str = "dense"
    depends_on: ClassVar[Literal["input"]] = "input"

    def __post_init__(self) -> None:
        super().__post_init__()
        activation(self.g)
        if self.exact and self.g not in EXACT:
            raise UserError(f"exact routing needs g that does not round, {' or '.join(EXACT)}, got "
                            f'"{self.g}"')
        if not isinstance(self.router, str) or self.router not in ROUTERS:
            raise unknown("router", self.router, ROUTERS)
        if self.exact and self.router != "dense":
            raise UserError('exact routing is that of the router "dense", whose V lies on a grid, '
                            f'got "{self.router}": choose exact=False, or router="dense"')

    def _routes(self) -> Router:
        return ROUTERS[self.router]

    def init(self, widths: tuple[int, ...], seed: int, backend: Backend, dtype: str) -> Weights:
        V = super().init(widths, seed, backend, dtype)
        return tuple(map(weight_on_grid, V)) if self.exact else V

    def check(self, name: str, V: Array) -> None:
        """Raise a UserError that begins with the name if V is not on the grid of an exact gate."""
        if self.exact and not backend_of(V).to_host((weight_on_grid(V) == V).all()):
            raise UserError(f'"{name}" is not on the grid of exact routing: pass '
                            "comet_np.functional.routing.weight_on_grid of it, or a config with "
                            "gates.Comet(exact=False)")

    def trace(self, x: Array, fixed: Weights) -> RoutingTrace:
        """Return c and m of every hidden layer, and z of all but the last."""
        if fixed and hasattr(fixed[0], "shape"):
            check_features(x, fixed[0], "x")
        return routing_forward(x, fixed, self.p_k, self.ties, activation(self.g),
                               self.exact, self._routes().scores)

    def masks(self, x: Array, fixed: Weights, config: Any, at: Pass) -> tuple[Array, ...]:
        if self.router != "dense" and x.shape[-1:] != config.widths[:1]:
            raise UserError(f"x must have shape (..., {config.widths[0]}) for a network of widths "
                            f"{config.widths}, got {x.shape}")
        return self.trace(x, fixed).m
