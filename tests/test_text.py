"""Texts: corpora are read right, tokens are GPT-2's, streams are made once and believed rightly."""

import contextlib
import errno
import gzip
import itertools
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from comet_np.backends import get_backend
from comet_np.experiments import datasets
from comet_np.experiments.cli import main
from comet_np.experiments.datasets import corpora, text, tokenizer
from comet_np.experiments.datasets.text import text_data, tokenizer_of
from comet_np.experiments.datasets.tokenizer import CHARACTERS, load_tokenizer, pieces
from comet_np.experiments.training.examples import Examples
from comet_np.models.gpt2 import GPT2Config
from tests.test_damaged_data import as_nobody, memory_below, public
from tests.test_datasets import refused

__all__ = ["public"]  # a fixture
REAL = os.environ.get("COMET_DATA")
WHY = "the package tokenizers, of the text extra, is not installed"
HARD = ("", " ", "a", "Hello world", "  two  spaces\n\n\n\tand\ttabs ", "naïve \u017f \ufb01",
        "\u4e2d\u6587 \u0438 \u043a", "\U0001f469\u200d\U0001f467 \U0001f99e\U0001f3fd",
        "it's we'll I'd 'tis don't", "x\r\ny\x00\x1c", "\x85\u2028z\u00a0\u3000 b",
        "e\u0301 \u200b\ufeff", "def f(x):\n    return x**2  # 123456", "<unk> = = Title = = \n \n")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Let streams be kept in a folder of the test's own."""
    monkeypatch.setenv("COMET_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COMET_DATA", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def packages():
    return pytest.importorskip("tokenizers", reason=WHY)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Let Python's standard library be a small one."""
    root = tmp_path / "lib"
    files = {f"m{i}.py": f'"""Module {i}."""\nx = {i}\n' for i in range(12)}
    files |= {"pack/__init__.py": '"""A package."""\n', "pack/inner.py": "y = 1\n" * 9,
              "pack/test/test_pack.py": "no\n", "site-packages/other.py": "no\n",
              "bad.py": b"\xff\xfe", "pydoc_data/topics.py": 'topics = {"if": "The if\\n"}\n',
              "_sysconfigdata_x.py": "no\n", "wrong.py": "def (\n",
              "deep.py": 'class A:\n    """Of a class."""\n    def f(self):\n        r"""\\d"""\n'}
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(corpora, "library", lambda: root)
    return root


def lines(path, *documents):
    """Write documents as lines of JSON, gzipped if the name says so."""
    content = "".join(json.dumps(document) + "\n" for document in documents).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


def own(path, context=4, **options):
    return text_data(str(path), "bytes", 256, context, **options)


def texts(x):
    """Return the texts of bytes."""
    return [row.astype(np.uint8).tobytes().decode() for row in x]


def gpt2_files(folder, merges=("h e", "he l", "Ġ w"), names=tokenizer.PAIRS[0], more=()):
    """Write a small vocabulary in the format of GPT-2's."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = [*CHARACTERS, *(merge.replace(" ", "") for merge in merges), *more]
    (folder / names[0]).write_text(json.dumps({e: i for i, e in enumerate(entries)}))
    (folder / names[1]).write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return folder


# --- tokenizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "bpe", "gpt2"])
def test_text_comes_back_from_its_tokens_and_from_a_saved_tokenizer(kind, tmp_path, request):
    if kind != "bytes":
        request.getfixturevalue("packages")
    made = {"bytes": tokenizer.of_bytes,
            "bpe": lambda: tokenizer.train_bpe([" ".join(HARD) * 3], 270),
            "gpt2": lambda: load_tokenizer(gpt2_files(tmp_path / "pair", more=["<|endoftext|>"]))}
    found = made[kind]()
    found.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.vocabulary == found.vocabulary and again.text() == found.text()
    for text_ in HARD:
        tokens = found.encode(text_)
        assert tokens.dtype == np.uint16 and tokens.ndim == 1
        assert found.decode(tokens) == again.decode(again.encode(text_)) == text_
    assert found.decode(found.encode("a\ud800b")) == "a?b"
    assert "\ufffd" in found.decode(found.encode("é")[:-1]) or len(found.encode("é")) == 1
    refused(lambda: found.decode([found.vocabulary]), "from 0 to", found.vocabulary)


def test_bytes_need_no_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    path = tmp_path / "a.txt"
    path.write_text("abcdefgh\n" * 20)
    data = own(path)
    assert tokenizer_of(data).decode(data.x_train[0]) == "abcd"
    refused(lambda: text_data(str(path), "bpe", 300, 4), "tokenizers", "pip install")
    gpt2_files(tmp_path / "gpt2")
    refused(lambda: text_data(str(path), "gpt2", 259, 4, tmp_path), "tokenizers", "pip install")
    assert not list((tmp_path / "cache").glob(".making*"))


@pytest.mark.parametrize("names", tokenizer.PAIRS)
def test_a_small_vocabulary_in_gpt2s_format(packages, tmp_path, names):
    found = load_tokenizer(gpt2_files(tmp_path, names=names, more=["<|endoftext|>"]))
    assert found.vocabulary == 260
    assert found.encode("hel wo").tolist() == [257, 258, CHARACTERS.index("o")]
    assert found.encode("a<|endoftext|>").tolist() == [97, 259]


def naive_bpe(text_, entries, pairs, pattern):
    """Return the tokens of a text, by the words of GPT-2's paper: the best pair first."""
    rank, tokens = {pair: i for i, pair in enumerate(pairs)}, []
    for word in pattern.findall(text_):
        parts = [CHARACTERS[byte] for byte in word.encode()]
        while True:
            best = min(itertools.pairwise(parts), key=lambda pair: rank.get(pair, 1 << 30),
                       default=None)
            if best not in rank:
                break
            merged, i = [], 0
            while i < len(parts):
                two = tuple(parts[i:i + 2]) == best
                merged.append("".join(parts[i:i + 1 + two]))
                i += 1 + two
            parts = merged
        tokens += [entries[part] for part in parts]
    return tokens


@pytest.mark.parametrize("official", [False, True])
def test_tokens_are_those_of_gpt2(packages, tmp_path, official):
    names = tokenizer.PAIRS[1]
    if official:
        folder = real("gpt2")
        for name, other in zip(tokenizer.PAIRS[0], names, strict=True):
            (tmp_path / other).write_bytes((folder / name).read_bytes())
    else:
        gpt2_files(tmp_path, names=names, more=["<|endoftext|>"])
    ours = load_tokenizer(tmp_path)
    hard = (*HARD, " ".join(HARD))
    with contextlib.suppress(ImportError):
        import regex

        pattern = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
                                r"|\s+(?!\S)|\s+")
        entries = json.loads((tmp_path / names[0]).read_text())
        pairs = [tuple(line.split()) for line in
                 (tmp_path / names[1]).read_text(encoding="utf-8").split("\n")[1:] if line]
        for text_ in hard:
            assert ours.encode(text_).tolist() == naive_bpe(text_, entries, pairs, pattern), text_
    transformers = pytest.importorskip("transformers", reason="transformers, of the crosscheck "
                                       "extra, is not installed")
    theirs = transformers.GPT2TokenizerFast.from_pretrained(str(tmp_path))
    for text_ in (*hard, "the end<|endoftext|>\n"):
        assert ours.encode(text_).tolist() == theirs(text_)["input_ids"], text_


