"""`diagnose_module`: PyTorch modules and JAX functions, right and wrong, of any names."""

import builtins
import copy
import subprocess
import sys
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest

import comet_np
from comet_np.errors import UserError
from comet_np.models.gpt2 import GPT2Config
from comet_np.optim import OptimizerConfig
from comet_np.rng import stream

WIDTHS = (9, 12, 10, 7, 4)
P_K = 0.45
LAYERS = range(1, len(WIDTHS) - 1)


def arrays(dtype="float64"):
    """Return weights, biases and V of a network of these widths, by published names."""
    draw = stream(0, "modules").normal
    named = {}
    for layer, (N_in, N) in enumerate(pairwise(WIDTHS), start=1):
        named[f"fc{layer}.weight"] = draw(size=(N, N_in)).astype(dtype)
        named[f"fc{layer}.bias"] = draw(size=N).astype(dtype)
        if layer in LAYERS:
            named[f"spec_{layer}.weight"] = draw(size=(N, N_in)).astype(dtype)
    return named


# --- PyTorch ------------------------------------------------------------------------------------


def torch_mlp(dtype="float64", rule="strict", before=False, dropout=0.0, stored=False, names=None,
              detached=False):
    """Return a module with published names, or others, that may be wrong in some ways."""
    torch = pytest.importorskip("torch")

    class MLP(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for layer, (N_in, N) in enumerate(pairwise(WIDTHS), start=1):
                self.add_module(f"fc{layer}", torch.nn.Linear(N_in, N))
                if layer in LAYERS:
                    self.add_module(f"spec_{layer}", torch.nn.Linear(N_in, N, bias=False))
            self.dropout = torch.nn.Dropout(dropout)
            self.masks = None

        def forward(self, x):
            z, masks = x, []
            for layer in LAYERS:
                c = getattr(self, f"spec_{layer}")(z)
                k = int(P_K * c.shape[1])
                order = c.sort(dim=1, descending=True).values
                m = c > order[:, k, None] if rule == "strict" else c >= order[:, k - 1, None]
                a = getattr(self, f"fc{layer}")(x)
                softplus = torch.nn.functional.softplus
                x, z = softplus(a * m) if before else m * softplus(a), m * c
                x = self.dropout(x.detach() if detached and layer == LAYERS[-1] else x)
                masks.append(m)
            self.masks = masks
            return self.fc4(x)

    module = MLP().to(getattr(torch, dtype))
    module.load_state_dict({name: torch.from_numpy(array) for name, array in arrays(dtype).items()})
    for layer in LAYERS:
        getattr(module, f"spec_{layer}").requires_grad_(False)
    return module


def diagnosed(module, *arguments, **settings):
    return comet_np.diagnose_module(module, *arguments, p_k=P_K, **settings)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rule", ["strict", "threshold"])
def test_a_right_module(dtype, rule):
    report = diagnosed(torch_mlp(dtype, rule), ties=rule)
    assert report.ok, str(report)
    assert [finding.stage for finding in report.findings] == ["output", "gradients"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("wrong", "name", "first"), [
    ({"rule": "threshold"}, "ties-threshold", None),
    ({"before": True}, "mask-before-activation", "a_2"),
    ({"detached": True}, "layer-detached", None),
])
def test_a_wrong_module(dtype, wrong, name, first):
    report = diagnosed(torch_mlp(dtype, **wrong))
    assert not report.ok
    assert report.mistakes == (name,), str(report)
    if first:
        assert f"the first that differs: {first}" in str(report)


def test_a_loss_of_ones_own():
    torch = pytest.importorskip("torch")
    loss = torch.nn.CrossEntropyLoss(reduction="sum")
    assert diagnosed(torch_mlp(), criterion=loss).mistakes == ("loss-summed",)


def test_a_module_of_which_nothing_is_trained():
    module = torch_mlp().requires_grad_(False)
    report = diagnosed(module)
    assert report.ok
    assert [finding.stage for finding in report.findings] == ["output"]


def test_a_module_whose_output_has_no_gradient():
    torch = pytest.importorskip("torch")
    module = torch_mlp()
    module.forward = torch.no_grad()(module.forward)
    report = diagnosed(module)
    assert report.findings[0].ok
    assert not report.findings[1].ok


def test_a_module_is_left_as_it_was():
    """In training, with dropout, hooks, gradients and what a forward pass keeps."""
    torch = pytest.importorskip("torch")
    module = torch_mlp(dropout=0.5).train()
    module.fc2.eval()
    seen = []
    module.fc1.register_forward_hook(lambda *_: seen.append(1))
    module.register_buffer("calls", torch.zeros(()))
    counted = module.forward

    def forward(x):
        module.calls += 1
        module.fc4.newest = x
        return counted(x)

    module.forward = forward
    module.masks = before = [torch.ones(3)]
    grads = {}
    for name, parameter in module.named_parameters():
        if name != "fc3.bias":
            parameter.grad = torch.ones_like(parameter)
            grads[name] = parameter.grad
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    attributes = {name: set(vars(each)) for name, each in module.named_modules()}
    report = diagnosed(module)
    assert report.ok, str(report)
    assert seen  # it was called
    assert module.training and module.dropout.training and not module.fc2.training
    assert module.masks is before
    assert {name: set(vars(each)) for name, each in module.named_modules()} == attributes
    assert len(module.fc1._forward_hooks) == 1 and not module.spec_1._forward_hooks
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, state[name])
    for name, parameter in module.named_parameters():
        assert parameter.grad is grads.get(name)
        assert parameter.grad is None or bool((parameter.grad == 1).all())


