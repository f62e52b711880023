"""A training loop written once more, from the paper and PyTorch's manual: `train` must agree.

From COMET-NP it takes the initial weights, the streams by which examples are ordered, and the
random bits of dropout and of the masks of examples; nothing else.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from comet_np.functional.dropout import dropout_forward, example_mask
from comet_np.gates import Bernoulli, Comet, ExampleTied, Layerwise
from comet_np.models import mlp
from comet_np.rng import key, stream


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


F = {"identity": lambda a: a, "relu": lambda a: np.maximum(a, 0), "tanh": np.tanh,
     "softplus": lambda a: np.logaddexp(0, a), "silu": lambda a: a * sigmoid(a)}
SLOPE = {"tanh": lambda a: 1 - np.tanh(a) ** 2, "relu": lambda a: (a > 0) * 1.0,
         "softplus": lambda a: sigmoid(a),
         "silu": lambda a: sigmoid(a) * (1 + a * (1 - sigmoid(a)))}


class Outcome(NamedTuple):
    """The lines of the metrics, those of the test set, and the weights and biases."""

    lines: list
    test: dict
    weights: list


def train(config, data, network):
    """Train a `network`, `ByHand` or `ByTorch`, and return the outcome."""
    training, n = config.training, len(data.x_train)
    x_train, x_val, x_test = (x.astype("float64") * data.scale + data.shift
                              for x in (data.x_train, data.x_val, data.x_test))
    net, size, step = network(config), training.batch * training.accumulate, 0
    passes, each, total = math.ceil(n / size), math.ceil(n / size), training.steps
    if total is None:
        total = passes * training.epochs
    else:
        each = total
    ends = [math.ceil(Fraction(each * k, training.evaluations))  # steps at which lines are written
            for k in range(1, training.evaluations + 1)] if each else []
    lines = [{"epoch": 0, "step": 0, **metrics(net, x_val, data.y_val, "val")}]
    losses = []
    for epoch in range(math.ceil(total / passes)):
        order = stream(config.seed, "order", epoch).permutation(n)
        for start in range(0, n, size):
            if step == total:
                break
            rows = order[start:start + size]
            parts = [rows[i:i + training.batch] for i in range(0, len(rows), training.batch)]
            lr = rate(training, step, total)
            losses.append(net.step([(x_train[part], data.y_train[part], part) for part in parts],
                                   step, lr))
            step += 1
            if (step - 1) % each + 1 in ends:
                lines.append({"epoch": step / passes, "step": step, "train_loss": np.mean(losses),
                              "lr": lr, **metrics(net, x_val, data.y_val, "val")})
                losses = []
    return Outcome(lines, metrics(net, x_test, data.y_test, "test"), net.weights())


def rate(training, step, total):
    """Return the learning rate of a step, counted from 0."""
    warmup = training.warmup if training.schedule == "warmup_cosine" else 0
    if training.schedule == "constant":
        return training.lr
    if step < warmup:
        return training.lr * step / warmup
    return training.lr * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def metrics(net, x, y, prefix):
    """Return the loss and, of classes, the share of examples whose largest output is the right."""
    output = net.output(x)
    found = {f"{prefix}_loss": loss_and_gradient(output, y)[0]}
    if y.ndim == 1:
        found[f"{prefix}_accuracy"] = np.mean([max(range(len(row)), key=lambda i: row[i]) == label
                                               for row, label in zip(output, y, strict=True)])
    return found


def loss_and_gradient(output, y):
    """Return the mean cross-entropy or squared error, and its gradient by the output."""
    if y.ndim == 1:
        e = np.exp(output - output.max(axis=1, keepdims=True))
        q, right = e / e.sum(axis=1, keepdims=True), np.eye(output.shape[1])[y]
        return -np.log((q * right).sum(axis=1)).mean(), (q - right) / len(y)
    e = output - y.astype("float64")
    return (e**2).mean(), 2 * e / e.size


def cap(v, k, ties):
    """Return C_k(v), eq. (3), by counting; and what the other rules make of ties: v (B, N)."""
    above = (v[:, None, :] > v[:, :, None]).sum(axis=2)  # how many v_j > v_i
    equal = v[:, None, :] == v[:, :, None]
    if ties == "strict":
        return above + equal.sum(axis=2) <= k
    return above + (np.tril(equal, -1).sum(axis=2) if ties == "index" else 0) < k


class ByHand:
    """A network with its gradient and its optimizer, in NumPy."""

    def __init__(self, config):
        self.model, self.optimizer = config.model, config.training.optimizer
        self.seed, self.accumulate = config.seed, config.training.accumulate
        params, self.V = mlp.init(self.model, self.seed, dtype="float64")
        if config.routing_seed is not None:
            _, self.V = mlp.init(self.model, config.routing_seed, dtype="float64")
        self.W, self.b = [p.weight for p in params], [p.bias for p in params if self.model.bias]
        self.moments = [[np.zeros_like(p), np.zeros_like(p)] for p in self.weights()]

    def weights(self):
        return [*self.W, *self.b]

    def mask(self, layer, x, h, a, rows, train):
        """Return m of a hidden layer, counted from 1, on its input h and the network's x."""
        gate, N, everyone = self.model.gate, a.shape[1], np.ones(a.shape, bool)
        if gate is None:
            return everyone
        if isinstance(gate, Bernoulli | ExampleTied):
            name = type(gate).__name__ + ("" if train else " evaluation")
            drawn = example_mask(rows, N, gate.p, key(self.seed, name, layer))
            if not train and gate.evaluation != "generalisation":
                return drawn if gate.evaluation == "masks" else everyone
            if isinstance(gate, Bernoulli):
                return drawn
            q = gate.p if gate.generalisation is None else gate.generalisation
            always = everyone & (np.arange(N) < int(q * N))
            return always | drawn if train else always
        if isinstance(gate, Comet):
            z = x
            for V in self.V[:layer]:
                if gate.router == "centred":
                    z = z - z.mean(axis=1, keepdims=True)
                c = z @ V.T
                m = cap(c, max(1, int(gate.p_k * len(V))), gate.ties)
                z = m * F[gate.g](c)
            return m
        if isinstance(gate, Layerwise):
            scores = h @ self.V[layer - 1].T
        else:
            scores = a if gate.of == "pre-activation" else F[self.model.activation](a)
        return cap(scores, max(1, int(gate.p_k * N)), gate.ties)

    def factor(self, layer, x, h, a, rows, counter):
        """Return by what f(a) is multiplied: mask, dropout (in training), and scale."""
        train = counter is not None
        factor = self.model.scale * self.mask(layer, x, h, a, rows, train)
        if train and self.model.dropout:
            of_layer = key(self.seed, "dropout", layer)
            factor = dropout_forward(factor, self.model.dropout, of_layer, counter)[0]
        return factor

    def affine(self, layer, h):
        return h @ self.W[layer].T + (self.b[layer] if self.b else 0)

    def output(self, x, rows=None, counter=None):
        """Return the network's output; in training, `counter` tells mini-batches apart."""
        h, rows, self.seen = x, np.arange(len(x)) if rows is None else rows, []
        for layer in range(1, len(self.W)):
            a = self.affine(layer - 1, h)
            factor = self.factor(layer, x, h, a, rows, counter)
            self.seen.append((h, a, factor))
            h = factor * F[self.model.activation](a)
        self.seen.append((h, None, None))
        return self.affine(-1, h)

    def gradients(self, d):
        """Return the gradients of all weights, then all biases, for d by the last output."""
        dW, db = [], []
        for layer in reversed(range(len(self.W))):
            h = self.seen[layer][0]
            dW.insert(0, d.T @ h)
            db.insert(0, d.sum(axis=0))
            if layer:
                _, a, factor = self.seen[layer - 1]
                d = (d @ self.W[layer]) * factor * SLOPE[self.model.activation](a)
        return [*dW, *(db if self.b else [])]

    def step(self, batches, step, lr):
        """Take a step on the mini-batches (x, y, rows) and return its loss."""
        total, mean, g = sum(len(y) for _, y, _ in batches), 0.0, [0.0] * len(self.weights())
        for i, (x, y, rows) in enumerate(batches):
            loss, d = loss_and_gradient(self.output(x, rows, step * self.accumulate + i), y)
            mean += len(y) / total * loss
            g = [old + len(y) / total * new
                 for old, new in zip(g, self.gradients(d), strict=True)]
        self.update(g, step + 1, lr)
        return mean

    def update(self, g, number, lr):
        """Change the parameters by their gradients, in the step of this number, from 1."""
        of = self.optimizer
        g = [g_i + of.l1 * np.sign(p) * (p.ndim > 1)
             for g_i, p in zip(g, self.weights(), strict=True)]
        if of.clip_value is not None:
            g = [np.clip(g_i, -of.clip_value, of.clip_value) for g_i in g]
        if of.clip_norm is not None:
            norm = math.sqrt(sum((g_i**2).sum() for g_i in g))
            g = [g_i * min(1, of.clip_norm / (norm + 1e-6)) for g_i in g]
        for p, g_i, moments in zip(self.weights(), g, self.moments, strict=True):
            decay = of.weight_decay if p.ndim > 1 or of.decay_biases else 0
            if of.name == "adamw":
                p -= lr * decay * p
            else:
                g_i = g_i + decay * p
            if of.name == "momentum":
                moments[0] = g_i = of.momentum * moments[0] + g_i
            elif of.name in ("adam", "adamw"):
                moments[0] = of.beta1 * moments[0] + (1 - of.beta1) * g_i
                moments[1] = of.beta2 * moments[1] + (1 - of.beta2) * g_i**2
                first = moments[0] / (1 - of.beta1**number)
                second = moments[1] / (1 - of.beta2**number)
                g_i = first / (np.sqrt(second) + of.eps)
            p -= lr * g_i