def test_a_saved_tokenizer_neither_cuts_nor_fills_up(packages, tmp_path):
    saved = load_tokenizer(gpt2_files(tmp_path))
    saved._bpe.enable_truncation(3)
    saved._bpe.enable_padding(length=9)
    saved.save(tmp_path)
    assert [len(tokens) for tokens in load_tokenizer(tmp_path).encode_all(["abcdef", "a"])] == [
        6, 1]


def test_long_texts_are_cut_where_no_token_is(packages, tmp_path, monkeypatch, draw):
    merges = ("h e", "he l", "Ġ w", "Ġ Ġ", "Ċ Ċ", "Ġ Ċ")  # white joins white, were it let
    ours = load_tokenizer(gpt2_files(tmp_path, merges))
    alphabet = list("hello w  \n\n\t\u00a0\x1c'sé1.")
    whole = ["".join(draw.choice(alphabet, 300)) for _ in range(20)]
    expected = [ours.encode(text_).tolist() for text_ in whole]
    together = ours.encode("".join(whole))
    monkeypatch.setattr(pieces, "__defaults__", (7,))
    assert len(pieces(whole[0])) > 10 and "".join(pieces(whole[0])) == whole[0]
    assert [tokens.tolist() for tokens in ours.encode_all(whole)] == expected
    monkeypatch.setattr(text, "AT_ONCE", 40)
    monkeypatch.setattr(corpora, "READ", 9)
    path = tmp_path / "a.txt"
    path.write_bytes(("".join(whole) + "\n" + "x" * 2000).encode())
    x = text_data(str(path), "gpt2", ours.vocabulary, 16, tmp_path).x_train.ravel()
    assert x[:len(together) - 2].tolist() == together[:-2].tolist()


