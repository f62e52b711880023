"""GPT-2 against transformers' GPT2LMHeadModel, in float64."""

import itertools
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest

from comet_np import interop
from comet_np.backends import BackendError
from comet_np.errors import UserError
from comet_np.experiments.datasets import Dataset
from comet_np.experiments.fit import trained_on
from comet_np.experiments.tasks import TASKS
from comet_np.experiments.training import RunConfig, TrainConfig
from comet_np.experiments.training.model import load_run
from comet_np.functional.activations import activation
from comet_np.functional.loss import (
    softmax_cross_entropy_backward,
    softmax_cross_entropy_forward,
)
from comet_np.gates import Comet, Layerwise, TopK
from comet_np.interop.huggingface_config import THEIR_ACTIVATIONS
from comet_np.models import gpt2
from comet_np.models.gpt2 import GPT2Config
from comet_np.optim import OptimizerConfig, init_state, update
from comet_np.tree import flatten, leaves, matrix_elements, named_leaves, zeros_like
from tests.tolerances import assert_close

WHY = "{}, of the crosscheck extra, is not installed"
torch = pytest.importorskip("torch", reason=WHY.format("torch"))
transformers = pytest.importorskip("transformers", reason=WHY.format("transformers"))
F = torch.nn.functional
torch.set_num_threads(1)  # its idle threads spin, and would slow down ours
transformers.utils.logging.disable_progress_bar()

GPT2 = GPT2Config(11, 9, 8, 2, 2, 12, activation="gelu_new", gate=None, dropout=0.0,
                  weight_dropout=0.0)
COMET = replace(GPT2, activation="tanh", gate=Comet())
STREAM = replace(COMET, routing="stream")
LANGUAGE = TASKS["language"]


def of_transformers(attention="eager", **changes):
    """Return their GPT-2 in float64, of weights past its own law's 0.02, gains and biases too."""
    values = {"vocab_size": 11, "n_positions": 9, "n_embd": 8, "n_layer": 2, "n_head": 2,
              "n_inner": 12, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0,
              "initializer_range": 0.5, "bos_token_id": None, "eos_token_id": None}
    network = transformers.GPT2LMHeadModel._from_config(transformers.GPT2Config(**values | changes),
                                                        attn_implementation=attention).double()
    with torch.no_grad():
        for p in network.parameters():
            if p.ndim == 1:
                p += 0.3 * torch.randn_like(p)
    return network


class Gated(torch.nn.Module):
    """Their MLP, whose hidden layer is masked: from outside, or by a fixed V on its input."""

    def __init__(self, mlp, gate, back):
        super().__init__()
        self.c_fc, self.act, self.c_proj, self.gate = mlp.c_fc, mlp.act, mlp.c_proj, gate
        D, H = mlp.c_fc.weight.shape
        self.spec = torch.nn.Linear(D, H, bias=False).double().requires_grad_(False)
        if back:
            self.spec_back = torch.nn.Linear(H, D, bias=False).double().requires_grad_(False)
        self.given = None

    def winners(self, c):
        """Return which of each row's scores are its k largest."""
        k = max(1, int(self.gate.p_k * c.shape[-1]))
        return torch.zeros_like(c, dtype=bool).scatter(-1, torch.topk(c, k).indices, True)

    def forward(self, x):
        self.m = self.winners(self.spec(x)) if self.given is None else self.given
        return self.c_proj(self.m * self.act(self.c_fc(x)))


def with_comet(network, config):
    """Give their GPT-2 the gates of COMET, by blocks or by a stream; return it."""
    mlps = []
    for i, block in enumerate(network.transformer.h, start=1):
        block.mlp = Gated(block.mlp, config.gate, config.routing == "stream" and i < config.depth)
        mlps.append(block.mlp)
    if config.routing == "block":
        return network
    network.spec_embedding = torch.nn.Embedding(
        config.vocabulary, config.width).double().requires_grad_(False)

    def route(module, arguments):
        s = network.spec_embedding(arguments[0])
        for mlp in mlps:
            c = mlp.spec(s)
            mlp.given = mlp.winners(c)
            s = mlp.spec_back(mlp.given * c) if hasattr(mlp, "spec_back") else None

    network.register_forward_pre_hook(route)
    return network


