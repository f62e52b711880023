"""Data of one's own: arrays, and files of them (CSV, npz)."""

import csv
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError, unknown
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
        hardly two examples of a class.
    """
    x, y = checked_inputs(x, name, columns), np.asarray(y)
    if len(y) != len(x) if y.ndim else True:
        raise UserError(f"{name}: x and y must have as many examples, got x of shape {x.shape} "
                        f"and y of shape {y.shape}")
    task = task_of(y, task, name)
    least = 5 if validation else 1
    if len(x) < least:
        raise UserError(f"{name}: training {'and validation need' if validation else 'needs'} at "
                        f"least {least} example{'s' * (least > 1)}, got {len(x)}")
    classes = None
    if task == "classification":
        y = _one_column(y, name)
        labels, y = np.unique(y, return_inverse=True)
        classes = tuple(labels.tolist())
    else:
        y = _real(y, name)
    rows = split(len(x), seed) if validation else (np.arange(len(x)), None)
    of_training = x[rows[0]]
    std, notices = of_training.std(axis=0), []
    constant = np.flatnonzero(std == 0)
    if len(constant):
        std[constant] = 1
        notices.append("the same in all training examples, so it says nothing: "
                       + ", ".join(_column(columns, i) for i in constant[:5])
                       + (f" and {len(constant) - 5} more" if len(constant) > 5 else ""))
    to = Preparation(of_training.mean(axis=0), std, classes=classes)
    if task == "regression":
        y_std = y[rows[0]].std(axis=0)
        to = to._replace(y_mean=y[rows[0]].mean(axis=0), y_std=np.where(y_std == 0, 1, y_std))

    def part(x: Array, y: Array) -> tuple[np.ndarray, np.ndarray]:
        return to.inputs(x), to.targets(y) if classes is None else y.astype(np.int64)

    train = part(x[rows[0]], y[rows[0]])
    val = (None, None) if rows[1] is None else part(x[rows[1]], y[rows[1]])
    held_out = (None, None) if test is None else part(*_test(test, x, name, classes))
    return Dataset(name, task, *train, *val, *held_out, notice="; ".join(notices),
                   outputs=len(classes) if classes is not None else y.shape[1], preparation=to)


def checked_inputs(x: Array, name: str, columns: Sequence[str] = ()) -> np.ndarray:
    """Return inputs as a float64 array (n, N_0), after a look at every number."""
    x = np.asarray(x)
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


def task_of(y: np.ndarray, task: str | None, name: str) -> str:
    """Return the task that these targets set, if none is named."""
    if task is not None:
        if task not in TASKS:
            raise unknown("task", task, TASKS)
        return task
    if y.dtype.kind == "f":
        return "regression"
    if y.dtype.kind not in "biuUSO":
        raise UserError(f"{name}: y must hold numbers or names of classes, got {y.dtype}")
    if y.dtype.kind in "iu" and len(y) and 2 * len(np.unique(y)) > len(y):
        raise UserError(f"{name}: y holds {len(np.unique(y))} different whole numbers in {len(y)} "
                        "examples: for classes these are too many; if they are quantities, say "
                        'task="regression" (--task regression)')
    return "classification"


def _one_column(y: np.ndarray, name: str) -> np.ndarray:
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim != 1:
        raise UserError(f"{name}: classes must have shape (n,), got {y.shape}")
    if y.dtype.kind == "O":
        kinds = {type(label).__name__ for label in y}
        if kinds != {"str"}:
            raise UserError(f"{name}: classes must all be strings or all be numbers, got "
                            f"{', '.join(sorted(kinds))}")
        y = y.astype(str)
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        raise UserError(f"{name}: y holds a class that is not finite (NaN or infinity)")
    return y


def _real(y: np.ndarray, name: str) -> np.ndarray:
    """Return targets as a float64 array (n, outputs)."""
    if y.dtype.kind not in "biuf":
        raise UserError(f"{name}: the targets of a regression must be numbers, got {y.dtype}")
    if y.ndim > 2 or 0 in y.shape[1:]:
        raise UserError(f"{name}: y must have shape (n,) or (n, outputs), got {y.shape}")
    y = y.astype(np.float64).reshape(len(y), -1)
    if not np.isfinite(y).all():
        row = int(np.argwhere(~np.isfinite(y))[0, 0])
        raise UserError(f"{name}: the target of example {row} is not finite: leave it out")
    return y


def _test(test: tuple[Array, Array], x: np.ndarray, name: str,
          classes: tuple[Any, ...] | None) -> tuple[np.ndarray, np.ndarray]:
    """Return checked test examples, their classes by number."""
    x_test, y_test = checked_inputs(test[0], f"{name}, x_test"), np.asarray(test[1])
    if x_test.shape[1] != x.shape[1] or y_test.ndim < 1 or len(y_test) != len(x_test):
        raise UserError(f"{name}: the test set needs {x.shape[1]} features and as many targets as "
                        f"examples, got x of shape {x_test.shape} and y of shape {y_test.shape}")
    if classes is None:
        return x_test, _real(y_test, f"{name}, y_test")
    number = {label: i for i, label in enumerate(classes)}
    labels = _one_column(y_test, f"{name}, y_test").tolist()
    if unknown_labels := set(labels) - set(number):
        raise UserError(f"{name}: the test set has classes that the training set has not: "
                        f"{', '.join(map(str, sorted(unknown_labels)[:5]))}")
    return x_test, np.array([number[label] for label in labels])


def _column(columns: Sequence[str], index: int) -> str:
    return f'column "{columns[index]}"' if columns else f"column {index}"


# --- files --------------------------------------------------------------------------------------


def is_file_name(name: str) -> bool:
    """Return whether the name of a data set is that of a file of one's own."""
    return Path(name).suffix.lower() in SUFFIXES


