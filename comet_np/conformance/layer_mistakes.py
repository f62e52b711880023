"""What one can get wrong in a norm, in attention, in blocks, and in the networks made of them."""

from itertools import permutations

from .mistakes import CAP, GRADIENTS, MLP, Between, Mistake

NORM = (
    Mistake("variance-unbiased", "variance", "unbiased",
            "the variance of a norm is the unbiased one, divided by D - 1, not by D"),
    Mistake("eps-outside-root", "eps_place", "outside",
            "eps of a norm stands outside the root: sqrt(var) + eps, not sqrt(var + eps)"),
    Mistake("norm-without-mean", "norm_mean", "kept",
            "a norm does not subtract the mean: it is an RMS norm"),
    Mistake("norm-without-mean", "norm_mean", "kept above",
            "a norm does not subtract the mean: x is divided by its standard deviation alone"),
    Mistake("norm-gain-missing", "norm_gain", "none", "the gain (weight) of a norm is left out"),
    Mistake("norm-bias-missing", "norm_bias", "none", "the bias of a norm is left out"),
    Mistake("norm-over-tokens", "norm_axis", "tokens too",
            "a norm is taken over all tokens together, not over the features of each"),
    Mistake("eps-missing", "eps", 0.0, "a norm has no eps"),
    *(Mistake("eps-other", "eps", eps, "eps of a norm is {value}")
      for eps in (1e-12, 1e-8, 1e-6, 1e-5, 1e-3)),
    Mistake("eps-other", "eps", Between(1e-14, 10.0), "eps of a norm is {value}"),
)

ATTENTION = (
    Mistake("attention-scale-width", "attention_scale", "width",
            "attention's scores are divided by sqrt(D), not by sqrt(D / heads)"),
    Mistake("attention-unscaled", "attention_scale", "none",
            "attention's scores are not divided by sqrt(D / heads)"),
    Mistake("attention-scale-other", "attention_scale", Between(1e-3, 1e3),
            "attention's scores are multiplied by {value}, not by 1 / sqrt(D / heads)"),
    Mistake("causal-missing", "triangle", "none",
            "attention is not causal: a token sees those after it"),
    Mistake("causal-excludes-self", "triangle", "before",
            "the causal triangle is off by one: a token does not see itself (and the first, which "
            "sees none, sees all alike)"),
    Mistake("causal-sees-next", "triangle", "next",
            "the causal triangle is off by one: a token sees the next one"),
    Mistake("causal-reversed", "triangle", "after",
            "the causal triangle is reversed: a token sees itself and those after it"),
    Mistake("causal-after-softmax", "triangle", "after softmax",
            "the causal triangle is applied after the softmax, whose weights then do not sum to 1"),
    Mistake("causal-unwanted", "triangle", "own", "attention is causal, and should not be"),
    Mistake("softmax-over-queries", "softmax", "queries",
            "attention's softmax is taken over the queries, not over the keys"),
    Mistake("heads-interleaved", "heads", "interleaved",
            "heads are interleaved: features are split as (D / heads, heads), not "
            "(heads, D / heads)"),
    Mistake("heads-interleaved", "heads", "interleaved, joined in blocks",
            "heads are split as (D / heads, heads), and joined as (heads, D / heads)"),
    Mistake("heads-untransposed", "heads", "split untransposed",
            "tokens (T, D) are reshaped to heads (heads, T, D / heads) without a transposition"),
    Mistake("heads-untransposed", "heads", "joined untransposed",
            "heads (heads, T, D / heads) are reshaped to tokens (T, D) without a transposition"),
    Mistake("qkv-by-head", "heads", "qkv by head",
            "the rows of the map to queries, keys and values are taken head by head, "
            "(heads, 3, D / heads), not (3, heads, D / heads)"),
    *(Mistake("qkv-order", "qkv", "".join(order),
              f"the map's rows are taken in the order {', '.join(order)}, not q, k, v")
      for order in permutations("qkv") if order != ("q", "k", "v")),
    Mistake("attention-bias-missing", "attention_bias", "none",
            "the biases of attention's maps are left out"),
    Mistake("attention-bias-missing", "attention_bias", "out only",
            "the biases of queries, keys and values are left out"),
    Mistake("attention-bias-missing", "attention_bias", "qkv only",
            "the bias of attention's last map is left out"),
    Mistake("attention-projection-missing", "attention_out", "none",
            "attention's last map is left out"),
    Mistake("attention-projection-transposed", "attention_out", "transposed",
            "attention's last map is used transposed"),
)