def test_hooks_are_taken_away():
    module = torch_mlp(before=True)
    assert "a_2" in str(diagnosed(module))
    assert not any(each._forward_hooks for each in module.modules())


def test_a_module_is_left_as_it_was_after_an_error():
    module = torch_mlp().train()
    module.fc3.forward = None
    with pytest.raises(TypeError):
        diagnosed(module)
    assert module.training


def test_dropout_that_stays_on_is_said():
    torch = pytest.importorskip("torch")
    module = torch_mlp()
    module.dropout.forward = lambda x: torch.nn.functional.dropout(x, 0.5)
    with pytest.raises(UserError, match="is dropout, or another source of chance, still on"):
        diagnosed(module)


def test_wrappers_do_not_matter():
    torch = pytest.importorskip("torch")
    inside = torch.nn.DataParallel(torch_mlp(before=True))
    report = diagnosed(inside)
    assert report.mistakes == ("mask-before-activation",)
    assert "the first that differs: a_2" in str(report)
    assert diagnosed(torch.compile(torch_mlp(), backend="eager")).ok


def blocks(buffers=True, registered=True, bias=True, transposed=False):
    """Return a right module with names of its own."""
    torch = pytest.importorskip("torch")
    weights = {name: torch.from_numpy(array) for name, array in arrays().items()}

    class Block(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            W, b, V = (weights[f"{name}"] for name in (
                f"fc{layer}.weight", f"fc{layer}.bias", f"spec_{layer}.weight"))
            self.linear = torch.nn.Linear(*W.shape[::-1], bias=bias).double()
            self.linear.load_state_dict({"weight": W, **({"bias": b} if bias else {})})
            V = V.T.contiguous() if transposed else V
            if not registered:
                self.V = V
            elif buffers:
                self.register_buffer("route", V, persistent=False)
            else:
                self.route = torch.nn.Parameter(V, requires_grad=False)

        def forward(self, x, z):
            V = self.route if registered else self.V
            c = z @ (V if transposed else V.T)
            k = int(P_K * c.shape[1])
            m = c > c.sort(dim=1, descending=True).values[:, k, None]
            return m * torch.nn.functional.softplus(self.linear(x)), m * c

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(Block(layer) for layer in LAYERS)
            self.head = torch.nn.Linear(*WIDTHS[-2:], bias=bias).double()
            self.register_buffer("steps", torch.tensor(3))

        def forward(self, x):
            z = x
            for block in self.blocks:
                x, z = block(x, z)
            return self.head(x)

    return Net()


def proposed(error):
    """Return the names that an error proposes."""
    text = str(error.value)
    return eval(text[text.index("names={") + len("names="):])


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_names_are_proposed_and_taken(buffers, bias, transposed):
    module = blocks(buffers, bias=bias, transposed=transposed)
    with pytest.raises(UserError, match=r"no fc1\.weight and no spec_1\.weight") as error:
        diagnosed(module)
    names = proposed(error)
    assert names["fc4.weight"] == "head.weight"
    assert names["spec_2.weight"] == "blocks.1.route" + ".T" * transposed
    assert ("fc1.bias" in names) == bias
    report = diagnosed(module, names=names)
    assert report.ok, str(report)


def test_weights_that_are_not_registered():
    module = blocks(registered=False)
    with pytest.raises(UserError) as error:
        diagnosed(module)
    assert "blocks.0.linear.weight (12, 9)" in str(error.value)  # no proposal: V is nowhere
    names = {f"fc{layer}.{part}": f"blocks.{layer - 1}.linear.{part}" for layer in LAYERS
             for part in ("weight", "bias")} | {f"fc4.{part}": f"head.{part}"
                                                for part in ("weight", "bias")}
    others = {f"spec_{layer}.weight": module.blocks[layer - 1].V for layer in LAYERS}
    assert diagnosed(module, "mlp", others, names=names).ok
    with pytest.raises(UserError, match="params is a mapping of names to tensors"):
        diagnosed(module, "mlp", list(others.values()), names=names)


def test_bad_names():
    module = blocks()
    with pytest.raises(UserError, match=r"unknown parameter \"blocks.0.route.weight\"; did you "
                                        r"mean \"blocks.0"):
        diagnosed(module, names={"fc1.weight": "blocks.0.route.weight"})
    with pytest.raises(UserError, match=r"got \"blocks.0.linear.weight\" as a published one"):
        diagnosed(module, names={"blocks.0.linear.weight": "fc1.weight"})


def test_modules_that_cannot_be_diagnosed():
    torch = pytest.importorskip("torch")
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(UserError, match=f"must be float32 or float64, got {dtype}"[:30]):
            diagnosed(torch_mlp().to(dtype))
    module = torch_mlp()
    forward = module.forward
    module.forward = lambda x: (forward(x), None)
    with pytest.raises(UserError, match="must return a tensor of logits, got tuple"):
        diagnosed(module)


# --- other models


def test_a_layer_norm():
    torch = pytest.importorskip("torch")

    class Norm(torch.nn.LayerNorm):
        def forward(self, x):
            return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + self.eps).sqrt()

    assert diagnosed_as("layer-norm", torch.nn.LayerNorm(7).double()).ok
    report = diagnosed_as("layer-norm", Norm(7).double())
    assert "variance-unbiased" in report.mistakes
    assert not report.findings[0].ok