def test_bpe_is_trained_alike_each_time_and_on_the_training_part(packages, tmp_path):
    path = tmp_path / "a.txt"
    training = "ab cd ef gh ij kl mn op\n" * 9
    path.write_text(training + "zq" * 10 + "\n")
    data = text_data(str(path), "bpe", 260, 4)
    first = tokenizer_of(data)
    assert data.outputs == first.vocabulary == 260
    assert len(first.encode("zq")) == 2 and tokenizer.train_bpe([training], 260).text() == (
        first.text())
    refused(lambda: text_data(str(path), "bpe", 5000, 4), "not 5000", "at most")
    refused(lambda: text_data(str(path), "bpe", 255, 4), "256 bytes", 255)


@pytest.mark.parametrize(("change", "words"), [
    (lambda f: (f / "vocab.bpe").write_text("h e\nx y\n"), ("lacks", '"xy"', "same place")),
    (lambda f: (f / "vocab.bpe").write_text("h e\n"), ('entry "hel"', "no merge makes")),
    (lambda f: (f / "vocab.bpe").write_text("h e\nhel\n"), ("line 2", "two entries")),
    (lambda f: (f / "vocab.bpe").write_bytes(b"\xff e\n"), ("UTF-8",)),
    (lambda f: (f / "encoder.json").write_text('{"a": 0, "b": 2}'), ("0 to 1",)),
    (lambda f: (f / "encoder.json").write_text('{"a": 0}'), ("lacks",)),
    (lambda f: (f / "encoder.json").write_text('["a"]'), ("JSON object",)),
    (lambda f: (f / "encoder.json").write_text("{"), ("JSON object",)),
    (lambda f: (f / "encoder.json").write_text('{"a": "b", "c": 1}'), ("JSON object",)),
    (lambda f: (f / "tokenizer.json").write_text("{"), ("damaged",)),
    (lambda f: (f / "tokenizer.json").write_text('{"model": {"merges": [1], "vocab": {}}}'),
     ("damaged",)),
    (lambda f: (f / "encoder.json").unlink(), ("no tokenizer", "encoder.json"))])
def test_damaged_tokenizers_are_refused(packages, tmp_path, change, words):
    change(gpt2_files(tmp_path))
    refused(lambda: load_tokenizer(tmp_path), tmp_path, *words)


# --- corpora ------------------------------------------------------------------------------------


def real(name):
    """Return a folder of the real data sets, or skip the test."""
    folder = Path(REAL or "-") / name
    if not folder.is_dir():
        pytest.skip(f"COMET_DATA names no folder that holds {name}")
    return folder


def all_texts(name, folder=None, filtered=False):
    """Return the texts of each part of a corpus, and its notice."""
    found, notice = corpora.find(name, folder, filtered).texts(lambda size: None)
    parts = {}
    for part, content in found:
        parts.setdefault(part, []).append(content)
    return parts, notice


def test_the_library_is_split_by_packages_and_leaves_out_tests(library):
    parts, notice = all_texts("python-code")
    both = "".join(parts["train"] + parts["val"])
    assert "no\n" not in both and "topics" not in both and len(parts["val"]) >= 2
    assert ("y = 1" in "".join(parts["val"])) == ("A package" in "".join(parts["val"]))
    assert "Python 3" in notice
    prose, _ = all_texts("python-prose")
    both = "".join(prose["train"] + prose["val"])
    assert all(found in both for found in ("Module 3.\n\n", "The if", "Of a class.", "\\d"))
    assert "x = " not in both and "no" not in both
    assert set(prose["val"]).isdisjoint(prose["train"])
    for file in library.rglob("*.py"):
        file.unlink()
    refused(lambda: corpora.find("python-code", None), "no source", library)


