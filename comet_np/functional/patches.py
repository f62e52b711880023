"""Patches of an image and their embedding: the first layer of a ViT and of an MLP-Mixer."""

from typing import Any, NamedTuple

from ..backends import xp_of
from ..errors import UserError
from .linear import Linear, LinearCache, check_cotangent, linear_backward, linear_forward

Array = Any
Image = tuple[int, int, int]  # colours C, rows, columns


def patch_count(image: Image, patch: int) -> int:
    """Return the number of patches of an image."""
    return image[1] // patch * (image[2] // patch)


def patch_width(image: Image, patch: int) -> int:
    """Return the number of values of a patch, P P C."""
    return patch * patch * image[0]


def to_patches(x: Array, image: Image, patch: int) -> Array:
    """Return an image's square patches as tokens, row by row: (..., T, P P C).

    Parameters
    ----------
    x : array (..., C rows columns) or (..., C, rows, columns)
        Whole planes of colours, one after the other.
    image : tuple of int
        C, rows, columns.
    patch : int
        P, which divides rows and columns.

    Returns
    -------
    array (..., T, P P C)
        T = rows columns / P^2. The pixels of a patch row by row, the colours of each together: the
        order of the code on which the paper builds.
    """
    lead = check_image(x, image)
    check_patch(image, patch)
    C, rows, columns = image
    cells = x.reshape(*lead, C, rows // patch, patch, columns // patch, patch)
    n = len(lead)
    order = (*range(n), *(n + i for i in (1, 3, 2, 4, 0)))  # row, column, those in the patch, C
    return cells.transpose(order).reshape(*lead, patch_count(image, patch), patch * patch * C)


def from_patches(patches: Array, image: Image, patch: int) -> Array:
    """Return the images (..., C rows columns) of patches (..., T, P P C): `to_patches` undone.

    Applied to a gradient it is the backward of `to_patches`.
    """
    C, rows, columns = image
    wanted = patch_count(image, patch), patch_width(image, patch)
    if patches.shape[-2:] != wanted:
        raise UserError(f"patches of such images have shape (..., {wanted[0]}, {wanted[1]}), got "
                        f"{patches.shape}")
    lead = patches.shape[:-2]
    cells = patches.reshape(*lead, rows // patch, columns // patch, patch, patch, C)
    n = len(lead)
    order = (*range(n), *(n + i for i in (4, 0, 2, 1, 3)))
    return cells.transpose(order).reshape(*lead, C * rows * columns)


def check_image(x: Array, image: Image) -> tuple[int, ...]:
    """Return the leading axes of x; raise a UserError unless its last axes are such an image."""
    xp_of(x)  # says what it should be
    C, rows, columns = image
    if x.shape[-3:] == image:
        return tuple(x.shape[:-3])
    if x.shape[-1:] == (C * rows * columns,):
        return tuple(x.shape[:-1])
    raise UserError(f"images of {C} colours and {rows}x{columns} pixels were expected, (..., {C}, "
                    f"{rows}, {columns}) or flat (..., {C * rows * columns}), got {x.shape}: "
                    "configure the model with image=(colours, rows, columns)")


def check_patch(image: Image, patch: int) -> None:
    """Raise a UserError unless images can be cut into square patches of so many pixels a side."""
    _, rows, columns = image
    if patch < 1 or rows % patch or columns % patch:
        raise UserError(f"an image of {rows}x{columns} pixels cannot be cut into patches of "
                        f"{patch}x{patch}: choose a patch that divides both sides")


class Embedding(NamedTuple):
    """Parameters: patches (D, P P C), a map of each patch; token (D,), the class token, or None;
    positions (T, D), of all tokens, the class token first; or None.
    """

    patches: Linear
    token: Array | None
    positions: Array | None


def embedding_forward(patches: Array, p: Embedding,
                      compute: str | None = None) -> tuple[Array, LinearCache]:
    """Return the tokens that a network begins with: patches (..., T', P P C) -> (..., T, D).

    ``x_0 = token + position_0``,  ``x_t = W patch_t + b + position_t``

    Raises
    ------
    UserError
        If the shapes of the patches and the parameters do not fit together.
    """
    tokens, cache = linear_forward(patches, p.patches, compute)  # (..., T', D)
    check_tokens(tokens, p)
    xp = xp_of(tokens)
    if p.token is not None:
        first = xp.broadcast_to(p.token, (*tokens.shape[:-2], 1, len(p.token)))
        tokens = xp.concatenate([first, tokens], axis=-2)  # (..., T, D)
    return tokens if p.positions is None else tokens + p.positions, cache


def embedding_backward(dx: Array, cache: LinearCache, p: Embedding, g: Embedding,
                       compute: str | None = None, input_gradient: bool = True) -> Array | None:
    """Return dpatches (..., T', P P C) for dx (..., T, D), and add the gradients into `g`.

    ``dposition_t += sum dx_t``,  ``dtoken += sum dx_0``; of the patches as of any linear layer

    Raises
    ------
    UserError
        If dx does not have the shape of the output.
    """
    *lead, T, _ = cache.x.shape
    check_cotangent(dx, (*lead, T + (p.token is not None), len(p.patches.weight)))
    token, positions = g.token, g.positions
    if positions is not None:
        positions += dx.reshape(-1, *positions.shape).sum(axis=0)
    if token is not None:
        token += dx[..., 0, :].reshape(-1, len(token)).sum(axis=0)
        dx = dx[..., 1:, :]
    return linear_backward(dx, cache, p.patches, g.patches, compute, input_gradient)


def check_tokens(tokens: Array, p: Embedding) -> None:
    """Raise a UserError unless class token and positions fit to the tokens (..., T', D)."""
    D = tokens.shape[-1]
    if p.token is not None and p.token.shape != (D,):
        raise UserError(f"the class token has as many features as the others, {D}, got shape "
                        f"{p.token.shape}")
    wanted = tokens.shape[-2] + (p.token is not None), D
    if p.positions is not None and p.positions.shape != wanted:
        raise UserError(f"there is a position for each token, the class token first, {wanted}, got "
                        f"shape {p.positions.shape}")
