"""ViT and MLP-Mixer against transformers, timm and the published forms, in float64."""

import itertools
import json
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest

from comet_np import interop
from comet_np.backends import BackendError
from comet_np.errors import UserError
from comet_np.experiments.datasets import load
from comet_np.experiments.fit import trained_on
from comet_np.experiments.training import RunConfig, TrainConfig
from comet_np.experiments.training.model import load_run
from comet_np.functional.loss import (
    softmax_cross_entropy_backward,
    softmax_cross_entropy_forward,
)
from comet_np.gates import (
    Bernoulli,
    Comet,
    ExampleTied,
    Gate,
    Layerwise,
    TopK,
)
from comet_np.models import mixer, module_of, vit
from comet_np.models.mixer import MixerConfig
from comet_np.models.vit import ViTConfig
from comet_np.optim import OptimizerConfig, init_state, update
from comet_np.tree import flatten, leaves, named_leaves, zeros_like
from tests.runs import small_data
from tests.tolerances import TOLERANCES, assert_close

torch = pytest.importorskip("torch", reason="PyTorch, the crosscheck extra, is not installed")
F = torch.nn.functional
torch.set_num_threads(1)  # its idle threads spin, and would slow down ours

WHY = "{}, of the crosscheck extra, is not installed"
IMAGE, CLASSES = (3, 8, 12), 5
COMET = Comet(ties="threshold")  # the published code's rule
VIT = ViTConfig(IMAGE, 4, CLASSES, 12, 2, 3, 20, gate=COMET, dropout=0.0, hidden_dropout=0.0)
MIXER = MixerConfig(IMAGE, 4, CLASSES, 12, 2, 14, 10, gate=COMET)
PAPERS = {replace(ViTConfig(), hidden=hidden): count for hidden, count in (
    (512, 9_523_722), (3072, 25_267_722), (6144, 44_160_522))} | {
    replace(MixerConfig(), width=width, hidden=width // 2): count for width, count in (
        (512, 1_819_530), (3072, 57_110_410))}


# --- the published forms, built from what is known of them ---------------------------------------


class Cut(torch.nn.Module):
    """Patches as tokens, of each the pixels in order and the colours of a pixel together."""

    def __init__(self, patch):
        super().__init__()
        self.patch = patch

    def forward(self, x):
        columns = F.unfold(x, self.patch, stride=self.patch)  # (B, C P P, T)
        apart = columns.reshape(len(x), x.shape[1], -1, columns.shape[-1])
        return apart.permute(0, 3, 2, 1).flatten(2)


class Normed(torch.nn.Module):
    """A function behind a norm."""

    def __init__(self, width, function):
        super().__init__()
        self.norm, self.fn = torch.nn.LayerNorm(width), function

    def forward(self, x, *others):
        return self.fn(self.norm(x), *others)


class Attention(torch.nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.to_qkv = torch.nn.Linear(width, 3 * width, bias=False)
        self.to_out = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Dropout(0.0))

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for part in self.to_qkv(x).chunk(3, dim=-1))
        weights = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


def add_maps(module, N, hidden, config):
    """Give a module the fixed maps of COMET."""
    maps = {"spec": (N, hidden)} if config.gate else {}
    if config.routing == "stream":
        maps["spec_back"] = hidden, N
    for name, shape in maps.items():
        setattr(module, name, torch.nn.Linear(*shape, bias=False).requires_grad_(False))


def winners(scores, gate):
    k = max(1, int(gate.p_k * scores.shape[-1]))
    return scores >= torch.topk(scores, k).values[..., -1:]


def masked(module, first, second, x, m, config, seen):
    """Return an MLP's output, its hidden layer masked after tanh; across has the channels last."""
    across = isinstance(first, torch.nn.Conv1d)
    if m is None and config.gate:
        m = winners(module.spec(x.mT if across else x), config.gate)
    h = torch.tanh(first(x))
    if m is not None:
        seen.append(m)
        h = h * (m.mT if across else m)
    return second(h)


class FeedForward(torch.nn.Module):
    """The MLP of the published ViT, in `net`."""

    def __init__(self, N, hidden, config):
        super().__init__()
        self.config = config
        self.net = torch.nn.Sequential(
            torch.nn.Linear(N, hidden), torch.nn.Tanh(), torch.nn.Dropout(0.0),
            torch.nn.Linear(hidden, N), torch.nn.Dropout(0.0))
        add_maps(self, N, hidden, config)

    def forward(self, x, m, seen):
        return masked(self, self.net[0], self.net[3], x, m, self.config, seen)


class Mixing(torch.nn.Sequential):
    """The MLP of the published Mixer: of channels, or as convolutions of tokens."""

    def __init__(self, N, hidden, config, across):
        def layer(*shape):
            return torch.nn.Conv1d(*shape, 1) if across else torch.nn.Linear(*shape)

        super().__init__(layer(N, hidden), torch.nn.Tanh(), torch.nn.Dropout(0.0),
                         layer(hidden, N), torch.nn.Dropout(0.0))
        self.config = config
        add_maps(self, N, hidden, config)

    def forward(self, x, m, seen):
        return masked(self, self[0], self[3], x, m, self.config, seen)


