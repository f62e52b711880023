"""Generation: what is kept equals the whole, how a token is chosen, the command, and bad input."""

import io
import shutil
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from comet_np import gates
from comet_np.backends import get_backend, reference
from comet_np.errors import UserError
from comet_np.experiments import generating
from comet_np.experiments.cli import main
from comet_np.experiments.datasets import Dataset
from comet_np.experiments.datasets.tokenizer import of_bytes
from comet_np.experiments.fit import trained_on
from comet_np.experiments.generating import characters
from comet_np.experiments.training import RunConfig, TrainConfig
from comet_np.experiments.training.model import load_run
from comet_np.functional.attention import attention_forward, query_attention, split_heads
from comet_np.generation import advance, choose, generate, probabilities, room_for
from comet_np.interop.huggingface import save_huggingface_gpt2
from comet_np.models import gpt2
from comet_np.optim import OptimizerConfig
from comet_np.rng import stream
from comet_np.tree import tree_map
from tests.runs import MODEL as OF_CLASSES
from tests.runs import small_data
from tests.test_gpt2 import GPT2, cases, network
from tests.tolerances import TOLERANCES, assert_close

CASES = {
    "standard": replace(GPT2, gate=None),
    "Comet": GPT2,
    "stream": replace(GPT2, routing="stream", dropout=0.1, weight_dropout=0.1),
    "TopK": replace(GPT2, gate=gates.TopK(0.3), activation="tanh"),
    "Layerwise, scale, eps": replace(GPT2, gate=gates.Layerwise(), scale=0.3, eps=0.1),
    "Bernoulli": replace(GPT2, gate=gates.Bernoulli()),
    "rounded": replace(GPT2, compute="float16"),
}


# --- what is kept -------------------------------------------------------------------------------


@cases(CASES)
def test_logits_token_by_token_are_those_of_the_whole_text(config, draw):
    tokens, params, fixed, _ = network(config, draw, batch=(3,), T=config.positions)
    expected, _ = gpt2.forward(tokens, params, fixed, config)
    allowed = 1e-2 if config.compute else TOLERANCES["torch"]["float64"]
    for start in (1, 4, config.positions):
        kept = room_for(3, config.positions, config, get_backend("numpy"), "float64")
        pieces = [(0, start), *((t, t + 1) for t in range(start, config.positions))]
        for first, stop in pieces:
            y = advance(tokens[:, first:stop], first, kept, params, fixed, config)
            assert y.shape == (3, config.vocabulary)
            assert np.abs(y - expected[:, stop - 1]).max() <= allowed * np.abs(expected).max()


def test_a_new_token_costs_one_row_of_every_product(draw, monkeypatch):
    tokens, params, fixed, _ = network(GPT2, draw, batch=(1,))
    kept = room_for(1, 7, GPT2, get_backend("numpy"), "float64")
    advance(tokens, 0, kept, params, fixed, GPT2)
    rows, kernels = [], get_backend("numpy").kernels
    for name in ("project", "linear_forward", "hidden_forward"):
        def watched(body, x, *rest, kernel=kernels[name]):
            rows.append(x.size // x.shape[-1])
            return kernel(body, x, *rest)

        monkeypatch.setitem(kernels, name, watched)
    advance(tokens[:, :1], 6, kept, params, fixed, GPT2)
    assert rows == [1] * (5 * GPT2.depth + 1)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "bodies"])
def test_attention_of_one_query_is_the_last_row(kernels, draw):
    qkv = draw.standard_normal((2, 3, 9, 24))
    with np.errstate() if kernels else reference():
        y, _ = attention_forward(qkv, 2, causal=True)
        q, k, v = split_heads(qkv, 2)
        assert_close(query_attention(q[..., -1:, :], k, v), y[..., -1:, :], "sum")


@cases({name: CASES[name] for name in ("Comet", "stream")})
def test_greedy_tokens_are_the_most_probable_of_the_whole_text(config, draw):
    _, params, fixed, _ = network(config, draw)
    prompt = draw.integers(0, config.vocabulary, (4, 2))
    text = prompt
    for token in generate(prompt, params, fixed, config, 5, temperature=0):
        logits, _ = gpt2.forward(text, params, fixed, config)
        np.testing.assert_array_equal(token, logits[:, -1].argmax(axis=-1))
        text = np.concatenate([text, token[:, None]], axis=1)
    assert text.shape == (4, 7)