ORACLES = {
    "eager": ({}, GPT2),
    "sdpa, tanh": ({"attention": "sdpa", "activation_function": "tanh", "n_inner": None},
                   replace(GPT2, activation="tanh", hidden=32)),
    "COMET": ({"attention": "sdpa", "activation_function": "tanh"}, COMET),
    "COMET, stream": ({"activation_function": "tanh"}, STREAM),
}


@pytest.fixture(params=ORACLES)
def oracle(request):
    """Return a network of PyTorch's, and our configuration of it."""
    torch.manual_seed(1)
    changes, config = ORACLES[request.param]
    network = of_transformers(**changes)
    found = interop.gpt2_config_from_huggingface(network.config.to_dict())
    assert found == replace(config, gate=None, routing="block")
    return (network if config.gate is None else with_comet(network, config)), config


def texts_of(draw, n=3, T=8):
    """Return texts of fewer tokens than there are positions, some of them more than once."""
    return draw.integers(0, 11, (n, T))


def loss_of(network, texts):
    """Return the mean loss of all tokens but the first of each, in the dtype of the logits."""
    logits = network(torch.tensor(texts[:, :-1])).logits
    return logits, F.cross_entropy(logits.flatten(0, 1), torch.tensor(texts[:, 1:]).flatten())


def learned(network):
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def test_masks_logits_loss_and_every_gradient(oracle, draw):
    network, config = oracle
    texts = texts_of(draw)
    theirs, their_loss = loss_of(network, texts)
    their_loss.backward()

    params, fixed = interop.gpt2_from_torch(network.state_dict(), config)
    ours, cache = gpt2.forward(LANGUAGE.inputs(texts, 1.0, 0.0, "float64"), params, fixed, config)
    assert_close(ours, theirs.detach().numpy(), "torch")
    loss, loss_cache = LANGUAGE.loss_forward(ours, texts)
    assert_close(loss, their_loss.item(), "torch")
    grads = zeros_like(params)
    gpt2.backward(LANGUAGE.loss_backward(1.0, loss_cache), cache, params, grads, config)

    for m, block in zip(cache.masks, network.transformer.h, strict=True):
        assert (m is None) == (config.gate is None)
        np.testing.assert_array_equal(m, None if m is None else block.mlp.m.numpy())
    named = {name: p.grad for name, p in learned(network).items()}
    # In our own form: there, the gradient of the keys' biases, which is 0, is part of an array.
    expected, _ = interop.gpt2_from_torch(named, replace(config, gate=None, routing="block"))
    for (name, grad), their_grad in zip(named_leaves(grads), leaves(expected), strict=True):
        assert grad.any(), name
        assert_close(grad, their_grad, "training")
    back = interop.gpt2_to_torch(grads, (), config)
    assert {name: array.shape for name, array in back.items()} == {
        name: tuple(grad.shape) for name, grad in named.items()}


def test_ten_steps_of_adamw(oracle, draw):
    """Biases and the norms' gains do not decay, as in the Hugging Face course; embeddings do."""
    network, config = oracle
    lr, settings = 1e-3, OptimizerConfig("adamw", weight_decay=0.1, decay_biases=False)
    groups = [{"params": [p for p in learned(network).values() if (p.ndim > 1) == decays],
               "weight_decay": 0.1 * decays} for decays in (True, False)]
    theirs = torch.optim.AdamW(groups, lr)
    before, fixed = interop.gpt2_from_torch(network.state_dict(), config)
    flat, params = flatten(before)
    flat_grads, grads = flatten(zeros_like(params))
    state = init_state(flat, settings)
    for texts in draw.integers(0, 11, (10, 3, 8)):
        theirs.zero_grad()
        loss_of(network, texts)[1].backward()
        theirs.step()
        logits, cache = gpt2.forward(texts[:, :-1], params, fixed, config)
        _, loss_cache = softmax_cross_entropy_forward(logits, texts[:, 1:])
        flat_grads.fill(0)
        gpt2.backward(softmax_cross_entropy_backward(1.0, loss_cache), cache, params, grads, config)
        state = update(flat, flat_grads, state, lr, settings, matrix_elements(params))
    expected, their_fixed = interop.gpt2_from_torch(network.state_dict(), config)
    for ours, after, start in zip(leaves(params), leaves(expected), leaves(before), strict=True):
        assert_close(ours, after, "training")
        assert abs(ours - start).max() > lr
    for V, their_V in zip(leaves(fixed), leaves(their_fixed), strict=True):
        np.testing.assert_array_equal(V, their_V)


