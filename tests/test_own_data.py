"""Data of one's own: arrays, CSV and npz files, and grids of them on the command line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from comet_np.backends import get_backend
from comet_np.errors import UserError
from comet_np.experiments import datasets, grid
from comet_np.experiments.cli import main
from comet_np.experiments.datasets import base, own
from comet_np.experiments.datasets.own import from_arrays, read
from comet_np.experiments.experiment import Place
from comet_np.experiments.progress import Progress
from comet_np.experiments.registry import experiment
from comet_np.experiments.training.model import load_run
from comet_np.records import read_json
from tests.runs import stopped

X = np.random.default_rng(0).normal(3, 2, (40, 3))
NAMED = np.array(["no", "yes", "may be", "no"])[np.arange(40) % 4]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(said, function, *arguments, **named):
    """Assert that a call is refused in one sentence that matches `said`."""
    with pytest.raises(UserError, match=said) as error:
        function(*arguments, **named)
    assert "\n" not in str(error.value)


# --- arrays -------------------------------------------------------------------------------------


def test_inputs_and_targets_are_standardised_by_the_training_part_alone():
    y = np.stack([X[:, 0] * X[:, 1], 5 + X[:, 2]], axis=1)
    data = from_arrays(X, y, seed=2)
    train, val = base.split(40, 2)
    assert (len(train), len(val)) == (32, 8)
    assert not set(train) & set(val)
    for values, ours, theirs in ((X, data.x_train, data.x_val), (y, data.y_train, data.y_val)):
        mean = sum(values[i] for i in train) / 32
        std = (sum((values[i] - mean) ** 2 for i in train) / 32) ** 0.5
        for rows, found in ((train, ours), (val, theirs)):
            assert found.dtype == "float32"
            np.testing.assert_allclose(found, [(values[i] - mean) / std for i in rows], rtol=1e-5,
                                       atol=1e-6)
    assert (data.task, data.outputs, data.x_test, data.notice) == ("regression", 2, None, "")


def test_another_seed_is_another_split_and_none_holds_nothing_out():
    one, other = (from_arrays(X, X[:, 0], seed=seed) for seed in (0, 1))
    assert not np.array_equal(one.y_val, other.y_val)
    whole = from_arrays(X, NAMED, validation=False)
    assert whole.x_val is whole.y_val is None
    np.testing.assert_array_equal(np.array(whole.preparation.classes)[whole.y_train], NAMED)


@pytest.mark.parametrize("labels", [
    NAMED, np.arange(40) % 3 - 7, np.arange(40) % 2 == 0, NAMED.astype(object),
    NAMED[:, None], (np.arange(40) % 3 - 7).astype(object), np.arange(40, dtype="uint8") % 4,
    np.array(NAMED, dtype=np.dtypes.StringDType()), list(NAMED)])
def test_classes_are_numbered_in_order(labels):
    data = from_arrays(X, labels)
    train, val = base.split(40, 0)
    flat = np.asarray(labels).reshape(-1).tolist()
    classes = sorted(set(flat))
    assert data.preparation.classes == tuple(classes)
    assert list(map(type, data.preparation.classes)) == list(map(type, classes))
    assert data.y_train.tolist() == [classes.index(flat[i]) for i in train]
    assert data.y_val.tolist() == [classes.index(flat[i]) for i in val]
    assert (data.task, data.outputs) == ("classification", len(classes))
    assert data.y_train.dtype == data.y_val.dtype == "int64"


def test_the_task_may_be_said():
    numbers = np.arange(40)
    assert from_arrays(X, numbers, "regression").task == "regression"
    assert from_arrays(X, numbers % 3 / 2, "classification").preparation.classes == (0, 0.5, 1)
    assert from_arrays(X, numbers, "classification").outputs == 40
    assert from_arrays(X, numbers % 2 == 0, "regression").outputs == 1


@pytest.mark.parametrize("value", [0.1, 0.0, -7.3e15, 1e-300])
def test_a_constant_column_becomes_zero_and_is_said(value):
    """0.1 too, whose mean over 32 examples is not 0.1 in floating point."""
    x = np.hstack([X, np.full((40, 1), value)])
    data = from_arrays(x, NAMED, columns=("a", "b", "c", "a constant"))
    assert not data.x_train[:, 3].any()
    assert not data.x_val[:, 3].any()
    assert data.x_train[:, :3].std() == pytest.approx(1, rel=0.1)
    assert data.notice == ("the same in all training examples, so it says nothing: column "
                           '"a constant"')


def test_what_is_constant_in_training_may_differ_elsewhere_and_many_are_counted():
    x = np.ones((40, 8))
    x[base.split(40, 0)[1]] = 3
    data = from_arrays(x, NAMED)
    assert not data.x_train.any()
    assert (data.x_val == 2).all()
    assert data.notice.endswith(": column 0, column 1, column 2, column 3, column 4 and 3 more")


def test_a_constant_target_is_learnt_as_such():
    data = from_arrays(X, np.full(40, 0.1))
    assert not data.y_train.any()
    assert data.preparation.y_mean == 0.1
    assert data.preparation.y_std == 1


class Frame:
    """What pandas gives: an object that NumPy makes an array of."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype)

    def __len__(self):
        return len(self.values)