def test_a_prompt_of_one_text_gives_single_tokens(draw):
    _, params, fixed, _ = network(GPT2, draw)
    for prompt in (np.array([3, 1], "uint16"), [3, 1]):
        tokens = list(generate(prompt, params, fixed, GPT2, 3, temperature=0))
        assert [(token.shape, token.dtype) for token in tokens] == [((), "int64")] * 3
    batch = generate(np.array([[3, 1]]), params, fixed, GPT2, 3, temperature=0)
    assert [token.tolist() for token in batch] == [[int(token)] for token in tokens]


def test_the_end_of_the_context_is_the_end(draw):
    _, params, fixed, _ = network(GPT2, draw)
    for T in (1, 5, 7):
        tokens = generate(np.ones(T, int), params, fixed, GPT2, 100)
        assert len(list(tokens)) == GPT2.positions + 1 - T


def test_a_seed_says_the_tokens(draw):
    _, params, fixed, _ = network(GPT2, draw)
    params = tree_map(lambda a: 0.3 * a, params)

    def tokens(seed, prompt=(1, 2)):
        return [int(token) for token in generate(np.array(prompt), params, fixed, GPT2, 6,
                                                 seed=seed)]

    assert tokens(0) == tokens(0)
    assert len({tuple(tokens(seed)) for seed in range(5)}) == 5


# --- the choice of a token ----------------------------------------------------------------------


def test_probabilities_by_hand():
    logits = np.log([0.1, 0.4, 0.2, 0.3])
    for options, expected in (
            ({}, [0.1, 0.4, 0.2, 0.3]), ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
            ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]), ({"top_k": 1}, [0, 1, 0, 0]),
            ({"top_p": 0.41}, [0, 4 / 7, 0, 3 / 7]), ({"top_p": 0.39}, [0, 1, 0, 0]),
            ({"top_p": 1e-9}, [0, 1, 0, 0]), ({"top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
            ({"top_k": 3, "top_p": 0.45}, [0, 4 / 7, 0, 3 / 7]),  # 4/9 of three are not enough
            ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30])):
        assert_close(probabilities(logits, **options), expected, "elementwise")
    tied = probabilities(np.array([1.0, 2.0, 2.0, 2.0]), top_k=2)
    assert_close(tied, [0, 1 / 3, 1 / 3, 1 / 3], "elementwise")
    large = probabilities(np.array([[1e4, 0.0], [-1e4, 0.0]], "float32"), 0.01)
    np.testing.assert_array_equal(large, [[1, 0], [0, 1]])
    np.testing.assert_array_equal(probabilities(logits, 1e-320), [0, 1, 0, 0])


def test_tokens_are_chosen_with_their_probabilities(draw):
    logits = np.tile(np.log([0.1, 0.4, 0.2, 0.3]), (4000, 1))
    count = Counter(choose(logits, draw, top_k=3).tolist())
    for token, p in enumerate([0, 4 / 9, 2 / 9, 3 / 9]):
        assert abs(count[token] / 4000 - p) < 5 * (p * (1 - p) / 4000)**0.5 + 1e-9


@pytest.mark.parametrize(("u", "token"), [(0.0, 1), (0.5, 2), (1 - 2**-53, 2)])
def test_an_improbable_token_is_never_chosen_at_the_edges(u, token):
    class Draw:
        random = staticmethod(lambda n: np.full(n, u))

    assert choose(np.array([[-5.0, 0, 0, -5.0]]), Draw, top_k=2).tolist() == [token]


@pytest.mark.parametrize("options", [
    {"top_k": 7}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.8, "temperature": 0.7},
    {"temperature": 3.0}], ids=str)
def test_the_choice_is_that_of_transformers(options, draw):
    torch = pytest.importorskip("torch", reason="torch, of the crosscheck extra, is not installed")
    process = pytest.importorskip("transformers", reason="transformers is not installed"
                                  ).generation.logits_process
    logits = 3 * draw.standard_normal((5, 50))
    scores = torch.tensor(logits) / options.get("temperature", 1)
    if "top_k" in options:
        scores = process.TopKLogitsWarper(options["top_k"])(None, scores)
    if "top_p" in options:
        scores = process.TopPLogitsWarper(options["top_p"])(None, scores)
    ours = probabilities(logits, **options)
    assert_close(ours, torch.softmax(scores, -1).numpy(), "sum")
    np.testing.assert_array_equal(ours > 0, np.isfinite(scores.numpy()))


