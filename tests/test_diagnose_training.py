"""`diagnose` of gradients and of training loops: each mistake by its own name, and no other."""

import math
from contextlib import nullcontext as nothing
from itertools import pairwise

import numpy as np
import pytest

import comet_np
from comet_np import optim
from comet_np.conformance.mistakes import GRADIENTS, TRAINING, Between
from comet_np.conformance.mlp import MLPSubject
from comet_np.conformance.training import Plan, Training
from comet_np.errors import UserError
from comet_np.gates import Comet
from comet_np.optim import OptimizerConfig
from comet_np.schedules import schedule

from .turns import in_turn

torch = pytest.importorskip("torch", reason="torch, of the crosscheck extra, is not installed")
torch.set_num_threads(1)  # its idle threads spin, and would slow down ours
F = torch.nn.functional

WIDTHS = (7, 12, 9, 5)
DTYPES = ("float32", "float64")
P_K = 0.5


def weights(dtype, seed=0):
    """Return the parameters of an MLP under their published names."""
    draw = np.random.default_rng(seed)
    named = {}
    for layer, (N_in, N) in enumerate(pairwise(WIDTHS), start=1):
        named[f"fc{layer}.weight"] = draw.normal(size=(N, N_in)) / math.sqrt(N_in)
        named[f"fc{layer}.bias"] = 0.3 * draw.normal(size=N)
        if layer < len(WIDTHS) - 1:
            named[f"spec_{layer}.weight"] = draw.uniform(-1, 1, (N, N_in)) / math.sqrt(N_in)
    return {name: array.astype(dtype) for name, array in named.items()}


class Scaled(torch.autograd.Function):
    """1 forward; the gradient is passed to the scores times a slope."""

    @staticmethod
    def forward(ctx, m, c, how):
        ctx.save_for_backward(c)
        ctx.how = how
        return m.clone()

    @staticmethod
    def backward(ctx, dm):
        c, = ctx.saved_tensors
        s = torch.sigmoid(c)
        return None, dm * (s * (1 - s) if ctx.how == "sigmoid" else 1.0), None


class DerivativeAtOutput(torch.autograd.Function):
    """Softplus whose derivative is taken at its output."""

    @staticmethod
    def forward(ctx, a):
        h = F.softplus(a)
        ctx.save_for_backward(h)
        return h

    @staticmethod
    def backward(ctx, dh):
        h, = ctx.saved_tensors
        return dh * torch.sigmoid(h)


class Torch:
    """Someone's own MLP in PyTorch, right unless it is told otherwise."""

    def __init__(self, dtype, gate="comet", activation="softplus", loss_name="cross_entropy",
                 **wrong):
        self.p = {name: torch.tensor(array, requires_grad=name.startswith("fc"))
                  for name, array in weights(dtype).items()}
        self.gate, self.loss_name, self.wrong = gate, loss_name, wrong
        self.f = {"softplus": F.softplus, "relu": torch.relu, "tanh": torch.tanh}[activation]
        if wrong.get("V_trains"):
            for layer in (1, 2):
                self.p[f"spec_{layer}.weight"].requires_grad_()

    @property
    def trained(self):
        return {name: array for name, array in self.p.items() if array.requires_grad}

    @property
    def named(self):
        return {name: array.detach().numpy() for name, array in self.p.items()}

    def logits(self, x):
        p, wrong, L = self.p, self.wrong, len(WIDTHS) - 1
        z = x
        for layer in range(1, L):
            a = x @ p[f"fc{layer}.weight"].T + p[f"fc{layer}.bias"]
            if self.gate == "top-k":
                c = a
            else:
                c = (z if self.gate == "comet" else x) @ p[f"spec_{layer}.weight"].T
            k = max(1, int(P_K * c.shape[1]))
            after = torch.sort(c.detach(), dim=1).values[:, -k - 1, None]
            m = (c.detach() > after).to(x.dtype)
            through = wrong.get("through")
            if through in ("identity", "sigmoid"):
                m = Scaled.apply(m, c, through)
            f = self.f
            if wrong.get("derivative") == "output":
                f = DerivativeAtOutput.apply
            h = f(a)
            if wrong.get("derivative") == "none":
                h = a + (h - a).detach()
            if wrong.get("mask") == "before":
                h = f(m * a)
            elif through == "mask":
                h = h + (m * h - h).detach()
            else:
                h = m * h
            z = m.detach() * c
            x = h
            if wrong.get("detached") == ("first" if layer == 1 else "last" if layer == L - 1
                                         else None):
                x = x.detach()
        return x @ p[f"fc{L}.weight"].T + p[f"fc{L}.bias"]

    def __call__(self, x):
        return self.logits(torch.tensor(x)).detach().numpy()

    def loss(self, x, labels):
        y, how = self.logits(torch.tensor(x)), self.wrong.get("loss")
        labels = torch.tensor(labels)
        if self.loss_name == "mse":
            mean = F.mse_loss(y, labels)
            whole = F.mse_loss(y, labels, reduction="sum")
            return {"sum": whole, "halved": mean / 2, "sum over outputs": whole / len(y),
                    "mean twice": mean / len(y), "negated": -mean}.get(how, mean)
        mean = F.cross_entropy(torch.softmax(y, 1) if how == "softmax twice" else y, labels)
        return {"sum": mean * len(y), "mean twice": mean / len(y),
                "mean over classes": mean / y.shape[1], "negated": -mean}.get(how, mean)

    def gradients(self, x, labels):
        if self.wrong.get("calls") != "accumulate":
            for p in self.p.values():
                p.grad = None
        self.loss(x, labels).backward()
        found = {name: torch.zeros_like(p) if p.grad is None else p.grad
                 for name, p in self.trained.items()}
        how = self.wrong.get("bias_gradient")
        if how:
            found = {name: g / (len(x) if how == "mean" else math.inf)
                     if name.endswith("bias") else g for name, g in found.items()}
        return {name: g.numpy() for name, g in found.items()}