class PublishedViT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, D = config, config.width
        P = config.patch ** 2 * config.image[0]
        self.to_patch_embedding = torch.nn.Sequential(Cut(config.patch), torch.nn.Linear(P, D))
        self.pos_embedding = torch.nn.Parameter(torch.randn(1, config.tokens, D))
        self.cls_token = torch.nn.Parameter(torch.randn(1, 1, D))
        self.transformer = torch.nn.Module()
        self.transformer.layers = torch.nn.ModuleList(
            torch.nn.ModuleList([Normed(D, Attention(D, config.heads)),
                                 Normed(D, FeedForward(D, config.hidden, config))])
            for _ in range(config.depth))
        self.mlp_head = torch.nn.Sequential(torch.nn.LayerNorm(D),
                                            torch.nn.Linear(D, config.classes))
        if config.routing == "stream":
            self.spec_embedding = torch.nn.Linear(P, D, bias=False).requires_grad_(False)

    def streamed(self, x):
        """Return the masks of all blocks by the network's input alone."""
        if self.config.routing == "block":
            return [None] * self.config.depth
        s = self.spec_embedding(self.to_patch_embedding[0](x))
        s, masks = torch.cat([s.mean(dim=1, keepdim=True), s], dim=1), []
        for _, mlp in self.transformer.layers:
            c = mlp.fn.spec(s)
            masks.append(winners(c, self.config.gate))
            if hasattr(mlp.fn, "spec_back"):
                s = mlp.fn.spec_back(masks[-1] * c)
        return masks

    def forward(self, images):
        self.masks = []
        x = self.to_patch_embedding(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embedding
        for (attention, mlp), m in zip(self.transformer.layers, self.streamed(images), strict=True):
            x = x + attention(x)
            x = x + mlp(x, m, self.masks)
        return self.mlp_head(x[:, 0])


class Mean(torch.nn.Module):
    def forward(self, x):
        return x.mean(dim=1)


class PublishedMixer(torch.nn.Sequential):
    def __init__(self, config):
        D, P = config.width, config.patch ** 2 * config.image[0]
        super().__init__(
            Cut(config.patch), torch.nn.Linear(P, D),
            *(torch.nn.Sequential(
                Normed(D, Mixing(config.tokens, config.token_hidden, config, True)),
                Normed(D, Mixing(D, config.hidden, config, False)))
              for _ in range(config.depth)),
            torch.nn.LayerNorm(D), Mean(), torch.nn.Linear(D, config.classes))
        self.config = config
        if config.routing == "stream":
            self.spec_embedding = torch.nn.Linear(P, D, bias=False).requires_grad_(False)

    def forward(self, x):
        self.masks, config = [], self.config
        patches = self[0](x)
        s = self.spec_embedding(patches) if config.routing == "stream" else None
        x = self[1](patches)
        for i in range(config.depth):
            for mixing, across in zip(self[2 + i], (True, False), strict=True):
                m = None
                if s is not None:
                    c = mixing.fn.spec(s.mT if across else s)
                    m = winners(c, config.gate)
                    if hasattr(mixing.fn, "spec_back"):
                        s = mixing.fn.spec_back(m * c)
                        s = s.mT if across else s
                x = x + mixing(x, m, self.masks)
        return self[4 + config.depth](self[3 + config.depth](self[2 + config.depth](x)))


def published(config):
    model = (PublishedViT if isinstance(config, ViTConfig) else PublishedMixer)(config)
    if config.routing == "stream":  # the last one's would route nothing
        del [module for module in model.modules() if hasattr(module, "spec_back")][-1].spec_back
    return model


# --- what people use ----------------------------------------------------------------------------


@pytest.fixture
def transformers(monkeypatch):
    """Return transformers, silent, whose eager softmax is as exact as its inputs."""
    transformers = pytest.importorskip("transformers", reason=WHY.format("transformers"))
    transformers.utils.logging.disable_progress_bar()
    monkeypatch.setattr(F, "softmax", lambda x, dim, dtype: torch.softmax(x, dim))
    return transformers


def huggingface(transformers, attention="eager", **changes):
    """Return Hugging Face's ViT in float64, of weights past its own law's 0.02."""
    values = {"image_size": [8, 12], "patch_size": 4, "hidden_size": 12, "num_hidden_layers": 2,
              "num_attention_heads": 3, "intermediate_size": 20, "num_labels": CLASSES,
              "initializer_range": 0.5}
    config = transformers.ViTConfig(**values | changes)
    return spread(transformers.ViTForImageClassification._from_config(
        config, attn_implementation=attention))


def spread(model):
    """Return a model in float64 whose gains and biases are not 1 and 0."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p += 0.3 * torch.randn(p.shape)
    return model.double()


def timms(**changes):
    timm = pytest.importorskip("timm", reason=WHY.format("timm"))
    return spread(timm.models.VisionTransformer(
        img_size=(8, 12), patch_size=4, num_classes=CLASSES, embed_dim=12, depth=2, num_heads=3,
        mlp_ratio=20 / 12, **changes))


TIMM = replace(VIT, activation="gelu", gate=None, qkv_bias=True, final_norm="tokens", eps=1e-6)
ORACLES = {
    "eager": ("huggingface", {}, None),
    "sdpa": ("huggingface", {"attention": "sdpa"}, None),
    "no qkv biases": ("huggingface", {"qkv_bias": False, "hidden_act": "tanh"}, None),
    "timm": ("timm", {}, TIMM),
    "timm, no class token": (
        "timm", {"class_token": False, "global_pool": "avg"},
        replace(TIMM, pooling="mean", final_norm="pooled")),
    "timm, its norm before": (
        "timm", {"class_token": False, "global_pool": "avg", "fc_norm": False, "qkv_bias": False},
        replace(TIMM, pooling="mean", qkv_bias=False)),
}
FORMS = {
    "ViT": VIT, "ViT, stream": replace(VIT, routing="stream"),
    "ViT, standard": replace(VIT, gate=None), "ViT, few": replace(VIT, gate=replace(COMET, p_k=.1)),
    "Mixer": MIXER, "Mixer, stream": replace(MIXER, routing="stream"),
    "Mixer, standard": replace(MIXER, gate=None),
    "Mixer, few": replace(MIXER, gate=replace(COMET, p_k=.1))}


@pytest.fixture(params=[*ORACLES, *FORMS])
def oracle(request, monkeypatch):
    """Return a network of PyTorch's, the function of its logits, our config, and its names' style.
    """
    torch.manual_seed(1)
    if request.param in FORMS:
        config = FORMS[request.param]
        network = spread(published(config))
        return network, network, config, "published"
    kind, changes, config = ORACLES[request.param]
    if kind == "timm":
        network = timms(**changes)
        return network, network, config, "timm"
    network = huggingface(request.getfixturevalue("transformers"), **changes)
    config = interop.vit_config_from_huggingface(network.config.to_dict())
    new = any("q_proj" in name for name in network.state_dict())
    return (network, lambda x: network(x).logits, config, "transformers" if new else "huggingface")


def from_torch(named, config):
    """Return parameters and fixed weights by the published names."""
    if isinstance(config, ViTConfig):
        return interop.vit_from_torch(named, config)
    return interop.mixer_from_torch(named, config)


def to_torch(params, fixed, config, style="published"):
    if isinstance(config, ViTConfig):
        return interop.vit_to_torch(params, fixed, config, style)
    return interop.mixer_to_torch(params, fixed, config)


def ungated(config):
    """Return a configuration whose weights are the learned ones alone, for gradients."""
    return replace(config, gate=None, routing="block")


def of_no_effect(name, config):
    """Return whether the gradient of an array is 0: of the Mixer's biases of its tokens' sums.

    They add one number to all channels of a token, and the norms after them take it away.
    """
    found = re.fullmatch(r"branches\[(\d+)\]\.mlp\[1\]\.bias", name)
    return found is not None and isinstance(config, MixerConfig) and int(found[1]) % 2 == 0


def test_masks_logits_loss_and_every_gradient(oracle, draw):
    network, logits_of, config, style = oracle
    labels = np.arange(6) % CLASSES
    x = torch.tensor(draw.standard_normal((6, *IMAGE)), requires_grad=True)
    theirs = logits_of(x)
    their_loss = F.cross_entropy(theirs, torch.tensor(labels))
    their_loss.backward()

    model = module_of(config)
    params, fixed = from_torch(network.state_dict(), config)
    ours, cache = model.forward(x.detach().numpy(), params, fixed, config)
    loss, loss_cache = softmax_cross_entropy_forward(ours, labels)
    grads = zeros_like(params)
    dx = model.backward(softmax_cross_entropy_backward(1.0, loss_cache), cache, params, grads,
                        config)

    masks = getattr(network, "masks", None) or [None] * len(cache.masks)
    for m, their_m in zip(cache.masks, masks, strict=True):
        assert (m is None) == (their_m is None) == (config.gate is None)
        np.testing.assert_array_equal(m, their_m if their_m is None else their_m.numpy())
    assert_close(ours, theirs.detach().numpy(), "torch")
    assert_close(loss, their_loss.item(), "torch")
    assert_close(dx, x.grad.numpy().reshape(6, -1), "training")
    named = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    # In our own form: there, the gradient of the keys' biases, which is 0, is part of an array.
    expected, _ = from_torch(named, ungated(config))
    largest = max(abs(grad).max() for grad in leaves(expected))
    for (name, grad), their_grad in zip(named_leaves(grads), leaves(expected), strict=True):
        if of_no_effect(name, config):  # two roundings of 0
            assert abs(grad - their_grad).max() <= TOLERANCES["torch"]["float64"] * largest
        else:
            assert grad.any(), name
            assert_close(grad, their_grad, "training")
    back = to_torch(grads, (), config, style)
    assert {name: array.shape for name, array in back.items()} == {
        name: tuple(grad.shape) for name, grad in named.items()}


def test_ten_steps_of_adam(oracle, draw):
    network, logits_of, config, _ = oracle
    lr, settings, model = 1e-4, OptimizerConfig("adam"), module_of(config)
    theirs = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr)
    before, fixed = from_torch(network.state_dict(), config)
    flat, params = flatten(before)
    flat_grads, grads = flatten(zeros_like(params))
    state = init_state(flat, settings)
    inputs, labels = draw.standard_normal((10, 6, *IMAGE)), draw.integers(0, CLASSES, (10, 6))
    for x, y in zip(inputs, labels, strict=True):
        theirs.zero_grad()
        F.cross_entropy(logits_of(torch.tensor(x)), torch.tensor(y)).backward()
        theirs.step()
        logits, cache = model.forward(x, params, fixed, config)
        _, loss_cache = softmax_cross_entropy_forward(logits, y)
        flat_grads.fill(0)
        model.backward(softmax_cross_entropy_backward(1.0, loss_cache), cache, params, grads,
                       config, False)
        state = update(flat, flat_grads, state, lr, settings)
    expected, their_fixed = from_torch(network.state_dict(), config)
    for (name, ours), after, start in zip(named_leaves(params), leaves(expected), leaves(before),
                                          strict=True):
        assert_close(ours, after, "training")
        assert of_no_effect(name, config) or abs(ours - start).max() > lr
    for V, their_V in zip(leaves(fixed), leaves(their_fixed), strict=True):
        np.testing.assert_array_equal(V, their_V)


def test_names_go_there_and_back(oracle):
    network, _, config, style = oracle
    named = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    params, fixed = from_torch(named, config)
    back = to_torch(params, fixed, config, style)
    assert set(back) == set(named)
    for name, array in named.items():
        np.testing.assert_array_equal(back[name], array)
    network.load_state_dict({name: torch.tensor(array) for name, array in back.items()})
    assert not any(np.shares_memory(ours, theirs)
                   for ours, theirs in itertools.product(leaves(params), named.values()))


@pytest.mark.parametrize(("config", "count"), PAPERS.items(), ids=str)
def test_the_papers_models_have_as_many_parameters(config, count):
    with torch.device("meta"):
        network = published(config)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == count
    assert module_of(config).parameter_count(config) == count


def test_the_usual_models_have_as_many_parameters(transformers):
    timm = pytest.importorskip("timm", reason=WHY.format("timm"))
    with torch.device("meta"):
        theirs = transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000))
        again = timm.models.VisionTransformer()
    config = interop.vit_config_from_huggingface(theirs.config.to_dict())
    assert vit.parameter_count(config) == 86_567_656
    for network in theirs, again:
        assert sum(p.numel() for p in network.parameters()) == 86_567_656


def test_a_pretrained_one_goes_on_with_comet(draw):
    """Weights without routing go with the fixed weights of any gate."""
    network = spread(PublishedViT(replace(VIT, gate=None)))
    params, _ = interop.vit_from_torch(network.state_dict(), replace(VIT, gate=None))
    _, fixed = vit.init(VIT, dtype="float64")
    x = draw.standard_normal((2, *IMAGE))
    _, cache = vit.forward(x, params, fixed, VIT)
    assert all(m.sum(axis=-1).max() == 10 for m in cache.masks)


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "style", "some"), [
    (VIT, "published", {"pos_embedding": (1, 7, 12), "cls_token": (1, 1, 12),
                        "to_patch_embedding.1.weight": (12, 48), "mlp_head.1.bias": (5,),
                        "transformer.layers.1.0.fn.to_qkv.weight": (36, 12),
                        "transformer.layers.0.1.fn.net.3.weight": (12, 20),
                        "transformer.layers.1.1.fn.spec.weight": (20, 12)}),
    (replace(VIT, routing="stream"), "published", {
        "spec_embedding.weight": (12, 48), "transformer.layers.1.1.fn.spec.weight": (20, 12),
        "transformer.layers.0.1.fn.spec_back.weight": (12, 20)}),
    (VIT, "huggingface", {"vit.embeddings.patch_embeddings.projection.weight": (12, 3, 4, 4),
                          "vit.encoder.layer.1.attention.attention.value.weight": (12, 12),
                          "vit.encoder.layer.0.intermediate.spec.weight": (20, 12),
                          "vit.layernorm.weight": (12,), "classifier.weight": (5, 12)}),
    (VIT, "transformers", {"vit.layers.1.attention.v_proj.weight": (12, 12),
                           "vit.layers.1.mlp.spec.weight": (20, 12)}),
    (VIT, "timm", {"blocks.1.attn.qkv.weight": (36, 12), "blocks.1.mlp.spec.weight": (20, 12),
                   "norm.weight": (12,), "patch_embed.proj.weight": (12, 3, 4, 4)}),
    (MIXER, "published", {"1.weight": (12, 48), "2.0.fn.0.weight": (14, 6, 1),
                          "3.0.fn.spec.weight": (14, 6), "3.1.fn.spec.weight": (10, 12),
                          "3.1.norm.bias": (12,), "4.weight": (12,), "6.weight": (5, 12)}),
    (replace(MIXER, routing="stream"), "published", {"2.0.fn.spec_back.weight": (6, 14),
                                                     "spec_embedding.weight": (12, 48)}),
], ids=lambda each: each if isinstance(each, str) else "")
def test_some_of_the_names(config, style, some):
    params, fixed = module_of(config).init(config)
    named = to_torch(params, fixed, config, style)
    assert {name: named[name].shape for name in some} == some
    assert sum(array.size for array in named.values()) == sum(
        leaf.size for leaf in leaves((params, fixed)))
    if style == "published":
        assert next(iter(named.values())) is next(leaves(params))
    again = from_torch({name: torch.tensor(array.copy()) for name, array in named.items()}, config)
    for ours, theirs in zip(leaves(again), leaves((params, fixed)), strict=True):
        assert ours.flags.c_contiguous
        np.testing.assert_array_equal(ours, theirs)


@dataclass(frozen=True)
class Two(Gate):
    """A gate whose fixed weights are two arrays a layer, of integers."""

    arrays: int = 2

    def shapes(self, widths):
        return self.arrays * ((widths[1],),)

    def init(self, widths, seed, backend, dtype):
        return tuple(backend.asarray(np.arange(widths[1]) + i) for i in range(self.arrays))

    def masks(self, x, fixed, config, at):
        return (np.broadcast_to(fixed[0] % 2 == 0, (*x.shape[:-1], len(fixed[0]))),)


@pytest.mark.parametrize("gate", [None, Comet(), Layerwise(), TopK(), Bernoulli(), ExampleTied(),
                                  Two(1), Two()], ids=str)
@pytest.mark.parametrize("config", [VIT, replace(VIT, pooling="mean", final_norm=None,
                                                 qkv_bias=True), MIXER], ids=["", "mean", "mixer"])
def test_all_weights_have_names_for_every_gate(config, gate, draw):
    config = replace(config, gate=gate)
    params, fixed = module_of(config).init(config)
    named = interop.named_weights(params, fixed, config)
    assert ("params.head.weight" in named) == (gate == Two())
    again = interop.weights_of(named, config)
    for ours, theirs in zip(leaves(again), leaves((params, fixed)), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    x = draw.standard_normal((2, *IMAGE), dtype="float32")
    np.testing.assert_array_equal(module_of(config).forward(x, *again, config)[0],
                                  module_of(config).forward(x, params, fixed, config)[0])


def test_fixed_weights_without_names_are_not_written():
    config = replace(VIT, gate=Two())
    params, fixed = vit.init(config)
    named = interop.vit_to_torch(params, (), config)
    assert interop.vit_from_torch(named, config)[1] == ((), ())
    with pytest.raises(UserError, match=r"one array an MLP .* left out by \(\): expected some of "
                                        r"shapes \(\(\), \(\)\), got"):
        interop.vit_to_torch(params, fixed, config)


RUN = RunConfig(ViTConfig((3, 2, 2), 1, 5, 8, 1, 2, 12), TrainConfig(epochs=1))


@pytest.mark.parametrize("model", [
    RUN.model, replace(RUN.model, gate=None), replace(RUN.model, routing="stream"),
    MixerConfig((3, 2, 2), 1, 5, 8, 1, 6, 12)], ids=str)
def test_a_finished_run_is_read_again(model, tmp_path):
    trained = trained_on(small_data(), replace(RUN, model=model), folder=tmp_path)
    again = load_run(tmp_path)
    for ours, theirs in zip(leaves((again.params, again.fixed)),
                            leaves((trained.params, trained.fixed)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with np.load(tmp_path / "weights.npz") as named:
        assert set(named) == set(to_torch(trained.params, trained.fixed, model))


def test_any_model_goes_into_a_safetensors_file(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason=WHY.format("safetensors"))
    for config in VIT, MIXER, replace(VIT, gate=Two()):
        params, fixed = module_of(config).init(config)
        interop.save_safetensors(tmp_path / "file", interop.named_weights(params, fixed, config))
        for read in interop.load_safetensors, safetensors.load_file:
            named = {name: np.asarray(array)
                     for name, array in read(tmp_path / "file").items()}
            again = interop.weights_of(named, config)
            for ours, theirs in zip(leaves(again), leaves((params, fixed)), strict=True):
                np.testing.assert_array_equal(ours, theirs)


def test_a_finished_run_is_exported(tmp_path, transformers):
    data, config = small_data(), replace(RUN, model=replace(RUN.model, gate=None))
    trained = trained_on(data, config, folder=tmp_path / "run")
    export = interop.save_huggingface_vit(tmp_path / "export", trained.params, trained.config)
    network = transformers.ViTForImageClassification.from_pretrained(export, local_files_only=True)
    x = data.x_test * np.float32(data.scale) + np.float32(data.shift)
    with torch.no_grad():
        theirs = network.eval()(torch.tensor(x.reshape(-1, 3, 2, 2))).logits
    np.testing.assert_allclose(trained.output(data.x_test), theirs, atol=1e-5)
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"is there and holds no model\.safetensors"):
        interop.save_huggingface_vit(tmp_path / "run", trained.params, trained.config)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


# --- folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    {}, {"image_size": 8, "num_labels": 2, "qkv_bias": False, "hidden_act": "relu"},
    {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3, "layer_norm_eps": 1e-6,
     "num_channels": 1}], ids=str)
def test_folders_go_there_and_back(changes, transformers, tmp_path, draw):
    theirs = huggingface(transformers, **changes)
    theirs.save_pretrained(tmp_path / "theirs")
    config, params, fixed = interop.load_huggingface_vit(tmp_path / "theirs")
    assert config == interop.vit_config_from_huggingface(theirs.config.to_dict())
    interop.save_huggingface_vit(tmp_path / "ours", params, config)
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "ours",
                                                                   local_files_only=True)
    assert again.dtype == torch.float64
    for name in ("image_size", "patch_size", "num_channels", "num_labels", "hidden_act",
                 "hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps",
                 "qkv_bias"):
        assert getattr(again.config, name) == getattr(theirs.config, name), name
    assert interop.load_huggingface_vit(tmp_path / "ours")[0] == config
    x = draw.standard_normal((4, *config.image))
    logits = vit.forward(x, params, fixed, config)[0]
    for network in theirs.eval(), again.eval():
        assert_close(logits, network(torch.tensor(x)).logits.detach().numpy(), "torch")
    interop.save_huggingface_vit(tmp_path / "ours", params, config)  # over what it wrote itself


def test_a_trained_vit_has_the_same_accuracy_here(transformers, tmp_path):
    """Made on the spot, as no package ships a small one: trained in PyTorch, evaluated by both."""
    pytest.importorskip("matplotlib", reason="matplotlib, which draws the digits, is not installed")
    data = load("glyphs", train=600)
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=32, patch_size=8, hidden_size=48,
                                    num_hidden_layers=2, num_attention_heads=4,
                                    intermediate_size=96, num_labels=10, initializer_range=0.1)
    network = transformers.ViTForImageClassification(config)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)

    def inputs(x):
        return (x * np.float32(data.scale) + np.float32(data.shift)).reshape(-1, 3, 32, 32)

    for step in range(80):
        rows = np.arange(step * 50, step * 50 + 50) % len(data.x_train)
        optimizer.zero_grad()
        network(torch.tensor(inputs(data.x_train[rows])),
                labels=torch.tensor(data.y_train[rows])).loss.backward()
        optimizer.step()
    network.eval().save_pretrained(tmp_path)
    x = inputs(data.x_train)
    with torch.no_grad():
        theirs = network(torch.tensor(x)).logits.numpy()
    config, params, fixed = interop.load_huggingface_vit(tmp_path)
    ours, _ = vit.forward(x, params, fixed, config)
    np.testing.assert_array_equal(ours.argmax(axis=-1), theirs.argmax(axis=-1))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert (ours.argmax(axis=-1) == data.y_train).mean() > 0.3  # of ten classes


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a ViT that is ours, as Hugging Face has it."""
    pytest.importorskip("safetensors", reason=WHY.format("safetensors"))
    config = replace(TIMM, classes=2)
    return interop.save_huggingface_vit(tmp_path / "vit", vit.init(config)[0], config)


def rewritten(folder, **changes):
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if value != "gone"}))


