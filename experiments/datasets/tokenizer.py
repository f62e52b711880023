"""Tokenizers: bytes, and byte-level BPE by the package `tokenizers`, trained or GPT-2's own."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...checkpoint import write_atomically
from ...errors import UserError, one_line
from .base import exists, read_file

TOKENIZERS = ("bytes", "bpe", "gpt2")
FILE = "tokenizer.json"  # in the format of the package `tokenizers`, those of bytes too
PAIRS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))  # OpenAI's, Hugging Face's
GPT2_FILES = ("put encoder.json and vocab.bpe there, from "
              "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main, or vocab.json and "
              "merges.txt, from https://huggingface.co/openai-community/gpt2")
END_OF_TEXT = "<|endoftext|>"
LARGEST = 1 << 28  # bytes of a file, far more than a vocabulary has
PIECE = 1 << 20  # characters that are encoded at once


def _characters() -> list[str]:
    """Return the printable character by which GPT-2's files write each byte.

    A byte that is printable in Latin-1 stands for itself, the others for those from 256 on.
    """
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


CHARACTERS = _characters()
BYTES = {character: byte for byte, character in enumerate(CHARACTERS)}


class Tokenizer:
    """Text to tokens and back: ``decode(encode(text)) == text``.

    A character that UTF-8 cannot write (half of a surrogate pair) is encoded as ``?``.

    Attributes
    ----------
    vocabulary : int
        How many entries it has.
    """

    def __init__(self, vocabulary: int, bpe: Any = None) -> None:
        self.vocabulary, self._bpe = vocabulary, bpe  # None: bytes

    @property
    def dtype(self) -> str:
        """The smallest type that holds its tokens in a file: at least 16 bits."""
        return "<u2" if self.vocabulary <= 1 << 16 else "<u4"

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a text, (T,)."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Iterable[str]) -> list[np.ndarray]:
        """Return the tokens of each text; on all cores, if it is BPE."""
        if self._bpe is None:
            return [np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(self.dtype)
                    for text in texts]
        parts = [pieces(writable(text)) for text in texts]
        encodings = iter(self._bpe.encode_batch_fast([part for of in parts for part in of]))
        empty = [np.empty(0, self.dtype)]
        return [np.concatenate(empty + [np.array(next(encodings).ids, self.dtype) for _ in of])
                for of in parts]

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Return the text of tokens; bytes that are no UTF-8 become U+FFFD.

        Raises
        ------
        UserError
            If one is not in the vocabulary.
        """
        tokens = np.asarray(tokens, np.int64).ravel()
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocabulary:
            raise UserError(f"tokens must be from 0 to {self.vocabulary - 1}, got from "
                            f"{tokens.min()} to {tokens.max()}")
        if self._bpe is None:
            return tokens.astype(np.uint8).tobytes().decode("utf-8", "replace")
        return str(self._bpe.decode(tokens.tolist(), skip_special_tokens=False))

    def text(self) -> str:
        """Return the content of its file."""
        return json.dumps(_OF_BYTES) if self._bpe is None else str(self._bpe.to_str())

    @property
    def digest(self) -> str:
        """The SHA-256 of its file."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    def save(self, folder: Path) -> Path:
        """Write it into a folder, atomically; `load_tokenizer` reads it."""
        write_atomically(folder / FILE, self.text().encode())
        return folder / FILE


_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
          "use_regex": False}
_OF_BYTES: dict[str, Any] = {
    "version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None,
    "pre_tokenizer": _SPLIT, "decoder": _SPLIT,
    "model": {"type": "BPE", "vocab": BYTES, "merges": []}}


def of_bytes() -> Tokenizer:
    """Return the tokenizer whose tokens are the bytes of UTF-8."""
    return Tokenizer(256)


def writable(text: str) -> str:
    """Return a text that UTF-8 can write, with ``?`` for halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


# GPT-2's pattern never joins what is not white to white behind it, so there a text may be cut.
BEFORE_WHITE = re.compile(r"(?<=\S)[ \n]")


def pieces(text: str, size: int = PIECE) -> list[str]:
    """Return a text in pieces that are encoded as they would be together.

    """
    found, start = [], 0
    while len(text) - start > size:
        match = BEFORE_WHITE.search(text, start + size)
        if match is None:
            break
        found.append(text[start:match.start()])
        start = match.start()
    return [*found, text[start:]]


def package() -> Any:
    """Return the package `tokenizers`.

    Raises
    ------
    UserError
        If it is not installed.
    """
    try:
        import tokenizers
    except ImportError:
        raise UserError('the tokenizers "bpe" and "gpt2" need the package tokenizers: python -m '
                        'pip install "tokenizers>=0.20", or choose the tokenizer "bytes"'
                        ) from None
    return tokenizers