def test_ignored_labels_are_ignored_there_too(draw):
    texts = texts_of(draw)
    labels = np.where(draw.random(texts.shape) < 0.3, -100, texts)
    network = of_transformers()
    logits = network(torch.tensor(texts)).logits
    theirs = F.cross_entropy(logits.flatten(0, 1), torch.tensor(labels).flatten())
    params, fixed = interop.gpt2_from_torch(network.state_dict(), GPT2)
    ours, _ = gpt2.forward(texts, params, fixed, GPT2)
    assert_close(softmax_cross_entropy_forward(ours, labels, -100)[0], theirs.item(), "torch")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_perplexity_of_a_text(dtype, draw):
    """By transformers' own loss, which is in float32."""
    texts = draw.integers(0, 11, (40, 9))
    network = of_transformers().to(getattr(torch, dtype)).eval()
    with torch.no_grad():
        theirs = network(torch.tensor(texts), labels=torch.tensor(texts)).loss.exp().item()
    params, fixed = interop.gpt2_from_torch(network.state_dict(), GPT2)
    ours, _ = gpt2.forward(texts[:, :-1], params, fixed, GPT2)
    loss, _ = LANGUAGE.loss_forward(ours, texts)
    found = LANGUAGE.measures({"loss": float(loss)})["perplexity"]
    assert found == pytest.approx(theirs, rel=1e-6)
    assert found > 11  # it was not trained


def test_activations_are_those_of_their_names():
    a = np.linspace(-6, 6, 60)
    for theirs, ours in THEIR_ACTIVATIONS.items():
        expected = transformers.activations.ACT2FN[theirs](torch.tensor(a)).numpy()
        assert_close(activation(ours).forward(a), expected, "torch")


# --- names --------------------------------------------------------------------------------------


def test_names_go_there_and_back(oracle):
    network, config = oracle
    named = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    params, fixed = interop.gpt2_from_torch(named, config)
    back = interop.gpt2_to_torch(params, fixed, config)
    assert named.keys() - back.keys() == {"lm_head.weight"}
    for name, array in back.items():
        np.testing.assert_array_equal(named[name], array)
    assert not any(np.shares_memory(ours, theirs)
                   for ours, theirs in itertools.product(leaves((params, fixed)), named.values()))
    network.load_state_dict({name: torch.tensor(array) for name, array in back.items()},
                            strict=False)


@pytest.mark.parametrize(("config", "some"), [
    (GPT2, {"transformer.wte.weight": (11, 8), "transformer.wpe.weight": (9, 8),
            "transformer.h.1.ln_1.weight": (8,), "transformer.h.0.attn.c_attn.weight": (8, 24),
            "transformer.h.0.attn.c_attn.bias": (24,), "transformer.h.1.attn.c_proj.weight": (8, 8),
            "transformer.h.1.mlp.c_fc.weight": (8, 12), "transformer.h.0.mlp.c_proj.bias": (8,),
            "transformer.ln_f.bias": (8,)}),
    (COMET, {"transformer.h.0.mlp.spec.weight": (12, 8)}),
    (STREAM, {"spec_embedding.weight": (11, 8), "transformer.h.1.mlp.spec.weight": (12, 8),
              "transformer.h.0.mlp.spec_back.weight": (8, 12)}),
], ids=["", "COMET", "stream"])
def test_some_of_the_names(config, some):
    params, fixed = gpt2.init(config)
    named = interop.gpt2_to_torch(params, fixed, config)
    assert {name: named[name].shape for name in some} == some
    assert named["transformer.wte.weight"] is params.embedding.tokens
    assert sum(array.size for array in named.values()) == sum(
        leaf.size for leaf in leaves((params, fixed)))