def diagnosed_as(model, module, **settings):
    return comet_np.diagnose_module(module, model, **settings)


def test_a_gpt2_whose_head_is_tied():
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {"bos_token_id": None, "eos_token_id": None, "vocab_size": 23, "n_positions": 8,
             "n_embd": 12, "n_layer": 1, "n_head": 3}
    module = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).double()
    right = {"vocabulary": 23, "positions": 8, "width": 12, "depth": 1, "heads": 3, "gate": None}
    report = diagnosed_as(GPT2Config(**right, activation="gelu_new"), module)
    assert report.ok, str(report)
    assert report.findings[1].stage == "gradients"
    wrong = diagnosed_as(GPT2Config(**right, activation="gelu"), module)
    assert wrong.mistakes == ("gelu-form",)


def test_weights_that_are_v_too():
    module = torch_mlp()
    for layer in LAYERS:
        getattr(module, f"spec_{layer}").weight = getattr(module, f"fc{layer}").weight
    assert "V-is-W" not in diagnosed(module).mistakes  # V is given, and is what is used


# --- training


def trained(optimizer="SGD", module=None, before=None, schedule=None, **settings):
    """Return the diagnosis of a module and a torch.optim of that name."""
    torch = pytest.importorskip("torch")
    module = module or torch_mlp()
    own = getattr(torch.optim, optimizer)(module.parameters(), **(before or {"lr": 0.05}))
    if schedule:
        settings |= {"scheduler": schedule(torch.optim.lr_scheduler, own), "schedule": "cosine",
                     "total": 10}
    return diagnosed(module, optimizer=own, **settings)


