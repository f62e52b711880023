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
    Mistake("p_k-other", "p_k", Between(0.01, 1.0), "p_k is {value}, not the one given"),
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
    Mistake("top-k-of-pre-activation", "routing", "pre-activation",
            "the mask is that of the layer's own pre-activations (top-k)"),
    Mistake("top-k-of-activation", "routing", "activation",
            "the k largest f(a) win, not the k largest pre-activations a"),
    Mistake("routing-bias", "routing_bias", "own",
            "routing has a bias: c = V z + the bias of the routing layers"),
    Mistake("routing-bias", "routing_bias", "backbone",
            "routing has a bias: c = V z + b, the backbone's"),
    Mistake("grid-missing", "grid", "none",
            "what is routed is not put on the grid of exact routing, row by row"),
    Mistake("V-transposed", "V", "transposed", "V is used transposed: c = V^T z"),
    Mistake("V-is-W", "V", "W", "V is equal to W: routing scores are taken with the trained "
                                "weights"),
    Mistake("W-transposed", "W", "transposed", "W is used transposed: a = W^T x + b"),
    *ACTIVATION,
    Mistake("output-activated", "output", "activated", "the output layer has an activation"),
    *(Mistake("output-activated", "output", name, f"the output layer has an activation, {name}")
      for name in ("relu", "sigmoid", "tanh", "softplus")),
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
    Mistake("loss-halved", "loss", "halved",
            "the loss is half the mean squared error: gradients are half as large"),
    Mistake("loss-summed-over-outputs", "loss", "sum over outputs",
            "the squared error is summed over the outputs and a mean over the batch only"),
    Mistake("gradient-through-mask", "through", "mask",
            "the gradient passes the mask as if it were 1 (straight-through): masked neurons learn "
            "too"),
    Mistake("gradient-through-scores", "through", "identity",
            "the gradient passes the mask to the scores as if it were c (straight-through)"),
    Mistake("gradient-through-scores", "through", "sigmoid",
            "the gradient passes the mask to the scores as if it were sigmoid(c) "
            "(straight-through)"),
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
    Mistake("V-trained", "V_gradient", "any", "V has a gradient, and is fixed"),
)

