"""Records: what is written comes back, what was changed is not believed, and what is forged (its
hash is right, its values are none of ours) is one sentence.
"""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from comet_np import checkpoint, records, settings
from comet_np.backends import get_backend
from comet_np.errors import UserError
from comet_np.experiments import (
    continual,
    datasets,
    diversity,
    fig2,
    fig3,
    grid_report,
    interpret,
    ntk,
    sensitivity,
    softmoe,
    stability,
    transfer,
)
from comet_np.experiments.experiment import Cell, keep_record, read_record
from comet_np.experiments.files import write_result
from comet_np.experiments.registry import experiment
from comet_np.experiments.training import RunConfig, train
from comet_np.models.mlp import MLPConfig
from comet_np.records import DamagedRecord, believed, digests, read_json, read_known, write_json
from tests.runs import MODEL, TRAINING, small_data, stopped
from tests.test_trained import forgeries

RUN = RunConfig(MODEL, TRAINING)
VALUES = {"text": "ä\n\ud800", "numbers": [0.1 + 0.2, -1e-300, 10**30, True, None],
          "nested": {"b": {}, "a": []}, "sha": "x"}

# --- JSON and its hash --------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path):
    write_json(tmp_path / "a.json", VALUES)
    assert read_json(tmp_path / "a.json") == VALUES
    write_json(tmp_path / "a.json", {"shape": (1, 2), "loss": math.inf})
    assert read_json(tmp_path / "a.json") == {"shape": [1, 2], "loss": math.inf}


def test_the_order_of_names_does_not_matter(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1, "b": {"c": 2, "d": 3}})
    values = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps(
        {"b": {"d": 3, "c": 2}, "sha256": values["sha256"], "a": 1}))
    assert read_json(tmp_path / "a.json") == {"b": {"d": 3, "c": 2}, "a": 1}


def test_a_change_of_any_byte_is_noticed(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, VALUES)
    content = file.read_bytes()
    for position in range(len(content)):
        for flip in 1, 4, 128:
            changed = bytearray(content)
            changed[position] ^= flip
            file.write_bytes(changed)
            try:
                assert read_json(file) == VALUES  # space between values, or an upper-case digit
            except DamagedRecord as error:
                assert str(file) in str(error)
    for length in range(len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(DamagedRecord):
            read_json(file)


@pytest.mark.parametrize("content", [
    b"", b"[]", b"null", b"1", b'"sha256"', b"{}", b'{"sha256": 1}', b'{"sha256": []}', b"\xff\xfe",
    100_000 * b"[", 100_000 * b'{"a":', b'{"a": ' + 900 * b"[" + 900 * b"]" + b"}",
    b'{"a": ' + 5000 * b"9" + b"}"])
def test_what_is_no_record_is_damaged(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DamagedRecord, match=r"a\.json (is damaged|has no hash)"):
        read_json(tmp_path / "a.json")


def test_what_is_not_there_is_not_damaged(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "a.json")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        read_json(tmp_path / "file" / "a.json")
    (tmp_path / "a.json").mkdir()
    with pytest.raises(DamagedRecord, match=r"a\.json is damaged: it is a folder"):
        read_json(tmp_path / "a.json")


def test_files_are_known_by_their_hash(tmp_path):
    (tmp_path / "a").write_text("one")
    (tmp_path / "b").write_text("two")
    known = digests(tmp_path, ("a", "b", "none"))
    assert set(known) == {"a", "b"}
    assert read_known(tmp_path / "a", known) == b"one"
    (tmp_path / "b").write_text("tw0")
    (tmp_path / "c").write_text("one")
    for name in "b", "c", "none":
        with pytest.raises(DamagedRecord, match=f"{name} is missing or damaged"):
            read_known(tmp_path / name, known)


def test_only_what_bad_values_do_is_turned_into_damage(tmp_path):
    for error in (KeyError("epoch"), TypeError("a\nb"), ValueError(), IndexError(),
                  AttributeError("x"), OverflowError(), RecursionError()):
        with pytest.raises(DamagedRecord, match=r"^file is damaged") as said, believed("file"):
            raise error
        assert "\n" not in str(said.value)
        assert said.value.__cause__ is error
    for error in (UserError("mine"), OSError(), RuntimeError(), AssertionError(),
                  KeyboardInterrupt()):
        with pytest.raises(type(error)) as said, believed("file"):
            raise error
        assert said.value is error


# --- the record of a run ------------------------------------------------------------------------

QUICKSTART = experiment("quickstart")
datasets.recall("own.csv", "1", None, datasets.Sizes("classification", 2, 3, 20))
CONFIG = QUICKSTART.configure("smoke", {"datasets": ("arm", "own.csv"), "target": "1", "seeds": 1,
                                        "widths": (8,), "models": ("standard", "comet")})
RECORD = {"experiment": "quickstart", "config": json.loads(json.dumps(settings.values(CONFIG))),
          "own data": {"own.csv": ["classification", 2, 3, 20]}, "preset": "smoke"}


def test_the_record_of_a_run_gives_its_configuration(tmp_path):
    write_json(tmp_path / "run.json", RECORD)
    assert read_record(tmp_path, QUICKSTART) == (CONFIG, "smoke")


def one_sentence(function, *arguments):
    """Return what a function returns, or the sentence with which it refuses."""
    try:
        return function(*arguments)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)