SETTINGS = {"p_k": P_K, "activation": "softplus"}


GRADIENT_MUTANTS = {
    **{("loss", how): {"loss": how} for how in ("sum", "mean twice", "mean over classes", "negated",
                                                "softmax twice")},
    **{("loss", how): {"loss": how, "loss_name": "mse"} for how in ("halved", "sum over outputs")},
    ("through", "mask"): {"through": "mask"},
    ("through", "identity"): {"through": "identity", "gate": "top-k"},
    ("through", "sigmoid"): {"through": "sigmoid", "gate": "layerwise"},
    ("derivative", "output"): {"derivative": "output"},
    ("derivative", "none"): {"derivative": "none"},
    ("bias_gradient", "mean"): {"bias_gradient": "mean"},
    ("bias_gradient", "none"): {"bias_gradient": "none"},
    ("calls", "accumulate"): {"calls": "accumulate"},
    ("detached", "last"): {"detached": "last"},
    ("detached", "first"): {"detached": "first"},
    ("V_gradient", "any"): {"V_trains": True, "through": "identity"},
}


def made(dtype, wrong):
    """Return someone's MLP and the settings that it should have."""
    settings = SETTINGS | {"gate": wrong.get("gate", "comet"),
                           "loss": wrong.get("loss_name", "cross_entropy")}
    return Torch(dtype, **wrong), settings


@pytest.mark.parametrize(("mistake", "dtype"), in_turn(GRADIENTS, DTYPES), ids=str)
def test_each_mistake_of_gradients_is_named(mistake, dtype):
    model, settings = made(dtype, GRADIENT_MUTANTS[mistake.decision, mistake.value])
    report = comet_np.diagnose(model, model.named, gradients=model.gradients, **settings)
    assert report.mistakes == (mistake.name,), str(report)
    best = report.findings[1].found.causes[0]
    assert [each.value for each in best.mistakes] == [mistake.value], str(report)


