"""Corpora: what texts there are, how they are read, and which are held out for validation.

A corpus is either *running*, one text line after line (prose), or *documents*, each by itself
(code). It is read in one pass that holds a document, or about a megabyte of text, at a time.
"""

import ast
import codecs
import gzip
import hashlib
import itertools
import json
import math
import os
import platform
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple, cast

from ...errors import UserError, one_line, unknown, user_path
from .base import exists, file_size, reason, unreadable

Tick = Callable[[int], object]  # is told of so many bytes that were read
Text = tuple[str, str]  # of which part it is ("train", "val" or "test"), and the text
JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
SUFFIXES = (".txt", *JSON_SUFFIXES)
KEYS = ("content", "text")
HELD_OUT = 10  # of so many packages, projects or documents, or fewer, one is held out
LIBRARIES = ("pandas", "sklearn", "matplotlib", "seaborn")  # of the Hugging Face course's filter
READ = 1 << 20  # bytes
NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


class Corpus(NamedTuple):
    """A corpus that was found.

    name : str
    files : what it is read from; of these, a change is noticed
    running : whether it is one running text, or documents
    texts : function (tick) -> its texts in one pass, and what the user should know, if anything
    passes : how often `texts` reads all files
    """

    name: str
    files: tuple[Path, ...]
    running: bool
    texts: Callable[[Tick], tuple[Iterator[Text], str]]
    passes: int = 1

    def stamp(self) -> str:
        """Return by what a change of the files is noticed: their names, sizes and times."""
        digest = hashlib.sha256()
        for file in self.files:
            size = file_size(file)
            digest.update(f"{file.resolve()} {size} {file.stat().st_mtime_ns}\n".encode(
                errors="surrogateescape"))
        return digest.hexdigest()

    @property
    def size(self) -> int:
        """How many bytes are read in all."""
        return sum(map(file_size, self.files)) * self.passes


class Kind(NamedTuple):
    """What is known of a corpus before it is looked for.

    find : function (folder or None, filtered) -> Corpus
    status : function (folder or None) -> what is there of it in a word or two, and where
    source : what it is, or where it comes from
    """

    find: Callable[[Path | None, bool], Corpus]
    status: Callable[[Path | None], tuple[str, Path | None]]
    source: str