def wikitext(folder, **parts):
    folder.mkdir(parents=True)
    for name, content in parts.items():
        (folder / f"wiki.{name.replace('_', '.')}").write_bytes(content.encode())
    return folder


def test_wikitext_is_the_larger_and_says_what_is_cut(tmp_path):
    refused(lambda: corpora.find("wikitext", None), "--data", "wikitext-2-v1.zip")
    refused(lambda: corpora.find("wikitext", tmp_path), "missing", tmp_path)
    two = wikitext(tmp_path / "wikitext-2", valid_tokens="v2", test_tokens="t2")
    assert corpora.CORPORA["wikitext"].status(tmp_path) == ("incomplete", two)
    refused(lambda: corpora.find("wikitext-2", tmp_path), "incomplete", two)
    (two / "wiki.train.tokens").write_text(" = A = \n \n b")
    assert all_texts("wikitext", tmp_path) == (
        {"train": [" = A = \n \n b"], "val": ["v2"], "test": ["t2"]}, "")
    prefix = wikitext(tmp_path / "wikitext-103-prefix", valid_tokens="v3", test_tokens="t3")
    (prefix / "wiki.train.tokens.prefix").write_bytes(b"longer than that \xc3")
    parts, notice = all_texts("wikitext", tmp_path)
    assert parts["train"] == ["longer than that "] and "cut short" in notice
    assert all_texts("wikitext-2", tmp_path)[0]["val"] == ["v2"]
    assert all_texts("wikitext", two)[0]["val"] == ["v2"]
    status = {row[0]: row[1] for row in datasets.report(tmp_path)}
    assert status["wikitext-2"] == "found" and status["wikitext-103"] == "partial"
    wikitext(tmp_path / "wikitext-103-raw", train_raw="x" * 50, valid_raw="raw", test_raw="t")
    assert all_texts("wikitext-103", tmp_path)[0]["val"] == ["raw"]


def project(i, name, content=""):
    return {"repo_name": f"p{name}", "path": f"{i}.py", "content": content or f"file {i} of {name}"}


def test_codeparrot_is_as_published_unless_its_parts_share_projects(tmp_path):
    refused(lambda: corpora.find("codeparrot", tmp_path), "missing", "codeparrot-clean-train")
    train = [project(i, i % 12) for i in range(40)]
    lines(tmp_path / "codeparrot-clean-train" / "file-000000000001.json.gz", *train[:20])
    lines(tmp_path / "codeparrot-clean-train" / "file-000000000002.json", *train[20:])
    valid = lines(tmp_path / "codeparrot-clean-valid" / "file-000000000001.json.gz",
                  project(0, "other"))
    parts, notice = all_texts("codeparrot", tmp_path)
    assert parts == {"train": [d["content"] for d in train], "val": ["file 0 of other"]}
    assert notice == ""
    lines(valid, project(50, 3), project(51, "other"))
    parts, notice = all_texts("codeparrot", tmp_path)
    of = {part: {content.split()[-1] for content in found} for part, found in parts.items()}
    assert len(of["val"]) == 2 and of["val"].isdisjoint(of["train"])
    assert sum(map(len, parts.values())) == 42
    assert "share 1 projects" in notice and "2 of the 13" in notice
    alone = tmp_path / "alone"
    for part, count in ("train", 20), ("valid", 1):
        lines(alone / f"codeparrot-clean-{part}" / "file-000000000001.json",
              *(project(i, 1) for i in range(count)))
    parts, notice = all_texts("codeparrot", alone)
    assert len(parts["val"]) == 2 and "share their only project" in notice
    assert corpora.CORPORA["codeparrot"].status(tmp_path) == ("partial", valid.parent.with_name(
        "codeparrot-clean-train"))
    refused(lambda: text_data("codeparrot", "bytes", 256, 4, tmp_path, True), "pandas")
    valid.unlink()
    lines(tmp_path / "codeparrot-clean-train" / "file-000000000054.json.gz",
          project(0, "a", "import pandas"), project(0, "b"))
    parts, notice = all_texts("codeparrot", tmp_path)
    assert parts["val"] == ["import pandas", "file 0 of b"]
    assert all_texts("codeparrot", tmp_path, True)[0] == {"val": ["import pandas"]}


