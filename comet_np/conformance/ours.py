"""Our own adapter: all test vectors, computed by COMET-NP, in any precision and on any backend."""

import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import pairwise
from typing import Any

import numpy as np

from ..backends import get_backend
from ..functional.activations import activation
from ..functional.attention import (
    SelfAttention,
    self_attention_backward,
    self_attention_forward,
)
from ..functional.hidden import hidden_backward, hidden_forward
from ..functional.linear import Linear, project
from ..functional.loss import (
    mean_squared_error_backward,
    mean_squared_error_forward,
    softmax_cross_entropy_backward,
    softmax_cross_entropy_forward,
)
from ..functional.norm import Norm, norm_backward, norm_forward
from ..functional.routing import grid_bits, kwta_mask, on_grid
from ..gates import EVALUATION, Comet, Gate, Layerwise, TopK
from ..interop import named_weights, weights_of
from ..models import mlp, module_of
from ..models.branch import branch_backward, branch_forward
from ..models.gpt2 import GPT2Config
from ..models.mixer import MixerConfig
from ..models.mlp import MLPConfig
from ..models.moe import MoEConfig
from ..models.soft_moe import SoftMoEConfig, SoftMoEParams
from ..models.vit import ViTConfig
from ..optim import OptimizerConfig, init_state, update
from ..schedules import schedule
from ..tree import flatten, matrix_elements, zeros_like
from .adapter import Given, Unsupported
from .vectors.making import linear_names, trees

Array = Any
Arrays = dict[str, Array]
Masks = tuple[Array, ...] | None

NETWORKS = {"vit": ViTConfig, "mixer": MixerConfig, "gpt2": GPT2Config}


class Ours:
    """COMET-NP as an adapter.

    Parameters
    ----------
    dtype : str
        "float64" or "float32".
    backend : str
        "numpy" or "cupy".
    """

    def __init__(self, dtype: str = "float64", backend: str = "numpy") -> None:
        self._dtype, self._backend = dtype, get_backend(backend)

    def cap(self, scores: Array, k: int, ties: Any) -> Array:
        """Return the mask of scores (..., N), eq. (3)."""
        return kwta_mask(self._array(scores), k, ties)

    def run(self, case: Given, masks: Masks) -> Arrays:
        """Return the output of a case, what comes in between, and all gradients."""
        compute = _MODELS.get(case.model)
        if compute is None:
            raise Unsupported(f"COMET-NP has no model {case.model}")
        if masks is not None:
            masks = tuple(map(self._backend.asarray, masks))
        return compute(case.config, self._arrays(case), masks)

    def train(self, case: Given) -> Arrays:
        """Return the parameters after each step of an optimizer."""
        return dict(self._steps(case.config, self._arrays(case)))

    def _steps(self, config: dict[str, Any], arrays: Arrays) -> Iterator[tuple[str, Array]]:
        own: dict[str, Any] = {field.name: config[field.name]
                               for field in fields(OptimizerConfig) if field.name in config}
        own |= {name: own[name] or None for name in own if name.startswith("clip_")}
        rule = OptimizerConfig(config["optimizer"], **own)
        losses, course = [], config.get("schedule", "constant")
        if "p" in arrays:
            params: Any = arrays["p"].copy()
            flat, matrices = params, params.size
        else:
            model = _mlp_config(config)
            params, fixed = trees(arrays, model)
            matrices = matrix_elements(params)
            flat, params = flatten(params)
        state = init_state(flat, rule)
        for t in range(config["steps"]):
            if "p" in arrays:
                g = arrays[f"dp_{t + 1}"].copy()
            else:
                y, cache = mlp.forward(arrays["x"], params, fixed, model)
                loss, of_loss = softmax_cross_entropy_forward(y, arrays["labels"])
                losses.append(loss)
                grads = zeros_like(params)
                mlp.backward(softmax_cross_entropy_backward(1.0, of_loss), cache, params, grads,
                             model)
                g = flatten(grads)[0]
            lr = config["lr"] * schedule(course, t, config["steps"], config.get("warmup", 0))
            state = update(flat, g, state, lr, rule, matrices)
            if "p" in arrays:
                yield f"p_after_{t + 1}", flat.copy()
            else:
                for name, p in linear_names(params):
                    yield f"{name}_after_{t + 1}", p.copy()
        if losses:
            yield "losses", self._backend.xp.stack(losses)

    def _arrays(self, case: Given) -> Arrays:
        return {name: self._array(array) for name, array in case.arrays.items()}

    def _array(self, array: Array) -> Array:
        return self._backend.asarray(array, self._dtype if array.dtype.kind == "f" else None)


# --- the MLP ------------------------------------------------------------------------------------


def _mlp_config(config: dict[str, Any]) -> MLPConfig:
    gates: dict[str, Callable[[], Gate | None]] = {
        "none": lambda: None,
        "comet": lambda: Comet(config["p_k"], config["ties"], config["g"], config["exact"]),
        "layerwise": lambda: Layerwise(config["p_k"], config["ties"]),
        "top-k": lambda: TopK(config["p_k"], config["ties"])}
    return MLPConfig(config["widths"], config["activation"], gates[config["gate"]](),
                     config["bias"])


