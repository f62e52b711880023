"""Data of one's own: arrays, and files of them (CSV, npz)."""

import csv
import math
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...errors import UserError, one_line, unknown, user_path
from ...records import DamagedRecord, read_arrays
from .base import Dataset, Preparation, split

Array = Any

SUFFIXES = (".csv", ".npz")
DELIMITERS = ",;\t"
TASKS = ("classification", "regression")


def from_arrays(x: Array, y: Array, task: str | None = None, validation: bool = True,
                seed: int = 0, name: str = "data", columns: Sequence[str] = (),
                test: tuple[Array, Array] | None = None) -> Dataset:
    """Return arrays as a data set: split, inputs and real targets standardised, classes numbered.

    Parameters
    ----------
    x : array (n, N_0) of finite numbers
    y : array (n,) or (n, outputs)
        Real numbers are targets of a regression; strings, whole numbers and booleans are classes.
    task : {"classification", "regression"}, optional
        If the type of `y` says it wrongly.
    validation : bool
        Whether to hold out 20 % of the examples.
    seed : int
        Of the split.
    name : str
    columns : sequence of str
        What the inputs are called, for messages.
    test : pair of arrays, optional
        Inputs and targets that are measured once, at the end.

    Returns
    -------
    Dataset
        Standardised by the mean and standard deviation of its training examples. A column that is
        constant there becomes 0, and the notice says so.

    Raises
    ------
    UserError
        If a shape or a type does not fit, a number is not finite, there are too few examples, or
        hardly two of a class.
    """
    x, y = checked_inputs(x, name, columns), checked_targets(y, name)
    if y.ndim < 1 or len(y) != len(x):
        raise UserError(f"{name}: x and y must have as many examples, got x of shape {x.shape} "
                        f"and y of shape {y.shape}")
    task = task_of(y, task, name)
    least = 5 if validation else 1
    if len(x) < least:
        raise UserError(f"{name}: training {'and validation need' if validation else 'needs'} at "
                        f"least {least} example{'s' * (least > 1)}, got {len(x)}")
    rows = split(len(x), seed) if validation else (np.arange(len(x)), None)
    mean, std, constant = _moments(x[rows[0]], name)
    to, notice = Preparation(mean, std, columns=tuple(columns)), ""
    if len(constant):
        notice = ("the same in all training examples, so it says nothing: "
                  + ", ".join(_column(columns, i) for i in constant[:5])
                  + (f" and {len(constant) - 5} more" if len(constant) > 5 else ""))
    if task == "classification":
        labels, y = np.unique(_one_column(y, name), return_inverse=True)
        if len(labels) < 2:
            raise UserError(f"{name}: y holds one class only, {labels[0]}: there is nothing to "
                            "tell apart")
        to = to._replace(classes=tuple(labels.tolist()))
    else:
        y = _real(y, name)
        y_mean, y_std, _ = _moments(y[rows[0]], name)
        to = to._replace(y_mean=y_mean, y_std=y_std)

    def part(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        try:
            return to.inputs(x), y.astype(np.int64) if to.y_mean is None else to.targets(y)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error

    train = part(x[rows[0]], y[rows[0]])
    val: tuple[Any, Any] = (None, None) if rows[1] is None else part(x[rows[1]], y[rows[1]])
    held_out: tuple[Any, Any] = (None, None)
    if test is not None:
        held_out = part(*_test(*test, x, y, to.classes, name))
    return Dataset(name, task, *train, *val, *held_out, notice=notice, preparation=to,
                   outputs=y.shape[1] if to.classes is None else len(to.classes))


def checked_inputs(x: Array, name: str, columns: Sequence[str] = ()) -> np.ndarray:
    """Return inputs as a float64 array (n, N_0), after a look at every number."""
    x = _array(x, f"{name}: x")
    if x.dtype.kind not in "biuf":
        raise UserError(f"{name}: x must hold numbers, got {x.dtype}: encode text and categories "
                        "as numbers, for example a column of 0 and 1 for each value")
    if x.ndim != 2 or x.shape[1] < 1:
        raise UserError(f"{name}: x must have shape (n, features), got {x.shape}: reshape it, for "
                        "example x.reshape(len(x), -1)")
    x = x.astype(np.float64)
    bad = ~np.isfinite(x)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise UserError(f"{name}: example {row}, {_column(columns, column)}, is {x[row, column]}: "
                        "fill in what is missing, or leave the example out")
    return x


def checked_targets(y: Array, name: str) -> np.ndarray:
    """Return targets as an array of numbers, booleans or strings."""
    y = _array(y, f"{name}: y")
    if y.dtype.kind in "OT":
        if not any(all(isinstance(value, kind) for value in y.flat) for kind in (str, Real)):
            kinds = sorted({type(value).__name__ for value in y.flat})
            raise UserError(f"{name}: y must hold numbers only, or strings only, got "
                            f"{', '.join(kinds)}")
        y = np.array(y.tolist())
    if y.dtype.kind not in "biufU":
        raise UserError(f"{name}: y must hold numbers, or strings that name classes, got {y.dtype}")
    return y.astype(np.float64) if y.dtype.kind == "f" else y


def _array(values: Array, what: str) -> np.ndarray:
    try:
        return np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged, or on a GPU
        raise UserError(f"{what} must be a NumPy array, or what can be made one, got "
                        f"{type(values).__name__} ({one_line(error)})") from error


def _moments(values: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each column, and the numbers of constant columns.

    Of a constant one they are its value and 1: rounding would leave it a deviation of its own.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = values.mean(axis=0), values.std(axis=0)
    if not np.isfinite(std).all():
        raise UserError(f"{name}: numbers up to {np.abs(values).max():.0e} cannot be standardised: "
                        "take a larger unit")
    constant = (values == values[0]).all(axis=0) | (std == 0)
    return (np.where(constant, values[0], mean), np.where(constant, 1, std),
            np.flatnonzero(constant))


def task_of(y: np.ndarray, task: str | None, name: str) -> str:
    """Return the task that these targets set, if none is named."""
    if task is not None:
        if task not in TASKS:
            raise unknown("task", task, TASKS)
        if task == "regression" or y.dtype.kind != "f":
            return task
    elif y.dtype.kind == "f":
        return "regression"
    if y.size == len(y) > 0 and 2 * (count := len(np.unique(y))) > len(y):
        what = {"U": "strings", "f": "real numbers"}.get(y.dtype.kind, "whole numbers")
        raise UserError(f"{name}: y holds {count} different {what} in {len(y)} examples: for "
                        "classes these are too many; if they are quantities, say "
                        'task="regression" (--task regression)')
    return "classification"


def _one_column(y: np.ndarray, name: str) -> np.ndarray:
    """Return classes as an array (n,)."""
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim != 1:
        raise UserError(f"{name}: classes must have shape (n,), got {y.shape}: of a column for "
                        'each class take y.argmax(axis=1), of numbers say task="regression"')
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        raise UserError(f"{name}: y holds a class that is not finite (NaN or infinity)")
    return y


def _real(y: np.ndarray, name: str) -> np.ndarray:
    """Return targets as a float64 array (n, outputs)."""
    if y.dtype.kind == "U":
        raise UserError(f"{name}: the targets of a regression must be numbers, got {y.dtype}")
    if y.ndim > 2 or 0 in y.shape[1:]:
        raise UserError(f"{name}: y must have shape (n,) or (n, outputs), got {y.shape}")
    y = y.astype(np.float64).reshape(len(y), -1)
    if not np.isfinite(y).all():
        row = int(np.argwhere(~np.isfinite(y))[0, 0])
        raise UserError(f"{name}: the target of example {row} is not finite: leave it out")
    return y


def _test(x_test: Array, y_test: Array, x: np.ndarray, y: np.ndarray,
          classes: tuple[Any, ...] | None, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return checked test examples for checked ones of training, classes by their numbers."""
    x_test, y_test = checked_inputs(x_test, f"{name}, x_test"), checked_targets(y_test, name)
    if x_test.shape[1] != x.shape[1] or y_test.shape[:1] != (len(x_test),) or not len(x_test):
        raise UserError(f"{name}: the test set needs {x.shape[1]} features and as many targets as "
                        f"examples, got x of shape {x_test.shape} and y of shape {y_test.shape}")
    if classes is None:
        y_test = _real(y_test, f"{name}, y_test")
        if y_test.shape[1] != y.shape[1]:
            raise UserError(f"{name}: the test set needs {y.shape[1]} targets an example, got "
                            f"{y_test.shape[1]}")
        return x_test, y_test
    number = {label: i for i, label in enumerate(classes)}
    labels = _one_column(y_test, f"{name}, y_test").tolist()
    if new := sorted(set(labels) - set(number)):
        raise UserError(f"{name}: the test set has classes that the training set has not: "
                        f"{', '.join(map(str, new[:5]))}")
    return x_test, np.array([number[label] for label in labels])


def _column(columns: Sequence[str], index: int) -> str:
    return f'column "{columns[index]}"' if columns else f"column {index}"


# --- files --------------------------------------------------------------------------------------


def is_file_name(name: str) -> bool:
    """Return whether the name of a data set is that of a file of one's own."""
    return Path(name).suffix.lower() in SUFFIXES


def stamp(name: str) -> tuple[int, int] | None:
    """Return by what a change of a file is noticed: its time and size; None if there is none."""
    try:
        found = user_path(name).stat()
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_size


def read(name: str, target: str | None = None, task: str | None = None,
         seed: int = 0) -> Dataset:
    """Return the data set in a CSV or npz file.

    A CSV file (commas, semicolons or tabs; UTF-8) has a line of column names first, or not; its
    target is the column `target`, by name or by number from 0, and all other columns are inputs.
    An npz file has the arrays ``x`` and ``y``, and may have ``x_test`` and ``y_test``.

    Raises
    ------
    UserError
        If it cannot be read, or does not hold that.
    """
    path = user_path(name)
    if not path.is_file():
        raise UserError(f"there is no file {path}" if not path.exists() else
                        f"{path} is not a file")
    try:
        if path.suffix.lower() == ".npz":
            if target is not None:
                raise UserError(f"--target is for CSV files; the targets of {path} are its array y")
            return _from_npz(path, task, seed)
        return _from_csv(path, target, task, seed)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error})") from error


def _from_npz(path: Path, task: str | None, seed: int) -> Dataset:
    wanted = ("x", "y", "x_test", "y_test")
    try:
        with open(path, "rb") as file:
            arrays, names = read_arrays(file, str(path), wanted)
    except DamagedRecord as error:
        raise UserError(f"{error}: write it with numpy.savez(file, x=..., y=...)") from error
    if "x" not in arrays or "y" not in arrays or ("x_test" in arrays) != ("y_test" in arrays):
        raise UserError(f"{path} must hold the arrays x and y, and may hold x_test and y_test "
                        f"together; it holds {one_line(', '.join(names)) or 'nothing'}")
    test = (arrays["x_test"], arrays["y_test"]) if "x_test" in arrays else None
    return from_arrays(arrays["x"], arrays["y"], task, True, seed, path.name, test=test)


def _from_csv(path: Path, target: str | None, task: str | None, seed: int) -> Dataset:
    lines = _lines(path)
    first, second = next(lines, None), next(lines, None)
    if first is None:
        raise UserError(f"{path} is empty: expected a line of column names and a line an example")
    width, names = len(first.cells), [one_line(cell) for cell in first.cells]
    header = _are_names(names, second.cells if second else [], target)
    columns = names if header else [str(i) for i in range(width)]
    at = _target(path, target, columns)
    if width < 2:
        raise UserError(f"{path} must have at least one column besides the target")
    inputs, x, y = [*columns[:at], *columns[at + 1:]], array("d"), list[tuple[int, str]]()
    for line in chain([] if header else [first], [second] if second else [], lines):
        if len(line.cells) != width:
            raise UserError(f"{path}, line {line.number}: expected {width} columns as in the first "
                            f"line, got {len(line.cells)}")
        y.append((line.number, line.cells.pop(at).strip()))
        numbers = [_number(cell) for cell in line.cells]
        if not all(map(_is_finite, numbers)):
            i = [*map(_is_finite, numbers)].index(False)
            raise _no_number(path, line.number, inputs[i], line.cells[i])
        x.extend(numbers)  # type: ignore[arg-type]
    if not y:
        raise UserError(f"{path} has a line of column names and no example below it")
    return from_arrays(np.frombuffer(x).reshape(len(y), -1), _values(path, y, columns[at], task),
                       task, True, seed, path.name, inputs)


class Line(NamedTuple):
    """A line of a CSV file: its number, from 1, and its cells."""

    number: int
    cells: list[str]


def _lines(path: Path) -> Iterator[Line]:
    """Yield the lines of a CSV file that are not empty."""
    number = 1
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            first = next((line for line in file if line.strip()), "")
            delimiter = max(DELIMITERS, key=lambda each: len(
                next(csv.reader([first], delimiter=each), ())))
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            for cells in reader:
                if cells:
                    yield Line(number, cells)
                number = reader.line_num + 1  # a quoted cell may have several lines
    except csv.Error as error:
        raise UserError(f"{path}, line {number}: this is no CSV ({error})") from error
    except UnicodeDecodeError:  # it was met in a block of many lines
        try:
            path.read_bytes().decode()
        except UnicodeDecodeError as error:
            number = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {number}: this is not in UTF-8: save the file as UTF-8"
                        ) from None