# Those of a training loop. Where gradients are not given, their mistakes come after these.
TRAINING = (
    Mistake("V-decayed", "V_training", "decayed",
            "V decays like a trained weight, and is fixed: leave it out of the optimizer"),
    Mistake("V-trained", "V_training", "trained", "V is trained, and is fixed"),
    Mistake("parameter-frozen", "frozen", "biases", "the biases never change"),
    Mistake("parameter-frozen", "frozen", "first", "the first layer never changes"),
    Mistake("parameter-frozen", "frozen", "output", "the output layer never changes"),
    Mistake("parameter-frozen", "frozen", "hidden",
            "all layers but the output layer never change"),
    Mistake("parameter-frozen", "frozen", "all", "no parameter ever changes"),
    Mistake("step-ascends", "sign", 1, "steps go up the loss: p + lr g, not p - lr g"),
    Mistake("step-doubled", "repeat", 2, "each batch makes two steps with one gradient"),
    Mistake("gradients-of-step-before", "late", True,
            "each step is made before the gradient of its batch, with that of the batch before"),
    Mistake("schedule-late", "schedule", "late",
            "the schedule is a step late: the first rate is used twice"),
    Mistake("schedule-early", "schedule", "early",
            "the schedule is a step early: the rate of the first step is left out"),
    Mistake("schedule-missing", "schedule", "missing", "the rate does not follow the schedule"),
    Mistake("schedule-compounded", "schedule", "compounded",
            "the schedule multiplies the rate of the step before, not the highest one"),
    Mistake("schedule-shorter", "schedule", "shorter",
            "the cosine ends a step too soon: total - 1 steps long"),
    Mistake("schedule-longer", "schedule", "longer", "the cosine is total + 1 steps long"),
    Mistake("schedule-linear", "schedule", "linear", "the rate falls linearly, not as a cosine"),
    Mistake("warmup-missing", "schedule", "no warmup", "there is no warm-up"),
    Mistake("warmup-from-one", "schedule", "from one",
            "the warm-up is (step + 1) / warmup, with steps from 0, not step / warmup"),
    Mistake("warmup-within-cosine", "schedule", "within",
            "the cosine begins with the warm-up, not after it"),
    Mistake("decay-coupled", "decay", "coupled",
            "weight decay is added to the gradient (L2), not decoupled from it (AdamW)"),
    Mistake("decay-decoupled", "decay", "decoupled",
            "weight decay is decoupled from the gradient (AdamW), not added to it (L2)"),
    Mistake("decay-missing", "decay", "none", "there is no weight decay"),
    Mistake("decay-without-rate", "decay", "without rate",
            "decoupled weight decay is not multiplied by the learning rate"),
    Mistake("decay-without-rate", "decay", "schedule only",
            "decoupled weight decay is multiplied by the schedule, not by the learning rate"),
    Mistake("decay-unscheduled", "decay", "unscheduled",
            "decoupled weight decay is multiplied by the highest rate, not by the schedule's"),
    Mistake("decay-after-step", "decay", "after",
            "decoupled weight decay is taken of the parameters after the step, not before it"),
    Mistake("decay-of-biases", "decay_biases", True, "biases decay too, and should not"),
    Mistake("decay-without-biases", "decay_biases", False, "biases do not decay, and should"),
    Mistake("momentum-dampened", "momentum_form", "dampened",
            "momentum is dampened: v = mu v + (1 - mu) g, not mu v + g"),
    Mistake("momentum-dampened", "momentum_form", "dampened later",
            "momentum is dampened after the first step: v = mu v + (1 - mu) g, not mu v + g"),
    Mistake("momentum-nesterov", "momentum_form", "nesterov", "momentum is Nesterov's"),
    Mistake("momentum-missing", "momentum_form", "none", "there is no momentum"),
    Mistake("momentum-times-rate", "momentum_form", "times rate",
            "the velocity holds the rates: v = mu v + lr g, which is another once lr changes"),
    Mistake("adam-uncorrected", "correction", "none", "Adam's moments are not bias-corrected"),
    Mistake("adam-uncorrected", "correction", "second",
            "Adam's first moment is not bias-corrected"),
    Mistake("adam-uncorrected", "correction", "first",
            "Adam's second moment is not bias-corrected"),
    Mistake("adam-step-late", "correction", "late",
            "Adam's bias correction counts one step too many"),
    Mistake("adam-eps-inside", "eps_place", "inside", "Adam's eps stands inside the root"),
    Mistake("adam-eps-uncorrected", "eps_place", "uncorrected",
            "Adam's eps is added before the bias correction"),
    Mistake("adam-eps-missing", "eps_place", "none", "Adam's eps is left out"),
    Mistake("adam-betas-swapped", "betas", "swapped", "Adam's beta1 and beta2 are swapped"),
    Mistake("adam-amsgrad", "second", "amsgrad",
            "Adam's second moment is the largest so far (AMSGrad)"),
    Mistake("adam-root-missing", "second", "no root", "Adam divides by v, not by its root"),
    Mistake("adam-first-moment-missing", "beta1", 0.0,
            "Adam's first moment is the gradient itself (RMSProp)"),
    Mistake("clip-missing", "clip", "none",
            "the gradient is not clipped, or only after the step"),
    Mistake("clip-by-value", "clip", "value", "the gradient is clipped by value, not by its norm"),
    Mistake("clip-by-norm", "clip", "norm", "the gradient is clipped by its norm, not by value"),
    Mistake("clip-per-parameter", "clip", "each",
            "the gradient of each parameter is clipped to the norm, not the whole"),
    Mistake("clip-always", "clip", "always",
            "the gradient is scaled to the norm where it is shorter too"),
    Mistake("clip-without-eps", "clip", "no eps",
            "1e-6 is not added to the gradient's norm where it is clipped (PyTorch does)"),
    Mistake("l1-missing", "l1", "none", "there is no L1 penalty"),
    Mistake("l1-of-biases", "l1", "all", "biases have an L1 penalty too, and should not"),
    Mistake("optimizer-other", "optimizer", "sgd", "the optimizer is plain SGD"),
    Mistake("optimizer-other", "optimizer", "adam", "the optimizer is Adam"),
    Mistake("optimizer-other", "optimizer", ("momentum", Between(0.05, 0.999)),
            "the optimizer is SGD with the momentum {value}"),
    Mistake("rate-other", "rate", Between(1e-7, 1e3), "the learning rate is {value}"),
    Mistake("decay-other", "weight_decay", Between(1e-7, 10.0), "the weight decay is {value}"),
    Mistake("momentum-other", "momentum", Between(0.05, 0.9999), "the momentum is {value}"),
    Mistake("adam-eps-other", "eps", Between(1e-12, 1.0), "Adam's eps is {value}"),
    Mistake("adam-beta1-other", "beta1", Between(0.05, 0.9999), "Adam's beta1 is {value}"),
    Mistake("adam-beta2-other", "beta2", Between(0.05, 0.99999), "Adam's beta2 is {value}"),
)