def test_a_forged_record_of_a_run_is_one_sentence(tmp_path):
    found = []
    for changed in forgeries(RECORD):
        if isinstance(changed, dict):
            write_json(tmp_path / "run.json", changed)
            found.append(one_sentence(read_record, tmp_path, QUICKSTART))
    refused = [each for each in found if isinstance(each, str)]
    assert len(refused) > len(found) / 3
    assert any("finished cells are kept" in each for each in refused)


def test_a_record_that_cannot_be_read_is_kept_aside(tmp_path):
    """Damaged, of an earlier form, or a folder in its place."""
    file = tmp_path / "run.json"
    for number, make in enumerate((lambda: file.write_text("{"), file.mkdir,
                                   lambda: write_json(file, {"config": 3}))):
        make()
        assert "run of other settings" in keep_record(tmp_path, RECORD, True)
        assert read_json(file) == RECORD
        assert len(list(tmp_path.glob("run-*.json"))) == number + 1
        file.unlink()
    assert keep_record(tmp_path, RECORD, False) == ""
    before = file.read_bytes(), file.stat().st_mtime_ns
    assert keep_record(tmp_path, RECORD, False) == ""
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before


def test_a_record_that_cannot_be_kept_aside_is_one_sentence(tmp_path, monkeypatch):
    def read_only(*arguments):
        raise OSError(30, "Read-only file system")

    write_json(tmp_path / "run.json", RECORD | {"config": {}})
    monkeypatch.setattr(Path, "replace", read_only)
    with pytest.raises(UserError, match=r"cannot keep .*run\.json under another name \(Read-only"):
        keep_record(tmp_path, RECORD, True)


# --- results of cells ---------------------------------------------------------------------------

CELL = Cell("a", MLPConfig((2, 3, 1)), 1.0)
LINES = [{"epoch": 0, "val_loss": 0.5, "val_accuracy": 0.1, "seconds": 0.0},
         {"epoch": 1, "val_loss": 0.25, "val_accuracy": 0.3, "seconds": 1.5}]


def finish_cell(cell, out, result, lines=LINES):
    """Write the files of a finished cell, with their right hashes."""
    cell.folder(out).mkdir(parents=True, exist_ok=True)
    (cell.folder(out) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n"
                                                            for line in lines))
    write_result(cell.folder(out), result)


def test_a_result_is_read_and_used(tmp_path):
    assert CELL.result(tmp_path) is None
    finish_cell(CELL, tmp_path, {"parameters": 3})
    assert CELL.result(tmp_path) == {"parameters": 3}
    assert CELL.result(tmp_path, lambda result: result["parameters"] + 1) == 4
    assert CELL.metrics(tmp_path) == LINES
    assert CELL.metrics(tmp_path, lambda lines: lines[1]["epoch"]) == 1
    for read in (lambda: CELL.result(tmp_path, lambda result: result["none"]),
                 lambda: CELL.metrics(tmp_path, lambda lines: lines[2])):
        with pytest.raises(UserError, match=r"is damaged: .*; remove its folder and run the exp"):
            read()


def test_a_changed_digit_of_the_metrics_is_not_believed(tmp_path):
    finish_cell(CELL, tmp_path, {})
    file = CELL.folder(tmp_path) / "metrics.jsonl"
    file.write_text(file.read_text().replace("0.25", "0.15"))
    with pytest.raises(UserError, match=r"metrics\.jsonl is missing or damaged"):
        CELL.metrics(tmp_path)
    assert CELL.result(tmp_path) == {}


RESULT = {"parameters": 40, "data": "the data", "notice": "", "last": LINES[1],
          "seconds": {"prepare": 0.5}}