def test_a_text_of_ones_own_ends_in_its_validation_part(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff".encode() + "ä line\r\n".encode() * 100)
    monkeypatch.setattr(corpora, "READ", 64)
    parts, _ = all_texts(str(path))
    train, val = "".join(parts["train"]), "".join(parts["val"])
    assert len(parts["train"]) > 5 and (train + val).encode() == path.read_bytes()[3:]
    assert train.endswith("\r\n") and 9 <= val.count("\n") <= 10
    path.write_bytes("ä".encode() * 500)
    parts, _ = all_texts(str(path))
    assert "".join(parts["train"] + parts["val"]) == "ä" * 500


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.JSONL"])
def test_documents_of_ones_own_are_split_by_project_or_by_tens(tmp_path, name):
    path = lines(tmp_path / name, *({"text": f"t{i}"} for i in range(25)))
    assert all_texts(str(path))[0]["val"] == ["t9", "t19"]
    lines(path, *(project(i, i % 5) for i in range(25)))
    parts, notice = all_texts(str(path))
    assert len({content[-1] for content in parts["val"]}) == 1 and len(parts["train"]) == 20
    assert notice == ""


@pytest.mark.parametrize(("name", "content", "words"), [
    ("a.txt", b"", ("expected at least one", "training")),
    ("a.txt", b"abc", ("expected at least one", "running text of 4 tokens", "in 1 piece:")),
    ("a.txt", b"abcdefgh\n" * 9 + b"\xff\xfe\xfa", ("not in UTF-8", "iconv")),
    ("a.jsonl", b"", ("expected at least one", "training")),
    ("a.jsonl", b'{"text": "a"}\n' * 20, ("18 tokens in 18 documents",)),
    ("a.jsonl", b'{"text": "a"}\n\n{"text"\n', ("line 3", "JSON object")),
    ("a.jsonl", b'{"text": "a"}\n[1]\n', ("line 2", "got a list")),
    ("a.jsonl", b'{"body": "a"}\n', ("line 1", "content or text", "body")),
    ("a.jsonl", b'{"text": 3}\n', ("line 1", "content or text")),
    ("a.jsonl", b'{"text": "\xff"}\n', ("line 1", "utf-8")),
    ("a.jsonl", b"[" * 100_000, ("line 1", "JSON object")),
    ("a.json.gz", b"no gzip", ("damaged",)),
    ("a.json.gz", gzip.compress(b'{"text": "abcdefgh"}\n' * 99, mtime=0)[:-12], ("damaged",)),
    ("b.txt", None, ("there is no file",)),
    ("a.csv", None, ("unknown corpus", "python-code", ".jsonl.gz"))])
def test_bad_files_are_refused_and_nothing_is_left(tmp_path, cache, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(lambda: own(tmp_path / name), name, *words)
    assert not cache.exists() or not list(cache.iterdir())


# --- streams ------------------------------------------------------------------------------------


def test_documents_are_cut_each_by_itself_and_running_text_goes_on(tmp_path):
    data = own(lines(tmp_path / "a.jsonl", *({"text": f"{i:02}abcdefg"} for i in range(10))))
    assert texts(data.x_train)[:4] == ["00ab", "cdef", "01ab", "cdef"]
    assert texts(data.x_val) == ["09ab", "cdef"] and data.x_test is None
    path = tmp_path / "a.txt"
    path.write_text("abcdefg\n" * 20)
    data = own(path, 5)
    assert "".join(texts(data.x_train)) == ("abcdefg\n" * 18)[:140]
    assert "".join(texts(data.x_val)) == ("abcdefg\n" * 2)[:15]
    assert (data.task, data.outputs, data.name) == ("language", 256, str(path))


def test_streams_stay_on_disk(tmp_path, draw):
    path = tmp_path / "a.txt"
    path.write_bytes(draw.integers(32, 127, 4_000_000, dtype=np.uint8).tobytes())
    with memory_below(40_000_000):
        data = own(path, 100)

    def examples(data):
        return Examples(data.x_train, data.y_train, data, GPT2Config(vocabulary=256), None,
                        get_backend("numpy"), "float32", keeps=False)

    examples(data)  # imports what it needs
    with memory_below(1_000_000):
        data = own(path, 100).first(30_000, 50)
        assert data.x_train is data.y_train and data.x_val is data.y_val
        assert len(data.x_train) == 30_000 and len(data.x_val) == 50
        found = examples(data)
        assert np.shares_memory(found.x, data.x_train) and np.shares_memory(found.y, data.x_train)
        batch = found.batch(np.array([3, 29_999]))
        assert batch.x.shape == (2, 99) and batch.y.tolist() == data.x_train[[3, 29_999]].tolist()
    assert not data.x_train.flags.writeable


def test_the_digest_is_of_the_tokens_that_are_used(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("abcdefg\n" * 40)
    data = own(path)
    digests = [data.digest, data.first(5, None).digest, data.first(None, 2).digest,
               own(path, 8).digest]
    assert len(set(digests)) == 4
    assert data.first(None, None).digest == data.first(999, None).digest == data.digest
    path.write_text("abcdefg\n" * 39 + "abcdefG\n")
    assert own(path).digest not in digests
    path.write_text("abcdefg\n" * 40)  # another time, and the same tokens
    assert own(path).digest == data.digest


@pytest.fixture
def made(monkeypatch):
    """Return a list that grows when streams are made."""
    calls, make = [], text._make
    monkeypatch.setattr(text, "_make", lambda *args: calls.append(args) or make(*args))
    return calls


def test_streams_are_made_once_and_anew_if_files_change(tmp_path, cache, made):
    path = tmp_path / "a.txt"
    path.write_text("abcdefg\n" * 40)
    first = own(path)
    own(path)
    assert len(made) == 1
    info = path.stat()
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns + 1))
    assert own(path).digest == first.digest and len(made) == 2
    path.write_text("abcdefg\n" * 60)
    assert len(own(path).x_train) > len(first.x_train) and len(made) == 3
    assert len(list(cache.iterdir())) == 1  # the old ones are gone
    assert texts(first.x_train[:2]) == ["abcd", "efg\n"]  # though still mapped


@pytest.mark.parametrize(("name", "damage", "anew"), [
    ("train.bin", lambda content: content[:-2], True),
    ("train.bin", lambda content: content + b"xx", True),
    ("val.bin", lambda content: b"\xff" + content[1:], True),
    ("val.bin", lambda content: content, False),  # copied, say: its time alone is another
    ("val.bin", None, True), ("tokenizer.json", None, True), ("meta.json", None, True),
    ("tokenizer.json", lambda content: content + b" ", True),
    ("meta.json", lambda content: content.replace(b"256", b"255"), True),
    ("meta.json", lambda content: b"{", True)])
def test_damaged_streams_are_made_anew(tmp_path, cache, made, name, damage, anew):
    path = tmp_path / "a.txt"
    path.write_text("abcdefg\n" * 40)
    digest = own(path).digest
    file = next(cache.glob(f"*/{name}"))
    content = file.read_bytes()
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(content))
        os.utime(file, ns=(1, 1))
    data = own(path)
    assert data.digest == digest and len(made) == 1 + anew
    assert texts(data.x_train[:2]) == ["abcd", "efg\n"]
    own(path)
    assert len(made) == 1 + anew