def find(name: str, folder: Path | None, filtered: bool = False) -> Corpus:
    """Return a corpus: one of `CORPORA`, or a file of one's own.

    Parameters
    ----------
    name : str
    folder : Path, optional
        Of the data sets.
    filtered : bool
        Of documents use only those that name pandas, sklearn, matplotlib or seaborn, as the
        Hugging Face course does; prose is taken whole.

    Raises
    ------
    UserError
        If there is no such corpus, or its files are not there.
    """
    if is_file_name(name):
        return _own(name, filtered)
    if name not in CORPORA:
        raise UserError(f"{unknown('corpus', name, CORPORA)}, or a file of your own, which ends in "
                        f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    return CORPORA[name].find(folder, filtered)


def is_file_name(name: str) -> bool:
    """Return whether the name of a corpus is that of a file of one's own."""
    return name.lower().endswith(SUFFIXES)


def _kept(text: str, filtered: bool) -> bool:
    return not filtered or any(library in text for library in LIBRARIES)


def held_out(groups: Iterable[str]) -> set[str]:
    """Return which packages or projects are for validation: those of the smallest hashes."""
    order = sorted(set(groups), key=_hash)
    return set(order[:math.ceil(len(order) / HELD_OUT)])


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


# --- Python's standard library ------------------------------------------------------------------


def library() -> Path:
    """Return the folder of Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def _modules(wants_topics: bool) -> list[Path]:
    """Return the files of the standard library in an order that mixes the packages."""
    root, found = library(), []
    for place, folders, names in os.walk(root):
        folders[:] = set(folders) - NOT_LIBRARY - ({"pydoc_data"} if not wants_topics else set())
        found += [Path(place, name) for name in names
                  if name.endswith(".py") and not name.startswith("_sysconfigdata")]
    if not found:
        raise UserError(f"there is no source of Python's standard library in {root}: choose "
                        "another corpus")
    return sorted(found, key=lambda path: _hash(path.relative_to(root).as_posix()))


def _package(path: Path) -> str:
    """Return the top-level package, or module, that a file of the library belongs to."""
    return path.relative_to(library()).parts[0].removesuffix(".py")


def _python_code(folder: Path | None, filtered: bool) -> Corpus:
    files = _modules(wants_topics=False)
    return Corpus("python-code", tuple(files), False,
                  partial(_of_library, files, lambda text, _: [text] * _kept(text, filtered)))


def _python_prose(folder: Path | None, filtered: bool) -> Corpus:
    files = _modules(wants_topics=True)
    return Corpus("python-prose", tuple(files), True, partial(_of_library, files, _prose))


def _of_library(files: list[Path], texts_of: Callable[[str, Path], Iterable[str]],
                tick: Tick) -> tuple[Iterator[Text], str]:
    apart = held_out(map(_package, files))

    def texts() -> Iterator[Text]:
        for path in files:
            try:
                text = path.read_bytes().decode()
            except UnicodeDecodeError:
                continue
            except OSError as error:
                raise unreadable(path, error) from error
            part = "val" if _package(path) in apart else "train"
            for found in texts_of(text, path):
                yield part, found
            tick(path.stat().st_size)

    return texts(), (f"the standard library of Python {platform.python_version()}: that of another "
                     "version gives other numbers")


def _prose(text: str, path: Path) -> Iterator[str]:
    """Yield the documentation strings of a module, each with an empty line behind it.

    Of pydoc_data.topics, the texts of ``help()``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes, say
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if found := ast.get_docstring(node):
                yield found + "\n\n"
        elif path.stem == "topics" and isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value.strip() + "\n\n"


# --- running text -------------------------------------------------------------------------------


def running(path: Path, tick: Tick, start: int = 0, end: int | None = None,
            is_cut: bool = False) -> Iterator[str]:
    """Yield the text between two bytes of a file in UTF-8, about a megabyte at a time.

    Raises
    ------
    UserError
        If it cannot be read, or is not in UTF-8; of a file that `is_cut`, half a character at the
        end is left out.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = start
    end = file_size(path) if end is None else end
    try:
        with open(path, "rb") as file:
            file.seek(start)
            while at < end:
                content = file.read(min(READ, end - at))
                if not content:
                    break
                at += len(content)
                text = decoder.decode(content, final=at >= end and not is_cut)
                yield text.removeprefix("\ufeff") if at == len(content) else text  # of Windows
                tick(len(content))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not in UTF-8 ({error.reason} near byte {at}): convert it, for "
                        "example with iconv") from error
    except OSError as error:
        raise unreadable(path, error) from error


class WikiText(NamedTuple):
    """A folder of WikiText, with a file for each part; `is_cut`: the training text is cut short."""

    folder: Path
    parts: dict[str, Path]
    is_cut: bool


WIKI_PARTS = {"train": "train", "val": "valid", "test": "test"}
WIKITEXT = ("unpack wikitext-2-v1.zip, wikitext-103-v1.zip or their raw kin there, so that "
            "wikitext-2/wiki.train.tokens, say, and wiki.valid.tokens lie beside each other")


def _wikitext_at(place: Path) -> WikiText | None:
    for suffix, is_cut in ((".tokens", False), (".raw", False), (".tokens.prefix", True)):
        other = suffix.removesuffix(".prefix")
        parts = {part: place / f"wiki.{name}{suffix if part == 'train' else other}"
                 for part, name in WIKI_PARTS.items()}
        if exists(parts["train"]) and exists(parts["val"]):
            return WikiText(place, {part: path for part, path in parts.items() if exists(path)},
                            is_cut)
    return None


def _wikitext_folders(pattern: str, folder: Path) -> list[Path]:
    """Return where a WikiText of this name may lie; any may lie in the folder of data itself."""
    return [*sorted(folder.glob(pattern)), *[folder] * (pattern == "wikitext-*"
                                                       or folder.match(pattern))]


def _locate_wikitext(pattern: str, folder: Path) -> WikiText | None:
    """Return the WikiText with the largest training text in the folder of data, or None."""
    found = [wiki for place in _wikitext_folders(pattern, folder) if (wiki := _wikitext_at(place))]
    return max(found, key=lambda wiki: file_size(wiki.parts["train"]), default=None)


def _wikitext(name: str, pattern: str, folder: Path | None, filtered: bool) -> Corpus:
    folder = _needed(name, folder, WIKITEXT)
    wiki = _locate_wikitext(pattern, folder)
    if wiki is None:
        status, place = _wikitext_status(pattern, folder)
        raise UserError(f"{name} is {status} in {place or folder}: {WIKITEXT}")

    def texts(tick: Tick) -> tuple[Iterator[Text], str]:
        notice = ("" if not wiki.is_cut else
                  f"{wiki.parts['train']} is the official training text cut short, so perplexities "
                  "cannot be compared with published ones")
        return ((part, text) for part, path in wiki.parts.items()
                for text in running(path, tick, is_cut=path.suffix == ".prefix")), notice

    return Corpus(name, tuple(wiki.parts.values()), True, texts)


def _wikitext_status(pattern: str, folder: Path | None) -> tuple[str, Path | None]:
    if folder is None:
        return "missing", None
    if wiki := _locate_wikitext(pattern, folder):
        return "partial" if wiki.is_cut or len(wiki.parts) < 3 else "found", wiki.folder
    part = next((place for place in _wikitext_folders(pattern, folder)
                 if any(place.glob("wiki.*"))), None)
    return ("missing" if part is None else "incomplete"), part


# --- documents in lines of JSON -----------------------------------------------------------------


class Document(NamedTuple):
    """A document, its project ("" if it names none), and whether its file is for validation."""

    text: str
    project: str
    validation: bool


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """Yield a file, unpacked if it is gzipped, and a function: how far it was read, in bytes."""
    try:
        with open(path, "rb") as raw:
            if path.suffix == ".gz":
                with gzip.open(raw) as unpacked:
                    yield cast(IO[bytes], unpacked), raw.tell
            else:
                yield raw, raw.tell
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}, it is damaged ({reason(error)}): fetch it again"
                        ) from error
    except OSError as error:
        raise unreadable(path, error) from error


def _documents(files: Iterable[Path], validation: Iterable[Path], filtered: bool,
               tick: Tick) -> Iterator[Document]:
    """Yield the documents of files of JSON lines, as far as they are not filtered out."""
    of_validation = set(validation)
    for path in files:
        with _opened(path) as (file, tell):
            before = 0
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                text, project = _fields(line, f"{path}, line {number}")
                if _kept(text, filtered):
                    yield Document(text, project, path in of_validation)
                if (at := tell()) != before:
                    tick(at - before)
                    before = at


def _fields(line: bytes, where: str) -> tuple[str, str]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: expected a JSON object, got something else ({one_line(error)})"
                        ) from error
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a JSON object, got a {type(values).__name__}")
    text = next((values[key] for key in KEYS if isinstance(values.get(key), str)), None)
    if text is None:
        raise UserError(f"{where}: expected a text named {' or '.join(KEYS)}, got "
                        f"{', '.join(list(values)[:5]) or 'nothing'}")
    project = values.get("repo_name")
    return text, project if isinstance(project, str) else ""


def _of_documents(files: tuple[Path, ...], validation: tuple[Path, ...], filtered: bool,
                  tick: Tick) -> tuple[Iterator[Text], str]:
    """Return documents in the official parts, if these share no project, else by project.

    Without projects every tenth document is for validation.
    """
    def documents() -> Iterator[Document]:
        return _documents(files, validation, filtered, tick)

    projects: dict[bool, set[str]] = {False: set(), True: set()}
    for document in documents():
        projects[document.validation].add(document.project)
    named = (projects[False] | projects[True]) - {""}
    shared = (projects[False] & projects[True]) - {""}

    def split(is_held: Callable[[int, Document], bool], notice: str) -> tuple[Iterator[Text], str]:
        return (("val" if is_held(number, document) else "train", document.text)
                for number, document in enumerate(documents())), notice if validation else ""

    if validation and not shared:
        return split(lambda _, document: document.validation, "")
    if len(named) < 2:
        return split(lambda number, _: number % HELD_OUT == HELD_OUT - 1,
                     "the official parts share their only project, so every tenth document of all "
                     "files is for validation instead")
    apart = held_out(named)
    return split(lambda _, document: document.project in apart,
                 f"the official parts share {len(shared)} projects, so validation is on all files "
                 f"of {len(apart)} of the {len(named)} projects instead")


CODEPARROT = ("put files of https://huggingface.co/datasets/codeparrot/codeparrot-clean-train and "
              "codeparrot-clean-valid there, in folders of these names")
CODEPARROT_FOLDERS = ("codeparrot", "codeparrot-clean*", "python_code")
OFFICIAL_VALIDATION = "file-000000000054"  # of 54 in the undivided data set


def _locate_codeparrot(folder: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Return the files of CodeParrot, and those among them that are for validation."""
    places = dict.fromkeys(itertools.chain(
        [folder], *(sorted(folder.glob(pattern)) for pattern in CODEPARROT_FOLDERS)))
    files = tuple(file for place in places for file in sorted(place.glob("file-*"))
                  if file.name.endswith(JSON_SUFFIXES))
    return files, tuple(file for file in files if "valid" in file.name + file.parent.name
                        or file.name.startswith(OFFICIAL_VALIDATION))


def _codeparrot(folder: Path | None, filtered: bool) -> Corpus:
    folder = _needed("codeparrot", folder, CODEPARROT)
    files, validation = _locate_codeparrot(folder)
    if len(files) == len(validation):
        raise UserError(f"codeparrot is {'incomplete' if files else 'missing'} in {folder}: "
                        f"{CODEPARROT}")
    return Corpus("codeparrot", files, False,
                  partial(_of_documents, files, validation, filtered), passes=2)


def _codeparrot_status(folder: Path | None) -> tuple[str, Path | None]:
    files, validation = _locate_codeparrot(folder) if folder else ((), ())
    if not files:
        return "missing", None
    official = {f"file-{number:012}.json.gz" for number in range(1, 55)}
    missing = official - {file.name for file in files}
    return ("incomplete" if len(files) == len(validation) else "partial" if missing else "found",
            files[0].parent)


# --- files of one's own -------------------------------------------------------------------------


def _own(name: str, filtered: bool) -> Corpus:
    path = user_path(name)
    if not exists(path):
        raise UserError(f"there is no file {path}")
    size = file_size(path)
    if path.suffix.lower() != ".txt":
        return Corpus(name, (path,), False, partial(_of_documents, (path,), (), filtered), passes=2)

    def texts(tick: Tick) -> tuple[Iterator[Text], str]:
        cut = _line_end(path, size * 9 // 10)
        return itertools.chain((("train", text) for text in running(path, tick, 0, cut)),
                               (("val", text) for text in running(path, tick, cut))), ""

    return Corpus(name, (path,), True, texts)


def _line_end(path: Path, at: int) -> int:
    """Return the first place from byte `at` on behind a line, or a character if lines are long."""
    start = max(at - 1, 0)
    try:
        with open(path, "rb") as file:
            file.seek(start)
            line = file.readline(READ)
    except OSError as error:
        raise unreadable(path, error) from error
    if line.endswith(b"\n"):
        return start + len(line)
    return start + next((i for i, byte in enumerate(line) if i and byte & 0xC0 != 0x80), 0)


def _needed(name: str, folder: Path | None, todo: str) -> Path:
    if folder is None:
        raise UserError(f"{name} needs its files: name their folder with --data DIR or COMET_DATA, "
                        f"and {todo}")
    return folder


def _built_in(folder: Path | None) -> tuple[str, Path | None]:
    return "built in", library()


def _of_wikitext(name: str, pattern: str, source: str) -> Kind:
    return Kind(partial(_wikitext, name, pattern), partial(_wikitext_status, pattern), source)


CORPORA: dict[str, Kind] = {
    "python-code": Kind(_python_code, _built_in, "Python's standard library"),
    "python-prose": Kind(_python_prose, _built_in,
                         "documentation strings of Python's standard library, topics of its help"),
    "wikitext": _of_wikitext("wikitext", "wikitext-*", "the larger of wikitext-2 and wikitext-103"),
    "wikitext-2": _of_wikitext("wikitext-2", "wikitext-2*", "wikitext-2-v1.zip"),
    "wikitext-103": _of_wikitext("wikitext-103", "wikitext-103*", "wikitext-103-v1.zip"),
    "codeparrot": Kind(_codeparrot, _codeparrot_status,
                       "https://huggingface.co/datasets/codeparrot/codeparrot-clean"),
}


def report(folder: Path | None) -> list[tuple[str, str, str, str]]:
    """Return, for each corpus, its name, status, where it lies, and where it comes from."""
    rows = []
    for name, kind in CORPORA.items():
        status, place = kind.status(folder)
        rows.append((name, status, str(place or "-"), kind.source))
    return rows