@pytest.mark.parametrize("gate", ["comet", "layerwise", "top-k"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_right_gradients_are_ok(dtype, loss, gate):
    model = Torch(dtype, gate=gate, loss_name=loss)
    report = comet_np.diagnose(model, model.named, gradients=model.gradients, loss=loss, gate=gate,
                               **SETTINGS)
    assert report.ok, str(report)


# --- the training loop ----------------------------------------------------------------------------

SGD = {"name": "sgd"}
MOMENTUM = {"name": "momentum"}
ADAM = {"name": "adam"}
ADAMW = {"name": "adamw", "weight_decay": 0.3}
COSINE = {"schedule": "cosine", "total": 8}
WARM = {"schedule": "warmup_cosine", "total": 9, "warmup": 3}


def plan_of(config, **plan):
    """Return what `diagnose` is told of a loop."""
    lr = 0.01 if config["name"].startswith("adam") else 0.1
    return {"optimizer": OptimizerConfig(**config), "lr": lr, **plan}


def groups(model, plan, **settings):
    """Return the trained parameters in groups, for torch.optim."""
    config = plan["optimizer"]
    both = {True: [], False: []}
    for name, p in model.trained.items():
        both[name.endswith("weight") or config.decay_biases].append(p)
    decay = settings.pop("weight_decay", config.weight_decay)
    return [{"params": each, "weight_decay": decay * decays} for decays, each in both.items()]


def torch_optimizer(model, plan, name=None, **settings):
    """Return the optimizer of a plan as PyTorch has it, with some settings otherwise."""
    config = plan["optimizer"]
    name = name or config.name
    parts = groups(model, plan, **settings)
    settings.pop("weight_decay", None)
    if name in ("sgd", "momentum"):
        settings = ({"momentum": config.momentum} if name == "momentum" else {}) | settings
        return torch.optim.SGD(parts, lr=plan["lr"], **settings)
    settings = {"betas": (config.beta1, config.beta2), "eps": config.eps} | settings
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](parts, lr=plan["lr"],
                                                                      **settings)


class Loop:
    """A training loop in PyTorch, of torch.optim, right unless it is told otherwise.

    wrong : of the optimizer (settings of torch.optim), and of the loop: factor(t), clip, before,
    after (called with the model round the step), zero, times.
    """

    def __init__(self, model, plan, factor=None, clip="given", before=None, after=None, zero=True,
                 times=1, late=False, **wrong):
        self.model, self.config = model, plan["optimizer"]
        self.optimizer = torch_optimizer(model, plan, **wrong)
        if factor is None:
            def factor(t):
                return schedule(plan.get("schedule", "constant"), min(t, plan.get("total", t)),
                                plan.get("total", t), plan.get("warmup", 0))
        self.rates = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.clip, self.before, self.after, self.zero = clip, before, after, zero
        self.times, self.late, self.t = times, late, 0

    def step(self, x, labels):
        model, config = self.model, self.config
        if self.late and self.t:
            self.optimizer.step()
        if self.zero:
            self.optimizer.zero_grad()
        model.loss(x, labels).backward()
        if config.l1:
            for name, p in model.trained.items():
                if name.endswith("weight"):
                    p.grad += config.l1 * torch.sign(p.detach())
        parameters = list(model.trained.values())
        if callable(self.clip):
            self.clip(parameters)
        elif self.clip == "given" and config.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        elif self.clip == "given" and config.clip_value:
            torch.nn.utils.clip_grad_value_(parameters, config.clip_value)
        with torch.no_grad():
            if self.before:
                self.before(model, self.optimizer.param_groups[0]["lr"])
        for _ in range(self.times if not self.late else 0):
            self.optimizer.step()
        with torch.no_grad():
            if self.after:
                self.after(model, self.optimizer.param_groups[0]["lr"])
        with pytest.warns(UserWarning) if self.late and not self.t else nothing():
            self.rates.step()
        self.t += 1
        return model.named


class ByHand:
    """A training loop in PyTorch whose update is written by hand.

    update(p, g, state, t, lr) -> the change, t from 1; `state` is a dict for each parameter.
    """

    def __init__(self, model, plan, update, factor=None):
        self.model, self.plan, self.update, self.t = model, plan, update, 0
        self.state = {name: {} for name in model.trained}
        self.factor = factor or (lambda t: schedule(
            plan.get("schedule", "constant"), t, plan.get("total", t), plan.get("warmup", 0)))

    def step(self, x, labels):
        g = self.model.gradients(x, labels)
        lr = self.plan["lr"] * self.factor(self.t)
        self.t += 1
        with torch.no_grad():
            for name, p in self.model.trained.items():
                p += self.update(p, torch.tensor(g[name]), self.state[name], self.t, lr)
        return self.model.named


def adam_update(beta1=0.9, beta2=0.999, eps=1e-8, correct=(True, True), late=0, inside=False,
                root=True):
    """Return Adam by hand, or a wrong one."""
    def update(p, g, state, t, lr):
        u = state["u"] = beta1 * state.get("u", 0 * g) + (1 - beta1) * g
        v = state["v"] = beta2 * state.get("v", 0 * g) + (1 - beta2) * g * g
        if correct[0]:
            u = u / (1 - beta1 ** (t + late))
        if correct[1] == "after":
            return -lr * u / ((v.sqrt() + eps) / math.sqrt(1 - beta2**t))
        if correct[1]:
            v = v / (1 - beta2 ** (t + late))
        if not root:
            return -lr * u / (v + eps)
        step = u / (v + eps).sqrt() if inside else u / (v.sqrt() + eps)
        return -lr * torch.nan_to_num(step) if eps == 0 else -lr * step
    return update


def momentum_update(kind):
    """Return a wrong momentum by hand."""
    def update(p, g, state, t, lr):
        v = state.get("v", 0 * g)
        v = state["v"] = {"dampened": 0.9 * v + (1 - 0.9) * g, "rate": 0.9 * v + lr * g}[kind]
        return -v if kind == "rate" else -lr * v
    return update


def decayed(how, decay=0.3, biases=True):
    """Return a decay in a loop whose optimizer has none."""
    def change(model, lr):
        for name, p in model.trained.items():
            if biases or name.endswith("weight"):
                p *= 1 - decay * how(lr)
    return change


def decay_V(model, lr):
    for name, p in model.p.items():
        if name.startswith("spec"):
            p *= 1 - lr * 0.3


class Frozen(Loop):
    """Parameters that are trained, whose gradients are needed, and that the optimizer lacks."""

    def __init__(self, model, plan, choose, **wrong):
        held = [p for name, p in model.trained.items() if choose(name)]
        super().__init__(model, plan, **wrong)
        for group in self.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if not any(p is each for each in held)]