MOMENTUM = OptimizerConfig("momentum", momentum=0.9)


def cosine(schedulers, own):
    return schedulers.CosineAnnealingLR(own, 10)


def test_right_optimizers():
    for report in (trained(), trained(lr=0.05), trained(schedule=cosine),
                   trained("SGD", before={"lr": 0.05, "momentum": 0.9}, expected=MOMENTUM),
                   trained("AdamW", before={"lr": 0.01, "weight_decay": 0.1},
                           expected=OptimizerConfig("adamw", weight_decay=0.1))):
        assert report.ok, str(report)
        assert report.findings[-1].stage == "training"


def test_wrong_optimizers():
    assert trained("SGD", before={"lr": 0.05, "momentum": 0.9, "dampening": 0.9},
                   expected=MOMENTUM).mistakes == ("momentum-dampened",)
    assert trained("Adam", before={"lr": 0.01, "weight_decay": 0.1},
                   expected=OptimizerConfig("adamw", weight_decay=0.1)
                   ).mistakes == ("decay-coupled",)
    assert trained(lr=0.1).mistakes == ("rate-other",)
    late = trained(schedule=lambda schedulers, own: schedulers.LambdaLR(
        own, lambda t: 0.5 * (1 + np.cos(np.pi * max(t - 1, 0) / 10))))
    assert late.mistakes == ("schedule-late",)