def _byte_level(model: Any) -> Any:
    tokenizers = package()
    bpe = tokenizers.Tokenizer(model)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    return bpe


def train_bpe(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Return byte-level BPE of so many entries, trained on texts: 256 bytes and merges.

    It has no entry for the end of a text, as none is put into the streams.

    Raises
    ------
    UserError
        If the texts do not give so many, or the package is not installed.
    """
    bpe = _byte_level(package().models.BPE())
    trainer = package().trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=CHARACTERS, show_progress=False)
    bpe.train_from_iterator(
        (piece for text in texts for piece in pieces(writable(text))), trainer)
    found = bpe.get_vocab_size()
    if found != vocabulary:
        raise UserError(f"the training text gives a vocabulary of {found} entries, not "
                        f"{vocabulary}: ask for at most {found}, or take a larger text")
    return Tokenizer(vocabulary, bpe)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer in a folder: tokenizer.json, or GPT-2's two files.

    Raises
    ------
    UserError
        If there is none, it is damaged, or the package `tokenizers` is needed and missing.
    """
    if exists(folder / FILE):
        return _from_file(folder)
    for vocabulary, merges in PAIRS:
        if exists(folder / vocabulary) and exists(folder / merges):
            return _from_pair(folder, vocabulary, merges)
    raise UserError(f"no tokenizer in {folder}: {FILE} should lie there, or "
                    + " or ".join(" and ".join(pair) for pair in PAIRS))


def gpt2_folder(folder: Path) -> Path:
    """Return where GPT-2's files lie: the folder of the data, or its folder gpt2.

    Raises
    ------
    UserError
        If they are in neither.
    """
    for place in (folder / "gpt2", folder):
        if any(all(exists(place / name) for name in pair) for pair in PAIRS):
            return place
    raise UserError(f"GPT-2's tokenizer is not in {folder} nor in {folder / 'gpt2'}: {GPT2_FILES}")


def _from_file(folder: Path) -> Tokenizer:
    path, content = folder / FILE, read_file(folder, FILE, LARGEST)
    try:
        model = json.loads(content)["model"]
        if not model["merges"] and model["vocab"] == BYTES:
            return of_bytes()
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it holds no tokenizer ({one_line(error)})") from error
    try:
        bpe = package().Tokenizer.from_str(content.decode())
    except UserError:
        raise
    except Exception as error:  # the package raises this very class
        raise UserError(f"{path} is damaged, or of a newer version of the package tokenizers "
                        f"({one_line(error)})") from error
    bpe.no_truncation()  # what a file of Hugging Face's may ask for
    bpe.no_padding()
    return Tokenizer(bpe.get_vocab_size(), bpe)


def _from_pair(folder: Path, vocabulary: str, merges: str) -> Tokenizer:
    """Return the tokenizer in GPT-2's files, of a folder without FILE."""
    entries = _entries(folder, vocabulary)
    pairs = _merges(folder, merges)
    unlike = f"{folder / merges} does not go with {vocabulary} beside it"
    made = {first + second for first, second in pairs}
    if lacking := sorted(({part for pair in pairs for part in pair} | made | {*CHARACTERS})
                         - entries.keys()):
        raise UserError(f'{unlike}, which lacks the entry "{lacking[0]}"'
                        f"{f' and {len(lacking) - 1} more' if lacking[1:] else ''}: take both from "
                        "the same place")
    special = sorted(entries.keys() - made - {*CHARACTERS}, key=entries.__getitem__)
    if strange := [entry for entry in special if not re.fullmatch("<.+>", entry)]:
        raise UserError(f'{unlike}, whose entry "{strange[0]}" no merge makes: take both from the '
                        "same place")
    bpe = _byte_level(package().models.BPE(entries, pairs))
    bpe.add_special_tokens(special)
    return Tokenizer(len(entries), bpe)


def _entries(folder: Path, name: str) -> dict[str, int]:
    try:
        entries = json.loads(read_file(folder, name, LARGEST))
        numbers = sorted(entries.values())
    except UserError:
        raise
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{folder / name}: expected a JSON object of entries and their numbers, "
                        f"got something else ({one_line(error)})") from error
    if numbers != list(range(len(numbers))):
        raise UserError(f"{folder / name}: the numbers of its {len(numbers)} entries must be 0 to "
                        f"{len(numbers) - 1}, each once")
    return dict(entries)


def _merges(folder: Path, name: str) -> list[tuple[str, str]]:
    try:
        lines = read_file(folder, name, LARGEST).decode().split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{folder / name} is damaged: it is not in UTF-8") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split()
        if len(parts) != 2:
            raise UserError(f"{folder / name}, line {number}: expected two entries with a space "
                            f"between, got {len(parts)}")
        pairs.append((parts[0], parts[1]))
    return pairs
