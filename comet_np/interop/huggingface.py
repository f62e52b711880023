"""Folders of Hugging Face's ViTForImageClassification and GPT2LMHeadModel.

Each holds a ``config.json`` and a ``model.safetensors``.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError, of_system, one_line, user_path
from ..models.gpt2 import GPT2Config, GPT2Params
from ..models.vit import ViTConfig, ViTParams
from ..tree import leaves
from .huggingface_config import (
    gpt2_config_from_huggingface,
    gpt2_described,
    vit_config_from_huggingface,
    vit_described,
)
from .tensors import load_safetensors, save_safetensors, write
from .torch_gpt2 import gpt2_from_torch, gpt2_to_torch
from .torch_vit import vit_from_torch, vit_to_torch

CONFIG, WEIGHTS = "config.json", "model.safetensors"
OTHERS = ("pytorch_model.bin", "model.safetensors.index.json")  # the same weights in other files


def load_huggingface_vit(folder: str | Path) -> tuple[ViTConfig, ViTParams, Any]:
    """Return the ViT in a folder that transformers' ``save_pretrained`` wrote, or a hub's copy.

    Returns
    -------
    config, params, fixed
        NumPy arrays; float16 is raised to float32. Its inputs are images as the preprocessor of
        that model makes them.

    Raises
    ------
    UserError
        If a file is missing or damaged, or of another architecture, or the package safetensors is
        not installed.
    """
    return _load(folder, vit_config_from_huggingface, vit_from_torch)


def load_huggingface_gpt2(folder: str | Path) -> tuple[GPT2Config, GPT2Params, Any]:
    """Return the GPT-2 in a folder that transformers' ``save_pretrained`` wrote, or a hub's copy.

    Returns
    -------
    config, params, fixed
        NumPy arrays; float16 is raised to float32. Its inputs are tokens as the tokenizer of that
        model makes them.

    Raises
    ------
    UserError
        If a file is missing or damaged, or of another architecture, or the package safetensors is
        not installed.
    """
    return _load(folder, gpt2_config_from_huggingface, gpt2_from_torch)


def huggingface_gpt2_config(folder: Path) -> GPT2Config:
    """Return the configuration that `load_huggingface_gpt2` does; the weights are not read."""
    config: GPT2Config = _config(folder, gpt2_config_from_huggingface)
    return config


def _config(folder: Path, described: Callable[[Any], Any]) -> Any:
    file = folder / CONFIG
    try:
        values = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(of_system("read", file, error, "")) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON ({one_line(error)}): get it again") from None
    try:
        return described(values)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _load(folder: str | Path, described: Callable[[Any], Any],
          from_torch: Callable[[Mapping[str, Any], Any], tuple[Any, Any]]) -> tuple[Any, Any, Any]:
    """Return configuration, parameters and fixed weights of the model in a folder."""
    folder = user_path(folder)
    config = _config(folder, described)
    for name in OTHERS:
        if (folder / name).exists() and not (folder / WEIGHTS).exists():
            raise UserError(f"{folder} holds its weights in {name}, and one file {WEIGHTS} was "
                            "expected: load it in transformers and save it again, by "
                            'save_pretrained(folder, max_shard_size="100GB")')
    named = {name: array.astype("float32") if array.dtype == "float16" else array
             for name, array in load_safetensors(folder / WEIGHTS).items()}
    try:
        return config, *from_torch(named, config)
    except UserError as error:
        raise UserError(f"{folder / WEIGHTS}: {error}") from None


def save_huggingface_vit(folder: str | Path, params: ViTParams, config: ViTConfig) -> Path:
    """Write a ViT as a folder that ``ViTForImageClassification.from_pretrained`` reads; return it.

    In evaluation it computes the same there. What acts in training alone and has no place there,
    `hidden_dropout`, is left out, as `compute` is.

    Raises
    ------
    UserError
        If Hugging Face's ViT is not all of this, as it has no gate; if the folder holds something
        else, or cannot be written; or if the package safetensors is not installed.
    """
    values = vit_described(config, next(leaves(params)).dtype.name)
    return _save(folder, values, vit_to_torch(params, (), config, "huggingface"))


def save_huggingface_gpt2(folder: str | Path, params: GPT2Params, config: GPT2Config) -> Path:
    """Write a GPT-2 as a folder that ``GPT2LMHeadModel.from_pretrained`` reads; return it.

    In evaluation it computes the same there. What acts in training alone and has no place there,
    `hidden_dropout`, `context` and `recompute`, is left out, as `compute` is.

    Raises
    ------
    UserError
        If Hugging Face's GPT-2 is not all of this, as it has no gate; if the folder holds something
        else, or cannot be written; or if the package safetensors is not installed.
    """
    values = gpt2_described(config, next(leaves(params)).dtype.name)
    return _save(folder, values, gpt2_to_torch(params, (), config))


def _save(folder: str | Path, values: dict[str, Any], named: Mapping[str, Any]) -> Path:
    """Write both files into a folder that is new, empty, or holds such files; return it."""
    folder = user_path(folder)
    try:
        if folder.exists() and not (folder.is_dir() and (
                (folder / WEIGHTS).exists() or not any(folder.iterdir()))):
            raise UserError(f"{folder} is there and holds no {WEIGHTS}: choose another name")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {folder} ({error.strerror})") from error
    save_safetensors(folder / WEIGHTS, named)
    write(folder / CONFIG, json.dumps(values, indent=1).encode() + b"\n")
    return folder
