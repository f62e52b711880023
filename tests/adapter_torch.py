"""COMET's MLP in PyTorch, and the adapter that checks it against the test vectors."""

from itertools import pairwise

import torch
from torch.nn import functional as F

from comet_np.conformance import Unsupported

ACTIVATIONS = {"softplus": F.softplus, "relu": F.relu, "tanh": torch.tanh, "gelu": F.gelu}


def cap(scores, k):
    return (scores[..., None, :] >= scores[..., None]).sum(-1) <= k


class Comet(torch.nn.Module):
    def __init__(self, widths, k, activation, bias):
        super().__init__()
        self.k, self.f = k, ACTIVATIONS[activation]
        layers = list(pairwise(widths))
        self.fc = torch.nn.ModuleList(torch.nn.Linear(*one, bias=bias) for one in layers)
        self.spec = torch.nn.ModuleList(torch.nn.Linear(*one, bias=False) for one in layers[:-1])
        self.spec.requires_grad_(False)

    def forward(self, x, masks=None):
        z = x
        for layer, k in enumerate(self.k):
            c = self.spec[layer](z)
            m = cap(c, k) if masks is None else masks[layer]
            z = m * c
            x = m * self.f(self.fc[layer](x))
        return self.fc[-1](x)


class Adapter:
    def cap(self, scores, k, ties):
        if ties != "strict":
            raise Unsupported(f"no tie rule {ties}")
        return cap(torch.tensor(scores), k)

    def run(self, case, masks):
        model, x, labels = self.made(case)
        y = model(x.requires_grad_(), masks and [torch.tensor(m) for m in masks])
        loss = F.cross_entropy(y, labels)
        loss.backward()
        grads = {f"d{name}": p.grad for name, p in self.named(model)}
        return {f"a_{len(model.fc)}": y, "loss": loss, "dx": x.grad, **grads}

    def train(self, case):
        model, x, labels = self.made(case)
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}.get(case.config["optimizer"])
        if kind is None or case.config["schedule"] != "constant" or not case.config["decay_biases"]:
            raise Unsupported("no such training")
        optimizer = kind(model.parameters(), lr=case.config["lr"],
                         weight_decay=case.config["weight_decay"],
                         **{"eps": case.config["eps"]} if "eps" in case.config else {})
        found = {}
        for step in range(1, case.config["steps"] + 1):
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
            found |= {f"{name}_after_{step}": p.detach().clone() for name, p in self.named(model)}
        return found

    def made(self, case):
        """Return the model with the weights of a case, and the batch."""
        config, arrays = case.config, {n: torch.tensor(a) for n, a in case.arrays.items()}
        if case.model != "mlp" or config["gate"] != "comet":
            raise Unsupported("no such model")
        if config["ties"] != "strict" or config["g"] != "identity" or config["exact"]:
            raise Unsupported("another routing")
        if config["activation"] not in ACTIVATIONS:
            raise Unsupported(f"no activation {config['activation']}")
        model = Comet(config["widths"], config["k"], config["activation"], config["bias"])
        with torch.no_grad():
            for name, p in self.named(model, "fc", "spec"):
                p.copy_(arrays[name])
        return model, arrays["x"], arrays["labels"]

    def named(self, model, *lists):
        """Yield the parameters by their names in the paper."""
        for name, p in model.named_parameters():
            kind, layer, what = name.split(".")
            if kind in (lists or ("fc",)):
                letter = "V" if kind == "spec" else "W" if what == "weight" else "b"
                yield f"{letter}_{int(layer) + 1}", p