def test_what_a_config_does_not_say_is_transformers_default(folder, transformers):
    every = json.loads((folder / "config.json").read_text())
    for gone in every.keys() - {"model_type", "patch_size"}:
        values = {name: value for name, value in every.items() if name != gone}
        theirs = transformers.ViTConfig(**values).to_dict()
        assert interop.vit_config_from_huggingface(values) == (
            interop.vit_config_from_huggingface(theirs))
    sizes = interop.vit_config_from_huggingface({"model_type": "vit"})
    assert (sizes.image, sizes.patch, sizes.classes) == ((3, 224, 224), 16, 2)


@pytest.mark.parametrize(("changes", "said"), [
    ({"model_type": "deit"}, 'which has model_type "vit", got {"model_type": "deit", '),
    ({"model_type": "gone"}, 'which has model_type "vit", got {"model_type": null, '),
    ({"architectures": ["ViTModel"]}, r'ViTForImageClassification was .*: \["ViTModel"\]}'),
    ({"hidden_act": "quick_gelu"}, "hidden_act in config.json is one of gelu, .* got 'quick_gelu'"),
    ({"hidden_act": ["gelu"]}, "hidden_act"),
    ({"patch_size": [4, 2]}, "patches are square here, got patch_size 4x2"),
    ({"patch_size": 5}, "8x12 pixels cannot be cut into patches of 5x5"),
    ({"image_size": "8"}, "image_size in config.json is an integer or two of them, got '8'"),
    ({"image_size": [8]}, "image_size"), ({"image_size": True}, "image_size"),
    ({"num_attention_heads": 5}, "5 heads do not divide the width 12"),
    ({"hidden_size": "12"}, "hidden_size in config.json is of the type int, as 768, got '12'"),
    ({"qkv_bias": 1}, "qkv_bias in config.json is of the type bool"),
    ({"layer_norm_eps": None}, "layer_norm_eps in config.json is of the type float"),
    ({"hidden_dropout_prob": 1}, "1"),
    ({"num_hidden_layers": 3, "num_channels": 1, "image_size": 16},
     r"model.safetensors: these are not the 56 tensors of this ViTConfig: of 40 given, 16 missing "
     r"\(vit.encoder.layer.2.layernorm_before.weight \(12,\), .*, \.\.\.\), 2 of another shape "
     r"\(vit.embeddings.patch_embeddings.projection.weight \(12, 3, 4, 4\), which should be "
     r"\(12, 1, 4, 4\), vit.embeddings.position_embeddings \(1, 7, 12\), which should be "
     r"\(1, 17, 12\)\)"),
])
def test_other_architectures_are_refused(changes, said, folder):
    rewritten(folder, **changes)
    with pytest.raises(UserError, match=said) as caught:
        interop.load_huggingface_vit(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


def test_half_precision_is_raised(folder):
    file = folder / "model.safetensors"
    named = interop.load_safetensors(file)
    interop.save_safetensors(file, {name: array.astype("float16")
                                    for name, array in named.items()})
    _, params, _ = interop.load_huggingface_vit(folder)
    assert {leaf.dtype.name for leaf in leaves(params)} == {"float32"}
    their_files = pytest.importorskip("safetensors.torch")
    their_files.save_file({name: torch.tensor(array).bfloat16() for name, array in named.items()},
                          file)
    with pytest.raises(UserError, match=r"numbers of the type BF16, .* after \.float\(\)"):
        interop.load_huggingface_vit(folder)


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda folder: (folder / "config.json").unlink(), r"cannot read .*config\.json \(No such"),
    (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is no JSON \("),
    (lambda folder: (folder / "config.json").write_text("[]"), "given by name, got list"),
    (lambda folder: (folder / "model.safetensors").unlink(), r"cannot read .*model\.safetensors"),
    (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
     r"in pytorch_model\.bin, and one file model\.safetensors was expected"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"no such file"),
     r"is no whole safetensors file \("),
    (lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:-1]), "is no whole safetensors file"),
])
def test_damaged_folders_are_refused(spoil, said, folder):
    spoil(folder)
    with pytest.raises(UserError, match=said):
        interop.load_huggingface_vit(folder)