def each_clipped(parameters):
    for p in parameters:
        torch.nn.utils.clip_grad_norm_([p], CLIP)


def always_clipped(parameters):
    norm = torch.sqrt(sum((p.grad**2).sum() for p in parameters))
    for p in parameters:
        p.grad *= 9.0 / (norm + 1e-6)


def clipped_without_eps(parameters):
    norm = torch.sqrt(sum((p.grad**2).sum() for p in parameters))
    for p in parameters:
        p.grad *= min(CLIP / norm, 1.0)


def l1_of_biases(parameters):
    for p in parameters:
        if p.ndim == 1:
            p.grad += 0.05 * torch.sign(p.detach())


def l1_undone(parameters):
    for p in parameters:
        if p.ndim == 2:
            p.grad -= 0.05 * torch.sign(p.detach())


CLIP = 0.3
CLIPPED = SGD | {"clip_norm": CLIP}
L1 = SGD | {"l1": 0.05}
DECAYED = SGD | {"weight_decay": 0.1}


def cosine(total, first=0):
    return lambda t: 0.5 * (1 + math.cos(math.pi * (t - first) / (total - first)))


def from_config(**wrong):
    """Return a loop with settings of torch.optim that are not those of the plan."""
    return lambda model, plan: Loop(model, plan, **wrong)


def by_hand(update, **wrong):
    return lambda model, plan: ByHand(model, plan, update, **wrong)


def without(choose):
    return lambda model, plan: Frozen(model, plan, choose)


def compounded(t):
    return math.prod(cosine(8)(each) for each in range(t + 1))


