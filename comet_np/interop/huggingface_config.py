"""What ``config.json`` says in a folder of Hugging Face, of a ViT or a GPT-2: there and back."""

import json
from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from ..models.gpt2 import GPT2Config
from ..models.vit import ViTConfig
from .torch_vit import check_style

# Of each configuration of ours the model_type and the architecture.
KINDS = {ViTConfig: ("vit", "ViTForImageClassification"), GPT2Config: ("gpt2", "GPT2LMHeadModel")}
# Ours, theirs, and what theirs is if nothing is said.
VIT_FIELDS = (("width", "hidden_size", 768), ("depth", "num_hidden_layers", 12),
              ("heads", "num_attention_heads", 12), ("hidden", "intermediate_size", 3072),
              ("dropout", "hidden_dropout_prob", 0.0),
              ("weight_dropout", "attention_probs_dropout_prob", 0.0),
              ("qkv_bias", "qkv_bias", True), ("eps", "layer_norm_eps", 1e-12))
GPT2_FIELDS = (("vocabulary", "vocab_size", 50257), ("positions", "n_positions", 1024),
               ("width", "n_embd", 768), ("depth", "n_layer", 12), ("heads", "n_head", 12),
               ("dropout", "resid_pdrop", 0.1), ("dropout", "embd_pdrop", 0.1),
               ("weight_dropout", "attn_pdrop", 0.1), ("eps", "layer_norm_epsilon", 1e-5))
# The names of all its models, by which transformers knows these too.
GPT2_ALIASES = {"max_position_embeddings": "n_positions", "hidden_size": "n_embd",
                "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
# What our GPT-2 is, which is what theirs is if nothing is said. Of reorder_and_upcast_attn only
# the rounding depends.
GPT2_RULES = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
              "add_cross_attention": False, "tie_word_embeddings": True}
LABELS = 2  # if nothing is said of them
# Activations of one name in both; leaky_relu is none: its slope is another there.
ACTIVATIONS = ("gelu", "gelu_new", "relu", "tanh", "sigmoid", "silu", "mish")
OUR_ACTIVATIONS = {"identity": "linear"} | {name: name for name in ACTIVATIONS}
THEIR_ACTIVATIONS = {**{name: name for name in ACTIVATIONS}, "linear": "identity", "swish": "silu",
                     "gelu_pytorch_tanh": "gelu_new"}


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
    _check_kind(values, ViTConfig)
    activation = _activation(values, "hidden_act", "gelu")
    rows, columns = _pair(values, "image_size", 224)
    patch, across = _pair(values, "patch_size", 16)
    if patch != across:
        raise UserError(f"patches are square here, got patch_size {patch}x{across} in config.json")
    labels = values.get("id2label")
    classes = len(labels) if isinstance(labels, Mapping) else _value(values, "num_labels", LABELS)
    return ViTConfig((_value(values, "num_channels", 3), rows, columns), patch, classes,
                     activation=activation, gate=None, hidden_dropout=0.0, final_norm="tokens",
                     **_fields(values, VIT_FIELDS))


def gpt2_config_from_huggingface(values: Mapping[str, Any]) -> GPT2Config:
    """Return the configuration that a ``config.json`` of Hugging Face's GPT-2 describes.

    Parameters
    ----------
    values : mapping
        Of that file, or ``to_dict()`` of transformers' GPT2Config. What it does not say is as
        transformers' defaults have it.

    Returns
    -------
    GPT2Config
        Without a gate.

    Raises
    ------
    UserError
        If it is of another model, or says what our GPT-2 does not have.
    """
    _check_kind(values, GPT2Config)
    values = {GPT2_ALIASES.get(name, name): value for name, value in values.items()}
    for name, ours in GPT2_RULES.items():
        if _value(values, name, ours) != ours:
            raise UserError(f"{name} in config.json is {json.dumps(ours)} here, got "
                            f"{json.dumps(not ours)}: that is another model than our GPT-2")
    found = _fields(values, GPT2_FIELDS)
    resid, embd = (_value(values, name, 0.1) for name in ("resid_pdrop", "embd_pdrop"))
    if resid != embd:
        raise UserError("one rate of dropout is that of the embedding and of the branches here, "
                        f"got embd_pdrop {embd} and resid_pdrop {resid} in config.json: make them "
                        "equal, as they matter in training only")
    hidden = values.get("n_inner")
    return GPT2Config(activation=_activation(values, "activation_function", "gelu_new"), gate=None,
                      hidden=None if hidden is None else _value(values, "n_inner", 3072), **found)