@pytest.mark.parametrize("gate", [None, Comet(), TopK(), Layerwise()], ids=str)
def test_all_weights_have_names_for_every_gate(gate, draw):
    config = replace(GPT2, gate=gate)
    params, fixed = gpt2.init(config)
    named = interop.named_weights(params, fixed, config)
    assert "transformer.h.1.mlp.c_fc.weight" in named
    again = interop.weights_of(named, config)
    for ours, theirs in zip(leaves(again), leaves((params, fixed)), strict=True):
        assert ours.flags.c_contiguous
        np.testing.assert_array_equal(ours, theirs)
    texts = texts_of(draw)
    np.testing.assert_array_equal(gpt2.forward(texts, *again, config)[0],
                                  gpt2.forward(texts, params, fixed, config)[0])


def as_old(named):
    """Return weights as the first files have them: no prefix, and what a module kept besides."""
    kept = {f"h.{i}.attn.{name}": array for i in range(2) for name, array in {
        "bias": np.tril(np.ones((1, 1, 9, 9), "uint8")), "masked_bias": np.array(-1e4)}.items()}
    return kept | {name.removeprefix("transformer."): array for name, array in named.items()}


HEAD, TABLE = "lm_head.weight", "transformer.wte.weight"


@pytest.mark.parametrize("given", [
    as_old, lambda named: {f"transformer.{name}": array for name, array in as_old(named).items()},
    lambda named: named | {HEAD: named[TABLE].copy()},
    lambda named: as_old(named) | {HEAD: named[TABLE].copy()},
    lambda named: {HEAD if name == TABLE else name: array for name, array in named.items()},
    lambda named: {name: torch.tensor(array) for name, array in named.items()} | {
        HEAD: torch.tensor(named[TABLE])},
], ids=["old", "buffers", "tied", "old, tied", "the head alone", "tensors"])
def test_old_files_and_tied_heads(given):
    params, fixed = gpt2.init(GPT2)
    named = given(interop.gpt2_to_torch(params, fixed, GPT2))
    before = set(named)
    for ours, theirs in zip(leaves(interop.gpt2_from_torch(named, GPT2)[0]), leaves(params),
                            strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert set(named) == before


def test_a_pretrained_one_goes_on_with_comet(draw):
    """Weights without routing go with the fixed weights of any gate."""
    params, _ = interop.gpt2_from_torch(of_transformers().state_dict(), GPT2)
    _, fixed = gpt2.init(COMET, dtype="float64")
    _, cache = gpt2.forward(texts_of(draw), params, fixed, COMET)
    assert all((m.sum(axis=-1) == 6).all() for m in cache.masks)


@pytest.mark.parametrize(("size", "count"), [("small", 124_439_808), ("medium", 354_823_168)])
def test_published_sizes_have_as_many_parameters(size, count):
    config = gpt2.of_size(size, gate=None, activation="gelu_new")
    with torch.device("meta"):
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            n_embd=config.width, n_layer=config.depth, n_head=config.heads))
    assert sum(p.numel() for p in theirs.parameters()) == count
    assert gpt2.parameter_count(config) == count
    assert interop.gpt2_config_from_huggingface(theirs.config.to_dict()) == config


# --- folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    {}, {"n_inner": None, "activation_function": "relu", "n_head": 4, "n_positions": 20},
    {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.3, "layer_norm_epsilon": 1e-6,
     "activation_function": "gelu", "reorder_and_upcast_attn": True}], ids=str)
