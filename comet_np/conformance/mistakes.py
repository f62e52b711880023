"""What one can get wrong: the names, and for each the decision that was taken otherwise.

A model is checked as a function of decisions, such as the rule for ties or the place of the mask. A
mistake is one decision with another value than the specification's. Its name is also the flag of
the test vectors that catch it.
"""

from typing import Any, NamedTuple

from ..functional.activations import ACTIVATIONS


class Between(NamedTuple):
    """A positive number that is not known and is fitted to what was seen."""

    low: float
    high: float


class Mistake(NamedTuple):
    """A decision that was taken otherwise.

    name : str, as in the lists below.
    decision, value : which, and how; a Between is fitted.
    sentence : what was done, as it ends "WRONG: ...", with {value} for a number that was fitted.
    """

    name: str
    decision: str
    value: Any
    sentence: str

    def __str__(self) -> str:
        value = self.value[-1] if type(self.value) is tuple else self.value
        return self.sentence.replace(
            "{value}", f"{value:.4g}" if isinstance(value, float) else "another")


Choices = dict[str, Any]  # decision -> value


CAP = (
    Mistake("ties-threshold", "ties", "threshold",
            "scores that tie at rank k all win (c >= the k-th largest)"),
    Mistake("ties-strict", "ties", "strict",
            "scores that tie at rank k all lose, as in eq. (3), and another rule was meant"),
    Mistake("ties-index", "ties", "index",
            "of scores that tie at rank k those with the lowest index win (exactly k, as by topk)"),
    Mistake("ties-index", "ties", "last",
            "of scores that tie at rank k those with the highest index win (exactly k)"),
    Mistake("k-rounded", "k", "round", "k is p_k N rounded to the nearest, not down"),
    Mistake("k-ceiled", "k", "ceil", "k is p_k N rounded up, not down"),
    Mistake("k-one-more", "k", "more", "k is one too large"),
    Mistake("k-one-less", "k", "less", "k is one too small"),
    Mistake("k-complement", "k", "complement",
            "p_k is taken for the share that is switched off: k = N - p_k N"),
    Mistake("k-quantile", "k", "quantile",
            "the (1 - p_k) quantile of the scores is the threshold: k = N - ceil((1 - p_k)(N - 1))"
            ),
    Mistake("k-of-layer-before", "k_width", "before", "k is that of the width of the layer before"),
    Mistake("k-of-layer-after", "k_width", "after", "k is that of the width of the layer after"),
    Mistake("k-of-first-layer", "k_width", "first",
            "k is that of the first hidden layer in all layers"),
    Mistake("cap-smallest", "cap", "smallest", "the k smallest scores win, not the largest"),
    Mistake("cap-magnitude", "cap", "magnitude", "the k largest |c| win, not the k largest c"),
    Mistake("cap-inverted", "cap", "inverted",
            "the mask is inverted: the winners are switched off"),
    Mistake("cap-argsort", "cap", "argsort",
            "argsort is taken for the ranks: m = argsort(-c) < k (argsort of argsort is meant)"),
    Mistake("cap-argsort", "cap", "argsort ascending",
            "argsort is taken for the ranks: m = argsort(c) >= N - k (argsort of argsort is "
            "meant)"),
    Mistake("cap-over-batch", "axis", "batch",
            "the k winners are taken along the batch, not along the neurons of an example"),
    Mistake("ties-index", "ties", "any",
            "of scores that tie at rank k some win, in an order of their own (as by topk)"),
)

# Those of f, which all models with an MLP share.
ACTIVATION = (
    Mistake("softplus-beta", "activation", ("softplus", Between(0.05, 100.0)),
            "softplus has beta = {value}, not 1"),
    Mistake("leaky-slope", "activation", ("leaky_relu", Between(1e-4, 0.9)),
            "leaky ReLU has the slope {value}, not 0.1 (Fig. 34)"),
    Mistake("gelu-form", "activation", "gelu_new",
            "GELU is taken in its tanh form, not exactly by erf"),
    Mistake("gelu-form", "activation", "gelu",
            "GELU is taken exactly by erf, not in its tanh form"),
    *(Mistake("activation-other", "activation", name,
              f"the activation is {name}" if name != "identity" else "there is no activation")
      for name in ACTIVATIONS if name not in ("gelu", "gelu_new")
      and not name.startswith("centred")),
    *(Mistake("activation-other", "activation", name, f"the activation is {name}")
      for name in ("gelu", "gelu_new")),
    Mistake("activation-other", "activation", ("leaky_relu", 0.01),
            "the activation is leaky ReLU with the slope {value}, PyTorch's default"),
)

MASK = (
    Mistake("mask-before-activation", "mask", "before",
            "mask applied before the activation (f(0) != 0)"),
    Mistake("mask-before-bias", "mask", "before bias",
            "the mask is applied to W x alone: masked neurons still give f(b)"),
    Mistake("mask-missing", "mask", "none", "the masks are not applied to the hidden layers"),
    Mistake("mask-times-scores", "mask", "scores",
            "hidden layers are multiplied by z = m o c, not by the mask m"),
    Mistake("mask-missing-first", "mask", "not first", "the first hidden layer is not masked"),
    Mistake("mask-missing-last", "mask", "not last", "the last hidden layer is not masked"),
)

