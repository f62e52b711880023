"""Streams of tokens, made once of a corpus and mapped into memory, and the data set of them."""

import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, TextIO, cast

import numpy as np

from ...errors import UserError, of_system, unknown, user_path
from ...records import DamagedRecord, believed, digests, read_json, write_json
from ..progress import Progress
from . import existing, named
from .base import Dataset
from .corpora import LIBRARIES, Corpus, Text, find
from .tokenizer import (
    BEFORE_WHITE,
    FILE,
    TOKENIZERS,
    Tokenizer,
    gpt2_folder,
    load_tokenizer,
    of_bytes,
    train_bpe,
)

VERSION = 1  # of the streams; another makes them anew
META = "meta.json"
PARTS = ("train", "val", "test")
AT_ONCE = 1 << 21  # characters that are encoded at once, on all cores
SILENT = 2.0  # seconds; what takes less is not spoken of
MAKING = ".making-"  # how folders begin in which streams are made
LEFT = 86_400.0  # seconds after which one that nobody writes into was left by a killed process


@dataclass(frozen=True)
class TextDataset(Dataset):
    """Texts of tokens (n, T), which stay on disk but for those that are used.

    Its x and y of a part are the same array.

    Attributes
    ----------
    stream : Path
        The folder of its streams and their tokenizer.
    made_of : str
        The SHA-256 of the streams.
    """

    stream: Path = Path()
    made_of: str = ""

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 of the streams and of how many of their texts are used.

        So it needs no pass over them.
        """
        used = self.made_of, len(self.x_train), None if self.x_val is None else len(self.x_val)
        return hashlib.sha256(repr(used).encode()).hexdigest()

    def first(self, train: int | None, validation: int | None) -> "TextDataset":
        """Return the first so many training and validation texts, and the whole test set."""
        x_train = self.x_train[:train]
        x_val = None if self.x_val is None else self.x_val[:validation]
        return replace(self, x_train=x_train, y_train=x_train, x_val=x_val, y_val=x_val)


def text_data(corpus: str, tokenizer: str, vocabulary: int, context: int,
              folder: str | Path | None = None, filtered: bool = False,
              progress: Any = None) -> TextDataset:
    """Return a corpus as texts of `context` tokens, (n, context), for the task "language".

    The streams of tokens are made once, in `cache_folder`, and made anew when the corpus's files
    change. Documents of code are tokenised one after the other and cut into texts each by itself,
    without a token for their end and without the short rest, as in the Hugging Face course; prose
    is one running text, line after line.

    Parameters
    ----------
    corpus : str
        A key of `CORPORA`, or a .txt, .json, .jsonl (or .gz of these two) file of one's own.
    tokenizer : {"bytes", "bpe", "gpt2"}
        256 bytes; byte-level BPE that is trained on the training part; or GPT-2's own.
    vocabulary : int
        How many entries it has.
    context : int
        Tokens of a text: all but the last are input, all but the first are predicted.
    folder : path, optional
        Of the data sets; the environment's COMET_DATA if not given.
    filtered : bool
        Of documents use only those that name pandas, sklearn, matplotlib or seaborn.
    progress : object with a method ``message``, optional
        To be told of long work; a line on standard error if not given.

    Raises
    ------
    UserError
        If a name is unknown, files are missing or damaged, the tokenizer has not so many entries,
        the corpus is too short, or the streams cannot be written.
    """
    if tokenizer not in TOKENIZERS:
        raise unknown("tokenizer", tokenizer, TOKENIZERS)
    if not isinstance(context, int) or context < 2:
        raise UserError("the context is how many tokens a text has, a whole number of at least 2, "
                        f"got {context!r}")
    where = named(folder)
    data = None if where is None else existing(where)
    found = find(corpus, data, filtered)
    ready = _ready(tokenizer, vocabulary, data)
    settings = {"version": VERSION, "corpus": corpus, "filtered": filtered, "context": context,
                "tokenizer": tokenizer, "vocabulary": vocabulary,
                "stamp": found.stamp() if ready is None else f"{found.stamp()} {ready.digest}"}
    cache = cache_folder()
    place = cache / _name(corpus, {**settings, "stamp": [str(file.resolve())
                                                         for file in found.files]})
    meta = _read(place, settings)
    if meta is None:
        _make(found, ready, settings, place, progress)
        meta = _read(place, settings)
        if meta is None:
            raise UserError(f"the tokens of {corpus} in {place} were changed while they were "
                            "made: give the same command again")
    return _mapped(place, meta)


def cache_folder() -> Path:
    """Return where streams are kept: COMET_CACHE, or comet-np in the user's folder of caches."""
    if own := os.environ.get("COMET_CACHE"):
        return user_path(own)
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "comet-np"


def tokenizer_of(data: Dataset) -> Tokenizer:
    """Return the tokenizer that a data set's streams were made with.

    Raises
    ------
    UserError
        If it is no data set of texts, or its tokenizer is damaged.
    """
    if not isinstance(data, TextDataset):
        raise UserError(f"{data.name} is no data set of texts and has no tokenizer")
    return load_tokenizer(data.stream)