def test_folders_go_there_and_back(changes, tmp_path, draw):
    theirs = of_transformers("sdpa", **changes)
    theirs.save_pretrained(tmp_path / "theirs")
    config, params, fixed = interop.load_huggingface_gpt2(tmp_path / "theirs")
    assert config == interop.gpt2_config_from_huggingface(theirs.config.to_dict())
    interop.save_huggingface_gpt2(tmp_path / "ours", params, config)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours", local_files_only=True)
    assert again.dtype == torch.float64
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "resid_pdrop",
                 "embd_pdrop", "attn_pdrop", "layer_norm_epsilon", "activation_function",
                 "bos_token_id", "eos_token_id"):
        assert getattr(again.config, name) == getattr(theirs.config, name), name
    assert interop.load_huggingface_gpt2(tmp_path / "ours")[0] == config
    texts = texts_of(draw)
    logits = gpt2.forward(texts, params, fixed, config)[0]
    for network in theirs.eval(), again.eval():
        assert_close(logits, network(torch.tensor(texts)).logits.detach().numpy(), "torch")
    interop.save_huggingface_gpt2(tmp_path / "ours", params, config)  # over what it wrote itself


@pytest.mark.parametrize("model", [
    replace(GPT2, dropout=0.1), COMET, STREAM], ids=["", "COMET", "stream"])
def test_a_finished_run_is_read_again_and_exported(model, tmp_path, draw):
    train, validation = (draw.integers(0, 11, (n, 9)).astype("uint8") for n in (16, 10))
    data = Dataset("texts", "language", train, train, validation, validation, None, None, 11)
    trained = trained_on(data, RunConfig(model, TrainConfig(epochs=1)), folder=tmp_path / "run")
    again = load_run(tmp_path / "run")
    for ours, theirs in zip(leaves((again.params, again.fixed)),
                            leaves((trained.params, trained.fixed)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with np.load(tmp_path / "run" / "weights.npz") as named:
        assert set(named) == set(interop.gpt2_to_torch(trained.params, trained.fixed, model))
    if model.gate is not None:
        return
    export = interop.save_huggingface_gpt2(tmp_path / "export", trained.params, trained.config)
    network = transformers.GPT2LMHeadModel.from_pretrained(export, local_files_only=True)
    with torch.no_grad():
        _, loss = loss_of(network.eval(), validation.astype("int64"))
    assert trained.result["last"]["val_perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a GPT-2 that is ours, as Hugging Face has it."""
    return interop.save_huggingface_gpt2(tmp_path / "gpt2", gpt2.init(GPT2)[0], GPT2)


def rewritten(folder, **changes):
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if value != "gone"}))


def test_what_a_config_does_not_say_is_transformers_default(folder):
    every = json.loads((folder / "config.json").read_text())
    for gone in every.keys() - {"model_type", "n_head", "resid_pdrop", "embd_pdrop"}:
        values = {name: value for name, value in every.items() if name != gone}
        theirs = transformers.GPT2Config(**values).to_dict()
        assert interop.gpt2_config_from_huggingface(values) == (
            interop.gpt2_config_from_huggingface(theirs)), gone
    assert interop.gpt2_config_from_huggingface({"model_type": "gpt2"}) == (
        GPT2Config(gate=None, activation="gelu_new"))
    aliases = {"hidden_size": 8, "num_attention_heads": 4, "num_hidden_layers": 1,
               "max_position_embeddings": 9}
    theirs = transformers.GPT2Config(**aliases).to_dict()
    found = interop.gpt2_config_from_huggingface({"model_type": "gpt2"} | aliases)
    assert (found.width, found.heads, found.depth, found.positions) == (8, 4, 1, 9)
    assert found == interop.gpt2_config_from_huggingface(theirs)