MLP = (
    *CAP, *MASK,
    Mistake("output-masked", "output_mask", "routed",
            "the output is masked too, by C_k(V_L z_{L-1})"),
    Mistake("output-masked", "output_mask", "own", "the output is masked too, by C_k(a_L)"),
    Mistake("routing-from-backbone", "routing", "backbone",
            "routing scores are taken of the backbone's x_{l-1}, not of the routing network's "
            "z_{l-1}"),
    Mistake("routing-from-backbone-unmasked", "routing", "backbone unmasked",
            "routing scores are taken of f(a_{l-1}) without its mask"),
    Mistake("routing-unmasked", "routing", "unmasked",
            "routing scores are taken of c_{l-1} without its mask, not of z_{l-1} = m o c"),
    Mistake("routing-activated", "routing", "activated",
            "the routing network has the backbone's activation: z = m o f(c)"),
    Mistake("routing-from-input", "routing", "input",
            "routing scores are taken of the network's input x_0 at every layer"),
    Mistake("routing-from-z", "routing", "z",
            "routing scores are those of COMET, of z_{l-1}, not of the layer's own input"),
    Mistake("top-k-of-activation", "routing", "activation",
            "the k largest f(a) win, not the k largest pre-activations a"),
    Mistake("top-k-of-pre-activation", "routing", "pre-activation",
            "the mask is that of the layer's own pre-activations (top-k)"),
    Mistake("routing-bias", "routing_bias", "own",
            "routing has a bias: c = V z + the bias of the routing layers"),
    Mistake("routing-bias", "routing_bias", "backbone",
            "routing has a bias: c = V z + b, the backbone's"),
    Mistake("V-transposed", "V", "transposed", "V is used transposed: c = V^T z"),
    Mistake("V-is-W", "V", "W", "V is equal to W: routing scores are taken with the trained "
                                "weights"),
    Mistake("W-transposed", "W", "transposed", "W is used transposed: a = W^T x + b"),
    *ACTIVATION,
    Mistake("output-activated", "output", "activated", "the output layer has an activation"),
    Mistake("output-softmax", "output", "softmax", "softmax is applied to the output: expected "
                                                   "logits"),
    Mistake("output-log-softmax", "output", "log-softmax",
            "log-softmax is applied to the output: expected logits"),
    Mistake("bias-missing", "bias", "none", "the biases are left out in all layers"),
    Mistake("bias-missing", "bias", "hidden only", "the bias of the output layer is left out"),
    Mistake("bias-missing", "bias", "output only", "the biases of the hidden layers are left out"),
    Mistake("masks-stale", "masks", "previous", "masks are stale: those of the call before"),
    Mistake("masks-stale", "masks", "first", "masks are stale: those of the first call"),
    Mistake("hidden-scaled", "hidden_scale", Between(0.02, 50.0),
            "hidden activations are multiplied by {value} (dropout's scaling, where there should "
            "be none)"),
    Mistake("output-scaled", "output_scale", Between(0.02, 50.0),
            "the output is multiplied by {value}"),
)

GRADIENTS = (
    Mistake("loss-summed", "loss", "sum", "the loss is the sum over the batch, not its mean: "
                                          "gradients are B times too large"),
    Mistake("loss-divided-twice", "loss", "mean twice",
            "the loss is divided by the size of the batch twice"),
    Mistake("loss-over-classes", "loss", "mean over classes",
            "the loss is a mean over examples and classes"),
    Mistake("gradient-negated", "loss", "negated", "the gradient has the wrong sign"),
    Mistake("softmax-twice", "loss", "softmax twice",
            "softmax is applied before a cross-entropy that applies it again"),
    Mistake("gradient-through-mask", "through", "mask",
            "the gradient passes the mask as if it were 1 (straight-through): masked neurons learn "
            "too"),
    Mistake("derivative-at-output", "derivative", "output",
            "the derivative of the activation is taken at its output: f'(f(a)), not f'(a)"),
    Mistake("derivative-missing", "derivative", "none",
            "the derivative of the activation is left out"),
    Mistake("bias-gradient-mean", "bias_gradient", "mean",
            "bias gradients are the mean over the batch of what should be summed"),
    Mistake("bias-gradient-missing", "bias_gradient", "none", "biases have no gradient"),
    Mistake("gradients-accumulate", "calls", "accumulate",
            "gradients are not set to zero: each call adds to those of the calls before"),
    Mistake("layer-detached", "detached", "last",
            "nothing flows back beyond the output layer: the others have no gradient"),
    Mistake("layer-detached", "detached", "first",
            "nothing flows back to the first layer: it has no gradient"),
)