def test_a_path_that_does_not_do_is_one_sentence(folder):
    config, params, _ = interop.load_huggingface_vit(folder)
    (folder / "config.json.d").mkdir()
    for use, said in (
            (lambda: interop.load_safetensors(folder / "x"), r"read .*/x \(No such"),
            (lambda: interop.load_huggingface_vit(folder / "x"), r"read .*config\.json \(No such"),
            (lambda: interop.save_safetensors(folder / "x" / "y", {}), r"write .*/y \(No such"),
            (lambda: interop.save_safetensors(folder / "config.json.d", {}), "Is a directory")):
        with pytest.raises(UserError, match=said) as caught:
            use()
        assert str(caught.value).endswith("give another path")
        assert "\n" not in str(caught.value)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*config\.json .* give another path$"):
        interop.save_huggingface_vit(folder, params, config)


@pytest.mark.parametrize(("named", "said"), [
    ({3: np.ones(1)}, "the names of arrays are strings, got 3"),
    ({"a": np.ones(1, complex)}, '"a" must hold real numbers of at most 8 bytes, got complex128'),
    ({"a": np.ones(1, "complex64")}, "got complex64"),
])
def test_what_a_safetensors_file_does_not_hold_is_refused(named, said, tmp_path):
    with pytest.raises(UserError, match=said):
        interop.save_safetensors(tmp_path / "x", named)
    assert not any(tmp_path.iterdir())