def test_an_optimizer_is_left_as_it_was():
    """In the middle of a training, of which the diagnosis sees nothing."""
    torch = pytest.importorskip("torch")
    module = torch_mlp().train()
    own = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    module(torch.ones(3, WIDTHS[0], dtype=torch.float64)).sum().backward()
    own.step()
    module.load_state_dict({name: torch.from_numpy(array) for name, array in arrays().items()})
    before = copy.deepcopy([module.state_dict(), own.state_dict(),
                            {name: p.grad for name, p in module.named_parameters()}])
    assert before[1]["state"]
    report = diagnosed(module, optimizer=own, expected=MOMENTUM)
    assert report.ok, str(report)
    after = [module.state_dict(), own.state_dict(),
             {name: p.grad for name, p in module.named_parameters()}]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert module.training

    new = torch.optim.SGD(module.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(new, 10)
    before = copy.deepcopy(scheduler.state_dict())
    assert diagnosed(module, optimizer=new, scheduler=scheduler, schedule="cosine", total=10).ok
    assert scheduler.state_dict() == before and new.param_groups[0]["lr"] == 0.05


def test_optimizers_that_cannot_be_diagnosed():
    torch = pytest.importorskip("torch")
    module, other = torch_mlp(), torch_mlp()
    with pytest.raises(UserError, match=r"one of torch\.optim's, .* got OptimizerConfig"):
        diagnosed(module, optimizer=MOMENTUM)
    with pytest.raises(UserError, match="holds no parameter of this module"):
        diagnosed(module, optimizer=torch.optim.SGD(other.parameters(), lr=1.0))
    own = torch.optim.SGD(module.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(own, 10)
    own.step()
    scheduler.step()
    with pytest.raises(UserError, match="scheduler has made 1 steps"):
        diagnosed(module, optimizer=own, scheduler=scheduler, schedule="cosine", total=10)
    with pytest.raises(UserError, match="give step= to diagnose"):
        diagnosed(lambda params, x: x, params={}, optimizer=own)


def test_the_squared_error():
    assert diagnosed(torch_mlp(), loss="mse").ok
    torch = pytest.importorskip("torch")
    criterion = torch.nn.MSELoss(reduction="sum")
    assert not diagnosed(torch_mlp(), loss="mse", criterion=criterion).ok


@pytest.mark.parametrize("module", [None, 3, "mlp", torch_mlp, {"fc1.weight": np.ones((2, 2))}])
def test_what_is_no_module(module):
    with pytest.raises(UserError, match=r"expects a torch\.nn\.Module, or a function of JAX"):
        diagnosed(module)


def test_without_jax(monkeypatch):
    found = builtins.__import__

    def missing(name, *arguments, **settings):
        if name == "jax":
            raise ImportError(name)
        return found(name, *arguments, **settings)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match="JAX is not installed"):
        diagnosed(lambda params, x: x, "mlp", {"fc1": 1})


def test_neither_is_loaded_by_this():
    code = ("import sys; from comet_np import diagnose_module\n"
            "assert not {'torch', 'jax'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


# --- JAX ----------------------------------------------------------------------------------------


class Layer(NamedTuple):
    kernel: object
    bias: object


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    jax = pytest.importorskip("jax")
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", request.param == "float64")
    yield request.param
    jax.config.update("jax_enable_x64", before)


def jax_mlp(dtype, before=False, through=False):
    """Return a function and its parameters, stored as kernels are in JAX."""
    import jax

    named = {name: jax.numpy.asarray(array) for name, array in arrays(dtype).items()}
    params = {"dense": [Layer(named[f"fc{layer}.weight"].T, named[f"fc{layer}.bias"])
                        for layer in range(1, len(WIDTHS))],
              "route": [named[f"spec_{layer}.weight"].T for layer in LAYERS], "steps": 3}

    def fn(params, x):
        z = x
        for dense, V in zip(params["dense"], params["route"], strict=False):
            c, a = z @ V, x @ dense.kernel + dense.bias
            k = int(P_K * c.shape[1])
            m = (c > jax.numpy.sort(c, axis=1)[:, -k - 1, None]).astype(x.dtype)
            if through:
                h = jax.nn.softplus(a)
                x = h + jax.lax.stop_gradient(m * h - h)
            else:
                x = jax.nn.softplus(m * a) if before else m * jax.nn.softplus(a)
            z = m * c
        return x @ params["dense"][-1].kernel + params["dense"][-1].bias

    return jax.jit(fn), params


NAMES = {f"fc{layer}.weight": f"dense.{layer - 1}.kernel.T" for layer in range(1, 5)} | {
    f"fc{layer}.bias": f"dense.{layer - 1}.bias" for layer in range(1, 5)} | {
    f"spec_{layer}.weight": f"route.{layer - 1}.T" for layer in LAYERS}


def test_a_right_function(dtype):
    fn, params = jax_mlp(dtype)
    with pytest.raises(UserError, match=r"no fc1\.weight and no spec_1\.weight") as error:
        diagnosed(fn, params=params)
    assert proposed(error) == NAMES
    report = diagnosed(fn, params=params, names=NAMES)
    assert report.ok, str(report)


@pytest.mark.parametrize(("wrong", "name"), [({"before": True}, "mask-before-activation"),
                                             ({"through": True}, "gradient-through-mask")])
def test_a_wrong_function(dtype, wrong, name):
    fn, params = jax_mlp(dtype, **wrong)
    report = diagnosed(fn, params=params, names=NAMES)
    assert report.mistakes == (name,), str(report)


def test_a_loss_in_jax(dtype):
    import jax

    fn, params = jax_mlp(dtype)

    def loss(logits, labels):
        return -jax.nn.log_softmax(logits)[jax.numpy.arange(len(labels)), labels].sum()

    assert diagnosed(fn, params=params, names=NAMES, criterion=loss).mistakes == ("loss-summed",)


def test_layers_are_counted_beyond_nine():
    from comet_np.conformance.modules import _by_number

    names = [f"Dense_{layer}.kernel" for layer in (10, 2, 1)]
    assert sorted(names, key=_by_number) == names[::-1]


def test_float64_that_jax_would_not_compute_in():
    jax = pytest.importorskip("jax")
    fn, params = jax_mlp("float32")
    params["route"] = [np.asarray(V, "float64") for V in params["route"]]
    assert not jax.config.jax_enable_x64
    with pytest.raises(UserError, match="jax_enable_x64"):
        diagnosed(fn, params=params, names=NAMES)


def test_a_bfloat16_of_jax():
    jax = pytest.importorskip("jax")
    fn, params = jax_mlp("float32")
    params["route"] = [V.astype(jax.numpy.bfloat16) for V in params["route"]]
    with pytest.raises(UserError, match=r"route\.0 must be float32 or float64, got bfloat16"):
        diagnosed(fn, params=params, names=NAMES)