def test_forged_results_and_metrics_of_a_grid_are_one_sentence(tmp_path):
    cells = QUICKSTART.cells(CONFIG)
    for cell in cells:
        finish_cell(cell, tmp_path, RESULT)
    whole = grid_report.table(CONFIG, tmp_path)
    found = []
    for changed in forgeries({"result": RESULT, "lines": LINES}):
        if (isinstance(changed, dict) and isinstance(changed.get("result"), dict)
                and isinstance(changed.get("lines"), list)):
            finish_cell(cells[0], tmp_path, changed["result"], changed["lines"])
            found.append(one_sentence(grid_report.table, CONFIG, tmp_path))
    refused = [each for each in found if "run the experiment again" in each]
    assert len(refused) > len(found) / 4
    assert whole in found
    for text in ("[", "\u00ff", "[]\n", 3000 * "["):
        (cells[0].folder(tmp_path) / "metrics.jsonl").write_bytes(text.encode("latin-1"))
        write_result(cells[0].folder(tmp_path), RESULT)
        with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
            grid_report.table(CONFIG, tmp_path)


NETWORK = {"p_k": 0.5, "widths": [2, 3], "never": 1, "woken": 1}
INTERPRET = interpret.InterpretConfig("glyphs", 20, 1, (0.5,), 50, seeds=1)
KERNEL = {**dict.fromkeys(("pairs", "kernel", "centred"), ntk.BINS * [1.0]), "share": [0.5, 0.5],
          **dict.fromkeys(("forward", "backward"), 2 * [ntk.BINS * [1.0]]), "printed": [[0.5, 0.1]],
          "classes": [0.5, 0.5, 0.5]}
FIGURES = {
    "fig2": (fig2.Fig2Config(pairs=2, networks=1, width=8, hidden=1, p_k=(0.5, 1.0)),
             {"input": [0.1, 0.9], "mask": [[0.1, 0.2], [0.3, 0.4]],
              "activation": [[0.1, 0.2], [0.3, 0.4]]}),
    "fig3": (fig3.Fig3Config(networks=1, images=10, datasets=("glyphs", "glyphs")),
             {"networks": [NETWORK | {"quantiles": [101 * [0.5], 101 * [0.25]]}]}),
    "softmoe": (softmoe.SoftMoESettings(experts=(4,), norm_experts=(), norm_larger=(),
                                        norm_slots=(), shares=(0.5,), seeds=1),
                {"parameters": 10, "test_accuracy": 0.5,
                 "kept": [{"K": 2, "specialised": 0.5, "random": [0.1, 0.2]}]}),
    "continual": (continual.ContinualConfig(sequences=("glyphs/2",), models=("comet",), seeds=1),
                  {"parameters": 10, "lr": 0.01, "within": [[0.9, 0.4], [0.5, 0.8]],
                   "among": [[0.9, 0.0], [0.2, 0.6]], "alone": [0.7]}),
    "transfer": (transfer.TransferConfig(models=("comet",), shots=(2, 5), seeds=1),
                 {"parameters": 10, "lr": 0.01, "first": [0.9], "carried": [0.5, 0.6],
                  "fresh": [0.4, 0.5]}),
    "diversity": (diversity.DiversityConfig(
        "glyphs", (20,), (0.5,), hidden=1, images=100, compared=24, seeds=1),
        {"dimensions": [1, 2, 40], "cosine": diversity.BINS * [0.5],
         "layers": 2 * [dict.fromkeys(diversity.SINGLE, 9.0) | {
             "images": [10, 100], "distinct": [10, 90], **{
                 f"{name} by cosine": diversity.BINS * [0.5] for name in ("within", "between")}}]}),
    "interpret": (INTERPRET, {"chance": 0.1, "ways": {
        way: dict.fromkeys(interpret.PROPERTIES, 0.5) for way in INTERPRET.ways}}),
    "stability": (stability.StabilityConfig("glyphs", 2, 2, train=20, validation=20),
                  {"last": {"val_accuracy": 0.5}}),
    "sensitivity": (sensitivity.SensitivityConfig(
        ("glyphs",), p_k=(0.1, 0.5), widths=(8,), seeds=1, train=20, validation=20),
        {"parameters": 7, "notice": "", "data": "d", "seconds": {"prepare": 0.25},
         "difference": 0.1}),
    "ntk": (ntk.NtkConfig(("comet",), (0.5,), width=8, hidden=1, dataset="glyphs",
                          image_width=8, image_hidden=1, train=20, validation=20, seeds=1),
            {"before": KERNEL, "test_accuracy": 0.5, "full": 0.0})}


@pytest.mark.parametrize("name", FIGURES)
def test_forged_results_of_figures_are_one_sentence(tmp_path, name):
    figure, (config, result) = experiment(name), FIGURES[name]
    for cell in figure.cells(config):
        finish_cell(cell, tmp_path, result)
    whole, found = figure.table(config, tmp_path), []
    for changed in forgeries(result):
        if isinstance(changed, dict):
            finish_cell(cell, tmp_path, changed)
            found.append(one_sentence(figure.table, config, tmp_path))
    assert sum("run the experiment again" in each for each in found) > len(found) / 3
    finish_cell(cell, tmp_path, result)
    assert figure.table(config, tmp_path) == whole


