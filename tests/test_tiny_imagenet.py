"""Tiny ImageNet: its files are read right, or refused in one sentence."""

import hashlib
import io
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from comet_np.experiments import datasets
from comet_np.experiments.cli import main
from comet_np.experiments.datasets import tiny_imagenet
from comet_np.experiments.datasets.tiny_imagenet import ARCHIVE, FOLDER, LABELS
from comet_np.records import read_json
from tests.test_damaged_data import as_nobody, public
from tests.test_datasets import real, refused

__all__ = ["public", "real"]  # fixtures
Image = pytest.importorskip("PIL.Image", reason="Tiny ImageNet is decoded by Pillow")

CLASSES = ("n00000010", "n00000002", "n00000001")  # as they come, not sorted
FORMS = ("folder", "archive", "archive of another name", "folder of another name")


def jpeg(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, **{"subsampling": 0} | options)
    return file.getvalue()


def picture(number):
    """Return an image (64, 64, 3) of 8x8 squares of one colour each, which JPEG keeps."""
    squares = np.random.default_rng(number).integers(30, 226, (8, 8, 3), dtype=np.uint8)
    return squares.repeat(8, axis=0).repeat(8, axis=1)


def files(train=20, test=4, classes=CLASSES, grey=()):
    """Return the official files in small: the content of each by its name."""
    contents = {"wnids.txt": "\n".join(classes).encode(), "words.txt": b"n00000001\tgoldfish"}
    number, labels = 0, []
    for wnid in classes:
        contents[f"train/{wnid}/{wnid}_boxes.txt"] = b"n00000001_0.JPEG\t0\t0\t62\t45"
        for i in range(train):
            contents[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = jpeg(picture(number))
            number += 1
    for i in range(test * len(classes)):
        name = f"val_{i}.JPEG"
        contents[f"val/images/{name}"] = jpeg(
            picture(number)[..., 0] if i in grey else picture(number))
        labels.append(f"{name}\t{classes[i % len(classes)]}\t0\t0\t62\t45\n")
        number += 1
    contents[LABELS] = "".join(labels).encode()
    contents["test/images/test_0.JPEG"] = jpeg(picture(number))  # whose class nobody knows
    return contents


def write(folder, contents, form="archive"):
    """Write the files in a form that is read; return the folder of images, or the archive."""
    if form.startswith("archive"):
        place = folder / (ARCHIVE.name if form == "archive" else "tiny-imagenet-3cls.zip")
        with zipfile.ZipFile(place, "w") as archive:
            for name, content in contents.items():
                archive.writestr(f"{FOLDER}/{name}", content)
        return place
    place = folder if form == "folder of another name" else folder / FOLDER
    for name, content in contents.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return place


@pytest.fixture(scope="module")
def small():
    return files(grey=(2, 5))


def pixels(content):
    """Return a picture in a file pixel by pixel: all red, all green, all blue, each row by row."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    return [image.getpixel((column, row))[colour] for colour in range(3) for row in range(64)
            for column in range(64)]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(tmp_path, small, form):
    place = write(tmp_path, small, form)
    data = datasets.load("tiny_imagenet", tmp_path)
    assert (data.x_train.shape, data.x_val.shape) == ((48, 12288), (12, 12288))
    assert (data.outputs, data.image) == (3, (3, 64, 64))
    assert data.preparation.classes == tuple(sorted(CLASSES))
    for part in ("train", "val", "test"):
        x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
        assert (x.dtype, y.dtype, x.flags.c_contiguous) == (np.uint8, np.int64, True)
    # the training and validation sets are a partition of the training images
    known = {tuple(pixels(content)): sorted(CLASSES).index(name.split("/")[1])
             for name, content in small.items() if name.startswith("train") and "images" in name}
    found = list(map(tuple, np.concatenate([data.x_train, data.x_val]).tolist()))
    assert sorted(found) == sorted(known)
    assert [known[image] for image in found] == [*data.y_train, *data.y_val]
    assert len(set(data.y_train[:12].tolist())) == 3
    names = [f"val_{i}.JPEG" for i in range(12)]
    expected = {tuple(pixels(small[f"val/images/{name}"])): i for i, name in enumerate(names)}
    order = [expected[tuple(image)] for image in data.x_test.tolist()]
    assert sorted(order) == list(range(12))
    assert data.y_test.tolist() == [sorted(CLASSES).index(CLASSES[i % 3]) for i in order]
    grey = data.x_test[order.index(2)].reshape(3, 4096)
    assert (grey == grey[0]).all()
    why = "unknown hash" if form.startswith("archive") else "not all of the official images"
    assert str(place) in data.notice
    assert why in data.notice
    assert "3 of 200 classes, 60 images for training and validation, 12 for" in data.notice


def test_pixels_lie_where_they_were(tmp_path, small):
    """Not as Pillow says, but as the picture was drawn."""
    write(tmp_path, small)
    data = datasets.load("tiny_imagenet", tmp_path)
    drawn = np.array([picture(i).transpose(2, 0, 1).reshape(-1) for i in range(60)], int)
    for image in np.concatenate([data.x_train, data.x_val]).astype(int):
        assert np.abs(drawn - image).max(axis=1).min() < 8


def test_every_form_has_the_same_digest(tmp_path, small):
    found = set()
    for form in FORMS:
        (tmp_path / form).mkdir()
        write(tmp_path / form, small, form)
        found.add(datasets.load("tiny_imagenet", tmp_path / form).digest)
    assert len(found) == 1
    assert datasets.load("tiny_imagenet", tmp_path / "folder", seed=1).digest not in found


def test_the_whole_set_gives_no_notice(tmp_path, small, monkeypatch):
    monkeypatch.setattr(tiny_imagenet, "CLASSES", 3)
    monkeypatch.setattr(tiny_imagenet, "TRAIN", 60)
    monkeypatch.setattr(tiny_imagenet, "TEST", 12)
    (tmp_path / "a").mkdir()
    archive = write(tmp_path, small)
    write(tmp_path / "a", small, "folder")
    assert datasets.load("tiny_imagenet", tmp_path / "a").notice == ""
    assert "unknown hash" in datasets.load("tiny_imagenet", tmp_path).notice
    official = ARCHIVE._replace(hash=hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(tiny_imagenet, "ARCHIVE", official)
    assert datasets.load("tiny_imagenet", tmp_path).notice == ""
    with datasets.in_folder(tmp_path):
        assert datasets.sizes_of("tiny_imagenet").outputs == 200  # as known, nothing was decoded
    assert status(tmp_path)[0] == status(tmp_path / "a")[0] == "found"


def status(folder):
    return {row[0]: row[1:3] for row in datasets.report(folder)}["tiny_imagenet"]


def test_the_status(tmp_path, small):
    assert status(tmp_path) == ("missing", "-")
    place = tmp_path / FOLDER
    place.mkdir()
    assert status(tmp_path) == ("incomplete", str(place))
    archive = write(tmp_path, small)
    assert status(tmp_path) == ("72 of 110,000 images", str(archive))
    write(tmp_path, files(1, 1), "folder")
    assert status(tmp_path) == ("6 of 110,000 images", str(place))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ARCHIVE.name).write_bytes(b"no archive")
    assert status(tmp_path / "other") == ("unreadable", str(tmp_path / "other" / ARCHIVE.name))


# --- sizes --------------------------------------------------------------------------------------


def test_the_sizes_are_those_of_what_is_there(tmp_path, small, monkeypatch):
    monkeypatch.delenv("COMET_DATA", raising=False)
    official = ("classification", 12288, 200, 80_000, "", (3, 64, 64))
    assert datasets.sizes_of("tiny_imagenet") == official
    for folder in (tmp_path, tmp_path / "nowhere"):
        with datasets.in_folder(folder):
            assert datasets.sizes_of("tiny_imagenet") == official
    write(tmp_path, small)
    data = datasets.load("tiny_imagenet", tmp_path)
    monkeypatch.setenv("COMET_DATA", str(tmp_path))
    assert datasets.sizes_of("tiny_imagenet") == (
        "classification", 12288, 3, 48, data.digest, (3, 64, 64))
    (tmp_path / "two").mkdir()
    write(tmp_path / "two", files(10, 2, CLASSES[:2]), "folder")
    with datasets.in_folder(tmp_path / "two"):
        assert datasets.sizes_of("tiny_imagenet")[2:4] == (2, 16)
    assert datasets.sizes_of("tiny_imagenet").outputs == 3
    refused(lambda: datasets.sizes_of("tiny_imagenet", "3"), "tiny_imagenet has classes")


def test_other_files_have_other_sizes(tmp_path, small):
    with datasets.in_folder(tmp_path):
        write(tmp_path, small, "folder")
        first = datasets.sizes_of("tiny_imagenet")
        new = "n00000003"
        write(tmp_path, {f"train/{new}/images/{new}_{i}.JPEG": jpeg(picture(i)) for i in range(10)},
              "folder")
        assert (first.outputs, datasets.sizes_of("tiny_imagenet").outputs) == (3, 4)


RUN = ("run", "quickstart", "--preset", "smoke", "--datasets", "tiny_imagenet", "--epochs", "1",
       "--widths", "8", "--models", "comet", "--p-k", "0.5", "--seeds", "1", "--augment",
       "crop_flip", "--data")


@pytest.mark.usefixtures("small_blocks")
def test_a_run_knows_its_classes(tmp_path, small, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COMET_DATA", raising=False)
    for name, contents in (("a", small), ("b", files(10, 2, CLASSES[:2]))):
        (tmp_path / name).mkdir()
        write(tmp_path / name, contents)
    assert main([*RUN, "a"]) == 0
    said = capsys.readouterr().out
    assert "tiny_imagenet: 48 training examples (80 %), 12288 features, 3 classes" in said
    out = Path("runs/quickstart-smoke")
    name, record = read_json(out / "run.json")["own data"].popitem()
    assert (name, record[2:4]) == ("tiny_imagenet", [3, 48])
    cell, = (out / "cells").iterdir()
    assert read_json(cell / "config.json")["run"]["model"]["widths"][-1] == 3
    (tmp_path / "a" / ARCHIVE.name).rename("gone")
    monkeypatch.setattr(datasets, "_seen", {})
    assert main(["plot", "quickstart", "--preset", "smoke"]) == 0  # its figure needs no file
    (tmp_path / "gone").rename(tmp_path / "a" / ARCHIVE.name)
    assert main([*RUN, "a"]) == 0
    assert "found" in capsys.readouterr().out
    assert main([*RUN, "b"]) == 0  # other data are other cells
    assert len(list((out / "cells").iterdir())) == 2
    monkeypatch.setattr(datasets, "_seen", {})
    assert main([*RUN, "nowhere"]) == 2
    assert "there is no folder nowhere" in capsys.readouterr().err


# --- what is refused ----------------------------------------------------------------------------


def refuses(folder, *words):
    refused(lambda: datasets.load("tiny_imagenet", folder), *words)


def test_what_is_missing(tmp_path, small):
    refuses(tmp_path, tmp_path, "tiny-imagenet-200/ or tiny-imagenet-200.zip",
            "--fetch tiny_imagenet", ARCHIVE.url)
    refused(lambda: datasets.look(["tiny_imagenet"], tmp_path), "tiny_imagenet is missing")
    (tmp_path / FOLDER / "train").mkdir(parents=True)
    refuses(tmp_path, f"{tmp_path / FOLDER} lacks {LABELS}", "--fetch tiny_imagenet")
    (tmp_path / "file").touch()
    refuses(tmp_path / "file", f"{tmp_path / 'file'} is a file")


def test_without_pillow_one_sentence_says_what_to_install(tmp_path, small, monkeypatch):
    write(tmp_path, small)
    monkeypatch.setitem(sys.modules, "PIL", None)
    refuses(tmp_path, "python -m pip install Pillow")
    refused(lambda: datasets.look(["tiny_imagenet"], tmp_path), "python -m pip install Pillow")


IMAGE = "train/n00000001/images/n00000001_0.JPEG"
PNG = io.BytesIO()
Image.fromarray(picture(0)).save(PNG, "PNG")


@pytest.mark.parametrize(("changes", "words"), [
    ({IMAGE: b""}, (IMAGE, "JPEG image of 64x64 pixels")),
    ({IMAGE: jpeg(picture(0))[:-300]}, (IMAGE, "JPEG image of 64x64 pixels")),
    ({IMAGE: jpeg(picture(0))[:100]}, (IMAGE, "JPEG image of 64x64 pixels")),
    ({IMAGE: PNG.getvalue()}, (IMAGE, "JPEG image of 64x64 pixels")),
    ({IMAGE: jpeg(picture(0)[:32])}, (IMAGE, "got something else (64x32 pixels)")),
    ({IMAGE: jpeg(np.zeros((4000, 4000, 3), np.uint8))}, (IMAGE, "(4000x4000 pixels)")),
    ({"val/images/val_99.JPEG": jpeg(picture(0))}, (LABELS, "no class of val_99.JPEG")),
    ({LABELS: b"val_0.JPEG n00000001\n"}, (LABELS, "a tab and its class")),
    ({LABELS: None}, (LABELS, "--fetch tiny_imagenet"))])
@pytest.mark.parametrize("form", ["folder", "archive"])
def test_wrong_contents_are_refused(tmp_path, small, form, changes, words):
    contents = {name: content for name, content in (small | changes).items() if content is not None}
    place = write(tmp_path, contents, form)
    refuses(tmp_path, place, *words, "--fetch tiny_imagenet")


def test_too_few_classes_or_images_are_refused(tmp_path):
    for contents, said in ((files(9, 2, CLASSES[:1]), "training images of 1 classes"),
                           (files(2, 2, CLASSES[:2]), "got 4"),
                           (files(9, 0), "no validation images of the classes")):
        refuses(write(tmp_path, contents).parent, ARCHIVE.name, said)


def test_validation_images_of_other_classes_are_left_out_and_said(tmp_path, small):
    write(tmp_path, {name: content for name, content in small.items()
                     if not name.startswith("train/n00000002")})
    data = datasets.load("tiny_imagenet", tmp_path)
    assert (data.outputs, len(data.x_test), sorted(set(data.y_test.tolist()))) == (2, 8, [0, 1])
    assert "8 for the test (4 are of other classes and left out)" in data.notice


def test_other_names_are_no_images(tmp_path, small):
    """Such as those that a Mac leaves beside its files."""
    odd = {"train/n00000001/images/._n00000001_0.JPEG": b"?", "train/.DS_Store": b"?",
           "train/n00000001/images/notes.txt": b"?", "val/images/._val_0.JPEG": b"?"}
    for form in ("folder", "archive"):
        (tmp_path / form).mkdir()
        write(tmp_path / form, small | odd, form)
        assert len(datasets.load("tiny_imagenet", tmp_path / form).x_train) == 48


def test_damaged_archives_are_refused(tmp_path, small):
    place = write(tmp_path, files(4, 1))
    good, expected = place.read_bytes(), datasets.load("tiny_imagenet", tmp_path).digest
    for content in (b"", b"no archive", good[:1000], good[:-30], good[1000:]):
        place.write_bytes(content)
        refuses(tmp_path, f"{place} is a damaged archive", "remove it and fetch it with")
    draw, kept = np.random.default_rng(0), 0
    directory = good.rindex(b"PK\5\6")
    at = [*range(60), *draw.integers(0, len(good), 60), *range(directory, len(good)),
          *draw.integers(good.index(b"PK\1\2"), directory, 200)]
    for i in at:
        for bit in (1, 128):
            content = bytearray(good)
            content[i] ^= bit
            place.write_bytes(content)
            try:
                data = datasets.load("tiny_imagenet", tmp_path)
            except ValueError as error:
                assert "\n" not in str(error)
                assert str(place) in str(error)
            else:
                kept += data.digest == expected
    assert 0 < kept < len(at)


def test_a_file_in_an_archive_that_is_too_large_is_refused(tmp_path, small, monkeypatch):
    contents = small | {IMAGE: small[IMAGE] + bytes(10_000)}
    place = write(tmp_path, contents)
    monkeypatch.setattr(tiny_imagenet, "LARGEST", 10_000)
    refuses(tmp_path, place, "more than an image")
    write(tmp_path, contents, "folder")
    refuses(tmp_path, f"{FOLDER}/{IMAGE} holds more than 10000 bytes")
    monkeypatch.setattr(tiny_imagenet, "LARGEST_ARCHIVE", 10_000)
    (tmp_path / FOLDER).rename(tmp_path / "away")
    refuses(tmp_path, f"{place} holds more than 10000 bytes")


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archive_packed_otherwise_is_refused(tmp_path, small, compression):
    place = tmp_path / ARCHIVE.name
    with zipfile.ZipFile(place, "w", compression) as archive:
        for name, content in small.items():
            archive.writestr(f"{FOLDER}/{name}", content)
    refuses(tmp_path, place, "packed as the official ones are not")


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_files_that_may_not_be_read(public, small, form):
    place = write(public, small, form)
    file = place if form == "archive" else place / IMAGE
    file.chmod(0)
    with as_nobody():
        refuses(public, f"cannot read {file} (Permission denied)", "right to read")
    if form == "folder":
        (place / "train").chmod(0)
        with as_nobody():
            refuses(public, f"cannot read {place / 'train'}", "(Permission denied)")
        (place / "train").chmod(0o755)


def test_a_folder_in_the_place_of_the_archive(tmp_path):
    (tmp_path / ARCHIVE.name).mkdir()
    refuses(tmp_path, f"{tmp_path / ARCHIVE.name} is a folder")


# --- the official files, where they are ---------------------------------------------------------


def test_official_tiny_imagenet(real):
    data = real("tiny_imagenet")
    assert data.x_train.shape[1] == 12288
    assert len(data.x_train) == 400 * data.outputs
    assert np.bincount(data.y_test).tolist() == [50] * data.outputs
    assert set(np.bincount(np.concatenate([data.y_train, data.y_val])).tolist()) == {500}
    grey = (data.x_train.reshape(-1, 3, 4096) == data.x_train.reshape(-1, 3, 4096)[:, :1]).all(
        axis=(1, 2))
    assert 0.005 < grey.mean() < 0.04
    means = data.x_train.reshape(-1, 3, 4096).mean(axis=(0, 2)) / 255
    np.testing.assert_allclose(means, [0.48, 0.45, 0.40], atol=0.06)
