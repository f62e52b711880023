"""Test vectors as files: what ``FORMAT.md`` beside this file says, written, read and verified."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...errors import REMEDIES, UserError, of_system, one_line

Array = Any

FORMAT = 1
DTYPES = {"float32": "<f4", "int64": "<i8", "uint8": "|u1"}  # how a .npy file calls them
LEVELS = ("cap", "forward", "gradients", "routing", "trajectory")
INPUTS = ("x", "dy", "labels", "target", "tokens", "scores", "choice", "step")
DATA = Path(__file__).with_name("data")  # the small set


class Case(NamedTuple):
    """A test vector.

    Attributes
    ----------
    id : str
        Its name, and that of its folder.
    title, equation : str
        What it is; the numbers of the paper's equations.
    model : str
        What is computed, as "mlp" or "attention".
    config : dict
        All numbers and names that it needs.
    levels : tuple of str
        At which of `LEVELS` something can be compared.
    flags : tuple of str
        Names of the mistakes that it catches, see `comet_np.conformance.mistakes`.
    tolerance : float
        The largest difference allowed, relative to the largest magnitude of an expected array.
    inputs : dict of str to array
        What is given, masks ``m_l`` too: float32, uint8 (masks) or int64.
    expected : dict of str to array
        What is to be computed, in the order of computation.
    levels_of : dict of str to str
        The level of each expected array.
    """

    id: str
    title: str
    equation: str
    model: str
    config: dict[str, Any]
    levels: tuple[str, ...]
    flags: tuple[str, ...]
    tolerance: float
    inputs: dict[str, Array]
    expected: dict[str, Array]
    levels_of: dict[str, str]


def role(name: str) -> str:
    """Return what an array that is given is: input, given (a mask), fixed or parameter."""
    if name in INPUTS:
        return "input"
    if ".spec" in name:
        return "fixed"
    return {"m": "given", "V": "fixed", "dp": "input"}.get(name.split("_")[0], "parameter")


def write(folder: Path, case: Case) -> None:
    """Write a case into a folder of its own, the description last."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for order, (name, array) in enumerate((case.inputs | case.expected).items()):
        data = npy(array)
        (folder / f"{name}.npy").write_bytes(data)
        arrays[name] = {"dtype": str(array.dtype), "order": order,
                        "role": "expected" if name in case.expected else role(name),
                        "sha256": hashlib.sha256(data).hexdigest(), "shape": list(array.shape)}
        if name in case.expected:
            arrays[name]["level"] = case.levels_of[name]
    text = description({
        "arrays": arrays, "config": case.config, "equation": case.equation, "flags": case.flags,
        "format": FORMAT, "id": case.id, "levels": case.levels, "model": case.model,
        "title": case.title, "tolerance": case.tolerance})
    (folder / "case.json").write_bytes(text.encode("ascii"))


def npy(array: Array) -> bytes:
    """Return the bytes of a .npy file, version 1.0, whatever version of NumPy this is."""
    return header(str(array.dtype), array.shape) + array.astype(DTYPES[str(array.dtype)]).tobytes()


def header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return what stands before the numbers in a .npy file."""
    text = (f"{{'descr': '{DTYPES[dtype]}', 'fortran_order': False, "
            f"'shape': {tuple(map(int, shape))}, }}").encode("ascii")
    text += b" " * (-(len(text) + 11) % 64) + b"\n"  # the whole is a multiple of 64 bytes
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def description(fields: dict[str, Any]) -> str:
    """Return the JSON text of a case: keys sorted, a line for each array and each setting."""
    lines = []
    for key, value in sorted(fields.items()):
        if isinstance(value, dict):
            inner = ",\n".join(f'"{name}": {_json(one)}' for name, one in sorted(value.items()))
            lines.append(f'"{key}": {{\n{inner}\n}}')
        else:
            lines.append(f'"{key}": {_json(value)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def read(folder: Path) -> Case:
    """Read the case in a folder, and verify all of it.

    Raises
    ------
    UserError
        If a file is missing, or is not what the description says.
    """
    folder = Path(folder)
    text = _bytes(folder / "case.json")
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise UserError(f"{folder / 'case.json'} is no JSON ({one_line(error)}): write or copy the "
                        "vectors again") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        found = fields.get("format") if isinstance(fields, dict) else None
        raise UserError(f"{folder / 'case.json'} is of format {found}, and this COMET-NP reads "
                        f"format {FORMAT}: write the vectors anew, comet-np vectors FOLDER")
    try:
        arrays = sorted(fields["arrays"].items(), key=lambda item: item[1]["order"])
        inputs: dict[str, Array] = {}
        expected: dict[str, Array] = {}
        for name, entry in arrays:
            to = expected if entry["role"] == "expected" else inputs
            to[name] = _array(folder / f"{name}.npy", **entry)
        return Case(fields["id"], fields["title"], fields["equation"], fields["model"],
                    fields["config"], tuple(fields["levels"]), tuple(fields["flags"]),
                    fields["tolerance"], inputs, expected,
                    {name: entry["level"] for name, entry in arrays if name in expected})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'case.json'} is not what FORMAT.md says "
                        f"({type(error).__name__}: {one_line(error)}): write or copy the vectors "
                        "again") from None


def _array(file: Path, dtype: str, shape: list[int], sha256: str, **other: Any) -> Array:
    """Return the array of a file, which must be what its entry in the description says."""
    data = _bytes(file)
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise UserError(f"{file} was changed: its SHA-256 is {found[:12]}..., case.json says "
                        f"{sha256[:12]}...; write or copy the vectors again")
    if dtype not in DTYPES:
        raise UserError(f"the dtype of {file} is one of {', '.join(DTYPES)}, and case.json says "
                        f"{dtype}: write the vectors again")
    before = header(dtype, tuple(shape))
    size = len(before) + math.prod(shape) * np.dtype(dtype).itemsize
    if not data.startswith(before) or len(data) != size:
        raise UserError(f"{file} is not {dtype} of shape {tuple(shape)}, as case.json says: write "
                        "the vectors again")
    values = np.frombuffer(data, DTYPES[dtype], offset=len(before))
    return values.astype(dtype).reshape(shape)


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{file} is missing: write or copy the vectors again") from None
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        raise UserError(of_system("read", file, error, "")) from None


def read_all(folder: Path | None = None) -> list[Case]:
    """Read all cases of a folder, sorted by name; of the small set in the package if none is given.

    Raises
    ------
    UserError
        If there are none, or one of them is damaged.
    """
    folder = DATA if folder is None else Path(folder)
    found = sorted(file for file in folder.glob("*") if file.is_dir())
    if not found:
        raise UserError(f"{folder} has no test vectors, which are folders with a case.json each: "
                        "write some with comet-np vectors FOLDER")
    return [read(each) for each in found]