def _mlp(settings: dict[str, Any], arrays: Arrays, masks: Masks) -> Arrays:
    config, x, found = _mlp_config(settings), arrays["x"], {}
    params, fixed = trees(arrays, config)
    if masks is None and isinstance(config.gate, Comet):
        c, masks, z = config.gate.trace(x, fixed)
        found = _numbered(c=c, z=z)
        if config.gate.exact:
            found["z_0"] = on_grid(x, grid_bits(x.shape[-1]).z)
    y, cache = mlp.forward(x, params, fixed, config, masks)
    found |= _numbered(a=[layer.a for layer in cache.hidden],
                       x=[*(layer.x for layer in cache.hidden[1:]), cache.output.x])
    if config.gate is not None:
        found |= _numbered(m=cache.masks)
    if isinstance(config.gate, Layerwise):
        found |= _numbered(c=[project(layer.x, V) for layer, V in zip(cache.hidden, fixed,
                                                                      strict=True)])
    loss, of_loss = softmax_cross_entropy_forward(y, arrays["labels"])
    dy = softmax_cross_entropy_backward(1.0, of_loss)
    grads = zeros_like(params)
    dx = mlp.backward(dy, cache, params, grads, config)
    L = len(params)
    return found | {f"a_{L}": y, "loss": loss, f"da_{L}": dy, "dx": dx} | {
        f"d{name}": g for name, g in linear_names(grads)}


def _numbered(**lists: Any) -> Arrays:
    return {f"{name}_{i}": array for name, arrays in lists.items()
            for i, array in enumerate(arrays, start=1)}


# --- layers -------------------------------------------------------------------------------------


def _hidden_layer(settings: dict[str, Any], arrays: Arrays, masks: Masks) -> Arrays:
    p, f = Linear(arrays["W_1"], arrays["b_1"]), activation(settings["activation"])
    h, cache = hidden_forward(arrays["x"], p, masks[0] if masks else None, f)
    g = zeros_like(p)
    dx = hidden_backward(arrays["dy"], cache, p, g, f)
    return {"a_1": cache.a, "x_1": h, "dW_1": g.weight, "db_1": g.bias, "dx": dx}


def _layer_norm(settings: dict[str, Any], arrays: Arrays, masks: Masks) -> Arrays:
    p = Norm(arrays["gain"], arrays["bias"])
    y, cache = norm_forward(arrays["x"], p, settings["eps"])
    g = zeros_like(p)
    dx = norm_backward(arrays["dy"], cache, p, g)
    return {"y": y, "dgain": g.gain, "dbias": g.bias, "dx": dx}


def _attention(settings: dict[str, Any], arrays: Arrays, masks: Masks) -> Arrays:
    p = SelfAttention(Linear(arrays["W_qkv"], arrays["b_qkv"]),
                      Linear(arrays["W_out"], arrays["b_out"]))
    y, cache = self_attention_forward(arrays["x"], p, settings["heads"], settings["causal"])
    g = zeros_like(p)
    dx = self_attention_backward(arrays["dy"], cache, p, g, settings["heads"])
    return {"qkv": cache.attention.qkv, "weights": cache.attention.weights, "values": cache.out.x,
            "y": y, "dW_qkv": g.qkv.weight, "db_qkv": g.qkv.bias, "dW_out": g.out.weight,
            "db_out": g.out.bias, "dx": dx}


def _loss(settings: dict[str, Any], arrays: Arrays, masks: Masks) -> Arrays:
    if settings["loss"] == "squared-error":
        loss, of_squares = mean_squared_error_forward(arrays["x"], arrays["target"])
        return {"loss": loss, "dx": mean_squared_error_backward(1.0, of_squares)}
    loss, cache = softmax_cross_entropy_forward(arrays["x"], arrays["labels"],
                                                settings.get("ignored"))
    return {"loss": loss, "dx": softmax_cross_entropy_backward(1.0, cache)}


def _schedule(settings: dict[str, Any], arrays: Arrays, masks: Masks) -> Arrays:
    return {"factor": np.array([  # which no device computes
        schedule(settings["schedule"], int(t), settings["steps"], settings["warmup"])
        for t in arrays["step"]])}


# --- larger models ------------------------------------------------------------------------------


def _of_gates(mlps: Any, fixed: Any) -> Arrays:
    """Return what the MLPs of a larger model computed, each with one hidden layer."""
    return _numbered(x=[one.hidden[0].x for one in mlps], a=[one.hidden[0].a for one in mlps],
                     c=[project(one.hidden[0].x, V) for one, (V,) in zip(mlps, fixed, strict=True)],
                     m=[one.masks[0] for one in mlps])