def test_greedy_text_is_that_of_transformers(draw):
    torch = pytest.importorskip("torch", reason="torch, of the crosscheck extra, is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from comet_np.interop.torch_gpt2 import gpt2_to_torch

    config = replace(CASES["standard"], vocabulary=50, positions=20, context=20)
    _, params, fixed, _ = network(config, draw)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50, n_positions=20, n_embd=12, n_layer=2, n_head=3, n_inner=10,
        bos_token_id=None, eos_token_id=None)).double().eval()
    wrong = model.load_state_dict({name: torch.tensor(a) for name, a in
                                   gpt2_to_torch(params, fixed, config).items()}, strict=False)
    assert not wrong.unexpected_keys
    prompt = draw.integers(0, 50, (3, 5))
    theirs = model.generate(torch.tensor(prompt), do_sample=False, max_new_tokens=15,
                            attention_mask=torch.ones(3, 5), pad_token_id=0)
    ours = list(generate(prompt, params, fixed, config, 15, temperature=0))
    np.testing.assert_array_equal(np.stack(ours, axis=1), theirs[:, 5:].numpy())


# --- a trained model ----------------------------------------------------------------------------

TEXT = "a tiny text, twice over; "
MODEL = replace(GPT2, vocabulary=256, positions=16, context=16, hidden=16)


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    """Return the folder of a finished run of a GPT-2 on bytes, its tokenizer beside it."""
    folder = tmp_path_factory.mktemp("text") / "cell"
    tokens = np.frombuffer((TEXT * 200).encode(), "uint8")[:4800].reshape(-1, 16).astype("uint16")
    data = Dataset("text", "language", tokens[20:], tokens[20:], tokens[:20], tokens[:20],
                   tokens[:9], tokens[:9], 256)
    training = TrainConfig(OptimizerConfig("adam"), lr=3e-3, batch=16, epochs=2)
    trained_on(data, RunConfig(MODEL, training), folder=folder)
    of_bytes().save(folder)
    return folder


def test_outputs_of_a_language_model_are_the_logits_of_all_tokens(cell, draw):
    model = load_run(cell)
    tokens = draw.integers(0, 256, (5, 16))
    for x in (tokens, tokens.astype("uint16"), tokens[:, :3], tokens[:0]):
        y = model.output(x)
        assert y.shape == (*x.shape, 256)
        np.testing.assert_array_equal(model.predict(x), y.argmax(axis=-1))
        assert_close(model.predict_proba(x).sum(axis=-1), np.ones(x.shape), "sum")
    expected, _ = gpt2.forward(tokens[:, :3], model.params, model.fixed, model.config)
    assert_close(model.output(tokens[:, :3]), expected, "sum")


@pytest.mark.parametrize(("x", "message"), [
    (np.zeros((2, 3)), r"tokens of texts, integers \(n, T\), got an array of type float64"),
    (np.zeros(3, int), r"one text is tokens.reshape\(1, -1\)"),
    (np.full((1, 3), 256), r"tokens must lie in 0\.\.255"),
    (np.zeros((1, 17), int), "a text of 17 tokens is longer than the context")])
def test_outputs_need_tokens(x, message, cell):
    with pytest.raises(UserError, match=message):
        load_run(cell).output(x)


def test_the_command_prints_the_prompt_and_what_goes_on_from_it(cell, capsys):
    arguments = ["generate", str(cell), "--prompt", "a t", "--tokens", "9"]
    assert main([*arguments, "--temperature", "0"]) == 0
    printed = capsys.readouterr()
    model, prompt = load_run(cell), np.frombuffer(b"a t", "uint8")
    expected = bytes(int(token) for token in generate(prompt, model.params, model.fixed,
                                                      model.config, 9, temperature=0))
    assert (printed.out, printed.err) == ("a t" + expected.decode(errors="replace") + "\n", "")

    def drawn(*options):
        assert main([*arguments, *options]) == 0
        return capsys.readouterr().out

    assert drawn() == drawn("--seed", "0") != drawn("--seed", "1")
    assert drawn("--top-k", "1") == drawn("--top-p", "1e-9") == printed.out
    assert len({drawn(), drawn("--top-k", "5"), drawn("--top-p", "0.5"),
                drawn("--temperature", "3")}) == 4