@pytest.mark.parametrize(("changes", "said"), [
    ({"model_type": "bert"}, 'which has model_type "gpt2", got {"model_type": "bert", '),
    ({"model_type": "gone"}, 'which has model_type "gpt2", got {"model_type": null, '),
    ({"architectures": ["GPT2DoubleHeadsModel"]}, r'GPT2LMHeadModel was .*: \["GPT2Double'),
    ({"activation_function": "quick_gelu"},
     "activation_function in config.json is one of gelu, .* got 'quick_gelu'"),
    ({"scale_attn_weights": False}, "scale_attn_weights in config.json is true here, got false"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx .* got true: that "
                                                "is another model"),
    ({"add_cross_attention": True}, "add_cross_attention in config.json is false here"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings in config.json is true here"),
    ({"tie_word_embeddings": None}, "tie_word_embeddings in config.json is of the type bool"),
    ({"resid_pdrop": 0.2}, r"got embd_pdrop 0.0 and resid_pdrop 0.2 .*: make them equal"),
    ({"embd_pdrop": "gone"}, "got embd_pdrop 0.1 and resid_pdrop 0.0"),
    ({"n_inner": "48"}, "n_inner in config.json is of the type int"),
    ({"n_embd": 8.0}, "n_embd in config.json is of the type int, as 768, got 8.0"),
    ({"n_head": 3}, "3 heads do not divide the width 8"),
    ({"attn_pdrop": 1}, "dropout rate is a probability .* got 1.0"),
    ({"n_layer": 3, "vocab_size": 12},
     r"model.safetensors: these are not the 40 tensors of this GPT2Config: of 28 given, 12 missing "
     r"\(transformer.h.2.ln_1.weight \(8,\), .*, \.\.\.\), 1 of another shape "
     r"\(transformer.wte.weight \(11, 8\), which should be \(12, 8\)\)"),
    ({"n_inner": None}, r"6 of another shape \(transformer.h.0.mlp.c_fc.weight \(8, 12\), which "
                        r"should be \(8, 32\), "),
])
def test_other_architectures_are_refused(changes, said, folder):
    rewritten(folder, **changes)
    with pytest.raises(UserError, match=said) as caught:
        interop.load_huggingface_gpt2(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


BERT = {"bert.embeddings.word_embeddings.weight": (11, 8),
        "bert.encoder.layer.0.attention.self.query.weight": (8, 8)}
LLAMA = {"model.embed_tokens.weight": (11, 8), "model.layers.0.self_attn.q_proj.weight": (8, 8),
         HEAD: (11, 8)}
VIT = {"vit.embeddings.cls_token": (1, 1, 8)}


@pytest.mark.parametrize(("others", "said"), [
    (BERT, r"28 missing \(transformer\.wte\.weight .*\), 2 unexpected \(bert\..*, bert\."),
    (LLAMA, r"missing \(transformer\.wpe.*\), 2 unexpected \(model\.embed_tokens\.weight \(11, 8"),
    (VIT, r"28 missing .*, 1 unexpected \(vit\.embeddings\.cls_token \(1, 1, 8\)\)$"),
], ids=["BERT", "Llama", "ViT"])
def test_weights_of_another_architecture_are_refused(others, said, folder):
    interop.save_safetensors(folder / "model.safetensors", {
        name: np.zeros(shape, "float32") for name, shape in others.items()})
    with pytest.raises(UserError, match=said) as caught:
        interop.load_huggingface_gpt2(folder)
    assert "\n" not in str(caught.value)


def test_half_precision_is_raised(folder):
    file = folder / "model.safetensors"
    named = interop.load_safetensors(file)
    interop.save_safetensors(file, {name: array.astype("float16") for name, array in named.items()})
    _, params, _ = interop.load_huggingface_gpt2(folder)
    assert {leaf.dtype.name for leaf in leaves(params)} == {"float32"}


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda folder: (folder / "config.json").unlink(), r"cannot read .*config\.json \(No such"),
    (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is no JSON \("),
    (lambda folder: (folder / "config.json").write_text("[]"), "given by name, got list"),
    (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
     r"in pytorch_model\.bin, and one file model\.safetensors was expected"),
    (lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:-1]), "is no whole safetensors file"),
])
def test_damaged_folders_are_refused(spoil, said, folder):
    spoil(folder)
    with pytest.raises(UserError, match=said):
        interop.load_huggingface_gpt2(folder)