def test_several_at_once_make_the_same_streams(tmp_path, cache):
    path = tmp_path / "a.txt"
    path.write_text("abcdefg\n" * 4000)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: own(path), range(16)))
    assert len({data.digest for data in found}) == 1
    assert all(np.array_equal(data.x_train, found[0].x_train) for data in found)
    assert len(list(cache.iterdir())) == 1


def test_no_space_leaves_nothing(tmp_path, cache, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("abcdefg\n" * 40)

    def full(self, tokens):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(text._Stream, "add", full)
        refused(lambda: own(path), "cannot write", "No space", "COMET_CACHE")
    assert not list(cache.iterdir())
    own(path)


def test_a_cache_that_cannot_be_written(public, monkeypatch):
    path = public / "a.txt"
    path.write_text("abcdefg\n" * 40)
    monkeypatch.setenv("COMET_CACHE", str(public / "cache"))
    with as_nobody():
        refused(lambda: own(path), "cannot write", public / "cache", "COMET_CACHE")
    (public / "cache").write_text("a file")
    refused(lambda: own(path), "cannot write", public / "cache", "COMET_CACHE")


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path, cache):
    path = tmp_path / "a.txt"
    path.write_text("abcdefg\n" * 40)
    for name, age, file_age in ("new", 0, 0), ("old", 2, 2), ("at work", 2, 0):
        made = cache / f".making-{name}" / "made"
        made.mkdir(parents=True)
        (made / "train.bin").write_text("half")
        for each, days in (made / "train.bin", file_age), (made, age), (made.parent, age):
            os.utime(each, (time.time() - days * 86_400 - 60,) * 2)
    own(path)
    assert {each.name for each in cache.glob(".making-*")} == {".making-new", ".making-at work"}