def test_the_command_says_that_the_context_is_full(cell, capsys):
    assert main(["generate", str(cell), "--prompt", "0123456789", "--temperature", "0"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "comet-np: the context of 16 tokens is full\n"
    assert printed.out.startswith("0123456789")


def test_text_is_printed_token_by_token(cell, monkeypatch):
    """And what is there when it is stopped ends with a newline."""
    class Watched(io.StringIO):
        def flush(self):
            if self.getvalue().endswith("t!?"):
                raise KeyboardInterrupt

    output = Watched()
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(generating, "generate", lambda *arguments: iter(b"!?never seen"))
    with pytest.raises(KeyboardInterrupt):
        generating.write_text(str(cell), "t", 9, 1.0, None, None, 0, "numpy")
    assert output.getvalue() == "t!?\n"


def test_who_reads_no_more_stops_it(cell, monkeypatch):
    class Closed(io.StringIO):
        error = OSError()

    def tokens(*arguments):
        yield 65
        pytest.fail("nobody reads on")

    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr(generating, "generate", tokens)
    generating.write_text(str(cell), "t", 9, 1.0, None, None, 0, "numpy")


@pytest.mark.parametrize("text", ["plain", "ä€🦊 and \ufffd, \ufffd", b"\xf0\x9f", b"\xe2\x82x",
                                  b"\x80\x80\xc3\xa4\xff", ""])
def test_only_whole_characters_are_printed(text):
    data = text if isinstance(text, bytes) else text.encode()
    shown = list(characters(data, of_bytes()))
    assert "".join(shown) == data.decode(errors="replace")
    if data and isinstance(text, str) and "\ufffd" not in text:
        assert [len(part) for part in shown if part] == [1] * len(text)


def test_bytes_by_chance_are_printed_as_they_are_read_at_once():
    for seed in range(20):
        data = bytes(stream(seed, "bytes").choice([0x41, 0x80, 0xC3, 0xE2, 0x82, 0xAC, 0xF0, 0x9F,
                                                   0xA6, 0x8A], 60).tolist())
        assert "".join(characters(data, of_bytes())) == data.decode(errors="replace")


def test_a_folder_of_hugging_faces(tmp_path, cell, capsys):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    config = replace(MODEL, gate=None)
    params, _ = gpt2.init(config, 1)
    save_huggingface_gpt2(tmp_path / "hub", params, config)
    assert main(["generate", str(tmp_path / "hub"), "--prompt", "a"]) == 2
    assert "no tokenizer in" in capsys.readouterr().err
    of_bytes().save(tmp_path / "hub")
    assert main(["generate", str(tmp_path / "hub"), "--prompt", "a", "--tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("a")


# --- bad input ----------------------------------------------------------------------------------


def one_sentence(arguments, capsys):
    """Return what the command says of bad input."""
    assert main(["generate", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("comet-np: ")
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize(("options", "message"), [
    (["--prompt", ""], "--prompt needs some text to go on from, got nothing"),
    (["--prompt", 17 * "a"], "a prompt of 17 tokens is longer than the context, which is 16"),
    (["--prompt", "a", "--temperature", "-1"], "temperature is a finite number of at least 0"),
    (["--prompt", "a", "--temperature", "nan"], "temperature is a finite number of at least 0"),
    (["--prompt", "a", "--top-k", "0"], "top_k is a number of tokens, at least 1, got 0"),
    (["--prompt", "a", "--top-p", "1.5"], "top_p is a probability above 0, up to 1, got 1.5"),
    (["--prompt", "a", "--tokens", "0"], "--tokens is the number of tokens to make, at least 1"),
    (["--prompt", "a", "--tokens", "x"], "argument --tokens: invalid int value: 'x'"),
    (["--prompt", "a", "--backend", "nump"], 'unknown backend "nump"'),
    (["--prompt", "-x"], "--prompt: expected one argument; one that begins with a dash is written "
                         "--prompt=-x (see"),
    ([], "the following arguments are required: --prompt"),
    (["--promt", "a"], "required: --prompt")])
def test_bad_options(options, message, cell, capsys):
    assert message in one_sentence([cell, *options], capsys)


def test_bad_folders(cell, tmp_path, capsys):
    def told(folder):
        return one_sentence([folder, "--prompt", "a"], capsys)

    assert "there is no folder" in told(tmp_path / "none")
    assert "holds no finished run" in told(tmp_path)
    assert "holds 1 finished runs: name the folder of one" in told(cell.parent)
    trained_on(small_data(), RunConfig(OF_CLASSES, TrainConfig(epochs=1)),
               folder=tmp_path / "mlp")
    assert "holds a model of MLPConfig, and text can be had of a GPT-2" in told(tmp_path / "mlp")
    shutil.copytree(cell, tmp_path / "copy", ignore=shutil.ignore_patterns("tokenizer.json"))
    assert "no tokenizer in" in told(tmp_path / "copy")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    assert "bert" in told(tmp_path / "bert")
    (tmp_path / "bert" / "config.json").write_text('{"model_type": ')
    assert "config.json is no JSON" in told(tmp_path / "bert")


def test_a_tokenizer_of_another_model(cell, monkeypatch):
    other = of_bytes()
    other.vocabulary = 300
    monkeypatch.setattr(generating, "load_tokenizer", lambda folder: other)
    with pytest.raises(UserError, match=r"the tokenizer in .* has 300 entries, and the model 256"):
        generating.load_writer(cell, get_backend("numpy"))


@pytest.mark.parametrize("options", [("--tokens", "0"), ("--top-k", "0"), ("--temperature", "-1"),
                                     ("--top-p", "2"), ()])
def test_flags_and_the_tokenizer_are_checked_before_the_weights_are_read(options, cell, tmp_path,
                                                                         capsys):
    folder = tmp_path / "copy"
    shutil.copytree(cell, folder)
    (folder / "weights.npz").unlink()
    if not options:
        (folder / "tokenizer.json").write_text("{")
    assert "weights" not in one_sentence([folder, "--prompt", "a", *options], capsys)


def test_entries_that_the_tokenizer_lacks_are_never_chosen(cell, monkeypatch, capsys):
    """A table of tokens is made longer, as 50304 for 50257, to be faster."""
    config = replace(MODEL, vocabulary=512)

    def padded(*arguments):
        _, params, fixed = load_run(*arguments)
        table = np.concatenate([params.embedding.tokens, 9 * params.embedding.tokens])
        return config, params._replace(embedding=params.embedding._replace(tokens=table)), fixed

    arguments = ["generate", str(cell), "--prompt", "a t", "--tokens", "9"]
    assert main(arguments) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(generating, "run_of", lambda folder: RunConfig(config))
    monkeypatch.setattr(generating, "load_run", padded)
    assert main(arguments) == 0
    assert capsys.readouterr().out == expected
    _, params, fixed = padded(cell)
    assert max(generate(np.array([1]), params, fixed, config, 15, temperature=9.0)) > 255


@pytest.mark.parametrize(("change", "message"), [
    ({"prompt": np.zeros(0, int)}, "a prompt is an array of at least one token"),
    ({"prompt": np.zeros((1, 2, 3), int)}, r"integers \(T,\), or \(B, T\) .* got int64 \(1, 2, 3"),
    ({"prompt": np.array([1.0])}, "a prompt is an array .* got float64"),
    ({"prompt": np.array([13])}, r"tokens must lie in 0\.\.12"),
    ({"prompt": np.zeros(8, int)}, "a prompt of 8 tokens is longer than the context, which is 7"),
    ({"params": ()}, "this GPT2Config needs GPT2Params"),
    ({"count": 2.5}, "count is the number of tokens to make, .* got 2.5"),
    ({"temperature": "hot"}, "temperature is a finite number .* got 'hot'"),
    ({"seed": "s"}, "a seed is a whole number, got 's'"),
    ({"entries": 0}, r"entries is a number of tokens, 1 to 13, got 0"),
    ({"top_k": 2.5}, "top_k is a number of tokens"), ({"top_p": 0}, "top_p is a probability")])
def test_bad_arguments_are_told_at_once(change, message, draw):
    _, params, fixed, _ = network(GPT2, draw)
    arguments = {"prompt": np.array([1, 2]), "params": params, "fixed": fixed, "config": GPT2,
                 "count": 3} | change
    with pytest.raises(UserError, match=message) as error:
        generate(**arguments)
    assert "\n" not in str(error.value)


def test_logits_that_are_no_number(draw):
    config = CASES["standard"]
    _, params, fixed, _ = network(config, draw)
    params.norm.bias[0] = np.inf
    with pytest.raises(UserError, match="the logits are not finite"), np.errstate(invalid="ignore"):
        next(generate(np.array([1]), params, fixed, config, 1))
