"""Folders of Hugging Face's ViTForImageClassification: ``config.json`` and ``model.safetensors``.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError, of_system, one_line, user_path
from ..models.vit import ViTConfig, ViTParams
from ..tree import leaves
from .tensors import load_safetensors, save_safetensors, write
from .torch_vit import check_style, vit_from_torch, vit_to_torch

CONFIG, WEIGHTS = "config.json", "model.safetensors"
OTHERS = ("pytorch_model.bin", "model.safetensors.index.json")  # the same weights in other files
MODEL_TYPE, ARCHITECTURE = "vit", "ViTForImageClassification"
LABELS = 2  # if nothing is said of them
# Ours, theirs, and what theirs is if nothing is said.
FIELDS = (("width", "hidden_size", 768), ("depth", "num_hidden_layers", 12),
          ("heads", "num_attention_heads", 12), ("hidden", "intermediate_size", 3072),
          ("dropout", "hidden_dropout_prob", 0.0),
          ("weight_dropout", "attention_probs_dropout_prob", 0.0), ("qkv_bias", "qkv_bias", True),
          ("eps", "layer_norm_eps", 1e-12))
# Activations of one name in both; leaky_relu is none: its slope is another there.
ACTIVATIONS = ("gelu", "relu", "tanh", "sigmoid", "silu", "mish")
THEIR_ACTIVATIONS = {**{name: name for name in ACTIVATIONS}, "linear": "identity", "swish": "silu"}


def vit_config_from_huggingface(values: Mapping[str, Any]) -> ViTConfig:
    """Return the configuration that a ``config.json`` of Hugging Face's ViT describes.

    Parameters
    ----------
    values : mapping
        Of that file, or ``to_dict()`` of transformers' ViTConfig. What it does not say is as
        transformers' defaults have it.

    Returns
    -------
    ViTConfig
        Without a gate; its final norm is on all tokens, of which the first is read.

    Raises
    ------
    UserError
        If it is of another model, or says what our ViT does not have.
    """
    if not isinstance(values, Mapping):
        raise UserError("the values of a config.json are given by name, got "
                        f"{type(values).__name__}")
    found = {"model_type": values.get("model_type"),
             "architectures": values.get("architectures") or [ARCHITECTURE]}
    if found != {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE]}:
        raise UserError(f"the config.json of a {ARCHITECTURE} was expected, which has model_type "
                        f'"{MODEL_TYPE}", got {json.dumps(found, default=str)}')
    activation = values.get("hidden_act", "gelu")
    if not isinstance(activation, str) or activation not in THEIR_ACTIVATIONS:
        raise UserError(f"hidden_act in config.json is one of {', '.join(THEIR_ACTIVATIONS)} here, "
                        f"got {activation!r}")
    rows, columns = _pair(values, "image_size", 224)
    patch, across = _pair(values, "patch_size", 16)
    if patch != across:
        raise UserError(f"patches are square here, got patch_size {patch}x{across} in config.json")
    labels = values.get("id2label")
    classes = len(labels) if isinstance(labels, Mapping) else _value(values, "num_labels", LABELS)
    return ViTConfig((_value(values, "num_channels", 3), rows, columns), patch, classes,
                     activation=THEIR_ACTIVATIONS[activation], gate=None, hidden_dropout=0.0,
                     final_norm="tokens",
                     **{ours: _value(values, theirs, default) for ours, theirs, default in FIELDS})


def _value(values: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return a value, or what it is if nothing is said, of the type of the latter."""
    value, kind = values.get(name, default), type(default)
    if type(value) is kind or (kind is float and type(value) is int):
        return kind(value)
    raise UserError(f"{name} in config.json is of the type {kind.__name__}, as {default}, got "
                    f"{value!r}")


def _pair(values: Mapping[str, Any], name: str, default: int) -> tuple[int, int]:
    """Return rows and columns of what is given as one number or as both."""
    size = values.get(name, default)
    pair = size if isinstance(size, list | tuple) else (size, size)
    if len(pair) == 2 and all(type(N) is int for N in pair):
        return pair[0], pair[1]
    raise UserError(f"{name} in config.json is an integer or two of them, got {size!r}")


def _described(config: ViTConfig, dtype: str) -> dict[str, Any]:
    """Return the values of a ``config.json``.

    Raises
    ------
    UserError
        If Hugging Face's ViT is not all of this.
    """
    check_style(config, "huggingface")
    if config.gate is not None or config.scale != 1:
        raise UserError("Hugging Face's ViT has neither a gate nor a factor of its activations and "
                        "would compute something else: expected a ViTConfig(gate=None, scale=1), "
                        f"got {config.gate} and {config.scale}")
    theirs = {"identity": "linear"} | {name: name for name in ACTIVATIONS}
    if config.activation not in theirs:
        raise UserError(f"Hugging Face has the activations {', '.join(theirs)} of ours, got "
                        f'"{config.activation}"')
    C, rows, columns = config.image
    labels = {i: f"LABEL_{i}" for i in range(config.classes)}
    return {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE,
            "dtype": dtype, "num_channels": C,
            "image_size": rows if rows == columns else [rows, columns],
            "patch_size": config.patch, "hidden_act": theirs[config.activation],
            **{theirs: getattr(config, ours) for ours, theirs, _ in FIELDS},
            "id2label": labels, "label2id": {label: i for i, label in labels.items()}}


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
    folder = user_path(folder)
    file = folder / CONFIG
    try:
        values = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(of_system("read", file, error, "")) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON ({one_line(error)}): get it again") from None
    try:
        config = vit_config_from_huggingface(values)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    for name in OTHERS:
        if (folder / name).exists() and not (folder / WEIGHTS).exists():
            raise UserError(f"{folder} holds its weights in {name}, and one file {WEIGHTS} was "
                            "expected: load it in transformers and save it again, by "
                            'save_pretrained(folder, max_shard_size="100GB")')
    named = {name: array.astype("float32") if array.dtype == "float16" else array
             for name, array in load_safetensors(folder / WEIGHTS).items()}
    try:
        return config, *vit_from_torch(named, config)
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
    values = _described(config, next(leaves(params)).dtype.name)
    named = vit_to_torch(params, (), config, "huggingface")
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
