"""Routers: by what fixed random map ``c = V z`` of eq. (4) is computed, appendix A.7 of the paper.

==============  ==================================================================================
dense           V of the paper
centred         V (z - mean of z): a constant added to z changes nothing
unit-norm       V z over the norm of z: with a g that is not linear, one scale in all layers
orthogonal      V with orthonormal rows
sparse-binary   the sum of 6 of z's elements, as of the fruit fly's olfactory neurons
sparse-signed   the sum of 3 of z's elements less the sum of 3 others
low-rank        V = A B of rank 16
kronecker       V = A (x) B, of about the square root of N_in columns each
block-diagonal  V of about sqrt(N_in) blocks on the diagonal, with inputs and outputs permuted
hadamard        N rows of H D: H of +-1, orthogonal, D random signs on the diagonal
convolutional   the first layer: random filters on patches of an image; dense after it
==============  ==================================================================================

From N = 500 on sparse, low-rank, kronecker and block-diagonal ones take at most a tenth of the
multiply-adds of the dense one, hadamard up to a third, convolutional a quarter and more.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from ..backends import Backend, xp_of
from ..errors import UserError
from ..functional.linear import project
from ..functional.patches import to_patches
from ..functional.products import multiply
from ..rng import stream, uniform

Array = Any
Tree = Any

# Of a row: a Kenyon cell of the fruit fly sums about 6 of 50 kinds of inputs, Dasgupta, Stevens and
# Navlakha, 'A neural algorithm for a fundamental computing problem', 2017.
ONES = 6
RANK = 16
PATCH = 4
COLOURS = (3, 1)


class Router:
    """One layer's map ``c = V z``; here V is one array, the paper's.

    The laws of factors and blocks are that of V, by the columns of each:
    ``U(-1/sqrt(columns), 1/sqrt(columns))``. Integers in the weights say which elements are taken.
    """

    def shapes(self, N_in: int, N: int, layer: int) -> Tree:
        """Return the shapes of the weights of a layer, a tree."""
        return N, N_in

    def init(self, N_in: int, N: int, seed: int, layer: int, backend: Backend, dtype: str) -> Tree:
        """Return the weights of a layer, freshly drawn."""
        return uniform(backend, dtype, N_in, (N, N_in), seed, "V", layer)

    def scores(self, z: Array, V: Tree) -> Array:
        """Return c (..., N) of z (..., N_in)."""
        return project(z, V)

    def multiply_adds(self, N_in: int, N: int, layer: int) -> int:
        """Return the multiply-adds of a layer; an addition alone is one, too."""
        return N * N_in


class Centred(Router):
    """``c = V (z - mean(z))``, which is V with rows of mean 0."""

    def scores(self, z: Array, V: Array) -> Array:
        return project(z - z.mean(axis=-1, keepdims=True), V)


class UnitNorm(Router):
    """``c = V z / |z|``, of z = 0 c = 0."""

    def scores(self, z: Array, V: Array) -> Array:
        xp = xp_of(z)
        norm = xp.sqrt((z * z).sum(axis=-1, keepdims=True))
        return project(z / xp.where(norm > 0, norm, 1).astype(z.dtype), V)


class Orthogonal(Router):
    """V with orthonormal rows, uniformly drawn; for N > N_in such blocks on top of each other."""

    def init(self, N_in: int, N: int, seed: int, layer: int, backend: Backend, dtype: str) -> Array:
        blocks = []
        for start in range(0, N, N_in):
            rows = min(N_in, N - start)
            Q, R = np.linalg.qr(stream(seed, "orthogonal", layer, start).standard_normal(
                (N_in, rows)))
            blocks.append((Q * np.sign(np.diag(R))).T)  # with these signs Q is uniform
        return backend.asarray(np.concatenate(blocks).astype("float32"), dtype=dtype)


class Inputs(NamedTuple):
    """Weights of a sparse router: which of z's elements the neurons read, int32 (6, N)."""

    index: Array