@pytest.mark.parametrize(("config", "said"), [
    (COMET, "Hugging Face's GPT-2 has neither a gate nor .* a GPT2Config.*, got Comet.* and 1.0"),
    (replace(GPT2, scale=0.5), "neither a gate nor a factor .* got None and 0.5"),
    (replace(GPT2, activation="selu"), 'the activations identity, .* got "selu"'),
])
def test_what_hugging_face_does_not_have_is_not_written(config, said, tmp_path):
    with pytest.raises(UserError, match=said):
        interop.save_huggingface_gpt2(tmp_path / "gpt2", gpt2.init(config)[0], config)
    assert not any(tmp_path.iterdir())


# --- bad input ----------------------------------------------------------------------------------


def without(name):
    return lambda named: {key: array for key, array in named.items() if key != name}


SPEC = "transformer.h.0.mlp.spec.weight"


@pytest.mark.parametrize(("change", "error", "message"), [
    (lambda named: list(named), UserError, "arrays must be given by name"),
    (lambda named: {}, UserError, "these are not the 30 tensors of this GPT2Config: of 0 given, 30 "
     "missing (transformer.wte.weight (11, 8), transformer.wpe.weight (9, 8), "),
    (without("transformer.ln_f.bias"), UserError, "1 missing (transformer.ln_f.bias (8,))"),
    (lambda named: as_old(without("transformer.ln_f.bias")(named)), UserError,
     "1 missing (ln_f.bias (8,))"),
    (without(SPEC), UserError, f"1 missing ({SPEC} (12, 8)); a network without routing has "
                               "gate=None, one of COMET gates.Comet(p_k=...)"),
    (lambda named: named | {"transformer.h.0.mlp.c_fc.weight": np.ones((12, 8))}, UserError,
     "1 of another shape (transformer.h.0.mlp.c_fc.weight (12, 8), which should be (8, 12))"),
    (lambda named: named | {"score.weight": np.ones((2, 8))}, UserError,
     "1 unexpected (score.weight (2, 8))"),
    (lambda named: named | {"transformer.h.0.attn.c_attn.masked_bias": np.ones(1), 3: np.ones(1)},
     UserError, "2 unexpected (3 (1,), transformer.h.0.attn.c_attn.masked_bias (1,))"),
    (lambda named: {f"module.{name}": array for name, array in named.items()}, UserError,
     'the names have a prefix: pass {name.removeprefix("module."): array for'),
    (lambda named: named | {HEAD: named[TABLE] + 1e-9}, UserError,
     '"lm_head.weight" (11, 8) is not "transformer.wte.weight" (11, 8), and in GPT-2 the head is'),
    (lambda named: named | {HEAD: named[TABLE][:5]}, UserError, '"lm_head.weight" (5, 8) is not'),
    (lambda named: named | {HEAD: [1.0]}, BackendError, '"lm_head.weight": expected a numpy'),
    (lambda named: named | {TABLE: [1.0]}, BackendError, '"transformer.wte.weight": expected'),
    (lambda named: named | {SPEC: np.ones((12, 8), "int64")}, UserError,
     "must be float32 or float64, got int64: convert it"),
    (lambda named: named | {TABLE: named[TABLE].astype("float32")}, UserError, "one dtype"),
])
def test_weights_that_do_not_fit(change, error, message):
    named = interop.gpt2_to_torch(*gpt2.init(COMET, dtype="float64"), COMET)
    with pytest.raises(error, match=re.escape(message)) as caught:
        interop.gpt2_from_torch(change(named), COMET)
    assert "\n" not in str(caught.value)


def test_routing_weights_that_a_gate_does_not_use_are_refused():
    named = interop.gpt2_to_torch(*gpt2.init(STREAM), STREAM)
    for config in GPT2, COMET:
        with pytest.raises(UserError, match=r"unexpected \(.*spec.* has gate=None"):
            interop.gpt2_from_torch(named, config)
    with pytest.raises(UserError, match="this GPT2Config needs GPT2Params"):
        interop.gpt2_to_torch(gpt2.init(replace(GPT2, depth=1))[0], (), GPT2)