def test_without_the_package_one_sentence_says_so(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.numpy", None)
    for use in (lambda: interop.load_huggingface_vit(folder),
                lambda: interop.save_safetensors(folder / "x", {})):
        with pytest.raises(UserError, match="need the package safetensors: python -m pip install"):
            use()


@pytest.mark.parametrize(("config", "said"), [
    (replace(TIMM, gate=Comet()), "has neither a gate nor .*, got Comet.* and 1.0"),
    (replace(TIMM, scale=0.5), "neither a gate nor a factor .* got None and 0.5"),
    (replace(TIMM, activation="leaky_relu"), 'the activations identity, .* got "leaky_relu"'),
    (replace(TIMM, pooling="mean"), 'reads a class token after a norm: .* got "mean"'),
    (replace(TIMM, final_norm=None), "reads a class token after a norm: .* and None"),
])
def test_what_hugging_face_does_not_have_is_not_written(config, said, tmp_path):
    with pytest.raises(UserError, match=said):
        interop.save_huggingface_vit(tmp_path / "vit", vit.init(config)[0], config)
    assert not any(tmp_path.iterdir())


# --- bad input ----------------------------------------------------------------------------------


def without(name):
    return lambda named: {key: array for key, array in named.items() if key != name}


@pytest.mark.parametrize(("change", "error", "message"), [
    (lambda named: list(named), UserError, "arrays must be given by name"),
    (lambda named: {}, UserError, "these are not the 32 tensors of this ViTConfig: of 0 given, 32 "
     "missing (to_patch_embedding.1.weight (12, 48), to_patch_embedding.1.bias (12,), cls_token "),
    (lambda named: {"conv1.weight": np.ones((64, 3, 7, 7))}, UserError,
     "of 1 given, 32 missing (to_patch_embedding.1.weight (12, 48), to_patch_embedding.1.bias "
     "(12,), cls_token (1, 1, 12), ...), 1 unexpected (conv1.weight (64, 3, 7, 7))"),
    (without("mlp_head.0.bias"), UserError, "1 missing (mlp_head.0.bias (12,))"),
    (without("transformer.layers.0.1.fn.spec.weight"), UserError,
     "1 missing (transformer.layers.0.1.fn.spec.weight (20, 12)); a network without routing has "
     "gate=None, one of COMET gates.Comet(p_k=...)"),
    (lambda named: named | {"cls_token": np.ones((1, 2, 12))}, UserError,
     "1 of another shape (cls_token (1, 2, 12), which should be (1, 1, 12))"),
    (lambda named: named | {3: np.ones(1)}, UserError, "1 unexpected (3 (1,))"),
    (lambda named: {f"module.{name}": array for name, array in named.items()}, UserError,
     'the names have a prefix: pass {name.removeprefix("module."): array for'),
    (lambda named: named | {"cls_token": [1.0]}, BackendError, '"cls_token": expected a numpy'),
    (lambda named: named | {"cls_token": named["cls_token"].astype("float32")}, UserError,
     '"cls_token" is float32 and "to_patch_embedding.1.weight" float64: bring all to one dtype'),
    (lambda named: named | {"transformer.layers.0.1.fn.spec.weight": np.ones((20, 12), "int64")},
     UserError, "must be float32 or float64, got int64: convert it"),
    (lambda named: {name: torch.tensor(array).bfloat16() for name, array in named.items()},
     UserError, "cannot be read by NumPy"),
])
def test_weights_that_do_not_fit(change, error, message):
    named = interop.vit_to_torch(*vit.init(VIT, dtype="float64"), VIT)
    with pytest.raises(error, match=re.escape(message)) as caught:
        interop.vit_from_torch(change(named), VIT)
    assert "\n" not in str(caught.value)


def test_the_style_that_is_meant_is_named():
    for style, one in (("huggingface", "vit.encoder.layer.0.output.dense.bias"),
                       ("transformers", "vit.layers.0.mlp.fc2.bias"),
                       ("timm", "blocks.0.mlp.fc2.bias")):
        named = interop.vit_to_torch(*vit.init(VIT), VIT, style)
        with pytest.raises(UserError, match=re.escape(f"1 missing ({one} (12,))")):
            interop.vit_from_torch(without(one)(named), VIT)
        with pytest.raises(UserError, match=r'removeprefix\("model\.a\."\)'):
            interop.vit_from_torch({f"model.a.{name}": array for name, array in named.items()}, VIT)
        if style != "timm":
            with pytest.raises(UserError, match=r'reads a class token .* got "mean"'):
                interop.vit_from_torch(named, replace(VIT, pooling="mean"))
    with pytest.raises(UserError, match='unknown style of names "tim"; did you mean "timm"'):
        interop.vit_to_torch(*vit.init(VIT), VIT, "tim")
    with pytest.raises(UserError, match=r"unknown style of names \"\['timm'\]\""):
        interop.vit_to_torch(*vit.init(VIT), VIT, ["timm"])


def test_routing_weights_that_a_gate_does_not_use_are_refused():
    for config in VIT, MIXER:
        named = to_torch(*module_of(config).init(config), config)
        with pytest.raises(UserError, match=r"unexpected \(.*spec\.weight .*; a network without "
                                            "routing has gate=None"):
            from_torch(named, ungated(config))


def test_weights_of_another_model_are_refused():
    named = interop.mixer_to_torch(*mixer.init(MIXER), MIXER)
    with pytest.raises(UserError, match="32 tensors of this ViTConfig: of 34 given, 32 missing"):
        interop.vit_from_torch(named, VIT)
    with pytest.raises(UserError, match=r"of this MixerConfig: .* of another shape"):
        interop.mixer_from_torch(named, replace(MIXER, token_hidden=15))
    with pytest.raises(UserError, match="this ViTConfig needs ViTParams"):
        interop.vit_to_torch(mixer.init(MIXER)[0], (), VIT)
    with pytest.raises(UserError, match="this MixerConfig needs MixerParams"):
        interop.mixer_to_torch(vit.init(VIT)[0], (), MIXER)