def _check_kind(values: Mapping[str, Any], config: type) -> None:
    """Raise a UserError unless these are the values of a ``config.json`` of such a model."""
    if not isinstance(values, Mapping):
        raise UserError("the values of a config.json are given by name, got "
                        f"{type(values).__name__}")
    model_type, architecture = KINDS[config]
    found = {"model_type": values.get("model_type"),
             "architectures": values.get("architectures") or [architecture]}
    if found != {"model_type": model_type, "architectures": [architecture]}:
        raise UserError(f"the config.json of a {architecture} was expected, which has model_type "
                        f'"{model_type}", got {json.dumps(found, default=str)}')


def _activation(values: Mapping[str, Any], name: str, default: str) -> str:
    """Return our name of the activation."""
    activation = values.get(name, default)
    if not isinstance(activation, str) or activation not in THEIR_ACTIVATIONS:
        raise UserError(f"{name} in config.json is one of {', '.join(THEIR_ACTIVATIONS)} here, "
                        f"got {activation!r}")
    return THEIR_ACTIVATIONS[activation]


def _fields(values: Mapping[str, Any], fields: tuple[tuple[str, str, Any], ...]) -> dict[str, Any]:
    """Return the values of some fields by our names."""
    return {ours: _value(values, theirs, default) for ours, theirs, default in fields}


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


def vit_described(config: ViTConfig, dtype: str) -> dict[str, Any]:
    """Return the values of a ``config.json``.

    Raises
    ------
    UserError
        If Hugging Face's ViT is not all of this.
    """
    check_style(config, "huggingface")
    C, rows, columns = config.image
    labels = {i: f"LABEL_{i}" for i in range(config.classes)}
    return {**_described(config, dtype, "ViT", "hidden_act", VIT_FIELDS), "num_channels": C,
            "image_size": rows if rows == columns else [rows, columns],
            "patch_size": config.patch,
            "id2label": labels, "label2id": {label: i for i, label in labels.items()}}


def gpt2_described(config: GPT2Config, dtype: str) -> dict[str, Any]:
    """Return the values of a ``config.json``.

    Raises
    ------
    UserError
        If Hugging Face's GPT-2 is not all of this.
    """
    values = {**_described(config, dtype, "GPT-2", "activation_function", GPT2_FIELDS),
              "n_inner": config.hidden, **GPT2_RULES}
    if config.vocabulary != GPT2Config.vocabulary:  # their default ends a text by that one's last
        values |= {"bos_token_id": None, "eos_token_id": None}
    return values


def _described(config: Any, dtype: str, name: str, activation: str,
               fields: tuple[tuple[str, str, Any], ...]) -> dict[str, Any]:
    """Return the values that all models have."""
    if config.gate is not None or config.scale != 1:
        raise UserError(f"Hugging Face's {name} has neither a gate nor a factor of its activations "
                        f"and would compute something else: expected a {type(config).__name__}("
                        f"gate=None, scale=1), got {config.gate} and {config.scale}")
    if config.activation not in OUR_ACTIVATIONS:
        raise UserError(f"Hugging Face has the activations {', '.join(OUR_ACTIVATIONS)} of ours, "
                        f'got "{config.activation}"')
    model_type, architecture = KINDS[type(config)]
    return {"architectures": [architecture], "model_type": model_type, "dtype": dtype,
            activation: OUR_ACTIVATIONS[config.activation],
            **{theirs: getattr(config, ours) for ours, theirs, _ in fields}}