# (decision, value) -> configuration, rest of the plan, loop, model's mistakes, dtypes
BETWEEN = "number"
BIG_EPS = ADAM | {"eps": 1e-3}
TRAINING_MUTANTS = {
    ("V_training", "decayed"): (ADAMW, {}, from_config(before=decay_V)),
    ("V_training", "trained"): (SGD, {}, from_config(), {"V_trains": True, "through": "identity"}),
    ("frozen", "biases"): (SGD, {}, without(lambda name: name.endswith("bias"))),
    ("frozen", "first"): (ADAM, {}, without(lambda name: name.startswith("fc1"))),
    ("frozen", "output"): (SGD, {}, without(lambda name: name.startswith("fc3"))),
    ("frozen", "hidden"): (MOMENTUM, {}, without(lambda name: not name.startswith("fc3"))),
    ("frozen", "all"): (SGD, {}, from_config(factor=lambda t: 0.0)),
    ("sign", 1): (MOMENTUM, {}, from_config(maximize=True)),
    ("repeat", 2): (MOMENTUM, {}, from_config(times=2)),
    ("late", True): (SGD, {}, from_config(late=True)),
    ("schedule", "late"): (SGD, COSINE, from_config(factor=lambda t: cosine(8)(max(t - 1, 0)))),
    ("schedule", "early"): (MOMENTUM, COSINE, from_config(factor=lambda t: cosine(8)(t + 1))),
    ("schedule", "missing"): (ADAM, COSINE, from_config(factor=lambda t: 1.0)),
    ("schedule", "compounded"): (SGD, COSINE, from_config(factor=compounded)),
    ("schedule", "shorter"): (SGD, COSINE, from_config(factor=cosine(7))),
    ("schedule", "longer"): (SGD, COSINE, from_config(factor=cosine(9))),
    ("schedule", "linear"): (SGD, COSINE, from_config(factor=lambda t: 1 - t / 8)),
    ("schedule", "no warmup"): (SGD, WARM, from_config(factor=cosine(9))),
    ("schedule", "from one"): (SGD, WARM, from_config(
        factor=lambda t: (t + 1) / 3 if t < 3 else cosine(9, 3)(t))),
    ("schedule", "within"): (SGD, WARM, from_config(
        factor=lambda t: t / 3 if t < 3 else cosine(9)(t))),
    ("decay", "coupled"): (ADAMW, {}, from_config(name="adam")),
    ("decay", "decoupled"): (ADAM | {"weight_decay": 0.3}, {}, from_config(name="adamw")),
    ("decay", "none"): (ADAMW, {}, from_config(weight_decay=0.0)),
    ("decay", "without rate"): (ADAMW, {}, from_config(
        weight_decay=0.0, before=decayed(lambda lr: 1.0))),
    ("decay", "schedule only"): (ADAMW, COSINE, from_config(
        weight_decay=0.0, before=decayed(lambda lr: lr / 0.01))),
    ("decay", "unscheduled"): (ADAMW, COSINE, from_config(
        weight_decay=0.0, before=decayed(lambda lr: 0.01))),
    ("decay", "after"): (ADAMW, {}, from_config(weight_decay=0.0, after=decayed(lambda lr: lr))),
    ("decay_biases", True): (ADAMW | {"decay_biases": False}, {}, from_config(
        weight_decay=0.0, before=decayed(lambda lr: lr))),
    ("decay_biases", False): (ADAMW, {}, from_config(
        weight_decay=0.0, before=decayed(lambda lr: lr, biases=False))),
    ("momentum_form", "dampened"): (MOMENTUM, {}, by_hand(momentum_update("dampened"))),
    ("momentum_form", "dampened later"): (MOMENTUM, {}, from_config(dampening=0.9)),
    ("momentum_form", "nesterov"): (MOMENTUM, {}, from_config(nesterov=True)),
    ("momentum_form", "none"): (MOMENTUM, {}, from_config(name="sgd")),
    ("momentum_form", "times rate"): (MOMENTUM, COSINE, by_hand(momentum_update("rate"))),
    ("correction", "none"): (ADAM, {}, by_hand(adam_update(correct=(False, False)))),
    ("correction", "second"): (ADAM, {}, by_hand(adam_update(correct=(False, True)))),
    ("correction", "first"): (ADAM, {}, by_hand(adam_update(correct=(True, False)))),
    ("correction", "late"): (ADAM, {}, by_hand(adam_update(late=1))),
    ("eps_place", "inside"): (ADAM, {}, by_hand(adam_update(inside=True))),
    ("eps_place", "uncorrected"): (BIG_EPS, {}, by_hand(adam_update(eps=1e-3,
                                                                    correct=(True, "after")))),
    ("eps_place", "none"): (BIG_EPS, {}, by_hand(adam_update(eps=0.0))),
    ("betas", "swapped"): (ADAM, {}, from_config(betas=(0.999, 0.9))),
    ("second", "amsgrad"): (ADAM | {"beta2": 0.9}, {}, from_config(amsgrad=True)),
    ("second", "no root"): (ADAM, {}, by_hand(adam_update(root=False))),
    ("beta1", 0.0): (ADAM, {}, from_config(betas=(0.0, 0.999))),
    ("clip", "none"): (CLIPPED, {}, from_config(clip=None)),
    ("clip", "value"): (CLIPPED | {"clip_norm": 0.05}, {}, from_config(
        clip=lambda parameters: torch.nn.utils.clip_grad_value_(parameters, 0.05))),
    ("clip", "norm"): (SGD | {"clip_value": CLIP}, {}, from_config(
        clip=lambda parameters: torch.nn.utils.clip_grad_norm_(parameters, CLIP))),
    ("clip", "each"): (CLIPPED, {}, from_config(clip=each_clipped)),
    ("clip", "always"): (SGD | {"clip_norm": 9.0}, {}, from_config(clip=always_clipped)),
    ("clip", "no eps"): (CLIPPED, {}, from_config(clip=clipped_without_eps)),
    ("l1", "none"): (L1, {}, from_config(clip=l1_undone)),
    ("l1", "all"): (L1, {}, from_config(clip=l1_of_biases)),
    ("optimizer", "sgd"): (ADAM, {}, from_config(name="sgd")),
    ("optimizer", "adam"): (SGD, {}, from_config(name="adam")),
    ("optimizer", "momentum"): (SGD, {}, from_config(name="momentum", momentum=0.7)),
    ("rate", BETWEEN): (MOMENTUM, {}, from_config(factor=lambda t: 0.3)),
    ("weight_decay", BETWEEN): (DECAYED, {}, from_config(weight_decay=0.05)),
    ("momentum", BETWEEN): (MOMENTUM, {}, from_config(momentum=0.8)),
    ("eps", BETWEEN): (ADAM, {}, from_config(eps=1e-2)),
    ("beta1", BETWEEN): (ADAM, {}, from_config(betas=(0.8, 0.999))),
    ("beta2", BETWEEN): (ADAM, {}, from_config(betas=(0.9, 0.99))),
}
ONLY_IN_FLOAT64 = {("clip", "no eps")}  # the difference is 1e-6
FITTED = {("rate", BETWEEN): 0.03, ("weight_decay", BETWEEN): 0.05, ("momentum", BETWEEN): 0.8,
          ("eps", BETWEEN): 1e-2, ("beta1", BETWEEN): 0.8, ("beta2", BETWEEN): 0.99,
          ("optimizer", "momentum"): 0.7}