def test_what_becomes_an_array_is_taken_as_one():
    theirs, ours = from_arrays(Frame(X), Frame(NAMED)), from_arrays(X, NAMED)
    assert theirs.digest == ours.digest
    assert from_arrays(X.tolist(), NAMED.tolist()).digest == ours.digest
    assert from_arrays(X > 3, NAMED).outputs == 3


def test_the_digest_is_of_every_example_and_label():
    data = from_arrays(X, NAMED, test=(X[:5], NAMED[:5]))
    digests = {data.digest}
    for name in ("x_train", "y_train", "x_val", "y_val", "x_test", "y_test"):
        changed = from_arrays(X, NAMED, test=(X[:5], NAMED[:5]))
        getattr(changed, name)[-1] += 1
        digests.add(changed.digest)
    assert len(digests) == 7


def test_a_test_set_is_prepared_as_the_training_set():
    y = X[:, 0]
    data = from_arrays(X, y, test=(X[:7], y[:7]))
    np.testing.assert_array_equal(data.x_test, data.preparation.inputs(X[:7]))
    np.testing.assert_allclose(
        data.y_test[:, 0] * data.preparation.y_std + data.preparation.y_mean, y[:7], rtol=1e-6)
    labelled = from_arrays(X, NAMED, test=(X[:7], NAMED[:7]))
    assert [labelled.preparation.classes[i] for i in labelled.y_test] == NAMED[:7].tolist()


BAD = X.copy()
BAD[4, 1] = np.nan
OUTLIER = X[:, :1].copy()
OUTLIER[base.split(40, 0)[1][3]] = -1e100  # held out
ONE_NAN = np.where(np.arange(40) == 6, np.nan, 1.5)


@pytest.mark.parametrize(("x", "y", "options", "said"), [
    (X, NAMED[:39], {}, r"as many examples, got x of shape \(40, 3\) and y of shape \(39,\)"),
    (X, 3, {}, r"y of shape \(\)"),
    (X[0], NAMED[:3], {}, r"x must have shape \(n, features\), got \(3,\)"),
    (X[:, :0], NAMED, {}, r"got \(40, 0\)"),
    (X.reshape(40, 3, 1), NAMED, {}, "reshape it"),
    (X.astype(str), NAMED, {}, "x must hold numbers, got <U"),
    (X.astype(object), NAMED, {}, "x must hold numbers, got object"),
    (X + 1j, NAMED, {}, "x must hold numbers, got complex128"),
    ([[1, 2], [3]], NAMED, {}, "x must be a NumPy array, .* got list"),
    (X, [[1, 2], [3]], {}, "y must be a NumPy array, .* got list"),
    (BAD, NAMED, {}, "example 4, column 1, is nan"),
    (BAD, NAMED, {"columns": ("a", "b", "c")}, 'example 4, column "b", is nan'),
    (1e200 * X, NAMED, {}, "numbers up to .*e\\+200 cannot be standardised"),
    (X, 1e200 * X, {}, "numbers up to .*e\\+200 cannot be standardised"),
    (OUTLIER, NAMED, {}, r"mine: a number of size 1e\+100 is too far from"),
    (X, OUTLIER, {}, r"a number of size 1e\+100 is too far"),
    (X[:4], NAMED[:4], {"task": "classification"}, "validation need at least 5 examples, got 4"),
    (X[:0], X[:0], {"validation": False}, "needs at least 1 example, got 0"),
    (X, NAMED, {"task": "clasification"}, 'unknown task "clas.*"; did you mean "classification"'),
    (X, NAMED, {"task": "regression"}, "targets of a regression must be numbers, got <U6"),
    (X, np.arange(40), {}, "40 different whole numbers in 40 examples: .*--task regression"),
    (X, np.arange(40).astype(str), {}, "40 different strings in 40 examples"),
    (X, X, {"task": "classification"}, r"classes must have shape \(n,\), got \(40, 3\)"),
    (X, X.reshape(40, 3, 1), {}, r"y must have shape \(n,\) or \(n, outputs\)"),
    (X, X[:, :0], {}, r"y must have shape .* got \(40, 0\)"),
    (X, ONE_NAN, {}, "the target of example 6 is not finite"),
    (X, ONE_NAN, {"task": "classification"}, "a class that is not finite"),
    (X, np.array([1, "a"] * 20, dtype=object), {}, "strings only, got int, str"),
    (X, np.array([None, "a"] * 20, dtype=object), {}, "strings only, got NoneType, str"),
    (X, np.array([b"a", b"b"] * 20), {}, r"strings that name classes, got \|S1"),
    (X, np.arange(40).astype("datetime64[D]"), {}, "got datetime64"),
    (X, X[:, 0] + 1j, {}, "got complex128"),
    (X, NAMED, {"test": (X[:, :2], NAMED)}, "the test set needs 3 features"),
    (X, NAMED, {"test": (X, NAMED[:9])}, "as many targets as examples"),
    (X, NAMED, {"test": (X[:0], NAMED[:0])}, r"got x of shape \(0, 3\)"),
    (X, NAMED, {"test": (BAD, NAMED)}, "x_test: example 4"),
    (X, NAMED, {"test": (X, np.where(np.arange(40) == 3, "new", NAMED))}, "training set has not"),
    (X, X, {"test": (X, X[:, :1])}, "the test set needs 3 targets an example, got 1"),
    (X, X[:, 0], {"test": (X, NAMED)}, "y_test: the targets of a regression must be numbers"),
])
def test_arrays_that_do_not_fit_are_refused(x, y, options, said):
    refused(said, from_arrays, x, y, name="mine", **options)