# The MLP of a block, with one hidden layer: what would compute the same as another is left out.
_ALIKE = ("k-of-layer-after", "k-of-first-layer", "mask-missing-first", "mask-missing-last",
          "masks-stale", "output-softmax", "output-log-softmax", "routing-from-z")
IN_BLOCK = (
    *(mistake._replace(sentence=f"in the MLPs: {mistake.sentence}")
      for mistake in MLP if mistake.name not in _ALIKE
      and mistake.decision not in ("axis", "grid") and mistake.name != "output-activated"
      and (mistake.decision != "routing" or mistake.value in ("activation", "pre-activation"))
      and (mistake.decision, mistake.value) not in (("output_mask", "routed"),
                                                    ("routing_bias", "own"))),
    Mistake("cap-over-batch", "axis", "tokens",
            "in the MLPs: the k winners are taken along the tokens, not along the neurons of each"),
    Mistake("cap-over-batch", "axis", "batch",
            "in the MLPs: the k winners are taken along the batch, not along the neurons"),
    Mistake("routing-before-norm", "routing_input", "before norm",
            "in the MLPs: routing scores are taken of the block's input before its norm"),
)
GATED = {mistake.decision for mistake in CAP} | {  # decisions of an MLP with a gate
    "mask", "grid", "output_mask", "routing", "routing_bias", "V", "routing_input"}

# What all networks share.
_NETWORK = (
    Mistake("post-norm", "norm_place", "post",
            "norms stand after the sum, x = norm(x + f(x)), not before f: x + f(norm(x))"),
    Mistake("post-norm", "norm_place", "branch",
            "norms stand after the branch, x + norm(f(x)), not before it: x + f(norm(x))"),
    Mistake("norm-missing", "norm_place", "none", "the norms of the blocks are left out"),
    Mistake("final-norm-missing", "final_norm", "none", "the last norm is left out"),
    Mistake("residual-missing", "residual", "none", "the blocks have no residual connections"),
    Mistake("residual-missing", "residual", "second only",
            "the blocks have no residual connection past their first part"),
    Mistake("residual-missing", "residual", "first only",
            "the blocks have no residual connection past their second part, the MLP"),
    Mistake("residual-of-norm", "residual", "normed",
            "the residual connection takes what was normed: n + f(n) with n = norm(x)"),
    Mistake("norms-swapped", "norms", "swapped", "the two norms of a block are exchanged"),
    Mistake("norms-swapped", "norms", "first", "the first norm of a block stands for both"),
)
_OUTPUT = (
    Mistake("output-softmax", "logits", "softmax", "softmax is applied to the output: expected "
                                                   "logits"),
    Mistake("output-log-softmax", "logits", "log-softmax",
            "log-softmax is applied to the output: expected logits"),
    Mistake("logits-scaled", "logits_scale", Between(0.02, 50.0),
            "the logits are multiplied by {value}"),
)
_IMAGE = (
    Mistake("patches-transposed", "patches", "transposed",
            "the pixels of a patch are taken column by column, not row by row"),
    Mistake("patches-channels-first", "patches", "channels first",
            "the values of a patch are taken colour by colour, not pixel by pixel"),
    Mistake("patches-by-column", "patches", "by column",
            "the patches of an image are taken column by column, not row by row"),
    Mistake("patch-bias-missing", "patch_bias", "none",
            "the bias of the map of patches is left out"),
    Mistake("head-bias-missing", "head_bias", "none", "the bias of the head is left out"),
)
BLOCK = (
    *_NETWORK,
    Mistake("block-parallel", "blocks", "parallel",
            "attention and MLP stand side by side: x + attention(norm(x)) + MLP(norm(x))"),
)