class ByTorch(ByHand):
    """The same by PyTorch: autograd, its losses, its clipping and its optimizers."""

    def __init__(self, config):
        import torch

        self.torch = torch
        super().__init__(config)
        self.W, self.b = ([torch.tensor(p, requires_grad=True) for p in group]
                          for group in (self.W, self.b))
        of = self.optimizer
        groups = [{"params": self.W, "weight_decay": of.weight_decay},
                  {"params": self.b, "weight_decay": of.weight_decay if of.decay_biases else 0.0}]
        adam = {"betas": (of.beta1, of.beta2), "eps": of.eps}
        make, settings = {"sgd": (torch.optim.SGD, {}),
                          "momentum": (torch.optim.SGD, {"momentum": of.momentum}),
                          "adam": (torch.optim.Adam, adam),
                          "adamw": (torch.optim.AdamW, adam)}[of.name]
        self.optimizing = make([group for group in groups if group["params"]], lr=0.1, **settings)

    def weights(self):
        return [p.detach().numpy() if self.torch.is_tensor(p) else p for p in [*self.W, *self.b]]

    def output(self, x, rows=None, counter=None):
        return self.tensor(x, np.arange(len(x)) if rows is None else rows, counter
                           ).detach().numpy()

    def tensor(self, x, rows, counter):
        nn, h = self.torch.nn.functional, self.torch.tensor(x)
        f = {"tanh": self.torch.tanh, "relu": nn.relu, "silu": nn.silu,
             "softplus": lambda a: nn.softplus(a, threshold=40)}[self.model.activation]
        for layer in range(1, len(self.W)):
            a = self.affine(layer - 1, h)
            factor = self.factor(layer, x, *(t.detach().numpy() for t in (h, a)), rows, counter)
            h = f(a) * self.torch.tensor(factor)
        return self.affine(-1, h)

    def step(self, batches, step, lr):
        torch, of = self.torch, self.optimizer
        self.optimizing.zero_grad()
        total, mean = sum(len(y) for _, y, _ in batches), 0.0
        for i, (x, y, rows) in enumerate(batches):
            output, y = self.tensor(x, rows, step * self.accumulate + i), torch.tensor(y)
            loss = (torch.nn.functional.cross_entropy(output, y) if y.ndim == 1
                    else torch.nn.functional.mse_loss(output, y.double()))
            (len(y) / total * loss).backward()
            mean += len(y) / total * loss.item()
        if of.l1:
            (of.l1 * sum(W.abs().sum() for W in self.W)).backward()
        if of.clip_value is not None:
            torch.nn.utils.clip_grad_value_([*self.W, *self.b], of.clip_value)
        if of.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_([*self.W, *self.b], of.clip_norm)
        for group in self.optimizing.param_groups:
            group["lr"] = lr
        self.optimizing.step()
        return mean