# --- CSV ----------------------------------------------------------------------------------------


def write(text, name="own.csv", encoding="utf-8"):
    Path(name).write_bytes(text.encode(encoding))
    return name


def inputs(data):
    """Return all inputs of a data set in the units of the file, by row of the file."""
    n = len(data.x_train) + len(data.x_val)
    train, val = base.split(n, 0)
    x = np.empty((n, data.x_train.shape[1]))
    for rows, part in ((train, data.x_train), (val, data.x_val)):
        x[rows] = part * data.preparation.x_std + data.preparation.x_mean
    return x.round(3).tolist()


def labels(data):
    """Return all targets, or classes by their labels, by row of the file."""
    train, val = base.split(len(data.y_train) + len(data.y_val), 0)
    found = dict(zip([*train, *val], [*data.y_train, *data.y_val], strict=True))
    if data.preparation.classes is not None:
        return [data.preparation.classes[found[i]] for i in sorted(found)]
    mean, std = data.preparation.y_mean, data.preparation.y_std
    return [round(float((found[i] * std + mean)[0]), 4) for i in sorted(found)]


ROWS = [[1, 2.5, "cat"], [-3, 4e1, "dog"], [5, 6, "cat"], [7, 8.25, "dog"], [0, 9, "cat"],
        [2, 1, "cat"]]
