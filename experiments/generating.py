"""`comet-np generate`: text from a GPT-2 that a run has trained, or from Hugging Face's."""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..backends import Backend, get_backend
from ..errors import UserError, user_path
from ..generation import check_choice, generate
from ..interop.huggingface import huggingface_gpt2_config, load_huggingface_gpt2
from ..models.gpt2 import GPT2Config, GPT2Params
from ..tree import tree_map
from .datasets.tokenizer import Tokenizer, load_tokenizer
from .files import CONFIG, RESULT
from .training.model import load_run, run_of

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # of bytes that are no UTF-8, or not yet


class Writer(NamedTuple):
    """A GPT-2 with its tokenizer."""

    config: GPT2Config
    params: GPT2Params
    fixed: Any
    tokenizer: Tokenizer


def load_writer(folder: str | Path, backend: Backend) -> Writer:
    """Return the GPT-2 in the folder of a finished cell, or in one of Hugging Face's.

    Raises
    ------
    UserError
        If there is none, or its tokenizer is missing or of another model.
    """
    folder = user_path(folder)
    of_hub = _of_huggingface(folder)
    described = huggingface_gpt2_config(folder) if of_hub else run_of(folder).model
    if not isinstance(described, GPT2Config):
        raise UserError(f"{folder} holds a model of {type(described).__name__}, and text can be "
                        "had of a GPT-2: name a cell that trained one")
    tokenizer = load_tokenizer(folder)  # before the weights, which take longer
    if tokenizer.vocabulary > described.vocabulary:  # a table of a model may be longer, as 50304
        raise UserError(f"the tokenizer in {folder} has {tokenizer.vocabulary} entries, and the "
                        f"model {described.vocabulary}: put the one there that it was trained with")
    if of_hub:
        config, params, fixed = load_huggingface_gpt2(folder)
        params, fixed = tree_map(backend.asarray, params), tree_map(backend.asarray, fixed)
    else:
        config, params, fixed = load_run(folder, backend)
    return Writer(config, params, fixed, tokenizer)


def _of_huggingface(folder: Path) -> bool:
    """Return whether a folder holds a model of Hugging Face's: both kinds have a config.json."""
    if (folder / RESULT).exists():
        return False
    try:
        values = json.loads((folder / CONFIG).read_bytes())
    except OSError:
        return False
    except (ValueError, RecursionError):
        return True  # what reads it says what is wrong
    return isinstance(values, dict) and "model_type" in values


def write_text(folder: str, prompt: str, count: int, temperature: float, top_k: int | None,
               top_p: float | None, seed: int, backend: str) -> None:
    """Print a prompt and the tokens that go on from it, each as soon as it is chosen."""
    if not prompt:
        raise UserError("--prompt needs some text to go on from, got nothing")
    if count < 1:
        raise UserError(f"--tokens is the number of tokens to make, at least 1, got {count}")
    check_choice(temperature, top_k, top_p)
    config, params, fixed, tokenizer = load_writer(folder, get_backend(backend))
    tokens = generate(tokenizer.encode(prompt).astype("int64"), params, fixed, config, count,
                      temperature, top_k, top_p, seed, tokenizer.vocabulary)
    print(prompt, end="", flush=True)
    made = 0

    def counted() -> Iterator[int]:
        nonlocal made
        for made, token in enumerate(tokens, start=1):  # noqa: B007 (told below)
            yield int(token)

    try:
        for text in characters(counted(), tokenizer):
            print(text, end="", flush=True)
            if getattr(sys.stdout, "error", None):
                return  # nobody reads on
    finally:
        print()
    if made < count:
        print(f"comet-np: the context of {config.positions} tokens is full", file=sys.stderr)


def characters(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the text of tokens as far as its characters are whole: some end in the next token."""
    open_ones: list[int] = []
    shown = 0
    for token in tokens:
        open_ones.append(token)
        text = tokenizer.decode(open_ones)
        whole = len(text) - text.endswith(REPLACEMENT)
        yield text[shown:whole]
        shown = whole
        if whole == len(text):
            open_ones, shown = [], 0
    yield tokenizer.decode(open_ones)[shown:]