# --- checkpoints --------------------------------------------------------------------------------


def forged_checkpoint(file, header, payload=b""):
    """Write a checkpoint with any header, and its right hash."""
    line = header if isinstance(header, bytes) else json.dumps(header).encode()
    digest = records.hashlib.sha256(line + b"\n" + payload).hexdigest()
    file.write_bytes(checkpoint.MAGIC + f"{checkpoint.VERSION} {digest}\n".encode() + line + b"\n"
                     + payload)


@pytest.mark.parametrize("arrays", [
    None, 3, [], "x", {"w": None}, {"w": []}, {"w": ["<f4"]}, {"w": ["<f4", 3]}, {"w": [3, [2]]},
    {"w": ["|O", [2]]}, {"w": ["none", [2]]}, {"w": ["<f4", [-1]]}, {"w": ["<f4", [-2, -1]]},
    {"w": ["<f4", [3]]}, {"w": ["<f4", [2**70]]}, {"w": ["<f4", [2**31, 2**31, 4]]},
    {"w": ["<f4", ["2"]]}, {"w": ["<f4", [1.5]]}, {"w": ["<f4", [None]]}, {"w": ["<V0", [2]]},
    {"w": ["<U0", [2]]}, {"w": [[["a", "|O"]], [1]]}, {"w": ["<f4", 70 * [1] + [2]]},
    {"w": ["(", [2]]}, {"w": ["<f4", {}]}, {"w": {"0": 1}}])
def test_forged_arrays_of_a_checkpoint_are_one_sentence(tmp_path, arrays):
    file = tmp_path / "checkpoint"
    forged_checkpoint(file, {"description": {}, "arrays": arrays}, bytes(8))
    with pytest.raises(checkpoint.CheckpointError, match="is damaged: its hash is right") as error:
        checkpoint.load(file)
        pytest.fail(str(arrays))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("header", [
    b"", b"{", b"[]", b"null", b"3", b"\xff", 100_000 * b"[", b"{}", b'{"arrays": {}}',
    b'{"description": {}}', b'{"arrays": {}, "description": 3}',
    b'{"arrays": {}, "description": null}', b'{"arrays": {}, "description": ["a"]}'])
def test_a_forged_header_of_a_checkpoint_is_one_sentence(tmp_path, header):
    forged_checkpoint(tmp_path / "checkpoint", header)
    with pytest.raises(checkpoint.CheckpointError, match="is damaged: its hash is right"):
        checkpoint.load(tmp_path / "checkpoint")


def test_a_folder_in_place_of_a_checkpoint_is_one_sentence(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(checkpoint.CheckpointError, match=r"cannot read .*: move .* away"):
        checkpoint.load_latest(tmp_path / "checkpoint")


def test_a_forged_checkpoint_of_a_run_is_one_sentence(tmp_path):
    """Whatever its description says: it is refused, or the run goes on to its end."""
    data = small_data()
    assert stopped(RUN, data, tmp_path / "run", at=3)
    file, metrics = tmp_path / "run" / "checkpoint", tmp_path / "run" / "metrics.jsonl"
    arrays, description = checkpoint.load(file)
    lines = metrics.read_bytes()

    def go_on(arrays, description):
        checkpoint.save(file, arrays, description)
        metrics.write_bytes(lines)
        return one_sentence(train, RUN, data, tmp_path / "run", get_backend("numpy"))

    assert isinstance(go_on(arrays, description), dict)
    found = [go_on(arrays, changed) for changed in forgeries(description)
             if isinstance(changed, dict)]
    refused = [each for each in found if isinstance(each, str)]
    assert len(refused) > len(found) / 2
    assert any("does not hold what a run writes" in each for each in refused)
    flat = arrays["flat"]
    for changed in ({}, {"flat": flat[:1]}, {"flat": flat.astype("float32")}, {"flat": flat[None]},
                    {"flat": flat, "first": flat}):
        assert "does not hold the arrays of this run" in go_on(changed, description)


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
def test_an_unreadable_checkpoint_is_one_sentence(tmp_path):
    checkpoint.save(tmp_path / "checkpoint", {"w": np.zeros(3)}, {})
    (tmp_path / "checkpoint").chmod(0)
    with pytest.raises(checkpoint.CheckpointError, match="Permission denied"):
        checkpoint.load(tmp_path / "checkpoint")

