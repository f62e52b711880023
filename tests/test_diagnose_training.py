"""`diagnose` of gradients and of training loops: each mistake by its own name, and no other."""

import math

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

torch = pytest.importorskip("torch", reason="torch, of the crosscheck extra, is not installed")
F = torch.nn.functional

WIDTHS = (7, 12, 9, 5)
DTYPES = ("float32", "float64")
P_K = 0.5


def weights(dtype, seed=0):
    """Return the parameters of an MLP under their published names."""
    draw = np.random.default_rng(seed)
    named = {}
    for layer, (N_in, N) in enumerate(zip(WIDTHS, WIDTHS[1:], strict=False), start=1):
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
            if self.gate == "top_k":
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


def names_of(report):
    return report.mistakes


GRADIENT_MUTANTS = {
    **{("loss", how): {"loss": how} for how in ("sum", "mean twice", "mean over classes", "negated",
                                                "softmax twice")},
    **{("loss", how): {"loss": how, "loss_name": "mse"} for how in ("halved", "sum over outputs")},
    ("through", "mask"): {"through": "mask"},
    ("through", "identity"): {"through": "identity", "gate": "top_k"},
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", GRADIENTS, ids=lambda each: f"{each.name}-{each.value}")
def test_each_mistake_of_gradients_is_named(mistake, dtype):
    model, settings = made(dtype, GRADIENT_MUTANTS[mistake.decision, mistake.value])
    report = comet_np.diagnose(model, model.named, gradients=model.gradients, **settings)
    assert report.mistakes == (mistake.name,), str(report)
    best = report.findings[1].found.causes[0]
    assert [each.value for each in best.mistakes] == [mistake.value], str(report)


@pytest.mark.parametrize("gate", ["comet", "layerwise", "top_k"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_right_gradients_are_ok(dtype, loss, gate):
    model = Torch(dtype, gate=gate, loss_name=loss)
    report = comet_np.diagnose(model, model.named, gradients=model.gradients, loss=loss, gate=gate,
                               **SETTINGS)
    assert report.ok, str(report)
