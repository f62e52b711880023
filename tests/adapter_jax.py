"""COMET's MLP as a JAX function, and the adapter that checks it against the test vectors."""

import jax
import jax.numpy as jnp
from jax.nn import log_softmax, softplus

from comet_np.conformance import Unsupported


def cap(scores, k):
    return (scores[..., None, :] >= scores[..., None]).sum(-1) <= k


def network(p, x, k, masks):
    z = x
    for i, k_i in enumerate(k, start=1):
        c = z @ p[f"V_{i}"].T
        m = cap(c, k_i) if masks is None else masks[i - 1]
        z = m * c
        x = m * softplus(x @ p[f"W_{i}"].T + p[f"b_{i}"])
    return x @ p[f"W_{len(k) + 1}"].T + p[f"b_{len(k) + 1}"]


class Adapter:
    def cap(self, scores, k, ties):
        if ties != "strict":
            raise Unsupported(f"no tie rule {ties}")
        return cap(jnp.asarray(scores), k)

    def run(self, case, masks):
        config = {"gate": "comet", "ties": "strict", "activation": "softplus", "bias": True,
                  "g": "identity", "exact": False}
        if case.model != "mlp" or not config.items() <= case.config.items():
            raise Unsupported("no such model")
        labels = case.arrays.pop("labels")
        p = {name: jnp.asarray(array) for name, array in case.arrays.items() if name[0] in "xWbV"}

        def loss(p):
            y = network(p, p["x"], case.config["k"], masks)
            return -log_softmax(y)[jnp.arange(len(y)), labels].mean(), y

        (value, y), grads = jax.value_and_grad(loss, has_aux=True)(p)
        last = len(case.config["k"]) + 1
        return {f"a_{last}": y, "loss": value,
                **{f"d{name}": g for name, g in grads.items() if name[0] in "xWb"}}