def _are_names(first: Sequence[str], second: Sequence[str], target: str | None) -> bool:
    """Return whether the first line of a file has the names of columns, and is no example.

    It has if all its cells are text, or one is where the next line has a number, or is the target.
    """
    text = {i for i, cell in enumerate(first) if cell and _number(cell) is None}
    numbers = {i for i, cell in enumerate(second) if _number(cell) is not None}
    return len(text) == len(first) or bool(text & numbers) or target in [first[i] for i in text]


def _target(path: Path, target: str | None, columns: Sequence[str]) -> int:
    """Return the number of the target's column."""
    if target is None:
        raise UserError(f"{path}: say which column is to be predicted with --target COLUMN, of "
                        f"{', '.join(columns)}")
    if columns.count(target) > 1:
        raise UserError(f'{path} has {columns.count(target)} columns "{target}": say the number of '
                        "the right one, counting from 0")
    numbers = [str(i) for i in range(len(columns))]
    for names in (columns, numbers):
        if target in names:
            return names.index(target)
    raise UserError(f"{path}: {unknown('column', target, columns)}")


def _values(path: Path, cells: Sequence[tuple[int, str]], column: str,
            task: str | None) -> np.ndarray:
    """Return the target's cells, with their lines, as whole numbers, real numbers or text."""
    numbers = [_number(cell) for _, cell in cells]
    whole, labels = None not in numbers, {cell for _, cell in cells}
    quantities = whole or task == "regression" or (  # but for a few cells
        2 * numbers.count(None) < len(cells) < 2 * len(labels))
    for (line, cell), number in zip(cells, numbers, strict=True):
        if not cell or (quantities and not _is_finite(number)):
            raise _no_number(path, line, column, cell)
    if not quantities:
        return np.array([cell for _, cell in cells])
    try:
        return np.array([int(cell) for _, cell in cells], np.int64)
    except (ValueError, OverflowError):
        return np.array(numbers)


def _no_number(path: Path, line: int, column: str, cell: str) -> UserError:
    """Return the error for a cell that should be a number and is none, or no finite one."""
    cell = one_line(cell)
    what = f'"{cell[:40]}{"..." * (len(cell) > 40)}", no finite number' if cell else "empty"
    return UserError(f'{path}, line {line}: column "{column}" is {what}: fill in what is missing, '
                     "or leave the line out; a category is given as a column of 0 and 1 for each "
                     "of its values")


def _number(text: str) -> float | None:
    try:
        return None if "_" in text else float(text)  # Python reads 1_000 as 1000
    except ValueError:
        return None


def _is_finite(number: float | None) -> bool:
    return number is not None and math.isfinite(number)