class Sparse(Router):
    """``c_i = z_a + z_b + z_c + ...`` of 6 different elements for each neuron, or of all if fewer.

    With `signed` every second of them is subtracted. They are added in this order and nothing is
    multiplied, so that these scores are the same bits on every machine.

    Unsigned sums are all negative where z is, as of a dark image: then neurons that read zeros
    alone, of a masked z, have the highest score, tie, and by eq. (3) lose; for small p_k nobody
    wins. With `signed` that does not happen.
    """

    def __init__(self, signed: bool) -> None:
        self.signed = signed

    def shapes(self, N_in: int, N: int, layer: int) -> Inputs:
        return Inputs((min(ONES, N_in), N))

    def init(self, N_in: int, N: int, seed: int, layer: int, backend: Backend,
             dtype: str) -> Inputs:
        draw = stream(seed, "inputs", layer)
        index = np.empty((min(ONES, N_in), N), "int64")
        for j in range(len(index)):
            # The r-th of those that are left: r plus how many of the chosen are not above it.
            index[j] = draw.integers(0, N_in - j, N)
            for chosen in np.sort(index[:j], axis=0):
                index[j] += index[j] >= chosen
        return Inputs(backend.asarray(index, dtype="int32"))

    def scores(self, z: Array, V: Inputs) -> Array:
        columns = neurons_first(z)  # (N_in, B)
        c = columns.take(V.index[0], axis=0)  # (N, B)
        for j in range(1, len(V.index)):
            read = columns.take(V.index[j], axis=0)
            if self.signed and j % 2:
                c -= read
            else:
                c += read
        return neurons_last(c, z)

    def multiply_adds(self, N_in: int, N: int, layer: int) -> int:
        return min(ONES, N_in) * N


class Factors(NamedTuple):
    """Weights of a low-rank router: A (N, r), B (r, N_in)."""

    A: Array
    B: Array


class LowRank(Router):
    """``c = A (B z)``."""

    def shapes(self, N_in: int, N: int, layer: int) -> Factors:
        r = min(RANK, N_in, N)
        return Factors((N, r), (r, N_in))

    def init(self, N_in: int, N: int, seed: int, layer: int, backend: Backend,
             dtype: str) -> Factors:
        A, B = self.shapes(N_in, N, layer)
        return Factors(uniform(backend, dtype, A[1], A, seed, "A", layer),
                       uniform(backend, dtype, N_in, B, seed, "B", layer))

    def scores(self, z: Array, V: Factors) -> Array:
        return project(project(z, V.B), V.A)

    def multiply_adds(self, N_in: int, N: int, layer: int) -> int:
        return min(RANK, N_in, N) * (N_in + N)


class Kronecker(NamedTuple):
    """Weights: A (p, q), B (s, t) with q t >= N_in and p s >= N; int32 (N,), the outputs read."""

    A: Array
    B: Array
    outputs: Array


class KroneckerProduct(Router):
    """``C = B Z^T A^T`` with z, and zeros behind it, as Z (q, t); c is N of C's, in random order.
    """

    def shapes(self, N_in: int, N: int, layer: int) -> Kronecker:
        (q, t), (p, s) = near_square(N_in), near_square(N)
        return Kronecker((p, q), (s, t), (N,))

    def init(self, N_in: int, N: int, seed: int, layer: int, backend: Backend,
             dtype: str) -> Kronecker:
        A, B, _ = self.shapes(N_in, N, layer)
        return Kronecker(uniform(backend, dtype, A[1], A, seed, "A", layer),
                         uniform(backend, dtype, B[1], B, seed, "B", layer),
                         some_of(A[0] * B[0], N, seed, layer, backend))

    def scores(self, z: Array, V: Kronecker) -> Array:
        q, t = V.A.shape[1], V.B.shape[1]
        C = of_factors(padded(z, q * t).reshape(*z.shape[:-1], q, t), V.A, V.B)
        return C.reshape(*z.shape[:-1], len(V.A) * len(V.B)).take(V.outputs, axis=-1)

    def multiply_adds(self, N_in: int, N: int, layer: int) -> int:
        (q, t), (p, s) = near_square(N_in), near_square(N)
        return q * t * s + q * s * p


class Blocks(NamedTuple):
    """Weights: n blocks V (n, s, t) with n t >= N_in and n s >= N; int32 (N,), the outputs read."""

    V: Array
    outputs: Array