def _ready(tokenizer: str, vocabulary: int, data: Path | None) -> Tokenizer | None:
    """Return a tokenizer that needs no training, or None."""
    if tokenizer == "bpe":
        if not 256 <= vocabulary <= 1 << 32:
            raise UserError(f"byte-level BPE has at least the 256 bytes as entries, got a "
                            f"vocabulary of {vocabulary}")
        return None
    if tokenizer == "gpt2" and data is None:
        raise UserError('the tokenizer "gpt2" needs its files: name their folder with --data DIR '
                        "or COMET_DATA")
    ready = of_bytes() if data is None or tokenizer == "bytes" else load_tokenizer(
        gpt2_folder(data))
    if ready.vocabulary != vocabulary:
        raise UserError(f'the tokenizer "{tokenizer}" has {ready.vocabulary} entries, got a '
                        f"vocabulary of {vocabulary}: ask for {ready.vocabulary}")
    return ready


def _name(corpus: str, settings: dict[str, Any]) -> str:
    short = "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(corpus).name[:40])
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"{short}-{digest[:16]}"


# --- reading ------------------------------------------------------------------------------------


def _read(place: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return what is known of streams, or None if they must be made (anew)."""
    try:
        meta = read_json(place / META)
        with believed(place / META):
            whole = (meta["settings"] == settings
                     and all(_is_whole(place / f"{part}.bin", known)
                             for part, known in meta["parts"].items())
                     and digests(place, (FILE,)) == {FILE: meta["tokenizer"]})
    except (FileNotFoundError, NotADirectoryError, DamagedRecord):
        return None
    return meta if whole else None


def _is_whole(path: Path, known: dict[str, Any]) -> bool:
    """Return whether a stream is as it was written; it is read only if its time has changed."""
    try:
        info = path.stat()
        if info.st_size != known["bytes"]:
            return False
        if info.st_mtime_ns == known["time"]:
            return True
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while content := file.read(1 << 20):
                digest.update(content)
        if digest.hexdigest() != known["sha256"]:
            return False
        with suppress(OSError):  # of another user: it is read again next time
            os.utime(path, ns=(info.st_atime_ns, known["time"]))
        return True
    except OSError:
        return False


def _mapped(place: Path, meta: dict[str, Any]) -> TextDataset:
    settings, x = meta["settings"], dict.fromkeys(PARTS)
    for part, known in meta["parts"].items():
        x[part] = cast(Any, np.memmap(place / f"{part}.bin", meta["dtype"], "r",
                                      shape=(known["texts"], settings["context"])))
    train, val, test = cast(Any, x).values()
    return TextDataset(settings["corpus"], "language", train, train, val, val, test, test,
                       outputs=settings["vocabulary"], notice=meta["notice"], stream=place,
                       made_of=meta["digest"])


# --- making -------------------------------------------------------------------------------------


def _make(corpus: Corpus, ready: Tokenizer | None, settings: dict[str, Any], place: Path,
          progress: Any) -> None:
    """Make the streams in a temporary folder, which then takes its place."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_left(place.parent)
        with _Line(f"tokens of {corpus.name}, once, for {place}",
                   corpus.size * (2 if ready is None else 1), progress) as line, \
                tempfile.TemporaryDirectory(prefix=MAKING, dir=place.parent) as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            tokenizer = ready or train_bpe(_training(corpus, settings, line),
                                           settings["vocabulary"])
            tokenizer.save(made)
            texts, notice = corpus.texts(line.tick)
            parts = _write(texts, corpus, tokenizer, settings, made)
            known = {part: (values["sha256"], values["texts"]) for part, values in parts.items()}
            digest = hashlib.sha256(json.dumps(
                [known, tokenizer.digest, settings["context"]], sort_keys=True).encode())
            write_json(made / META, {
                "settings": settings, "parts": parts, "dtype": tokenizer.dtype, "notice": notice,
                "tokenizer": tokenizer.digest, "digest": digest.hexdigest()})
            _put(made, place, Path(temporary), settings)
    except OSError as error:  # of the corpus's files those are errors of the user's already
        raise UserError(of_system("write", place, error, "COMET_CACHE")) from error


def _remove_left(cache: Path) -> None:
    """Remove what processes that were killed have left."""
    for folder in cache.glob(f"{MAKING}*"):
        with suppress(OSError):
            last = max(each.stat().st_mtime for each in (folder, *folder.rglob("*")))
            if time.time() - last > LEFT:
                shutil.rmtree(folder)


def _put(made: Path, place: Path, temporary: Path, settings: dict[str, Any]) -> None:
    """Let what was made take its place, unless another process was faster; what is damaged goes."""
    for _ in range(10):
        if _read(place, settings) is not None:
            return
        with suppress(FileNotFoundError, FileExistsError):
            os.replace(place, Path(tempfile.mkdtemp(dir=temporary)) / "old")
        with suppress(OSError):
            os.replace(made, place)
            return
    os.replace(made, place)


def _training(corpus: Corpus, settings: dict[str, Any], line: "_Line") -> Iterator[str]:
    texts, _ = corpus.texts(line.tick)
    training = (text for part, text in texts if part == "train")
    first = next(training, None)
    if first is None:
        raise _too_short(corpus, settings, "train")
    yield first
    yield from training
    line.say(f"{corpus.name} is read; now its tokenizer of {settings['vocabulary']:,} entries is "
             "trained")


def _too_short(corpus: Corpus, settings: dict[str, Any], part: str, found: str = "") -> UserError:
    if not found:
        found = f"none that names {', '.join(LIBRARIES)}" if settings["filtered"] else "none"
    return UserError(
        f"{corpus.name}: expected at least one {'running ' if corpus.running else ''}text of "
        f"{settings['context']} tokens for {'training' if part == 'train' else 'validation'}, got "
        f"{found}: take a shorter context, or a larger corpus")


def _write(texts: Iterator[Text], corpus: Corpus, tokenizer: Tokenizer, settings: dict[str, Any],
           folder: Path) -> dict[str, dict[str, Any]]:
    """Write a stream for each part, and return what is known of them."""
    streams: dict[str, _Stream] = {}
    with ExitStack() as files:
        for batch in _batches(texts, corpus.running):
            tokens = tokenizer.encode_all([text for _, text in batch])
            for (part, _), found in zip(batch, tokens, strict=True):
                if part not in streams:
                    file = files.enter_context(open(folder / f"{part}.bin", "wb"))
                    streams[part] = _Stream(file, settings["context"], corpus.running)
                streams[part].add(found)
    for part in ("train", "val"):
        if part not in streams:
            raise _too_short(corpus, settings, part)
        if not streams[part].texts:
            count, kind = streams[part].documents, "piece" if corpus.running else "document"
            raise _too_short(corpus, settings, part, f"{streams[part].tokens} tokens in {count} "
                                                     f"{kind}{'s' * (count != 1)}")
    return {part: stream.known() for part, stream in streams.items() if stream.texts}


def _batches(texts: Iterator[Text], is_running: bool) -> Iterator[list[Text]]:
    """Yield texts as many at a time as fill AT_ONCE characters.

    Running text is cut where it is tokenised as it would be together: see `pieces`.
    """
    batch: list[Text] = []
    size = 0
    for part, text in _recut(texts) if is_running else texts:
        batch.append((part, text))
        size += len(text)
        if size >= AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _recut(texts: Iterator[Text]) -> Iterator[Text]:
    """Yield running texts cut at the last place where a text may be, see `BEFORE_WHITE`."""
    before, rest = "", ""
    for part, text in texts:
        if part != before:
            if rest:
                yield before, rest
            before, rest = part, ""
        rest += text
        if len(rest) < AT_ONCE // 4:
            continue
        cut = max((match.start() for match in BEFORE_WHITE.finditer(rest)), default=0)
        if cut:
            yield part, rest[:cut]
            rest = rest[cut:]
    if rest:
        yield before, rest


class _Stream:
    """A file of texts of `context` tokens each."""

    def __init__(self, file: IO[bytes], context: int, is_running: bool) -> None:
        self._file, self._context, self._is_running = file, context, is_running
        self._digest = hashlib.sha256()
        self._rest: np.ndarray | None = None
        self.texts = self.tokens = self.documents = 0

    def add(self, tokens: np.ndarray) -> None:
        """Write the whole texts in a document, or in what is read of the running text by now."""
        self.documents += 1
        self.tokens += len(tokens)
        if self._rest is not None:
            tokens = np.concatenate((self._rest, tokens))
        whole = len(tokens) // self._context
        content = tokens[:whole * self._context].tobytes()
        self._digest.update(content)
        self._file.write(content)
        self.texts += whole
        if self._is_running:
            self._rest = tokens[whole * self._context:]

    def known(self) -> dict[str, Any]:
        """Return what is known of it, once it is closed."""
        info = os.stat(self._file.name)
        return {"texts": self.texts, "bytes": info.st_size, "time": info.st_mtime_ns,
                "sha256": self._digest.hexdigest()}


class _Line:
    """The progress of making streams: nothing for SILENT seconds, then a line."""

    def __init__(self, what: str, total: int, progress: Any) -> None:
        self._what, self._waiting, self._start = what, 0, time.monotonic()
        self._progress = Progress(total, unit="kB", stream=None if progress is None else
                                  cast(TextIO, _Messages(progress)))

    def __enter__(self) -> "_Line":
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.clear()

    def tick(self, size: int) -> None:
        """Count so many bytes that were read."""
        self._waiting += size
        if self.say(self._what):
            self._progress.advance(self._waiting, self._what, self._waiting / 1e3)
            self._waiting = 0

    def say(self, text: str) -> bool:
        """Print a line once, if the work is long; return whether it is."""
        is_long = time.monotonic() - self._start >= SILENT
        if is_long:
            self._progress.message(text)
        return is_long


class _Messages:
    """A stream of text each line of which is a message to the progress of something larger."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> None:
        self._progress.message(text.strip())

    def flush(self) -> None:
        pass