VIT = (
    Mistake("class-token-last", "class_token", "last",
            "the class token stands behind the others, not before them, and has the last position"),
    Mistake("class-token-last", "pooling", "last",
            "the head reads the last token, not the first, the class token"),
    Mistake("class-token-mean", "pooling", "mean",
            "the head reads the mean of all tokens, not the class token"),
    Mistake("class-token-mean", "pooling", "mean of patches",
            "the head reads the mean of the patches' tokens, not the class token"),
    Mistake("pooling-first", "pooling", "class", "the head reads the first token, not their mean"),
    Mistake("positions-missing", "positions", "none", "positions are not added to the tokens"),
    Mistake("positions-missing", "positions", "patches only",
            "positions are not added to the class token, which has one too"),
    Mistake("positions-off-by-one", "positions", "before class",
            "positions are off by one: the first one is added to the first patch, not to the class "
            "token, which has none"),
    Mistake("positions-off-by-one", "positions", "next",
            "positions are off by one: a token has that of the next one"),
    Mistake("embedding-scaled", "embedding_scale", "root",
            "embeddings are multiplied by sqrt(D) before positions are added"),
    *_IMAGE, *BLOCK,
    Mistake("final-norm-place", "final_norm", "tokens",
            "the last norm stands on the tokens before they are pooled, not on what was pooled"),
    Mistake("final-norm-place", "final_norm", "pooled",
            "the last norm stands on what was pooled, not on the tokens before"),
    *ATTENTION, *IN_BLOCK, *NORM, *_OUTPUT,
)

MIXER = (
    Mistake("mixing-not-transposed", "mixing", "untransposed",
            "token mixing maps the channels of each token, not the tokens of each channel"),
    Mistake("mixing-not-transposed", "mixing", "routed untransposed",
            "token mixing is routed by the channels of a token, not by the tokens of a channel"),
    Mistake("mixing-order", "mixing_order", "channels first",
            "channels are mixed before tokens, not after them"),
    *_IMAGE, *_NETWORK,
    Mistake("pooling-first", "pooling", "class", "the head reads the first token, not their mean"),
    *IN_BLOCK, *NORM, *_OUTPUT,
)

GPT2 = (
    Mistake("head-untied", "head", "own",
            "the head is lm_head.weight, not the table of tokens, wte.weight, to which it is tied"),
    Mistake("positions-missing", "positions", "none", "positions are not added to the tokens"),
    Mistake("positions-off-by-one", "positions", "next",
            "positions are off by one: they begin with 1, not with 0"),
    Mistake("positions-off-by-one", "positions", "previous",
            "positions are off by one: the second token has position 0 too"),
    Mistake("embedding-scaled", "embedding_scale", "root",
            "embeddings are multiplied by sqrt(D) before positions are added"),
    *BLOCK, *ATTENTION, *IN_BLOCK, *NORM, *_OUTPUT,
)

# Those of which our own backward can be made to compute the gradients.
NETWORK_GRADIENTS = tuple(mistake for mistake in GRADIENTS if mistake.name in (
    "loss-summed", "loss-divided-twice", "loss-over-classes", "gradient-negated", "softmax-twice",
    "gradient-through-mask", "derivative-at-output", "gradients-accumulate") or (
        mistake.decision, mistake.value) in (("detached", "last"), ("V_gradient", "any")))
TIED_GRADIENTS = (
    Mistake("head-untied", "tied", "embedding",
            "the table of tokens has its gradient as the embedding alone, not as the head too"),
    Mistake("head-untied", "tied", "head",
            "the table of tokens has its gradient as the head alone, not as the embedding too"),
)