def key(mistake):
    """Return a mistake's place in the table."""
    value = mistake.value
    if type(value) is tuple:
        value = value[0]
    return mistake.decision, BETWEEN if isinstance(value, Between) else value


def test_every_entry_has_a_mutant():
    assert {key(each) for each in TRAINING} == set(TRAINING_MUTANTS)
    assert {key(each) for each in GRADIENTS} == set(GRADIENT_MUTANTS)


def trained(dtype, place):
    """Return the report on a mutant of the table."""
    config, rest, loop, *more = TRAINING_MUTANTS[place]
    plan, model = plan_of(config, **rest), Torch(dtype, **(more[0] if more else {}))
    made = loop(model, plan)
    return comet_np.diagnose(model, model.named, step=made.step, **plan, **SETTINGS)


@pytest.mark.parametrize(("mistake", "dtype"), in_turn(TRAINING, DTYPES), ids=str)
def test_each_mistake_of_training_is_named(mistake, dtype):
    if key(mistake) in ONLY_IN_FLOAT64:
        dtype = "float64"
    report = trained(dtype, key(mistake))
    assert report.mistakes == (mistake.name,), str(report)
    found, = report.findings[1].found.causes[0].mistakes
    value = found.value[-1] if type(found.value) is tuple else found.value
    assert value == FITTED.get(key(mistake), mistake.value), str(report)