def test_where_streams_are_kept(monkeypatch):
    monkeypatch.delenv("COMET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert text.cache_folder() == Path("/somewhere/comet-np")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert text.cache_folder() == Path.home() / ".cache" / "comet-np"


def test_long_work_is_spoken_of_and_short_work_is_not(tmp_path, monkeypatch, capsys):
    class Listener(list):
        message = list.append

    path, heard = tmp_path / "a.txt", Listener()
    path.write_text("abcdefg\n" * 40)
    own(path, 4, progress=heard)
    own(path, 5)
    assert not heard and capsys.readouterr().err == ""
    monkeypatch.setattr(text, "SILENT", 0)
    own(path, 6, progress=heard)
    own(path, 7)
    assert heard and "tokens of" in heard[0]
    assert "tokens of" in capsys.readouterr().err
    monkeypatch.setattr(text, "train_bpe", lambda texts, vocabulary: list(texts) and (
        tokenizer.Tokenizer(vocabulary)))
    text_data(str(path), "bpe", 300, 4, progress=heard)
    assert heard[-1] == f"{path} is read; now its tokenizer of 300 entries is trained"


@pytest.mark.parametrize(("options", "words"), [
    ({"tokenizer": "words"}, ('unknown tokenizer "words"', "bytes")),
    ({"vocabulary": 257}, ("has 256 entries", 257)),
    ({"context": 1}, ("at least 2", 1)),
    ({"context": 2.5}, ("a whole number of at least 2", 2.5)),
    ({"corpus": "pythoncode"}, ("unknown corpus", "did you mean", "python-code")),
    ({"tokenizer": "gpt2"}, ("--data",)),
    ({"tokenizer": "gpt2", "folder": "."}, ("GPT-2's tokenizer is not in", "vocab.bpe")),
    ({"folder": "nowhere"}, ("no folder", "nowhere"))])
def test_options_that_do_not_fit_are_refused(library, options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = {"corpus": "python-code", "tokenizer": "bytes", "vocabulary": 256, "context": 4}
    refused(lambda: text_data(**known | options), *words)


def test_data_names_the_corpora(tmp_path, capsys):
    assert main(["data", "--data", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in corpora.CORPORA)
    refused(lambda: datasets.fetch("codeparrot", tmp_path), "huggingface.co")
    refused(lambda: tokenizer_of(datasets.load("arm")), "no tokenizer")


# --- the real ones --------------------------------------------------------------------------------


def test_wikitext_in_gpt2s_tokens(packages):
    folder = real("wikitext-103-prefix")
    real("gpt2")
    parts, _ = all_texts("wikitext", folder.parent)
    ours = load_tokenizer(folder.parent / "gpt2")
    start = "".join(parts["val"])[:20_000]
    tokens = ours.encode(start)
    assert ours.vocabulary == 50257 and ours.decode(tokens) == start


def test_the_code_at_hand_shares_no_project(tmp_path):
    folder = real("python_code")
    data = text_data("codeparrot", "bytes", 256, 512, folder.parent)
    assert len(data.x_train) > 10 * len(data.x_val) / 9 > 0 and "projects" in data.notice