def _mixer_block(settings: dict[str, Any], arrays: Arrays, masks: Masks) -> Arrays:
    x, gate = arrays["x"], Comet(settings["p_k"], settings["ties"])
    parts, found = [], {}
    for i in (1, 2):
        W, b, W_2, b_2 = (arrays[f"{kind}_{2 * i - other}"] for other in (1, 0) for kind in "Wb")
        config = MLPConfig((W.shape[1], *W_2.shape[::-1]), settings["activation"], gate)
        norm, p = Norm(arrays[f"gain_{i}"], arrays[f"bias_{i}"]), (Linear(W, b), Linear(W_2, b_2))
        x, cache = branch_forward(x, norm, p, (arrays[f"V_{i}"],), config,
                                  None if masks is None else masks[i - 1:i], EVALUATION,
                                  settings["eps"], 0.0, i == 1)
        parts.append((norm, p, cache, config))
        found[f"y_{i}"] = x
    found |= _of_gates([cache.mlp for _, _, cache, _ in parts],
                       [(arrays[f"V_{i}"],) for i in (1, 2)])
    d = arrays["dy"]
    for i in (2, 1):
        norm, p, cache, config = parts[i - 1]
        of_norm, g = zeros_like(norm), zeros_like(p)
        d = branch_backward(d, cache, norm, p, of_norm, g, config, i == 1)
        found |= {f"dW_{2 * i - 1}": g[0].weight, f"db_{2 * i - 1}": g[0].bias,
                  f"dW_{2 * i}": g[1].weight, f"db_{2 * i}": g[1].bias,
                  f"dgain_{i}": of_norm.gain, f"dbias_{i}": of_norm.bias}
    return found | {"dx": d}


def _network(config: Any, arrays: Arrays, masks: Masks) -> Arrays:
    module = module_of(config)
    given = {name: array for name, array in arrays.items()
             if not re.fullmatch(r"x|tokens|dy|m_\d+", name)}
    params, fixed = weights_of(given, config)
    x = arrays["tokens" if isinstance(config, GPT2Config) else "x"]
    y, cache = module.forward(x, params, fixed, config, masks)
    grads = zeros_like(params)
    dx = module.backward(arrays["dy"], cache, params, grads, config, True)
    found = _of_gates(cache.mlps, fixed) | {"y": y} | {
        f"d_{name}": g for name, g in named_weights(grads, (), config).items()}
    return found if dx is None else found | {"dx": dx}


def _of_network(kind: Any) -> Callable[[dict[str, Any], Arrays, Masks], Arrays]:
    def compute(settings: dict[str, Any], arrays: Arrays, masks: Masks) -> Arrays:
        names = {field.name for field in fields(kind)}
        own = {name: tuple(value) if isinstance(value, list) else value
               for name, value in settings.items() if name in names and name != "gate"}
        own |= {name: 0.0 for name in ("dropout", "hidden_dropout", "weight_dropout")
                if name in names}
        gate = Comet(settings["p_k"], settings["ties"], settings["g"])
        return _network(kind(**own, gate=gate), arrays, masks)

    return compute


def _moe(settings: dict[str, Any], arrays: Arrays, masks: Masks) -> Arrays:
    config = MoEConfig(tuple(settings["widths"]), settings["experts"], settings["activation"],
                       settings["gate"])
    module, x = module_of(config), arrays["x"]
    params, fixed = weights_of({name: array for name, array in arrays.items()
                                if name not in ("x", "choice", "dy")}, config)
    y, cache = module.forward(x, params, fixed, config, arrays.get("choice"))
    grads = zeros_like(params)
    dx = module.backward(arrays["dy"], cache, params, grads, config)
    found = {"y": y, "dx": dx, "choice": cache.chosen.argmax(axis=-1)} | {
        f"d_{name}": g for name, g in named_weights(grads, (), config).items()}
    if cache.scores is not None:
        found["scores"] = cache.scores
    return found | ({"weight": cache.weight} if config.gate == "weighted" else {})


def _soft_moe(settings: dict[str, Any], arrays: Arrays, masks: Masks) -> Arrays:
    config = SoftMoEConfig(tuple(settings["widths"]), settings["experts"], settings["slots"],
                           settings["activation"])
    module = module_of(config)

    def expert(e: int) -> mlp.Params:
        return tuple(Linear(arrays[f"W_{i}_of_{e}"], arrays[f"b_{i}_of_{e}"])
                     for i, _ in enumerate(pairwise(config.widths), start=1))

    params = SoftMoEParams(arrays["Phi"], tuple(map(expert, range(1, config.experts + 1))))
    y, cache = module.forward(arrays["x"], params, (), config)
    grads = zeros_like(params)
    dx = module.backward(arrays["dy"], cache, params, grads, config)
    of_experts = {f"d{name}_of_{e}": g for e, one in enumerate(grads.experts, start=1)
                  for name, g in linear_names(one)}
    return {"logits": cache.logits, "dispatch": cache.dispatch.weights, "y": y, "dPhi": grads.slots,
            "dx": dx, **of_experts}


_MODELS: dict[str, Callable[[dict[str, Any], Arrays, Masks], Arrays]] = {
    "mlp": _mlp, "hidden-layer": _hidden_layer, "layer-norm": _layer_norm,
    "attention": _attention, "loss": _loss, "schedule": _schedule, "mixer-block": _mixer_block,
    "moe": _moe, "soft-moe": _soft_moe,
    **{name: _of_network(kind) for name, kind in NETWORKS.items()}}