PLANS = {
    "sgd": (SGD, {}),
    "sgd, decay, cosine": (DECAYED, COSINE),
    "sgd, decay of weights": (DECAYED | {"decay_biases": False}, WARM),
    "l1": (L1, {}),
    "momentum, warm-up": (MOMENTUM | {"weight_decay": 0.1}, WARM),
    "adam": (ADAM, {}),
    "adam, decay": (ADAM | {"weight_decay": 0.1}, COSINE),
    "adamw, groups": (ADAMW | {"decay_biases": False}, WARM),
    "clipped by norm": (ADAMW | {"clip_norm": 0.3}, {}),
    "clipped by value": (MOMENTUM | {"clip_value": 0.01}, {}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PLANS)
def test_right_loops_are_ok(name, dtype):
    config, rest = PLANS[name]
    plan, model = plan_of(config, **rest), Torch(dtype)
    report = comet_np.diagnose(model, model.named, step=Loop(model, plan).step, **plan, **SETTINGS)
    assert report.ok, str(report)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_of_which_adam_makes_a_step_is_no_mistake(dtype):
    """Gradients that cancel to nothing: those of neurons that all outputs weigh alike."""
    plan, model = plan_of(ADAM), Torch(dtype)
    with torch.no_grad():
        model.p["fc3.weight"][:, :4] = 0.7
    report = comet_np.diagnose(model, model.named, step=Loop(model, plan).step, **plan, **SETTINGS)
    assert report.ok, str(report)


@pytest.mark.parametrize("gate", ["layerwise", "top-k"])
def test_masks_that_follow_the_weights_are_ok(gate):
    plan, model = plan_of(ADAM), Torch("float32", gate=gate)
    report = comet_np.diagnose(model, model.named, step=Loop(model, plan).step, gate=gate, **plan,
                               **SETTINGS)
    assert report.ok, str(report)


@pytest.mark.parametrize("name", PLANS)
def test_right_decisions_are_those_of_optim(name):
    """Or the specification would be another one here."""
    config, rest = PLANS[name]
    plan = plan_of(config, **rest)
    wanted = Plan(plan["optimizer"], plan["lr"], rest.get("schedule", "constant"),
                  rest.get("total"), rest.get("warmup", 0))
    named = weights("float64")
    subject = MLPSubject(named, Comet(P_K), "softplus", 1e-10)
    choices = subject.right
    names = [*(each for each in named if each.endswith("weight") and each.startswith("fc")),
             *(each for each in named if each.endswith("bias"))]
    p = np.concatenate([named[each].ravel() for each in names])
    matrices = sum(named[each].size for each in names if each.endswith("weight"))
    state = optim.init_state(p, wanted.optimizer)
    points, batches, subjects = [named], [], []
    for t in range(wanted.steps):
        at = subject.at(points[-1])
        x = subject.inputs(t)
        labels = at.labels(x)
        made = at.gradients(x, labels, choices)
        g = np.concatenate([made[each].ravel() for each in names])
        rate = wanted.lr * schedule(wanted.schedule, t, wanted.total or 0, wanted.warmup)
        state = optim.update(p, g, state, rate, wanted.optimizer, matrices)
        after, place = dict(named), 0
        for each in names:
            after[each] = p[place:place + named[each].size].reshape(named[each].shape).copy()
            place += named[each].size
        points.append(after)
        subjects.append(at)
        batches.append((x, labels))
    training = Training(subjects, batches, points, wanted, 1e-10)
    want, _ = training.changes(choices | training.right)
    sizes = np.abs(want).max(axis=1, keepdims=True)
    assert (np.abs(training.seen - want) <= 1e-12 * sizes + 1e-15).all()


# --- more than one mistake, and none that is known ------------------------------------------------

PAIRS = {
    "output and optimizer": (
        ADAMW, {}, from_config(name="adam"), {"mask": "before"},
        ("mask-before-activation", "decay-coupled")),
    "gradient and optimizer": (
        MOMENTUM, {}, from_config(nesterov=True), {"loss": "sum"},
        ("momentum-nesterov", "loss-summed")),
    "optimizer and schedule": (
        MOMENTUM, COSINE, from_config(dampening=0.9, factor=lambda t: cosine(8)(t + 1)), {},
        ("momentum-dampened", "schedule-early")),
    "optimizer and its number": (
        ADAMW, {}, from_config(name="adam", weight_decay=0.1), {},
        ("decay-coupled", "decay-other")),
    "clipping and decay": (
        ADAMW | {"clip_norm": CLIP}, {}, from_config(clip=None, weight_decay=0.0), {},
        ("decay-missing", "clip-missing")),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PAIRS)
def test_two_mistakes_are_named(name, dtype):
    config, rest, loop, wrong, names = PAIRS[name]
    plan, model = plan_of(config, **rest), Torch(dtype, **wrong)
    step = loop(model, plan).step
    report = comet_np.diagnose(model, model.named, step=step, **plan, **SETTINGS)
    assert set(report.mistakes) == set(names), str(report)


def test_the_loop_is_judged_given_its_gradients():
    """A sum as loss is a mistake of the gradients; the optimizer is right."""
    plan, model, other = plan_of(ADAM), Torch("float64", loss="sum"), Torch("float64", loss="sum")
    report = comet_np.diagnose(model, model.named, gradients=other.gradients,
                               step=Loop(model, plan).step, **plan, **SETTINGS)
    assert [each.ok for each in report.findings] == [True, False, True], str(report)
    assert report.mistakes == ("loss-summed",)


def test_gradients_that_add_up_in_the_loop_alone():
    plan, model, other = plan_of(SGD), Torch("float64"), Torch("float64")
    report = comet_np.diagnose(model, model.named, gradients=other.gradients,
                               step=Loop(model, plan, zero=False).step, **plan, **SETTINGS)
    assert [each.ok for each in report.findings] == [True, True, False], str(report)
    assert report.mistakes == ("gradients-accumulate",)


def test_gradients_that_add_up_and_are_clipped_where_they_lie():
    plan, model = plan_of(CLIPPED), Torch("float64")
    report = comet_np.diagnose(model, model.named, step=Loop(model, plan, zero=False).step, **plan,
                               **SETTINGS)
    assert report.mistakes == ("gradients-accumulate",), str(report)


def test_an_unknown_mistake_is_not_explained_and_its_place_is_named():
    def noisy(model, lr):
        if len(calls) == 2:
            model.p["fc2.bias"][3] += 0.01
        calls.append(None)

    calls = []
    plan, model = plan_of(SGD), Torch("float64")
    report = comet_np.diagnose(model, model.named, step=Loop(model, plan, after=noisy).step, **plan,
                               **SETTINGS)
    assert (report.ok, report.cause, report.mistakes) == (False, None, ())
    assert report.findings[1].first == "fc2.bias in step 3"


def test_what_cannot_be_trained_is_not_compared():
    """Of a softmax as output no loss is known, and the loop is not even called."""
    model = Torch("float64")
    report = comet_np.diagnose(
        lambda x: torch.softmax(model.logits(torch.tensor(x)), 1).detach().numpy(), model.named,
        gradients=model.gradients, step=Loop(model, plan_of(SGD)).step, **SETTINGS)
    assert report.mistakes == ("output-softmax",)
    assert [each.found is None for each in report.findings] == [False, True, True]
    assert "put right first" in str(report)


def test_a_schedule_too_slow_to_be_seen_is_said_to_be():
    plan, model = plan_of(SGD, schedule="cosine", total=10**6), Torch("float32")
    report = comet_np.diagnose(model, model.named, step=Loop(model, plan).step, **plan, **SETTINGS)
    assert report.ok, str(report)
    assert {"schedule-late", "schedule-missing"} <= {each.name
                                                     for each in report.findings[1].unseen}


def test_a_loop_in_jax_is_ok():
    jax = pytest.importorskip("jax", reason="jax, of the crosscheck extra, is not installed")
    jnp = jax.numpy
    named = weights("float32")
    p = {name: jnp.asarray(array) for name, array in named.items()}

    def logits(p, x):
        z = x
        for layer in (1, 2):
            c = z @ p[f"spec_{layer}.weight"].T
            k = int(P_K * c.shape[1])
            m = c > jnp.sort(c, axis=1)[:, -k - 1, None]
            x = m * jax.nn.softplus(x @ p[f"fc{layer}.weight"].T + p[f"fc{layer}.bias"])
            z = m * c
        return x @ p["fc3.weight"].T + p["fc3.bias"]

    def loss(p, x, labels):
        return -jax.nn.log_softmax(logits(p, x))[jnp.arange(len(x)), labels].mean()

    gradients = jax.jit(jax.grad(loss))

    def step(x, labels):
        g = gradients(p, x, labels)
        for name in p:
            if name.startswith("fc"):
                v[name] = 0.9 * v.get(name, 0.0) + g[name]
                p[name] = p[name] - 0.1 * v[name]
        return p

    v = {}
    report = comet_np.diagnose(lambda x: np.asarray(jax.jit(logits)(named, x)), named, step=step,
                               gradients=lambda x, labels: gradients(named, x, labels),
                               **plan_of(MOMENTUM), **SETTINGS)
    assert report.ok, str(report)


# --- what cannot be judged: one sentence ----------------------------------------------------------

BAD_STEPS = {
    "no mapping": (lambda named: list(named), "step must return a dict"),
    "a name missing": (lambda named: {name: array for name, array in named.items()
                                      if name != "spec_2.weight"}, "missing: spec_2.weight"),
    "another shape": (lambda named: named | {"fc1.weight": named["fc1.weight"].T},
                      "fc1.weight is float32 of shape"),
    "another dtype": (lambda named: named | {"fc1.bias": named["fc1.bias"].astype("float64")},
                      "step 1 returned float64"),
    "NaN": (lambda named: named | {"fc2.bias": np.nan * named["fc2.bias"]},
            "fc2.bias is not finite after step 1"),
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_bad_steps_are_refused(name):
    change, words = BAD_STEPS[name]
    plan, model = plan_of(SGD), Torch("float32")
    loop = Loop(model, plan)
    with pytest.raises(UserError, match=words) as error:
        comet_np.diagnose(model, model.named, step=lambda x, y: change(loop.step(x, y)), **plan,
                          **SETTINGS)
    assert "\n" not in str(error.value)


BAD_PLANS = {
    "lr": ({"lr": 0.0}, "lr must be positive"),
    "no total": ({"schedule": "cosine"}, "needs total="),
    "total": ({"schedule": "cosine", "total": 0}, "total must be at least 1"),
    "schedule": ({"schedule": "step", "total": 5}, "unknown schedule"),
    "warm-up": ({"schedule": "warmup_cosine", "total": 5, "warmup": 6}, "warm-up must be"),
    "clipped twice": ({"optimizer": OptimizerConfig(clip_norm=1.0, l1=0.1)}, "leave one of them"),
    "too small": ({"lr": 1e-9}, "too little"),
    "loss": ({"loss": "hinge"}, "unknown loss"),
}


@pytest.mark.parametrize("name", BAD_PLANS)
def test_bad_plans_are_refused(name):
    wrong, words = BAD_PLANS[name]
    model = Torch("float32")
    step = Loop(model, {"optimizer": OptimizerConfig(), "lr": wrong.get("lr", 0.1)}).step
    with pytest.raises(UserError, match=words):
        comet_np.diagnose(model, model.named, step=step, **wrong, **SETTINGS)


def test_arrays_that_change_in_place_are_copied():
    """And so NumPy loops, which return the same arrays each time, are seen step by step."""
    plan, model = plan_of(MOMENTUM), Torch("float64")
    named, step = model.named, Loop(model, plan).step
    report = comet_np.diagnose(Torch("float64"), named, step=lambda x, y: step(x, y) and named,
                               **plan, **SETTINGS)
    assert report.ok, str(report)