class BlockDiagonal(Router):
    """Block j maps z_j, z_{j+n}, z_{j+2n}, ..., as cards are dealt; the outputs are shuffled."""

    def shapes(self, N_in: int, N: int, layer: int) -> Blocks:
        n = math.isqrt(N_in)
        return Blocks((n, -(-N // n), -(-N_in // n)), (N,))

    def init(self, N_in: int, N: int, seed: int, layer: int, backend: Backend,
             dtype: str) -> Blocks:
        (n, s, t), _ = self.shapes(N_in, N, layer)
        return Blocks(uniform(backend, dtype, t, (n, s, t), seed, "blocks", layer),
                      some_of(n * s, N, seed, layer, backend))

    def scores(self, z: Array, V: Blocks) -> Array:
        n, s, t = V.V.shape
        dealt = neurons_first(padded(z, n * t)).reshape(t, n, -1).swapaxes(0, 1)  # (n, t, B)
        c = multiply(V.V, dealt).reshape(n * s, -1)
        return neurons_last(c.take(V.outputs, axis=0), z)

    def multiply_adds(self, N_in: int, N: int, layer: int) -> int:
        return math.prod(self.shapes(N_in, N, layer).V)


class Hadamard(NamedTuple):
    """Weights: signs (copies, N_in); A (a, a) and B (b, b), a power of 2 each, whose Kronecker
    product is H; int32 (N,), the outputs read.
    """

    signs: Array
    A: Array
    B: Array
    outputs: Array


class SubsampledHadamard(Router):
    """``c`` is N of the elements of ``H D z``, z with zeros behind it, in random order.

    If H has fewer than N rows there are several D. Small products with A and B, ``H = A (x) B``,
    take more multiply-adds than the fast transform, and less time.
    """

    def shapes(self, N_in: int, N: int, layer: int) -> Hadamard:
        bits = (N_in - 1).bit_length()
        a, b = 2**(bits // 2), 2**(bits - bits // 2)
        return Hadamard((-(-N // (a * b)), N_in), (a, a), (b, b), (N,))

    def init(self, N_in: int, N: int, seed: int, layer: int, backend: Backend,
             dtype: str) -> Hadamard:
        signs, A, B, _ = self.shapes(N_in, N, layer)
        D = 2 * stream(seed, "signs", layer).integers(0, 2, signs) - 1
        A_l, B_l = (backend.asarray(hadamard(n) / math.sqrt(n), dtype=dtype)
                    for n in (A[0], B[0]))
        return Hadamard(backend.asarray(D, dtype=dtype), A_l, B_l,
                        some_of(signs[0] * A[0] * B[0], N, seed, layer, backend))

    def scores(self, z: Array, V: Hadamard) -> Array:
        a, b = len(V.A), len(V.B)
        Z = padded(z[..., None, :] * V.signs, a * b)  # (..., copies, a b)
        C = of_factors(Z.reshape(*Z.shape[:-1], a, b), V.A, V.B)
        return C.reshape(*z.shape[:-1], len(V.signs) * a * b).take(V.outputs, axis=-1)

    def multiply_adds(self, N_in: int, N: int, layer: int) -> int:
        signs, A, B, _ = self.shapes(N_in, N, layer)
        return int(signs[0] * (N_in + A[0] * B[0] * (A[0] + B[0])))


class Filters(NamedTuple):
    """Weights: F filters of patches (F, P P C); int32 (N,), which filter at which patch."""

    weight: Array
    outputs: Array


class Convolutional(Router):
    """Each neuron of the first layer sees one patch of 4x4 pixels through one of F random filters.

    All filters are taken at all patches, which do not overlap; F is as small as N allows. Later
    layers are dense.
    """

    def shapes(self, N_in: int, N: int, layer: int) -> Tree:
        if layer > 1:
            return super().shapes(N_in, N, layer)
        C, rows, columns = image_of(N_in)
        patches = rows // PATCH * (columns // PATCH)
        return Filters((-(-N // patches), PATCH * PATCH * C), (N,))

    def init(self, N_in: int, N: int, seed: int, layer: int, backend: Backend, dtype: str) -> Tree:
        if layer > 1:
            return super().init(N_in, N, seed, layer, backend, dtype)
        weight, _ = self.shapes(N_in, N, layer)
        return Filters(uniform(backend, dtype, weight[1], weight, seed, "filters", layer),
                       some_of(weight[0] * N_in // weight[1], N, seed, layer, backend))

    def scores(self, z: Array, V: Tree) -> Array:
        if not isinstance(V, Filters):
            return super().scores(z, V)
        c = project(to_patches(z, image_of(z.shape[-1]), PATCH), V.weight)  # (..., patches, F)
        return c.reshape(*z.shape[:-1], c.shape[-2] * c.shape[-1]).take(V.outputs, axis=-1)

    def multiply_adds(self, N_in: int, N: int, layer: int) -> int:
        if layer > 1:
            return super().multiply_adds(N_in, N, layer)
        return int(self.shapes(N_in, N, layer).weight[0] * N_in)


ROUTERS: dict[str, Router] = {
    "dense": Router(), "centred": Centred(), "unit-norm": UnitNorm(), "orthogonal": Orthogonal(),
    "sparse-binary": Sparse(signed=False), "sparse-signed": Sparse(signed=True),
    "low-rank": LowRank(), "kronecker": KroneckerProduct(), "block-diagonal": BlockDiagonal(),
    "hadamard": SubsampledHadamard(), "convolutional": Convolutional()}


def neurons_first(z: Array) -> Array:
    """Return z (..., N) as a matrix (N, B) whose rows lie one after the other.

    Of the column-major scores that products of few rows are on a CPU no copy is made; and what
    rows of it are taken, as by `Sparse`, are read in the order in which they lie.
    """
    return xp_of(z).ascontiguousarray(z.reshape(-1, z.shape[-1]).T)


def neurons_last(c: Array, z: Array) -> Array:
    """Return c (N, B) as scores (..., N) of z (..., N_in)."""
    return c.T.reshape(*z.shape[:-1], len(c))


def padded(z: Array, N: int) -> Array:
    """Return z (..., N_in) with zeros behind it: (..., N)."""
    if z.shape[-1] == N:
        return z
    wide = xp_of(z).zeros((*z.shape[:-1], N), dtype=z.dtype)
    wide[..., :z.shape[-1]] = z
    return wide


def of_factors(Z: Array, A: Array, B: Array) -> Array:
    """Return ``B Z^T A^T``, (..., s, p), of Z (..., q, t), A (p, q), B (s, t)."""
    ZB = project(Z, B)  # (..., q, s)
    return project(xp_of(Z).ascontiguousarray(ZB.swapaxes(-1, -2)), A)


def near_square(N: int) -> tuple[int, int]:
    """Return rows and columns of a matrix with room for N numbers: ceil(sqrt(N)) columns."""
    columns = math.isqrt(N - 1) + 1
    return -(-N // columns), columns


def some_of(outputs: int, N: int, seed: int, layer: int, backend: Backend) -> Array:
    """Return which N of so many outputs the neurons read, in random order: int32 (N,)."""
    order = stream(seed, "outputs", layer).permutation(outputs)[:N]
    return backend.asarray(order, dtype="int32")


def hadamard(N: int) -> np.ndarray:
    """Return Sylvester's matrix H (N, N) of +-1, N a power of 2: ``H_ij = (-1)^(bits of i & j)``.
    """
    H = np.ones((1, 1))
    while len(H) < N:
        H = np.block([[H, H], [H, -H]])
    return H


def image_of(N_in: int) -> tuple[int, int, int]:
    """Return colours, rows and columns of a square image of so many numbers.

    Raises
    ------
    UserError
        If there is none whose sides PATCH divides.
    """
    for C in COLOURS:
        side = math.isqrt(N_in // C)
        if C * side**2 == N_in and side and side % PATCH == 0:
            return C, side, side
    raise UserError("the convolutional router needs square images of 3 colours or 1, whose sides "
                    f"{PATCH} divides, got {N_in:,} inputs: choose another router")