TABLE = "\n".join(",".join(map(str, row)) for row in ROWS)
READ = [[float(v) for v in row[:2]] for row in ROWS]
FORMS = {
    "names": ("weight,height,kind\n" + TABLE, "kind"),
    "names, target by number": ("weight,height,kind\n" + TABLE, "2"),
    "no names": (TABLE, "2"),
    "no names, a last newline": (TABLE + "\n", "2"),
    "semicolons": ("weight;height;kind\n" + TABLE.replace(",", ";"), "kind"),
    "tabs": ("weight\theight\tkind\n" + TABLE.replace(",", "\t"), "kind"),
    "CRLF": (("weight,height,kind\n" + TABLE + "\n").replace("\n", "\r\n"), "kind"),
    "CR": (("weight,height,kind\n" + TABLE).replace("\n", "\r"), "kind"),
    "a byte order mark": ("\ufeffweight,height,kind\n" + TABLE, "kind"),
    "a byte order mark, no names": ("\ufeff" + TABLE, "2"),
    "quoted": ('"weight","height","the ""kind"", or so"\n' + TABLE.replace("cat", '"cat"'),
               'the "kind", or so'),
    "more commas than semicolons in a name": (
        '"a, b, c, d, e";height;kind\n' + TABLE.replace(",", ";"), "kind"),
    "a name of two lines": ('weight,"height\nin m",kind\n' + TABLE, "kind"),
    "blanks": ("weight , height, kind\n" + TABLE.replace(",", " , "), "kind"),
    "empty lines": ("\n\nweight,height,kind\n\n" + TABLE.replace("\n", "\n\n") + "\n\n", "kind"),
    "names that are numbers": ("0,1,kind\n" + TABLE, "kind"),
    "years as names": ("1999,2000,kind\n" + TABLE, "kind"),
    "no name for the first": (",height,kind\n" + TABLE, "kind"),
    "upper case": ("weight,height,Kind\n" + TABLE, "Kind"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_table_is_read_in_every_form(form):
    text, target = FORMS[form]
    data = read(write(text), target)
    assert inputs(data) == READ
    assert labels(data) == [row[2] for row in ROWS]
    assert (data.name, data.task, data.outputs) == ("own.csv", "classification", 2)


@pytest.mark.parametrize(("cells", "task", "values"), [
    (["1", "2", "1", "2", "1", "2"], "classification", [1, 2, 1, 2, 1, 2]),
    (["1", "2.0", "1", "2", "1", "2"], "regression", [1, 2, 1, 2, 1, 2]),
    (["1e3", "-.5", "+2", "7", "8", "1"], "regression", [1000, -0.5, 2, 7, 8, 1]),
    (["1_0", "2", "1_0", "2", "2", "2"], "classification", ["1_0", "2", "1_0", "2", "2", "2"]),
    (["True", "False"] * 3, "classification", ["True", "False"] * 3),
    (["1", "2", "1", "2", "b", "2"], "classification", ["1", "2", "1", "2", "b", "2"]),
    (["9" * 30, "2", "1", "2", "5", "2"], "regression", [1e30, 2, 1, 2, 5, 2]),
])
def test_the_target_is_what_its_cells_are(cells, task, values):
    data = read(write("x,y\n" + "\n".join(f"{i},{cell}" for i, cell in enumerate(cells))), "y")
    assert data.task == task
    if task == "classification":
        assert labels(data) == values
    else:
        np.testing.assert_allclose(labels(data), values, rtol=1e-6, atol=1e24 * (cells[0] > "8"))


def test_whole_numbers_are_quantities_if_it_is_said():
    file = write("x,y\n" + "".join(f"{i * i},{i}\n" for i in range(6)))
    refused("6 different whole numbers in 6 examples: .*--task regression", read, file, "y")
    data = read(file, "y", "regression")
    assert labels(data) == [0, 1, 2, 3, 4, 5]
    assert data.y_train.shape == (5, 1)


def test_a_number_as_target_is_the_column_of_that_name_before_that_place():
    file = write("2,1,a\n" + "\n".join(f"{i},{i + 10},{i + 20}" for i in range(6)))
    for target, first in (("2", 0), ("1", 10), ("a", 20), ("0", 0)):
        assert labels(read(file, target, "regression")) == [first + i for i in range(6)]


NUMBERS = "a,b,c\n" + "\n".join(f"{i},{i % 2},{i % 3}" for i in range(6))


@pytest.mark.parametrize(("text", "target", "said"), [
    ("", "c", r"own\.csv is empty"),
    ("\ufeff\r\n\r\n", "c", r"own\.csv is empty"),
    ("a,b,c\n", "c", r"own\.csv has a line of column names and no example below it"),
    ("a,b,c", "c", "no example below"),
    ("c\n1\n0\n", "c", "at least one column besides the target"),
    (NUMBERS, None, "say which column is to be predicted with --target COLUMN, of a, b, c"),
    (NUMBERS, "d", 'unknown column "d" '),
    (NUMBERS, "3", 'unknown column "3"'),
    (NUMBERS, "-1", 'unknown column "-1"'),
    (NUMBERS, "9" * 5000, 'unknown column "99'),
    (NUMBERS, "colour", 'unknown column "colour"'),
    (NUMBERS.replace("a,b", "c,b"), "c", 'has 2 columns "c": say the number of the right one'),
    (NUMBERS + "\n1,2\n", "c", r"own\.csv, line 8: expected 3 columns as in the first line, got 2"),
    (NUMBERS + "\n1,2,3,4\n", "c", "line 8: expected 3 columns .* got 4"),
    (NUMBERS.replace("4,0,1", "4,,1"), "c", r'own\.csv, line 6: column "b" is empty: fill in'),
    (NUMBERS.replace("4,0,1", "4, ,1"), "c", 'line 6: column "b" is empty'),
    (NUMBERS.replace("4,0,1", "4,0,"), "c", 'line 6: column "c" is empty'),
    (NUMBERS.replace("4,0,1", "4,nan,1"), "c", 'line 6: column "b" is "nan", no finite number'),
    (NUMBERS.replace("4,0,1", "-inf,0,1"), "c", 'line 6: column "a" is "-inf", no finite'),
    (NUMBERS.replace("4,0,1", "1e999,0,1"), "c", 'line 6: column "a" is "1e999", no finite'),
    (NUMBERS.replace("4,0,1", "4,1_0,1"), "c", 'line 6: column "b" is "1_0", no finite'),
    (NUMBERS.replace("4,0,1", "4,0,NaN"), "c", 'line 6: column "c" is "NaN", no finite'),
    (NUMBERS.replace("4,0,1", "NA,0,1"), "a", 'line 6: column "a" is "NA", no finite number'),
    (NUMBERS.replace("4,0,1", '4,"two\nlines",1'), "c", 'line 6: column "b" is "two lines", no'),
    ("a,b\n" + '1,"x\ny"\n' * 3 + "?,z\n", "b", 'line 8: column "a" is "\\?"'),
    ("1,,3\n4,5,6\n7,8,9\n", "0", 'line 1: column "1" is empty'),
    ("nan,2,3\n4,5,6\n7,8,9\n", "2", 'line 1: column "0" is "nan"'),
    (NUMBERS + '\n1,"2"3,4\n', "c", "line 8: this is no CSV"),
    (NUMBERS + '\n1,"2,4\n', "c", "line 8: this is no CSV"),
    ("a,b\n" + "1" * 200_000 + ",2", "b", "line 2: this is no CSV"),
    (NUMBERS.replace("4,0,1", "4,z" + 99 * "y" + ",1"), "c", r'is "zy{39}\.\.\.", no'),
])
def test_a_table_that_cannot_be_used_is_refused_with_its_line_and_column(text, target, said):
    refused(said, read, write(text), target)


@pytest.mark.parametrize(("encoding", "line"), [("latin-1", 9002), ("utf-16", 1)])
def test_a_file_in_another_encoding_is_refused_with_its_line(encoding, line):
    text = "a,b\n" + 9000 * "1,2\n" + "3,Käse\n"
    refused(rf"own\.csv, line {line}: this is not in UTF-8", read, write(text, encoding=encoding),
            "b")


def test_what_is_no_file_is_refused():
    refused(r"there is no file none\.csv", read, "none.csv", "a")
    Path("folder.csv").mkdir()
    refused(r"folder\.csv is not a file", read, "folder.csv", "a")
    refused("or a file of your own, which ends in .csv or .npz", datasets.load, "table.tsv")


def test_a_long_label_costs_no_memory_in_other_columns(monkeypatch):
    """An array of text is as wide in every cell as its longest."""
    made, array = [], np.array
    monkeypatch.setattr(np, "array", lambda *given, **named: made.append(
        array(*given, **named)) or made[-1])
    read(write("a,b,c\n" + "\n".join(f"{i},{i},{'long' * (1 + 99 * (i == 3))}"
                                     for i in range(30))), "c")
    assert max(array.nbytes for array in made) <= 30 * 400 * 4


# --- npz ----------------------------------------------------------------------------------------


def test_an_npz_file_is_its_arrays():
    np.savez("own.npz", x=X, y=NAMED, x_test=X[:9], y_test=NAMED[:9], names=[{1}, None])
    data, same = read("own.npz"), from_arrays(X, NAMED, test=(X[:9], NAMED[:9]))
    assert data.digest == same.digest
    assert data.preparation.classes == same.preparation.classes
    assert len(data.x_test) == 9
    np.savez_compressed("small.npz", x=X, y=np.arange(40))
    assert read("small.npz", task="regression").task == "regression"


class Bomb:
    """What must not be unpickled."""

    def __reduce__(self):
        return Path("exploded").touch, ()


def damaged_archives():
    np.savez("whole.npz", x=X, y=NAMED)
    np.save("single.npy", X)
    whole = Path("whole.npz").read_bytes()
    return {
        "truncated": whole[:len(whole) // 2],
        "empty": b"",
        "text": b"hello",
        "a single array": Path("single.npy").read_bytes(),
        "changed bytes": whole.replace(X.tobytes()[:8], b"12345678"),
        "a huge shape": whole.replace(b"(40, 3)", b"(40000,9999999)", 1),
        "no shape": whole.replace(b"(40, 3)", b"(((((((", 1)}


@pytest.mark.parametrize("name", ["truncated", "empty", "text", "a single array", "changed bytes",
                                  "a huge shape", "no shape"])
def test_a_damaged_npz_file_is_refused(name):
    Path("own.npz").write_bytes(damaged_archives()[name])
    refused(r"^own\.npz is no npz file of plain arrays \(.+\): write it with", read, "own.npz")


def test_objects_are_never_unpickled():
    np.savez("own.npz", x=X, y=np.array([Bomb()] * 40, dtype=object))
    refused("no npz file of plain arrays", read, "own.npz")
    assert not Path("exploded").exists()


@pytest.mark.parametrize(("arrays", "said"), [
    ({"X": X, "y": NAMED}, "must hold the arrays x and y, .* it holds X, y"),
    ({"x": X}, "it holds x$"),
    ({"x": X, "two\nlines": X}, "it holds x, two lines$"),
    ({}, "it holds nothing"),
    ({"x": X, "y": NAMED, "x_test": X}, "x_test and y_test together"),
])
def test_an_npz_file_without_its_arrays_is_refused(arrays, said):
    np.savez("own.npz", **arrays)
    refused(said, read, "own.npz")
    refused("--target is for CSV files; the targets of own.npz are its array y", read, "own.npz",
            "y")


# --- sizes --------------------------------------------------------------------------------------


def test_the_sizes_of_a_file_are_those_of_its_data_and_follow_its_changes():
    file = write(NUMBERS)
    assert datasets.sizes_of(file, "c")[:4] == ("classification", 2, 3, 5)
    assert datasets.sizes_of(file, "c", "regression")[:4] == ("regression", 2, 1, 5)
    assert datasets.load(file, target="c", train=2).x_train.shape == (2, 2)
    assert datasets.load(file, target=2).outputs == 3
    write(NUMBERS.replace("a,b,c", "a,b,c,d").replace("\n", ",1\n").replace("d,1", "d") + ",2")
    assert datasets.sizes_of(file, "c")[:4] == ("classification", 3, 3, 5)
    Path(file).unlink()
    refused("there is no file", datasets.sizes_of, file, "c")
    datasets.recall(file, "c", None, datasets.Sizes("classification", 7, 3, 5))
    assert datasets.sizes_of(file, "c").inputs == 7


def test_options_that_do_not_fit_are_refused():
    refused("--task is for files of your own, and arm is none", datasets.load, "arm", task="x")
    refused('unknown task "x"', datasets.load, write(NUMBERS), target="c", task="x")


# --- the command line ---------------------------------------------------------------------------

SMOKE = ("run", "quickstart", "--preset", "smoke", "--epochs", "2", "--widths", "8", "--jobs", "1",
         "--models", "standard,comet", "--p-k", "0.5")
PLOT = ("plot", "quickstart", "--preset", "smoke")
OUT = Path("runs/quickstart-smoke")


def write_own(seed=0, n=60, constant=False):
    """Write a table of three inputs, a class, a number and a count."""
    x = np.random.default_rng(seed).normal(size=(n, 3)).round(6)
    rows = [f"{a},{b},{7 if constant else c},{'high' if a * b > 0 else 'low'},{a * b + c:.6f},"
            f"{int(9 * abs(a))}" for a, b, c in x]
    write("cost ($),gain ($),c,level,y,count\n" + "\n".join(rows))


def drop_columns(*names):
    """Leave out columns of the file."""
    rows = [line.split(",") for line in Path("own.csv").read_text().splitlines()]
    kept = [i for i, name in enumerate(rows[0]) if name not in names]
    write("\n".join(",".join(row[i] for i in kept) for row in rows))


def cells(out=OUT):
    return sorted((out / "cells").iterdir())


def test_a_table_of_ones_own_goes_through_a_grid_and_is_drawn_without_it(capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    write_own(constant=True)
    drop_columns("y", "count")
    command = (*SMOKE, "--datasets", "own.csv", "--target", "level", "--seeds", "1,4")
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.err.splitlines()[0] == (
        'own.csv: the same in all training examples, so it says nothing: column "c"')
    assert [folder.name.rsplit("-", 1)[0] for folder in cells()] == [
        f"own-{model}-seed{seed}" for model in ("comet-N8-pk0.5", "standard-N8") for seed in (1, 4)]
    table = said.out.split("\n", 3)[3]
    assert re.search(r"^own +8 +0\.5 ", table, re.MULTILINE)
    assert read_json(OUT / "run.json")["own data"] == {
        "own.csv": ["classification", 3, 2, 48, datasets.load("own.csv", target="level").digest,
                    None]}
    picture = (OUT / "quickstart.png").read_bytes()
    Path("own.csv").unlink()
    (OUT / "quickstart.png").unlink()
    monkeypatch.setattr(datasets, "_seen", {})
    assert main(PLOT) == 0
    assert capsys.readouterr().out == table
    assert (OUT / "quickstart.png").read_bytes() == picture
    monkeypatch.setattr(datasets, "_seen", {})
    assert main(command) == 2
    assert capsys.readouterr().err == "comet-np: there is no file own.csv\n"


@pytest.mark.parametrize(("options", "loss"), [
    (("--datasets", "own.csv", "--target", "y"), "MSE"),
    (("--datasets", "own.csv", "--target", "count", "--task", "regression"), "MSE"),
    (("--datasets", "own.npz"), "accuracy"),
    (("--datasets", "own.npz", "--task", "regression"), "MSE"),
])
def test_every_kind_of_file_and_task_goes_through_a_grid(options, loss, capsys):
    pytest.importorskip("matplotlib")
    write_own()
    drop_columns("level")
    np.savez("own.npz", x=X, y=np.arange(40) % 3, x_test=X, y_test=np.arange(40) % 3)
    assert main((*SMOKE, *options, "--seeds", "0,")) == 0
    assert f"validation {loss}" in capsys.readouterr().out
    result = read_json(cells()[0] / "result.json")
    assert ("test_loss" in result) == ("own.npz" in options)
    if "test_accuracy" in result:
        right = load_run(cells()[0]).predict(X) == np.arange(40) % 3
        assert right.mean() == pytest.approx(result["test_accuracy"])
    elif "test_loss" in result:
        errors = (load_run(cells()[0]).predict(X) - np.arange(40) % 3) ** 2
        scale = load_run(cells()[0]).data.preparation.y_std[0] ** 2
        assert errors.mean() / scale == pytest.approx(result["test_loss"], rel=1e-4)
    assert (OUT / "quickstart.png").stat().st_size > 10_000


def test_an_edited_table_is_another_run(capsys):
    """Of other length, or of other numbers only; the file as it was finds its cells again."""
    pytest.importorskip("matplotlib")
    command = (*SMOKE, "--datasets", "own.csv", "--target", "y", "--models", "standard",
               "--seeds", "1")
    texts = []
    for seed, n in (60, 60), (61, 60), (62, 59):
        write_own(seed=seed, n=n)
        drop_columns("level")
        texts.append(Path("own.csv").read_bytes())
        assert main(command) == 0
        said = capsys.readouterr().out
        assert "1 cell run in" in said
        assert ("holds a run of other settings" in said) == (len(texts) > 1)
        assert "different data" not in said
    assert len({read_json(folder / "result.json")["data"] for folder in cells()}) == 3
    Path("own.csv").write_bytes(texts[0])
    assert main(command) == 0
    assert "1 found finished" in capsys.readouterr().out


def test_a_table_that_changes_while_cells_run_is_said(tmp_path):
    write_own()
    drop_columns("level")
    quickstart = experiment("quickstart")
    cell = quickstart.cells(quickstart.configure("smoke", {
        "datasets": ("own.csv",), "target": "y", "seeds": 1, "models": ("standard",)}))[0]
    write_own(seed=1)
    drop_columns("level")
    with pytest.raises(UserError, match=r"own\.csv was changed after this run had begun"):
        grid.run_cell(cell.spec, Place(tmp_path, get_backend("numpy"), None, Progress(1)))


def test_a_stopped_cell_does_not_go_on_with_another_table(capsys):
    pytest.importorskip("matplotlib")
    write_own()
    drop_columns("level")
    command = (*SMOKE, "--datasets", "own.csv", "--target", "y", "--seeds", "1")
    quickstart = experiment("quickstart")
    cell = quickstart.cells(quickstart.configure("smoke", {
        "datasets": ("own.csv",), "target": "y", "seeds": 1, "epochs": 2, "widths": (8,),
        "models": ("standard", "comet"), "p_k": (0.5,)}))[0]
    assert stopped(cell.spec.run, datasets.load("own.csv", target="y"), cell.folder(OUT), at=2)
    before, text = (cell.folder(OUT) / "checkpoint").read_bytes(), Path("own.csv").read_bytes()
    write_own(seed=1)
    drop_columns("level")
    assert main(command) == 0
    assert "2 cells run in" in capsys.readouterr().out
    assert (cell.folder(OUT) / "checkpoint").read_bytes() == before
    Path("own.csv").write_bytes(text)
    assert main(command) == 0
    assert cell.result(OUT)["last"]["step"] > 2


def test_a_table_of_other_columns_gives_other_cells():
    pytest.importorskip("matplotlib")
    command = (*SMOKE, "--datasets", "own.csv", "--target", "y", "--models", "standard", "--seeds",
               "1")
    write_own()
    drop_columns("level")
    assert main(command) == 0
    drop_columns("count")
    assert main(command) == 0
    widths = [json.loads((folder / "config.json").read_text())["run"]["model"]["widths"][0]
              for folder in cells()]
    assert sorted(widths) == [3, 4]


@pytest.mark.parametrize("name", ["arm", "glyphs"])
def test_the_models_of_built_in_data_predict_in_their_units_too(name):
    pytest.importorskip("matplotlib")
    assert main((*SMOKE, "--datasets", name, "--train", "100", "--seeds", "1")) == 0
    data, model = datasets.load(name), load_run(cells()[0])
    found, to = model.predict(data.x_val if name == "glyphs" else
                              data.x_val * data.preparation.x_std + data.preparation.x_mean
                              ), data.preparation
    if name == "glyphs":
        assert (found == data.y_val).mean() == pytest.approx(model.metrics[-1]["val_accuracy"])
    else:
        errors = ((found - to.y_mean) / to.y_std - data.y_val[:, 0]) ** 2
        assert errors.mean() == pytest.approx(model.metrics[-1]["val_loss"], rel=1e-3)


@pytest.mark.parametrize(("options", "said"), [
    (("own.csv",), "say which column is to be predicted with --target COLUMN, of cost"),
    (("own.csv", "--target", "levl"), 'unknown column "levl"; did you mean "level"?'),
    (("own.csv", "--target", "y"), 'own.csv, line 2: column "level" is "'),
    (("own.csv", "--target", "level", "--task", "clas"), 'unknown task "clas"'),
    (("own.csv,./own.csv", "--target", "y"), "one name, by which their cells are called"),
    (("none.csv", "--target", "y"), "there is no file none.csv"),
    (("arm", "--task", "regression"), "--task is for files of your own"),
    (("arm", "--seeds", "1,1"), "given once, got seeds = (1, 1)"),
    (("arm", "--seeds", "1,-1"), "at least 1 seed, each 0 or more"),
    (("arm", "--seeds", ","), "at least 1 seed"),
    (("arm", "--seeds", "1" + 40 * "0"), "those are up to "),
    (("arm", "--seeds", "1,x"), '--seeds takes a whole number, got "x"'),
])
def test_what_does_not_fit_a_table_is_one_sentence(options, said, capsys):
    write_own()
    assert main((*SMOKE, "--datasets", *options)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_name_with_dollars_is_drawn_as_it_is(saved):
    write_own()
    drop_columns("level")
    Path("own.csv").rename("in_$x_$.csv")
    assert main((*SMOKE, "--datasets", "in_$x_$.csv", "--target", "y", "--seeds", "1")) == 0
    titles = [axes.get_title() for axes in saved[0].axes]
    assert titles[0].startswith(r"in_\$x_\$, N = 8")


def test_a_stamp_tells_a_change():
    file = write(NUMBERS)
    before = own.stamp(file)
    assert before == own.stamp(file)
    write(NUMBERS + "\n")
    assert own.stamp(file) != before
    assert own.stamp("none.csv") is None


def test_a_model_knows_its_columns():
    write_own()
    drop_columns("level")
    assert main((*SMOKE, "--datasets", "own.csv", "--target", "y", "--seeds", "1")) == 0
    trained = load_run(cells()[0])
    assert trained.data.preparation.columns == tuple(
        name for name in Path("own.csv").read_text().splitlines()[0].split(",") if name != "y")
    assert f"on 'own.csv' of {', '.join(trained.data.preparation.columns)}," in repr(trained)


@pytest.mark.parametrize(("y", "task", "said"), [
    (["a"] * 20, None, "y holds one class only, a: there is nothing to tell apart"),
    (np.arange(20) / 7, "classification", "20 different real numbers in 20 examples"),
    (np.eye(20, dtype=int), None, r"take y\.argmax\(axis=1\)")])
def test_a_task_that_makes_no_sense_is_refused(y, task, said):
    with pytest.raises(UserError, match=said):
        from_arrays(np.eye(20), y, task)
