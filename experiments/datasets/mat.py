"""MATLAB 5 files of which it is known what they hold: checked in full, then read by SciPy."""

import io
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

HEADERS = 4096  # bytes, far more than the numbers of a file have around them
# The class of an array and the type in which its numbers are stored: MATLAB puts doubles that are
# small whole numbers into bytes.
DOUBLES, BYTES, DOUBLES_IN_BYTES = (6, 9), (9, 2), (6, 2)
SIZES = {2: 1, 9: 8}  # bytes of a number of each type


class Layout(NamedTuple):
    """What an array must be.

    name : str
    shape : its sides; 0 stands for n, the number of examples, at least 1
    kinds : those that will do, of the above
    """

    name: str
    shape: tuple[int, ...]
    kinds: tuple[tuple[int, int], ...]


def read_mat(content: bytes, layouts: Sequence[Layout], limit: int,
             official: bool) -> list[np.ndarray]:
    """Return the arrays in a file, in the order of their layouts.

    Parameters
    ----------
    content : bytes
    layouts : sequence of Layout
        All that the file holds.
    limit : int
        The most bytes that the arrays may have.
    official : bool
        Whether the hash of the content says that its layout is right.

    Raises
    ------
    ValueError, zlib.error
        If it holds anything else.
    """
    from scipy.io import loadmat  # here, as it takes a while to load

    if not official:
        check_layout(content, layouts, limit)
    arrays = loadmat(io.BytesIO(content))
    return [arrays[layout.name] for layout in layouts]


def check_layout(content: bytes, layouts: Sequence[Layout], limit: int) -> None:
    """Raise ValueError unless these are the bytes of these arrays, each once.

    SciPy's reader believes what a file says of itself, and a wrong byte can crash it.
    """
    if not content.startswith(b"MATLAB 5.0") or content[124:128] != b"\0\1IM":
        raise ValueError("no header of MATLAB 5")
    missing = list(layouts)
    for array in _arrays(content, limit):
        found = next((layout for layout in missing if _fits(array, layout)), None)
        if found is None:
            raise ValueError("another array, or more of them")
        missing.remove(found)
    if missing:
        raise ValueError(f"no array {missing[0].name}")


def _arrays(content: bytes, limit: int) -> Iterator[memoryview]:
    """Yield the bytes of each array, unpacked, `limit` in all at most."""
    rest = memoryview(content)[128:]
    while rest:
        kind, size = struct.unpack("<2I", rest[:8]) if len(rest) > 8 else (0, 0)
        if not 0 < size <= len(rest) - 8:
            raise ValueError(f"{len(content)} bytes, not those of whole arrays")
        array, rest = rest[:8 + size], rest[8 + size:]
        if kind == 15:  # compressed
            unpacker = zlib.decompressobj()
            array = memoryview(unpacker.decompress(array[8:], max(limit, 1)))
            if not unpacker.eof or unpacker.unused_data:
                raise ValueError("it unpacks to more than the official one, or is cut")
        limit -= len(array)
        yield array


def _fits(array: memoryview, layout: Layout) -> bool:
    """Return whether an array is as its layout says: real, and with its numbers to the last."""
    at = 32 + 4 * layout.shape.index(0)  # behind the array's tag, its class, and the shape's tag
    n = int.from_bytes(array[at:at + 4], "little", signed=True)
    if n < 1 or n * math.prod(filter(None, layout.shape)) > len(array):
        return False
    shape = struct.pack(f"<{len(layout.shape)}i", *(side or n for side in layout.shape))
    elements = math.prod(side or n for side in layout.shape)
    for kind, stored in layout.kinds:
        # Its parts, from the MAT-file format of level 5: the array (14), its class (6), its shape
        # (5), its name (1), its numbers.
        size = elements * SIZES[stored]
        start = (struct.pack("<2I", 14, len(array) - 8) + _part(6, struct.pack("<2I", kind, 0))
                 + _part(5, shape) + _part(1, layout.name.encode()))
        start += struct.pack("<2H", stored, size) if size <= 4 else struct.pack("<2I", stored, size)
        if array[:len(start)] == start and len(array) == -(-(len(start) + size) // 8) * 8:
            return True
    return False


def _part(kind: int, content: bytes) -> bytes:
    """Return a part of an array with its type and size before it; four bytes lie in that tag."""
    if len(content) <= 4:
        return struct.pack("<2H4s", kind, len(content), content)
    return struct.pack("<2I", kind, len(content)) + content + bytes(-len(content) % 8)