def read(name: str, target: str | None = None, task: str | None = None,
         seed: int = 0) -> Dataset:
    """Return the data set in a CSV or npz file.

    A CSV file has a line of column names first, or not; its target is the column `target`, by name
    or by number from 0, and all other columns are inputs. An npz file has the arrays ``x`` and
    ``y``, and may have ``x_test`` and ``y_test``.

    Raises
    ------
    UserError
        If it cannot be read, or does not hold that.
    """
    path = Path(name).expanduser()
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
    try:
        with np.load(path, allow_pickle=False) as found:
            arrays = {name: found[name] for name in ("x", "y", "x_test", "y_test")
                      if name in found.files}
            names = found.files
    except (ValueError, EOFError, zipfile.BadZipFile, AttributeError, NotImplementedError) as error:
        raise UserError(f"{path} is no npz file of plain arrays ({_line(error)}): write it with "
                        "numpy.savez(file, x=..., y=...)") from error
    if "x" not in arrays or "y" not in arrays or ("x_test" in arrays) != ("y_test" in arrays):
        raise UserError(f"{path} must hold the arrays x and y, and may hold x_test and y_test "
                        f"together; it holds {', '.join(names) or 'nothing'}")
    test = (arrays["x_test"], arrays["y_test"]) if "x_test" in arrays else None
    return from_arrays(arrays["x"], arrays["y"], task, True, seed, path.name, test=test)


def _from_csv(path: Path, target: str | None, task: str | None, seed: int) -> Dataset:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            delimiter = max(DELIMITERS, key=first.count)
            file.seek(0)
            lines = [(number, line) for number, line in enumerate(
                csv.reader(file, delimiter=delimiter, strict=True), start=1) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV file in UTF-8 ({_line(error)})") from error
    if not lines:
        raise UserError(f"{path} is empty: expected a line of column names and a line an example")
    width = len(lines[0][1])
    header = any(_number(text) is None for text in lines[0][1])
    columns = ([text.strip() for text in lines[0][1]] if header
               else [str(i) for i in range(width)])
    lines = lines[header:]
    for number, line in lines:
        if len(line) != width:
            raise UserError(f"{path}, line {number}: expected {width} columns as in the first "
                            f"line, got {len(line)}")
    at = _target(path, target, columns)
    inputs = [i for i in range(width) if i != at]
    if not inputs or not lines:
        raise UserError(f"{path} must have at least one column besides the target and one line "
                        f"besides the names, got {width} columns and {len(lines)} lines")
    text = np.array([line for _, line in lines])
    try:
        x = text[:, inputs].astype(np.float64)
    except ValueError:
        raise _no_number(path, lines, inputs, columns) from None
    return from_arrays(x, _values(text[:, at]), task, True, seed, path.name,
                       [columns[i] for i in inputs])


def _target(path: Path, target: str | None, columns: Sequence[str]) -> int:
    """Return the number of the target's column."""
    if target is None:
        raise UserError(f"{path}: say which column is to be predicted with --target COLUMN, of "
                        f"{', '.join(columns)}")
    if columns.count(target) == 1:
        return columns.index(target)
    if columns.count(target) > 1:
        raise UserError(f'{path} has {columns.count(target)} columns "{target}": say the number of '
                        "the right one, counting from 0")
    if target.isdecimal() and int(target) < len(columns):
        return int(target)
    raise UserError(f"{path}: {unknown('column', target, columns)}")


def _values(text: np.ndarray) -> np.ndarray:
    """Return a column of text as whole numbers, real numbers, or what it is."""
    text = np.char.strip(text)
    for kind in (np.int64, np.float64):
        try:
            return text.astype(kind)
        except (ValueError, OverflowError):
            continue
    return text


def _no_number(path: Path, lines: Sequence[tuple[int, list[str]]], inputs: Sequence[int],
               columns: Sequence[str]) -> UserError:
    """Return the error for the first input that is no number."""
    for number, line in lines:
        for i in inputs:
            if _number(line[i]) is None:
                what = f'"{line[i]}", no number' if line[i].strip() else "empty"
                return UserError(
                    f'{path}, line {number}: column "{columns[i]}" is {what}: inputs are numbers, '
                    "so fill in what is missing, and give each value of a category a column of 0 "
                    "and 1")
    return UserError(f"{path}: a number in it cannot be read")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
