"""The hunt as a habit: each of these wrong programs must be caught by the tests that it names.

Each is made in a copy of the project.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("backends", "benchmarks", "comet_np", "experiments", "tests", "pyproject.toml")
AT_ONCE = 2  # mutants, each in a copy of its own


class Mutant(NamedTuple):
    """A wrong program: the right text, which occurs once in a file, is another one.

    tests : the file of tests that must notice it, and by which word pytest selects them
    """

    file: str
    right: str
    wrong: str
    tests: tuple[str, str]


def by_hand(cases):
    """Return the tests in which `train` must agree with a loop written by hand in these cases."""
    return "test_loop_oracle", f"a_loop_by_hand and ({cases})"


TABLE = ("test_grid", "the_table_says")
OF_ONE_PROCESS = ("test_data_parallel", "the_numbers_of_one_process")
FLAGS = ("test_grid", "every_flag_reaches")
OF_OPTIM = ("test_diagnose_training", "those_of_optim")
RIGHT_LOOPS = ("test_diagnose_training", "right_loops")
MUTANTS = {
    # --- the loop -------------------------------------------------------------------------------
    "argmin for argmax": Mutant(
        "experiments/tasks/classification.py", ".argmax(output", ".argmin(output",
        by_hand("defaults")),
    "test metrics of the validation set": Mutant(
        "experiments/training/record.py", "measure(run, run.test)", "measure(run, run.validation)",
        by_hand("defaults")),
    "one order for all seeds": Mutant(
        "experiments/training/loop.py", 'stream(seed, "order", epoch)', 'stream(0, "order", epoch)',
        by_hand("seed")),
    "one order for all epochs": Mutant(
        "experiments/training/loop.py", 'stream(seed, "order", epoch)', 'stream(seed, "order", 0)',
        by_hand("defaults")),
    "the first block's masks for all blocks": Mutant(
        "experiments/training/examples.py", "self.rows[block])", "self.rows[:len(x)])",
        by_hand("Bernoulli or Comet")),
    "a mean over blocks of unequal size": Mutant(
        "experiments/training/step.py",
        "(to_host(made.loss)) * len(batch.rows)",
        "(to_host(made.loss)) * len(examples) / len(list(examples.blocks()))",
        by_hand("defaults")),
    "losses of all epochs added up": Mutant(
        "experiments/training/record.py", "run.loss_sum, run.record.last = 0.0, line",
        "run.record.last = line", by_hand("defaults")),
    "losses of the whole epoch over each of its lines": Mutant(
        "experiments/training/record.py", 'step - run.record.last["step"]', "run.steps_an_epoch",
        by_hand("evaluations")),
    "a whole last epoch where the steps are fewer": Mutant(
        "experiments/training/loop.py", "min(run.steps_an_epoch, first + run.total - run.step)",
        "run.steps_an_epoch", by_hand("steps")),
    "lines without regard to the evaluations": Mutant(
        "experiments/training/config.py", "-(-k * span // self.evaluations)", "span",
        by_hand("evaluations")),
    "a schedule over whole epochs": Mutant(
        "experiments/training/config.py",
        "self.epochs * self.steps_an_epoch(examples) if self.steps is None else self.steps\n\n",
        "self.epochs * self.steps_an_epoch(examples)\n\n", by_hand("steps")),
    "the schedule a step early": Mutant(
        "experiments/training/run.py", "schedule(training.schedule, step,",
        "schedule(training.schedule, step + 1,", by_hand("cosine")),
    "--schedule ignored": Mutant(
        "experiments/training/run.py", "schedule(training.schedule,", 'schedule("constant",',
        by_hand("cosine")),
    "the next step's rate in the record": Mutant(
        "experiments/training/record.py", "run.rate(run.step - 1)", "run.rate(run.step)",
        by_hand("cosine")),
    "weights not restored after a group that diverged": Mutant(
        "experiments/training/loop.py", "array[...] = before[name]", "pass",
        ("test_loop_oracle", "a_group_that_diverged")),
    "masks of examples in evaluation as in training": Mutant(
        "experiments/training/step.py", "at = Pass(train,", "at = Pass(True,",
        by_hand("Bernoulli")),
    "metrics that are not on the disk": Mutant(
        "experiments/training/run.py", "os.fsync(self.metrics.fileno())", "pass",
        ("test_sweep", "on_the_disk")),
    "a result before its metrics are on the disk": Mutant(
        "experiments/training/record.py", "run.record.sync()\n        Trained", "Trained",
        ("test_sweep", "on_the_disk")),
    # --- diagnose --------------------------------------------------------------------------------
    "a cause that leaves rows out wins": Mutant(
        "comet_np/conformance/search.py", "most = max((each.agreeing for each in full), default=0)",
        "most = max((each.agreeing for each in full[:1]), default=0)",
        ("test_diagnose", "decides_less")),
    "numbers that are only as near as the grid": Mutant(
        "comet_np/conformance/search.py", "point = min((point, point + least.x), key=profile)",
        "pass", ("test_diagnose", "own_name and scaled and float64")),
    "two unknown numbers are not tried": Mutant(
        "comet_np/conformance/search.py", "(*combinations(unknown, 2), *product(unknown, order))",
        "product(unknown, order)", ("test_diagnose", "two_numbers")),
    "a closest mistake by chance": Mutant(
        "comet_np/conformance/search.py",
        "4 * (closest.explained - spec.explained) < closest.items", "False",
        ("test_diagnose", "not_known")),
    "a mask that its scores do not fit": Mutant(
        "comet_np/conformance/mlp.py", "return (c > after).astype(float), sure",
        "return (c >= after).astype(float), sure", ("test_diagnose", "right_decisions and strict")),
    "the routing network's activation is left out": Mutant(
        "comet_np/conformance/mlp.py", "values = scale * h, a, c, m, m * self.g(c)",
        "values = scale * h, a, c, m, m * c", ("test_diagnose", "right_decisions and relu")),
    "rows are as small as they come out": Mutant(
        "comet_np/conformance/mlp.py", "size = np.maximum(size, abs(choices",
        "np.maximum(size, abs(choices", ("test_diagnose", "cancels")),
    "quantile as floor": Mutant(
        "comet_np/conformance/mlp.py", "(1 - p_k) * (N - 1) - 1e-9", "(1 - p_k) * N - 1e-9",
        ("test_diagnose", "own_name and quantile")),
    # --- data-parallel training -----------------------------------------------------------------
    "all ranks drop the same": Mutant(
        "experiments/training/step.py", "self.forward(batch, examples, True, part)",
        "self.forward(batch, examples, True, part // self.ranks.size)", OF_ONE_PROCESS),
    "each rank's share of its own examples": Mutant(
        "experiments/training/step.py", "sum(len(batch.rows) for batch in batches)",
        "sum(len(batches[part].rows) for part in self.ranks.parts(len(batches)))", OF_ONE_PROCESS),
    "gradients of one rank": Mutant(
        "experiments/training/ranks.py", "(work or self._sum)(array)", "(work or len)(array)",
        OF_ONE_PROCESS),
    "loss of one rank": Mutant(
        "experiments/training/ranks.py", "sum(losses)", "losses[0]", OF_ONE_PROCESS),
    "a block that each rank evaluates": Mutant(
        "experiments/training/examples.py", "(each[i] for i in ranks.parts(len(each)))", "each",
        OF_ONE_PROCESS),
    "files of all ranks": Mutant(
        "experiments/training/run.py", "Record(folder, ranks.first,", "Record(folder, True,",
        OF_ONE_PROCESS),
    "a stop that one rank hears": Mutant(
        "experiments/training/ranks.py", "max(self.gather(stop.asked and stop.number))",
        "stop.asked and stop.number", ("test_data_parallel", "a_stop_asked_of_one")),
    "one rank resumes": Mutant(
        "experiments/training/record.py", "run.ranks.copy_(array)", "pass",
        ("test_data_parallel", "a_stop_asked_of_one")),
    "an error told twice": Mutant(
        "experiments/training/ranks.py", "if not self._knows(error):",
        "if error is not self._told:", ("test_data_parallel", "interrupted_while")),
    "an error taken for the one before": Mutant(
        "experiments/training/ranks.py", "self._told = None  # of an", "pass  # of an",
        ("test_data_parallel", "a_disk_that_is_full")),
    "settings of one rank": Mutant(
        "experiments/training/ranks.py", "any(value != values[0]", "any(value is values",
        ("test_data_parallel", "disagree")),
    # --- the mixture of experts -----------------------------------------------------------------
    "nothing of the gate in the input's gradient": Mutant(
        "comet_np/models/moe.py", "dx if dx is None else dx + dx_gate", "dx",
        ("test_moe", "by_differences")),
    "experts that were not chosen have a say": Mutant(
        "comet_np/models/moe.py", "xp.where(masks[rows, e, None], factor[rows] * y_e, 0)",
        "factor[rows] * y_e", ("test_moe", "number_by_number")),
    "experts that were not chosen learn": Mutant(
        "comet_np/models/moe.py", "xp.where(mine, factor[rows] * dy[rows], 0)",
        "factor[rows] * dy[rows]", ("test_moe", "without_examples")),
    "a hard gate among the parameters": Mutant(
        "comet_np/models/moe.py", 'return self.gate == "weighted" and self.trainable',
        "return self.trainable", ("test_moe", "counted")),
    "all experts start alike": Mutant(
        "comet_np/models/moe.py", '("expert", e)', '("expert", 0)', ("test_moe", "for_itself")),
    "the load of experts is no metric": Mutant(
        "experiments/training/step.py", "counts | self._functions.counts(made.cache, self.model)",
        "counts", ("test_moe", "is_a_metric")),
    # --- ViT and MLP-Mixer ----------------------------------------------------------------------
    "no sum around the MLP": Mutant(
        "comet_np/models/branch.py", "return x + y, BranchCache", "return y, BranchCache",
        ("test_vit_mixer", "number_by_number")),
    "no gradient past the MLP": Mutant(
        "comet_np/models/branch.py", "return dy + norm_backward", "return norm_backward",
        ("test_vit_mixer", "by_differences")),
    "no gradient past attention": Mutant(
        "comet_np/models/block.py", "return dx + norm_backward", "return norm_backward",
        ("test_vit_mixer", "by_differences")),
    "all blocks drop the same": Mutant(
        "comet_np/models/block.py", 'within(at, "block", i)', "at",
        ("test_vit_mixer", "differs_between_blocks")),
    "all mixing drops the same": Mutant(
        "comet_np/models/mixer.py", 'within(at, "branch", i)', "at",
        ("test_vit_mixer", "differs_between_blocks")),
    "all gates start alike": Mutant(
        "comet_np/models/mlp.py", "seed_of(seed, *name)", "seed",
        ("test_vit_mixer", "drawn_for_itself")),
    "attention's weights dropped in evaluation": Mutant(
        "comet_np/models/block.py", 'key(at.seed, "weights") if at.train else None',
        'key(at.seed, "weights")', ("test_vit_mixer", "in_training_alone")),
    "the class token is the last": Mutant(
        "comet_np/models/vit.py", "pooled = x[..., 0, :]", "pooled = x[..., -1, :]",
        ("test_vit_mixer", "number_by_number")),
    "a mean's gradient not shared out": Mutant(
        "comet_np/models/branch.py", "d[..., None, :] / T", "d[..., None, :]",
        ("test_vit_mixer", "by_differences")),
    "masks from outside not read": Mutant(
        "comet_np/models/stream.py", "if masks is None and config.routing",
        "if config.routing", ("test_vit_mixer", "from_outside")),
    "a stream that is not masked": Mutant(
        "comet_np/models/stream.py", "project(masked(c, m, activation(gate.g)), U)",
        "project(activation(gate.g).forward(c), U)",
        ("test_vit_mixer", "number_by_number")),
    "a stream without a class token": Mutant(
        "comet_np/models/stream.py", "[s.mean(axis=-2, keepdims=True), s]", "[s[..., :1, :], s]",
        ("test_vit_mixer", "number_by_number")),
    "a stream of another image": Mutant(
        "comet_np/models/stream.py", "gate.trace(turned(s, turn), (V,))",
        "gate.trace(turned(s[::-1], turn), (V,))",
        ("test_vit_mixer", "number_by_number")),
    "routing of a stream counted once": Mutant(
        "comet_np/models/stream.py", "return 2 * sum(each) -", "return sum(each) -",
        ("test_vit_mixer", "of_the_products")),
    # --- exact routing --------------------------------------------------------------------------
    "a bit too many in exact routing": Mutant(
        "comet_np/functional/routing.py", "FLOAT32_BITS = 24", "FLOAT32_BITS = 25",
        ("test_exact_routing", "leave_sums_below")),
    "z that is not on the grid": Mutant(
        "comet_np/functional/routing.py", "        if exact:", "        if False:",
        ("test_exact_routing", "no_order_of_summation")),
    "V that is not on the grid": Mutant(
        "comet_np/gates/comet.py", "tuple(map(weight_on_grid, V)) if self.exact else V", "V",
        ("test_exact_routing", "no_order_of_summation")),
    "a grid that is cut off instead of rounded": Mutant(
        "comet_np/functional/routing.py", "xp.rint(z / unit)", "xp.trunc(z / unit)",
        ("test_exact_routing", "number_by_number")),
    "a largest number that is not clipped": Mutant(
        "comet_np/functional/routing.py", "2**bits - 1\n    return", "2**bits\n    return",
        ("test_exact_routing", "number_by_number")),
    "rows on a grid without limits": Mutant(
        "comet_np/functional/routing.py", "FURTHEST = 100", "FURTHEST = 200",
        ("test_exact_routing", "no_order_of_summation")),
    "infinity on the grid": Mutant(
        "comet_np/functional/routing.py", "xp.isfinite(top)", "(top == top)",
        ("test_exact_routing", "not_finite")),
    "weights from elsewhere that are not looked at": Mutant(
        "comet_np/gates/comet.py", "if self.exact and not", "if False and not",
        ("test_exact_routing", "from_elsewhere")),
    # --- routers --------------------------------------------------------------------------------
    "centred by the whole batch": Mutant(
        "comet_np/gates/routers.py", "z - z.mean(axis=-1, keepdims=True)", "z - z.mean()",
        ("test_routers", "definition and centred")),
    "the square of the norm": Mutant(
        "comet_np/gates/routers.py", "xp.sqrt((z * z).sum(axis=-1, keepdims=True))",
        "(z * z).sum(axis=-1, keepdims=True)", ("test_routers", "definition and unit-norm")),
    "one orthogonal block for all": Mutant(
        "comet_np/gates/routers.py", '"orthogonal", layer, start)', '"orthogonal", layer)',
        ("test_routers", "orthonormal")),
    "inputs that are read twice": Mutant(
        "comet_np/gates/routers.py", "index[j] += index[j] >= chosen", "pass",
        ("test_routers", "six_different")),
    "inputs that are nearly all different": Mutant(
        "comet_np/gates/routers.py", "index[j] >= chosen", "index[j] > chosen",
        ("test_routers", "six_different")),
    "all of a sparse row added": Mutant(
        "comet_np/gates/routers.py", "if self.signed and j % 2:", "if False:",
        ("test_routers", "definition and sparse-signed")),
    "a Kronecker product without turning": Mutant(
        "comet_np/gates/routers.py", "ZB.swapaxes(-1, -2)), A)", "ZB).reshape(ZB.swapaxes(-1, "
        "-2).shape), A)", ("test_routers", "definition and kronecker")),
    "blocks of neighbours": Mutant(
        "comet_np/gates/routers.py", ".reshape(t, n, -1).swapaxes(0, 1)", ".reshape(n, t, -1)",
        ("test_routers", "definition and block-diagonal")),
    "outputs of one order in all layers": Mutant(
        "comet_np/gates/routers.py", 'stream(seed, "outputs", layer)', 'stream(seed, "outputs")',
        ("test_routers", "other_orders")),
    "signs of the first copy of a Hadamard matrix": Mutant(
        "comet_np/gates/routers.py", "z[..., None, :] * V.signs,", "z[..., None, :] * "
        "(0 * V.signs + V.signs[:1]),", ("test_routers", "definition and hadamard")),
    "a router that is not asked": Mutant(
        "comet_np/gates/comet.py", "self.exact, self._routes().scores)", "self.exact)",
        ("test_routers", "of_a_network")),
    "a dense router's work for all": Mutant(
        "comet_np/models/stream.py", "n * config.gate.multiply_adds(one.widths)",
        "n * math.prod(one.widths[:2])", ("test_routers", "counts_of_a_model")),
    "short inputs of a router that pads": Mutant(
        "comet_np/gates/comet.py", 'if self.router != "dense" and x.shape', "if False and x.shape",
        ("test_routers", "another_router_or_input")),
    "a stream of other maps": Mutant(
        "comet_np/models/branch.py", 'if config.routing == "stream" and router != "dense":',
        "if False:", ("test_routers", "one_sentence")),
    # --- scaled losses --------------------------------------------------------------------------
    "a scale that never grows": Mutant(
        "comet_np/precision.py", "xp.where(due, larger, scale)", "scale",
        ("test_precision", "follows_its_rule")),
    "good steps counted on after an overflow": Mutant(
        "comet_np/precision.py", "xp.where(finite, good + 1, 0)", "good + 1",
        ("test_precision", "gradscaler")),
    "a scale that stays where a gradient overflows": Mutant(
        "comet_np/precision.py", "scale), scale / 2)", "scale), scale)",
        ("test_precision", "gradscaler")),
    "a scale beyond float32": Mutant(
        "comet_np/precision.py", "2 * xp.minimum(scale, LARGEST_SCALE / 2)", "2 * scale",
        ("test_precision", "follows_its_rule")),
    "gradients that stay scaled": Mutant(
        "comet_np/precision.py", "finite, 1 / scaling[0], np.nan", "finite, 1.0, np.nan",
        ("test_precision", "gradscaler")),
    "losses that are not scaled": Mutant(
        "experiments/training/step.py", "share * self.scaling[0]", "share",
        ("test_training", "too_small_for_float16")),
    "a step that is never left out": Mutant(
        "experiments/training/step.py", "scale = unscaled(self.scaling, finite)",
        "scale = 1 / self.scaling[0]", ("test_training", "overflows_is_left_out")),
    "a scale that is forgotten in checkpoints": Mutant(
        "experiments/training/step.py", '"scaling": self.scaling}', '"scaling": None}',
        ("test_training", "killed_anywhere")),
    "the norm of the scaled gradient": Mutant(
        "comet_np/optim.py", "norm = scale * squared_norm(g) ** 0.5",
        "norm = squared_norm(g) ** 0.5", ("test_optim", "scale_of_the_gradient")),
    "a norm that is not finite leaves steps out": Mutant(
        "comet_np/optim.py", "xp_of(g).fmin(", "xp_of(g).minimum(",
        ("test_optim", "norm_that_is_not_finite")),
    "an L1 penalty that is not scaled": Mutant(
        "comet_np/optim.py", "config.l1 / scale", "config.l1",
        ("test_optim", "scale_of_the_gradient")),
    "values clipped as if they were not scaled": Mutant(
        "comet_np/optim.py", "config.clip_value / scale", "config.clip_value",
        ("test_optim", "scale_of_the_gradient")),
    "errors of other threads told": Mutant(
        "backends/cpu.py", "copy_context().run, drain", "drain",
        ("test_backends", "met_in_every_thread")),
    "recomputation that is not asked for": Mutant(
        "experiments/training/config.py", "replace(model, recompute=True)", "model",
        ("test_training", "asked_of_the_model")),
    # --- GPT-2 ----------------------------------------------------------------------------------
    "a token sees those after it": Mutant(
        "comet_np/models/gpt2.py", "config, at, causal=True,", "config, at, causal=False,",
        ("test_gpt2", "does_not_see")),
    "a token sees those after it when computed again": Mutant(
        "comet_np/models/gpt2.py", "grads.blocks, config, causal=True)",
        "grads.blocks, config, causal=False)", ("test_gpt2", "bit_for_bit and GPT")),
    "no table of positions": Mutant(
        "comet_np/functional/tokens.py", "return p.tokens[tokens] + p.positions[first:first + T],",
        "return p.tokens[tokens] + 0 * p.positions[first:first + T],",
        ("test_gpt2", "number_by_number and bodies")),
    "no gradient of the head": Mutant(
        "comet_np/models/gpt2.py", "params.head, grads.head,",
        "params.head, Linear(grads.head.weight.copy(), None),", ("test_gpt2", "both_its_places")),
    "maps back that begin too small": Mutant(
        "comet_np/models/gpt2.py", "STD / math.sqrt(2 * config.depth)", "STD / (2 * config.depth)",
        ("test_gpt2", "laws_of_the_initial")),
    "all blocks begin alike": Mutant(
        "comet_np/models/gpt2.py", 'STD, "block", i, "qkv")', 'STD, "block", 0, "qkv")',
        ("test_gpt2", "drawn_for_itself")),
    "dropout anew when computed again": Mutant(
        "comet_np/models/block.py", "(cache.m,), cache.at, causal)",
        "(cache.m,), cache.at._replace(step=cache.at.step + 1), causal)",
        ("test_gpt2", "bit_for_bit")),
    "masks that are forgotten": Mutant(
        "comet_np/models/block.py", "BlockInput(x, cache.branch.mlp.hidden[0].m, config.hidden,",
        "BlockInput(x, None, config.hidden,", ("test_gpt2", "bit_for_bit")),
    "the caches are kept all the same": Mutant(
        "comet_np/models/block.py", "if recompute else cache)", "if False else cache)",
        ("test_gpt2", "bit_for_bit")),
    "what is computed again is not counted": Mutant(
        "comet_np/models/gpt2.py", "times = 4 if config.recompute else 3", "times = 3",
        ("test_gpt2", "of_the_products")),
    # --- generation -----------------------------------------------------------------------------
    "every new token at the first position": Mutant(
        "comet_np/generation.py", "params.embedding, first)", "params.embedding)",
        ("test_generation", "token_by_token_are")),
    "the values of all tokens lost": Mutant(
        "comet_np/generation.py", "values[:, :, :stop], config", "0 * values[:, :, :stop], config",
        ("test_generation", "token_by_token_are")),
    "a set too small for its probability": Mutant(
        "comet_np/generation.py", "before < top_p", "before + ranked <= top_p",
        ("test_generation", "by_hand")),
    "--temperature ignored": Mutant(
        "comet_np/generation.py", "axis=-1, keepdims=True)) / temperature",
        "axis=-1, keepdims=True))", ("test_generation", "by_hand")),
    "one text for all seeds": Mutant(
        "comet_np/generation.py", 'stream(seed, "generation")', 'stream(0, "generation")',
        ("test_generation", "a_seed_says")),
    "half a character is printed": Mutant(
        "experiments/generating.py", "len(text) - text.endswith(REPLACEMENT)", "len(text)",
        ("test_generation", "whole_characters")),
    "a vector times the transposed matrix": Mutant(
        "backends/numpy_kernels.py", "trans = (a, 1 - trans) if", "trans = (a, trans) if",
        ("test_layers", "packs_no_matrix")),
    "the last token of a text is not told": Mutant(
        "experiments/training/model.py", 'texts.astype("int64"))', 'texts[:, :-1].astype("int64"))',
        ("test_generation", "logits_of_all_tokens")),
    # --- optimizers -----------------------------------------------------------------------------
    "--momentum ignored": Mutant(
        "comet_np/optim.py", "lr, config.momentum,", "lr, 0.9,", ("test_optim", "formulas")),
    "--beta1 ignored": Mutant(
        "comet_np/optim.py", "step, lr, config.beta1,", "step, lr, 0.9,",
        ("test_optim", "formulas")),
    "--eps ignored": Mutant(
        "comet_np/optim.py", "config.beta2, config.eps,", "config.beta2, 1e-8,",
        ("test_optim", "formulas")),
    "decay of biases": Mutant(
        "comet_np/optim.py", "(slice(matrices, p.size), 0.0)",
        "(slice(matrices, p.size), config.weight_decay)", by_hand("no_biases or biases")),
    "the other sign of the L1 penalty": Mutant(
        "comet_np/optim.py", "g[:matrices] += config.l1", "g[:matrices] -= config.l1",
        by_hand("all_of_it or biases or all")),
    "the other sign of the L1 penalty of SGD": Mutant(
        "backends/numpy_kernels.py", "new -= signs", "new += signs", by_hand("L1")),
    "clipping by value ignored": Mutant(
        "comet_np/optim.py", "clip_value(g, config.clip_value / scale)", "pass",
        by_hand("clip_value")),
    # --- masks ----------------------------------------------------------------------------------
    "dropout ignores the step": Mutant(
        "comet_np/models/mlp.py", '"dropout", layer), at.step)', '"dropout", layer), 0 * at.step)',
        by_hand("dropout")),
    "Bernoulli masks by the place in the batch": Mutant(
        "comet_np/gates/bernoulli.py", "example_mask(examples(at, x), N,",
        "example_mask(xp_of(x).arange(len(examples(at, x))), N,",
        ("test_gates", "an_example_has_one_mask")),
    "the last neurons generalise": Mutant(
        "comet_np/gates/bernoulli.py", "xp.arange(N) < int(q * N)",
        "xp.arange(N) >= N - int(q * N)",
        ("test_gates", "generalisation_neurons")),
    "generalisation neurons in training only": Mutant(
        "comet_np/gates/bernoulli.py", "return tuple(always)", "return (None,) * len(always)",
        ("test_gates", "outside_training")),
    "top-k after the activation": Mutant(
        "comet_np/gates/top_k.py", 'a if self.of == "pre-activation" else', "a if False else",
        ("test_gates", "where_top_k_takes")),
    "layer-wise routing of the network's input": Mutant(
        "comet_np/gates/layerwise.py", "tuple(partial(self._mask, V_l) for V_l in fixed)",
        "tuple(lambda own, a, V_l=V_l: self._mask(V_l, x if x.shape == own.shape else own * 0, a) "
        "for V_l in fixed)", ("test_gates", "one_by_one")),
    "kept masks of another example": Mutant(
        "comet_np/gates/kept.py", "fixed[numbers]", "fixed[numbers - 1]",
        ("test_gates", "kept_masks")),
    "ties of COMET ignored": Mutant(
        "comet_np/gates/comet.py", "self.p_k, self.ties,", 'self.p_k, "strict",',
        by_hand("ties")),
    # --- odd arrays -----------------------------------------------------------------------------
    "subclasses taken for plain arrays": Mutant(
        "backends/base.py", "isinstance(value, np.memmap)", "isinstance(value, np.ndarray)",
        ("test_odd_arrays", "where_users_call and subclass")),
    "arrays within a NamedTuple not looked at": Mutant(
        "backends/__init__.py", "elif isinstance(value, tuple):",
        "elif isinstance(value, tuple):\n            continue",
        ("test_odd_arrays", "by_every_operation and linear_forward")),
    "negative numbers of examples read from the end": Mutant(
        "comet_np/gates/bernoulli.py", "at.example.min()) < 0", "at.example.min()) < -99",
        ("test_odd_arrays", "numbers_of_examples")),
    "fixed weights without a gate ignored": Mutant(
        "comet_np/models/mlp.py", "if any(True for _ in leaves(fixed)):", "if False:",
        ("test_odd_arrays", "without_a_gate")),
    "gradients of other shapes broadcast": Mutant(
        "comet_np/functional/linear.py", "if total.shape != shape:", "if False:",
        ("test_odd_arrays", "would_lose and bodies")),
    "an update of what cannot be written": Mutant(
        "backends/base.py", "a.dtype == g.dtype and writeable(a)", "a.dtype == g.dtype",
        ("test_odd_arrays", "update_of_what_cannot")),
    # --- kernels of the CPU ---------------------------------------------------------------------
    "a sum in the order of the threads": Mutant(
        "backends/numpy_kernels.py", "in sorted(parts))", "in parts)",
        ("test_layers", "order_in_which_blocks")),
    "softplus without its compensation": Mutant(
        "backends/numpy_kernels.py", "    y += lost\n", "",
        ("test_kernels", "exact_to_its_own_size")),
    "another limit of few rows": Mutant(
        "backends/numpy_kernels.py", "FEW_ROWS = 256", "FEW_ROWS = 255",
        ("test_layers", "change_of_memory_order")),
    "masks of few rows unpacked from another byte": Mutant(
        "backends/numpy_kernels.py", "start += -(-N // 8) * 8", "start += N",
        ("test_kernels", "agrees_with_its_body and unpack")),
    "ties to the highest index": Mutant(
        "backends/numpy_kernels.py", "tied & (tied.cumsum(axis=-1) <= places_left)",
        "tied & (tied[:, ::-1].cumsum(axis=-1)[:, ::-1] <= places_left)",
        ("test_kernels", "agrees_with_its_body and kwta")),
    "gradients of a norm in the order of the threads": Mutant(
        "backends/numpy_kernels.py", "in sorted(sums, key=lambda found: found[0])", "in sums",
        ("test_layers", "order_in_which_blocks")),
    "every block of dropout begins with the first number": Mutant(
        "backends/numpy_kernels.py", "block.stop - block.start, step, block.start)",
        "block.stop - block.start, step)", ("test_kernels", "agrees_with_its_body and dropout")),
    "every attention in pieces taken for causal, backwards": Mutant(
        "backends/numpy_kernels.py",
        " and not any(p[..., rows, rows.stop:].any() for rows in pieces)", "",
        ("test_kernels", "agrees_with_its_body and attention_backward")),
    "a piece too long": Mutant(
        "backends/numpy_kernels.py", "ALONE // (T * d)))", "ALONE // (T * d) + 1))",
        ("test_attention", "no_thread_of_blas")),
    "weights of later pieces left as they were": Mutant(
        "backends/numpy_kernels.py", "weights[..., rows, rows.stop:] = 0",
        "weights[..., rows, rows.stop:] += 0",
        ("test_kernels", "agrees_with_its_body and attention_forward")),
    "the first block of heads again and again": Mutant(
        "backends/numpy_kernels.py", "slice(j, j + heads))", "slice(0, heads))",
        ("test_kernels", "agrees_with_its_body and attention_backward")),
    # --- tokens, loss, gelu_new -----------------------------------------------------------------
    "a token that comes again counted once": Mutant(
        "backends/numpy_kernels.py", "rows[order[start:start + count]].sum(axis=0)",
        "rows[order[start]]", ("test_tokens", "one_by_one and kernels")),
    "positions from the first, backwards": Mutant(
        "backends/numpy_kernels.py", "positions = g.positions[first:first + T]",
        "positions = g.positions[:T]", ("test_tokens", "one_by_one and kernels")),
    "tokens looked up whatever they are": Mutant(
        "comet_np/functional/tokens.py", "if low < 0 or high >= V:", "if high >= V:",
        ("test_tokens", "bad_tokens")),
    "a text longer than the context": Mutant(
        "backends/base.py", "and first + tokens.shape[-1] <= len(positions))", ")",
        ("test_tokens", "bad_tokens")),
    "a mean over ignored labels too": Mutant(
        "comet_np/functional/loss.py", "return losses.sum() / counted,", "return losses.mean(),",
        ("test_loss", "left_out")),
    "a gradient of ignored labels": Mutant(
        "backends/numpy_kernels.py", "part[left_out[block]] = 0", "pass",
        ("test_loss", "left_out and kernels")),
    "a gradient of ignored labels by the body": Mutant(
        "comet_np/functional/loss.py", "rows[~kept] = 0", "pass",
        ("test_loss", "left_out and bodies")),
    "a copy written over": Mutant(
        "backends/numpy_kernels.py", "and np.may_share_memory(rows, a))", ")",
        ("test_loss", "every_order_of_memory and kernels")),
    "what is read-only written over": Mutant(
        "comet_np/functional/loss.py", "if in_place and not (writeable(array) and", "if not (",
        ("test_loss", "nothing_can_be_written")),
    "the cube of gelu_new forgotten": Mutant(
        "backends/numpy_kernels.py", "slope *= 3 * GELU_K", "slope *= GELU_K",
        ("test_hidden", "gelu_new")),
    # --- norm, attention, patches ---------------------------------------------------------------
    "eps beside the deviation": Mutant(
        "comet_np/functional/norm.py", "keepdims=True) + eps) ** -0.5",
        "keepdims=True) ** 0.5 + eps) ** -1", ("test_norm", "one_by_one and bodies")),
    "a token does not see itself": Mutant(
        "comet_np/functional/attention.py", "position <= position[:, None]",
        "position < position[:, None] + (position == 0)",
        ("test_attention", "one_by_one and bodies")),
    "scores over the width of all heads": Mutant(
        "comet_np/functional/attention.py", "compute) / math.sqrt(q.shape[-1])  # (..., H, T,",
        "compute) / math.sqrt(qkv.shape[-1] // 3)  # (..., H, T,",
        ("test_attention", "one_by_one and bodies")),
    "no gradient of scores through the dropped weights' factor": Mutant(
        "comet_np/functional/attention.py", "        dP = dP * factor\n", "        pass\n",
        ("test_attention", "test_gradients and bodies")),
    "colours first in a patch": Mutant(
        "comet_np/functional/patches.py", "in (1, 3, 2, 4, 0)))", "in (1, 3, 0, 2, 4)))",
        ("test_patches", "every_pixel")),
    "the class token's gradient reaches the patches' map": Mutant(
        "comet_np/functional/patches.py", "dx = dx[..., 1:, :]", "dx = dx[..., :-1, :]",
        ("test_patches", "test_gradients")),
    # --- models and settings of a grid ----------------------------------------------------------
    "the control without its centring": Mutant(
        "experiments/variants.py", 'f"centred_{run.model.activation}"', "run.model.activation",
        ("test_grid", "controls_do")),
    "a standard model with a gate": Mutant(
        "experiments/grid.py", "panel.kind, gate=None, bias", "panel.kind, bias",
        ("test_grid", "variant_of_the_standard")),
    "dropout at p_k": Mutant(
        "experiments/variants.py", "name: 1 - p_k", "name: p_k",
        ("test_grid", "as_the_paper_defines")),
    "a smaller model that is rounded up": Mutant(
        "experiments/variants.py", "return int(p_k * N)", "return -int(-p_k * N // 1)",
        ("test_grid", "parameter_counts and smaller")),
    "--ties ignored": Mutant(
        "experiments/grid.py", "p_k,\n                                 config.ties)",
        'p_k,\n                                 "strict")', FLAGS),
    "--bias ignored": Mutant(
        "experiments/grid.py", "bias=self.bias", "bias=True", FLAGS),
    "an MLP-Mixer trained at the ViT's rate": Mutant(
        "experiments/vision.py", "lr=self.mixer_lr, ", "", ("test_vision", "reaches_the_cell")),
    "a smaller MLP-Mixer of which one MLP is as large as ever": Mutant(
        "experiments/variants.py", '("hidden", "token_hidden")', '("hidden",)',
        ("test_vision", "change_of_the_standard")),
    "colours normalised by the deviation of all pixels": Mutant(
        "experiments/vision.py", "x.std(axis=2)]", "x.std(axis=(0, 2)) + 0 * x.mean(axis=2)]",
        ("test_vision", "colours_are_normalised")),
    "large networks evaluated a thousand at once": Mutant(
        "experiments/training/config.py", "max(config.training.batch, few)", "10**9",
        ("test_vision", "at_a_time")),
    "--target ignored": Mutant(
        "experiments/grid.py", "spec.validation, spec.target,", "spec.validation, None,",
        ("test_grid", "trained_on_the_data")),
    "flags of nested settings ignored": Mutant(
        "comet_np/settings.py", "own[field.name] = _changed(value, values)",
        "own[field.name] = value", FLAGS),
    "a record that does not tell gates apart": Mutant(
        "comet_np/settings.py", '{"class": type(config).__name__} | {', "{",
        ("test_training", "checkpoint_of_another_run")),
    # --- tables and figures ---------------------------------------------------------------------
    "'less' for 'more'": Mutant(
        "experiments/grid_report.py", "'less' if found.mean > 0 else 'more'",
        "'more' if found.mean > 0 else 'less'", TABLE),
    "the last value for the best": Mutant(
        "experiments/grid_report.py", "sign * (sign * self.value).max()", "self.value[-1]",
        TABLE),
    "intervals of a normal law": Mutant(
        "experiments/intervals.py", "stdtrit(n - 1, (1 + LEVEL) / 2)", "1.96", TABLE),
    "a deviation of the whole population": Mutant(
        "experiments/intervals.py", "ddof=1", "ddof=0", TABLE),
    "a lead over seeds that only one has": Mutant(
        "experiments/grid_report.py", "sorted(one.keys() & other.keys())", "sorted(one.keys())",
        ("test_grid", "seeds_that_both_have")),
    "the worst called the best": Mutant(
        "experiments/grid_report.py", "-sign * _mean_best(found", "sign * _mean_best(found",
        ("test_grid", "best_of_many")),
    "multiply-adds of masks kept as if routed each step": Mutant(
        "experiments/training/config.py", "each = whole if routed else", "each = whole or",
        ("test_grid", "figures_show")),
    "a penalty for every model": Mutant(
        "experiments/grid.py", 'model != "l1"', "False", ("test_grid", "penalty_is_that")),
    "weights by the number of neurons": Mutant(
        "experiments/fig2.py", "W *= 2 / W.shape[1] ** 0.5", "W *= 2 / W.shape[0] ** 0.5",
        ("test_fig2_fig3", "uniform_by")),
    "inputs that share a mean": Mutant(
        "experiments/fig2.py", "size=(2, 1), endpoint=True", "size=1, endpoint=True",
        ("test_fig2_fig3", "integer_mean")),
    "p_k for 1 - p_k": Mutant(
        "experiments/fig3.py", "p_k = 1 - draw.uniform(0.05, 1)", "p_k = draw.uniform(0.05, 1)",
        ("test_fig2_fig3", "laws_of_the_paper")),
    "utilisation of the first block": Mutant(
        "experiments/fig3.py", "count += unpacked(m, len(count)).sum(axis=0)",
        "count[:] = unpacked(m, len(count)).sum(axis=0)",
        ("test_fig2_fig3", "counting_one_by_one")),
    # --- the soft mixture of experts ------------------------------------------------------------
    "soft dispatch over the slots": Mutant(
        "comet_np/functional/soft_mixture.py", "softmax(logits, axis=-2)",
        "softmax(logits, axis=-1)", ("test_soft_moe", "that_of_the_definition")),
    "soft combination of all experts": Mutant(
        "comet_np/functional/soft_mixture.py", "axis=-1, kept=kept)", "axis=-1)",
        ("test_soft_moe", "experts_that_are_kept")),
    "soft experts left out after the softmax": Mutant(
        "comet_np/functional/softmax.py", "a = xp.where(kept, a, -xp.inf)\n    powers =",
        "pass\n    powers = (1 if kept is None else kept) *",
        ("test_soft_moe", "however_small")),
    "soft logits of the combination alone": Mutant(
        "comet_np/models/soft_moe.py", "dlogits + of_dispatch", "dlogits",
        ("test_soft_moe", "test_gradients")),
    "soft tokens that make no logits": Mutant(
        "comet_np/models/soft_moe.py", "dx + through_logits", "dx",
        ("test_soft_moe", "test_gradients")),
    "soft experts that start alike": Mutant(
        "comet_np/models/soft_moe.py", '("expert", number)', '("expert", 0)',
        ("test_soft_moe", "drawn_apart")),
    "soft logits in a format": Mutant(
        "comet_np/models/soft_moe.py", "linear_forward(x, routing)",
        "linear_forward(x, routing, config.compute)", ("test_soft_moe", "in_the_format")),
    "soft experts of the smallest weights": Mutant(
        "experiments/softmoe.py", "kwta_mask(each, K", "kwta_mask(-each, K",
        ("test_softmoe", "counting_one_by_one")),
    "soft experts of the first token": Mutant(
        "experiments/softmoe.py", "slots // experts).sum(axis=(1, 3))",
        "slots // experts)[:, 0].sum(axis=-1)", ("test_softmoe", "largest_total_weight")),
    "an image beside itself": Mutant(
        "experiments/routing.py", "active * (active - 1)", "active * active",
        ("test_routing_inputs", "counting_one_by_one")),
    "masks kept, of those before training": Mutant(
        "experiments/routing.py", "(start & end).sum() / total",
        "(start & end).sum() / start.sum()",
        ("test_routing_inputs", "ties_leave")),
    "masks of another seed": Mutant(
        "experiments/routing.py", "init(model, spec.run.seed,", "init(model, 0,",
        ("test_routing_inputs", "those_of_its_seed")),
    "a curve of another run's length": Mutant(
        "experiments/routing.py",
        "curve.reshape(config.training.lines(examples(config, config.dataset)), 2)", "curve",
        ("test_routing_inputs", "forged")),
    "a Jacobian without its masks": Mutant(
        "experiments/ntk.py", "slope = slope * m", "pass", ("test_ntk", "full_jacobians")),
    "eq. (11) as printed": Mutant(
        "experiments/ntk.py", "x, J = one.x[layer]", "x, J = one.a[layer]",
        ("test_ntk", "full_jacobians")),
    "a kernel centred by the ways too": Mutant(
        "experiments/ntk.py", "K[:, :n].mean(axis=1)", "K.mean(axis=1)",
        ("test_ntk", "less_their_mean")),
    "one set of images for all seeds": Mutant(
        "experiments/ntk.py", "spec.run.seed * count + np", "np",
        ("test_ntk", "while_they_last")),
    "the true product for the printed one": Mutant(
        "experiments/ntk.py", "for each in (of_a, of_x))", "for each in (of_x, of_a))",
        ("test_ntk", "printed_equation_is_off")),
    # --- measures of masks ----------------------------------------------------------------------
    "an overlap over N": Mutant(
        "comet_np/analysis.py", "both / xp.sqrt(of_one[:, None] * of_other)",
        "both / one.shape[1]", ("test_analysis", "common_neurons")),
    "an overlap over the active of one": Mutant(
        "comet_np/analysis.py", "xp.sqrt(of_one[:, None] * of_other)",
        "xp.maximum(of_one[:, None], 0 * of_other)", ("test_analysis", "common_neurons")),
    "entropy in bits": Mutant(
        "comet_np/analysis.py", "(p * np.log(p)).sum()", "(p * np.log2(p)).sum()",
        ("test_analysis", "effective_number")),
    "an example nearest to itself": Mutant(
        "comet_np/analysis.py", "xp.fill_diagonal(others, -math.inf)", "pass",
        ("test_analysis", "nearest_others")),
    "the farthest for the nearest": Mutant(
        "comet_np/analysis.py", "xp.argsort(-others,", "xp.argsort(others,",
        ("test_analysis", "nearest_others")),
    "natural logarithms for those to base 10": Mutant(
        "comet_np/functional/routing.py", "/ math.log(10)", "",
        ("test_routing", "number_of_experts")),
    "masks seen once taken for those seen twice": Mutant(
        "comet_np/analysis.py", "for times in (1, 2))", "for times in (2, 1))",
        ("test_analysis", "chao1")),
    "coincidences of ordered pairs": Mutant(
        "comet_np/analysis.py", "(counts * (counts - 1)).sum() / 2",
        "(counts * (counts - 1)).sum()",
        ("test_analysis", "coincidences")),
    "as many coincidences as were seen": Mutant(
        "comet_np/analysis.py", "gammaincinv(coincident + 1, 0.975)", "max(coincident, 1)",
        ("test_analysis", "coincidences")),
    "a code of neurons by themselves": Mutant(
        "comet_np/analysis.py", "parent = _tree(information)",
        "parent = _tree(np.zeros_like(information))", ("test_analysis", "of_a_chain")),
    "a code without its root": Mutant(
        "comet_np/analysis.py",
        "lengths - np.where(others[:, root], np.log(p[1][root]), np.log(p[0][root]))", "lengths",
        ("test_analysis", "of_a_probability")),
    "subsets counted one too few": Mutant(
        "comet_np/analysis.py", "range(min(dimensions, N - 1) + 1)",
        "range(min(dimensions, N - 1))",
        ("test_analysis", "separable")),
    "the images of the training set alone": Mutant(
        "experiments/masks.py", "(data.x_train, data.x_val, data.x_test)", "(data.x_train,)",
        ("test_diversity", "of_all_splits")),
    "one draw of images for all seeds": Mutant(
        "experiments/masks.py", 'stream(seed, "images")', 'stream(0, "images")',
        ("test_diversity", "of_all_splits")),
    "bytes routed as they are": Mutant(
        "experiments/masks.py", "images.scale, images.shift,", "1.0, 0.0,",
        ("test_diversity", "of_equations_4_to_6")),
    "a code tried on what it learnt from": Mutant(
        "experiments/diversity.py", "masks[::2], masks[1::2]", "masks[::2], masks[::2]",
        ("test_diversity", "those_of_counting")),
    "within and between classes swapped": Mutant(
        "experiments/diversity.py", '(("within", self.same), ("between", ~self.same))',
        '(("within", ~self.same), ("between", self.same))',
        ("test_diversity", "within_and_between_classes")),
    "pairs binned by their order": Mutant(
        "experiments/diversity.py", "of_bin[np.argsort(cosine)] = ", "of_bin[:] = ",
        ("test_diversity", "within_and_between_classes")),
    "an image beside itself, of its class": Mutant(
        "experiments/diversity.py", "np.triu_indices(len(x), 1)", "np.triu_indices(len(x))",
        ("test_diversity", "within_and_between_classes")),
    "dimensions around 0, not the mean": Mutant(
        "experiments/diversity.py", "    x -= x.mean(axis=0)\n", "",
        ("test_diversity", "hold_shares")),
    "a bound in nats for one to base 10": Mutant(
        "experiments/diversity.py", 'single["nats"] / np.log(10)', 'single["nats"]',
        ("test_diversity", "table_says")),
    "a bound above all possible masks": Mutant(
        "experiments/diversity.py", "np.minimum(single[", "np.maximum(single[",
        ("test_diversity", "table_says")),
    "experts of one layer for those of all": Mutant(
        "experiments/diversity.py", 'config.hidden if kind.layer == "all" else 1', "1",
        ("test_diversity", "possible_masks_of_all_layers")),
    "a class's share whatever the cosine": Mutant(
        "experiments/diversity.py", "each[known].mean() for each in more",
        "np.nansum(each) / len(each) for each in more", ("test_diversity", "bin_by_bin")),
    "the inner pixels for the background": Mutant(
        "experiments/interpret.py", "x[:, :, outside]", "x[:, :, ~outside]",
        ("test_interpret", "pixel_by_pixel")),
    "the lower half above": Mutant(
        "experiments/interpret.py", "halves[:, 0] - halves[:, 1]", "halves[:, 1] - halves[:, 0]",
        ("test_interpret", "pixel_by_pixel")),
    "left over for explained": Mutant(
        "experiments/interpret.py", "return float(1 - left /", "return float(left /",
        ("test_interpret", "share_that_is_left")),
    "the first image for the mean of the near": Mutant(
        "experiments/interpret.py", "values[near].mean(axis=1)", "values[near[:, 0]]",
        ("test_interpret", "share_that_is_left")),
    "distance for nearness": Mutant(
        "experiments/interpret.py", "2 * (x @ x.T) - square[:, None] - square",
        "square[:, None] + square - 2 * (x @ x.T)", ("test_interpret", "of_the_definitions")),
    "chance of the largest class": Mutant(
        "experiments/interpret.py", "(frequency**2).sum()", "frequency.max()",
        ("test_interpret", "foretold_by_the_nearest")),
    "pictures of the farthest first": Mutant(
        "experiments/interpret.py", "np.argsort(-np.where(", "np.argsort(np.where(",
        ("test_interpret", "order_of_nearness")),
    "pixels ahead of masks": Mutant(
        "experiments/interpret.py", "advantage(masks[name], pixels[name], 1)",
        "advantage(pixels[name], masks[name], 1)", ("test_interpret", "table_says")),
    # --- seeds apart, and p_k -------------------------------------------------------------------
    "a deviation without the lost degree of freedom": Mutant(
        "experiments/stability.py", "float(np.std(values, ddof=1)), len(values) - 1",
        "float(np.std(values)), len(values) - 1", ("test_stability", "their_distributions")),
    "tails of chi-square swapped": Mutant(
        "experiments/stability.py", "chdtri(free, TAILS)", "chdtri(free, TAILS[::-1])",
        ("test_stability", "their_distributions")),
    "a ratio of variances upside down": Mutant(
        "experiments/stability.py", "np.var(one, ddof=1) / np.var(other, ddof=1)",
        "np.var(other, ddof=1) / np.var(one, ddof=1)", ("test_stability", "their_distributions")),
    "the F distribution of the other order": Mutant(
        "experiments/stability.py", "fdtri(len(one) - 1, len(other) - 1,",
        "fdtri(len(other) - 1, len(one) - 1,", ("test_stability", "their_distributions")),
    "rows for columns in the shares": Mutant(
        "experiments/stability.py", "np.array([y.size * rows.var(), y.size * cols.var(),",
        "np.array([y.size * cols.var(), y.size * rows.var(),",
        ("test_stability", "analysis_of_variance")),
    "the pair left in the share of the rows": Mutant(
        "experiments/stability.py", "np.maximum(of_rows - pair, 0)", "of_rows",
        ("test_stability", "analysis_of_variance")),
    "shares without a chance of their own": Mutant(
        "experiments/stability.py", "drawn = parts(stream(", "drawn = parts(free + 0 * stream(",
        ("test_stability", "hold_the_truth")),
    "backbones that differ for one": Mutant(
        "experiments/stability.py", "((0, n), (n, 0), (n, None))", "((n, n), (n, 0), (n, None))",
        ("test_stability", "both_arms")),
    "V of the backbone's seed": Mutant(
        "experiments/stability.py", "config.training, backbone, routing)",
        "config.training, backbone, None)", ("test_stability", "both_arms")),
    "a block across": Mutant(
        "experiments/stability.py", "by_seeds.get((i, j), np.nan)", "by_seeds.get((j, i), np.nan)",
        ("test_stability", "figure_shows")),
    "masks differ from themselves": Mutant(
        "experiments/sensitivity.py", "/ (n * (n - 1))", "/ n**2",
        ("test_sensitivity", "of_all_pairs")),
    "p_k for neurons that differ": Mutant(
        "experiments/sensitivity.py", "active * (n - active)", "active * active",
        ("test_sensitivity", "of_all_pairs")),
    "masks of the validation set": Mutant(
        "experiments/sensitivity.py", "data.x_train[:EXAMPLES]", "data.x_val[:EXAMPLES]",
        ("test_sensitivity", "its_masks_differ")),
    "the best by the seeds' own luck": Mutant(
        "experiments/sensitivity.py", "self.values[seeds != seed] if len(seeds) > 1 else",
        "self.values[seeds == seed] if len(seeds) > 1 else",
        ("test_sensitivity", "other_seeds")),
    "the best of an error is the largest": Mutant(
        "experiments/sensitivity.py", "int((self.sign * self.values.mean(axis=0)).argmax())",
        "int(self.values.mean(axis=0).argmax())", ("test_sensitivity", "in_percent")),
    "more error of the larger one": Mutant(
        "experiments/sensitivity.py", "gain = advantage(taken, self.at_best, self.sign)",
        "gain = advantage(self.at_best, taken, self.sign)._replace(mean=-advantage("
        "self.at_best, taken, self.sign).mean)", ("test_sensitivity", "in_percent")),
    "k kept as p_k": Mutant(
        "experiments/sensitivity.py", "first.panel.size / case.panel.size",
        "case.panel.size / first.panel.size", ("test_sensitivity", "rule_chooses")),
    "the p_k of the case for that of the first": Mutant(
        "experiments/sensitivity.py", "case.nearest(first.p_k[first.best]),", "case.best,",
        ("test_sensitivity", "rule_chooses")),
    "levels nearest by their difference": Mutant(
        "experiments/sensitivity.py", "np.abs(np.log(self.p_k / p_k))", "np.abs(self.p_k - p_k)",
        ("test_sensitivity", "rule_chooses")),
    "a rule chosen where it is judged": Mutant(
        "experiments/sensitivity.py", "behind(RULES[name], first, own)), own, others",
        "behind(RULES[name], first, others)), own, others",
        ("test_sensitivity", "first_data_set_alone")),
    "widths of the first data set for other data sets": Mutant(
        "experiments/sensitivity.py",
        "others = [case for case in found if case.panel.dataset != first.panel.dataset]",
        "others = found[1:]", ("test_sensitivity", "first_data_set_alone")),
    "steps with what comes before the first": Mutant(
        "experiments/sensitivity.py", "float(curve.seconds[-1] - curve.seconds[0])",
        "float(curve.seconds[-1])", ("test_sensitivity", "table_says")),
    "a step's time upside down": Mutant(
        "experiments/sensitivity.py", "times.append(one / other)", "times.append(other / one)",
        ("test_sensitivity", "table_says")),
    "the p_k of another level": Mutant(
        "experiments/sensitivity.py", "[first._replace(p_k=level) for level in config.p_k]",
        "[first._replace(p_k=level) for level in config.p_k[::-1]]",
        ("test_sensitivity", "left_out")),
    "patches counted down for across": Mutant(
        "experiments/pooled.py", "transpose(0, 2, 4, 1, 3, 5)", "transpose(0, 4, 2, 1, 3, 5)",
        ("test_softmoe", "patches_with")),
    # --- data sets of images --------------------------------------------------------------------
    "each pixel's number for each plane's": Mutant(
        "experiments/datasets/base.py", "return np.repeat(np.array(value, dtype), N // len(value))",
        "return np.tile(np.array(value, dtype), N // len(value))",
        ("test_normalised", "own_mean")),
    "an image mirrored by its height": Mutant(
        "experiments/datasets/augment.py", "mirrored * (width - 1)", "mirrored * (height - 1)",
        ("test_augment", "every_choice")),
    "SVHN on its side": Mutant(
        "experiments/datasets/svhn.py", "x.transpose(3, 2, 0, 1)", "x.transpose(3, 2, 1, 0)",
        ("test_svhn", "every_form and plain")),
    "the digit 10": Mutant(
        "experiments/datasets/svhn.py", ".astype(np.int64) % 10", ".astype(np.int64) - 1",
        ("test_svhn", "every_form and plain")),
    "every Tiny ImageNet is whole": Mutant(
        "experiments/datasets/__init__.py", "entry.sizes if whole else", "entry.sizes if True else",
        ("test_tiny_imagenet", "what_is_there")),
    "Tiny ImageNet's classes as they come": Mutant(
        "experiments/datasets/tiny_imagenet.py", "for name in sorted(names):", "for name in names:",
        ("test_tiny_imagenet", "every_form_has")),
    # --- data of one's own, and trained models --------------------------------------------------
    "standardised by all examples": Mutant(
        "experiments/datasets/own.py", "_moments(x[rows[0]], name)", "_moments(x, name)",
        ("test_own_data", "training_part_alone")),
    "targets standardised by all examples": Mutant(
        "experiments/datasets/own.py", "_moments(y[rows[0]], name)", "_moments(y, name)",
        ("test_own_data", "training_part_alone")),
    "a constant column as rounding has it": Mutant(
        "experiments/datasets/own.py", "(values == values[0]).all(axis=0) | (std == 0)", "std == 0",
        ("test_own_data", "constant_column")),
    "every first line has names": Mutant(
        "experiments/datasets/own.py", "return len(text) == len(first) or", "return bool(text) or",
        ("test_own_data", "every_form")),
    "a number is a place before it is a name": Mutant(
        "experiments/datasets/own.py", "for names in (columns, numbers):",
        "for names in (numbers, columns):",
        ("test_own_data", "of_that_name")),
    "a file that is not read again": Mutant(
        "experiments/datasets/own.py", "return found.st_mtime_ns, found.st_size", "return 0, 0",
        ("test_own_data", "not_mixed_in or follow_its_changes")),
    "the digest of the training set alone": Mutant(
        "experiments/datasets/base.py", "(self.x_train, self.y_train, self.x_val, self.y_val,",
        "(self.x_train, self.y_train) or (self.x_val, self.y_val,",
        ("test_own_data", "digest_is_of_every")),
    "a changed record is believed": Mutant(
        "comet_np/records.py", "if known != found:", "if known is None:",
        ("test_records", "any_byte")),
    "changed metrics are believed": Mutant(
        "comet_np/records.py", "if hashlib.sha256(content).hexdigest() != known.get(path.name):",
        "if path.name not in known:", ("test_records", "changed_digit")),
    "routing weights that are not kept": Mutant(
        "comet_np/interop/__init__.py", "return mlp_to_torch(params, fixed)",
        "return mlp_to_torch(params)", ("test_trained", "round_trip and Comet")),
    "a gate of one's own under the published names": Mutant(
        "comet_np/interop/torch_mlp.py", "is Gate.init or routing_shapes(config) is not None",
        "is Gate.init or True", ("test_trained", "round_trip and Planes")),
    "other units are the same data": Mutant(
        "experiments/fit.py", "found.data.as_json()) != (record(config), Data.of(data).as_json())",
        "found.data.digest) != (record(config), data.digest)",
        ("test_trained", "left_alone")),
    "predictions in standard units": Mutant(
        "experiments/tasks/base.py", "output * preparation.y_std + preparation.y_mean", "output",
        ("test_trained", "those_of_the_files")),
    "numbers of classes for labels": Mutant(
        "experiments/tasks/classification.py", "np.array(preparation.classes)[numbers]", "numbers",
        ("test_trained", "labels_and_units")),
    "a model that products do not round": Mutant(
        "experiments/training/model.py", "config, weights = computing(run), folder / WEIGHTS",
        "config, weights = run.model, folder / WEIGHTS", ("test_trained", "rounded_format")),
    "a copied task has another name": Mutant(
        "experiments/training/model.py", "if type(task) is type(self.task)", "if task is self.task",
        ("test_trained", "a_copy")),
    # --- files, cells, workers ------------------------------------------------------------------
    "a file written in place": Mutant(
        "comet_np/checkpoint.py", 'path.with_name(f"{path.name}.{os.getpid()}.tmp")', "path",
        ("test_checkpoint", "a_reader_sees")),
    "one temporary name for all processes": Mutant(
        "comet_np/checkpoint.py", ".{os.getpid()}.tmp", ".tmp",
        ("test_checkpoint", "each_others_file")),
    "a file named before it is on the disk": Mutant(
        "comet_np/checkpoint.py", "os.fsync(file.fileno())", "pass",
        ("test_checkpoint", "before_it_takes_the_name")),
    "starts overwritten": Mutant(
        "experiments/cell.py", '"starts.jsonl", "a")', '"starts.jsonl", "w")',
        ("test_sweep", "every_start")),
    "no second look under the lock": Mutant(
        "experiments/cell.py", "if cell.result(job.out) is not None:  # finished by",
        "if False:  # finished by", ("test_sweep", "another_sweep_finishes")),
    "a lock that two may hold": Mutant(
        "experiments/files.py", "fcntl.LOCK_EX", "fcntl.LOCK_SH", ("test_sweep", "hold_a_lock")),
    "two trainings in one folder": Mutant(
        "experiments/fit.py", "if not ours:", "if False:", ("test_trained", "two_do_not_train")),
    "data that each thread loads": Mutant(
        "experiments/grid.py", "with _loading:", "with threading.Lock():",
        ("test_grid", "begin_together")),
    "checkpoints removed before the result is there": Mutant(
        "experiments/files.py",
        "    write_result(folder, result)\n",
        '    for file in folder.glob("checkpoint*"):\n        file.unlink()\n'
        "    write_result(folder, result)\n", ("test_sweep", "checkpoint")),
    "a failed cell ends the sweep": Mutant(
        "experiments/cell.py", "except Exception as error:", "except LookupError as error:",
        ("test_sweep", "does_not_end_the_other_threads")),
    "threads not shared out": Mutant(
        "experiments/workers.py", "str(max(1, threads() // at_once))", "str(threads())",
        ("test_sweep", "share_out_the_threads")),
    "a process that outlives its killed parent": Mutant(
        "experiments/workers.py", "        parent.join()\n",
        "        above = os.getppid()\n        while os.getppid() == above:\n"
        "            time.sleep(0.1)\n", ("test_processes", "outlives")),
    "workers that hear Ctrl-C before they are ready": Mutant(
        "experiments/workers.py", "with _born_deaf(), suppress(BrokenProcessPool):",
        "with suppress(BrokenProcessPool):", ("test_processes", "stops_all and import")),
    "a second SIGHUP that costs the checkpoint": Mutant(
        "experiments/signals.py", "        if number == signal.SIGINT:\n", "        if True:\n",
        ("test_training", "second_ctrl_c")),
    "a cell begun after Ctrl-C": Mutant(
        "experiments/workers.py", "if stop.asked:\n            return",
        "if False:\n            return",
        ("test_sweep", "stops_all_threads")),
    "progress that is not told": Mutant(
        "experiments/workers.py", '        self._send("")\n', "",
        ("test_sweep", "tells_all")),
    # --- gradient checks, names of PyTorch ------------------------------------------------------
    "a jump taken for a derivative": Mutant(
        "comet_np/gradcheck.py", '                if flip:\n',
        '                if False:\n', ("test_gradcheck", "reported_with_its_margin")),
    "nothing compared taken for right": Mutant(
        "comet_np/gradcheck.py", 'return "UNDECIDED"',
        'return "ok"', ("test_gradcheck", "nothing_compared or only_flips")),
    "the best verdict for that of all": Mutant(
        "comet_np/gradcheck.py", "return min((array.verdict",
        "return max((array.verdict", ("test_gradcheck", "verdict_of_its_own")),
    "cotangents of ones": Mutant(
        "comet_np/gradcheck.py", "draw.standard_normal(like.shape)",
        "np.ones(like.shape)", ("test_gradcheck", "cotangents_of_ones")),
    "not a number taken for right": Mutant(
        "comet_np/gradcheck.py", "< math.inf > scale else math.inf",
        "< math.inf > scale else 0.0", ("test_gradcheck", "wrong_backward_passes")),
    "the margin of another row": Mutant(
        "comet_np/gradcheck.py", "to_host(c)[flip.row]",
        "to_host(c)[(0,) * len(flip.row)]", ("test_gradcheck", "reported_with_its_margin")),
    "a step that moves nothing": Mutant(
        "comet_np/gradcheck.py", "if moves < EPS * largest:",
        "if False:", ("test_gradcheck", "points_that_are or options")),
    "outputs that the next call fills": Mutant(
        "comet_np/gradcheck.py", "return y.copy(), cache",
        "return y, cache", ("test_gradcheck", "buffers")),
    "masks that the next call fills": Mutant(
        "comet_np/gradcheck.py", "tree_map(lambda m: m.copy(), tuple(masks(cache)))",
        "tuple(masks(cache))", ("test_gradcheck", "buffers")),
    "gradients that the next call fills": Mutant(
        "comet_np/gradcheck.py", "yield gradients.copy()",
        "yield gradients", ("test_gradcheck", "buffers")),
    "a forward that writes into the caller's arrays": Mutant(
        "comet_np/gradcheck.py", "at = tree_map(lambda x: x.copy(), at)",
        "at = at", ("test_gradcheck", "writes_into")),
    "a forward that writes into its input": Mutant(
        "comet_np/gradcheck.py", '_check_untouched("forward", inputs, given)',
        "pass", ("test_gradcheck", "writes_into")),
    "a backward that writes into its input": Mutant(
        "comet_np/gradcheck.py", '_check_untouched("backward", inputs, given)',
        "pass", ("test_gradcheck", "writes_into")),
    "a backward that writes into the cache": Mutant(
        "comet_np/gradcheck.py", '_check_untouched("backward", kept, before)',
        "pass", ("test_gradcheck", "writes_into")),
    "a backward that writes into the cotangent": Mutant(
        "comet_np/gradcheck.py", "own = dy.copy()",
        "own = dy", ("test_gradcheck", "writes_into")),
    "a forward that draws at random": Mutant(
        "comet_np/gradcheck.py", "CENTRAL_STEP**2 * _norm(y)",
        "math.inf", ("test_gradcheck", "draws_at_random")),
    "gradients of another structure": Mutant(
        "comet_np/gradcheck.py", "if _kind(of) != _kind(gradients):",
        "if False:", ("test_gradcheck", "gradients_that_are_refused")),
    "the right arrays first": Mutant(
        "comet_np/gradcheck.py", "(VERDICTS.index(array.verdict), -array.error))",
        "-VERDICTS.index(array.verdict))", ("test_gradcheck", "wrong_ones_first")),
    "routing weights dropped silently": Mutant(
        "comet_np/interop/torch_mlp.py", "(routing is None or name !=",
        '(name[:5] != "spec_" or name !=', ("test_interop", "gate_does_not_use")),
    "kept bits under the names of a router": Mutant(
        "comet_np/interop/torch_mlp.py", "if type(fixed) is not tuple or",
        "if False and", ("test_interop", "without_names")),
    "names for gates of the package only": Mutant(
        "comet_np/interop/torch_mlp.py", "type(config.gate).init is Gate.init",
        "not isinstance(config.gate, Routed)", ("test_interop", "gate_of_ones_own")),
    "a patch read column by column": Mutant(
        "comet_np/interop/torch_vit.py", "(D, C, P, P), (0, 2, 3, 1)", "(D, C, P, P), (0, 3, 2, 1)",
        ("test_interop_vision", "every_gradient and timm")),
    "the names of one style": Mutant(
        "comet_np/interop/torch_vit.py",
        "max(STYLES, key=lambda style: matches(named, places_of(config, style)))", '"published"',
        ("test_interop_vision", "some_of_the_names")),
    "a norm before pooling under the name of one after": Mutant(
        "comet_np/interop/torch_vit.py", ' and config.final_norm == "pooled":', ":",
        ("test_interop_vision", "there_and_back and timm")),
    "routing weights of a ViT that are not kept": Mutant(
        "comet_np/interop/__init__.py", "return vit_to_torch(params, fixed, config)",
        "return vit_to_torch(params, (), config)", ("test_interop_vision", "for_every_gate")),
    "a gate that transformers leaves out": Mutant(
        "comet_np/interop/huggingface_config.py",
        "if config.gate is not None or config.scale != 1:", "if config.scale != 1:",
        ("test_interop_vision", "not_written")),
    "a tensor of another shape": Mutant(
        "comet_np/interop/places.py", "if given.get(name) not in (None, shape)]", "if False]",
        ("test_interop_vision", "do_not_fit")),
    "maps of GPT-2 as PyTorch's Linear has them": Mutant(
        "comet_np/interop/torch_gpt2.py", "weight.shape, weight.shape[::-1], (1, 0))",
        "weight.shape)", ("test_interop_gpt2", "every_gradient and eager")),
    "a square map of GPT-2 as PyTorch's Linear has it": Mutant(
        "comet_np/interop/torch_gpt2.py", "_map(block.attention.out,", "layer(block.attention.out,",
        ("test_interop_gpt2", "every_gradient and eager")),
    "a head of its own is the table of tokens": Mutant(
        "comet_np/interop/torch_gpt2.py", "    _check_tied(array_of(HEAD, head),",
        "    (array_of(HEAD, head),", ("test_interop_gpt2", "do_not_fit")),
    "GPT-2's names with their prefix only": Mutant(
        "comet_np/interop/torch_gpt2.py", 'for prefix in (PREFIX, "")', "for prefix in (PREFIX,)",
        ("test_interop_gpt2", "old_files")),
    "all that ends in bias is a mask of old files": Mutant(
        "comet_np/interop/torch_gpt2.py", r"attn\.(masked_)?bias", r"attn\..*bias",
        ("test_interop_gpt2", "every_gradient and eager")),
    "routing weights of a GPT-2 that are not kept": Mutant(
        "comet_np/interop/__init__.py", "return gpt2_to_torch(params, fixed, config)",
        "return gpt2_to_torch(params, (), config)", ("test_interop_gpt2", "for_every_gate")),
    "a GPT-2 of other rules is read as ours": Mutant(
        "comet_np/interop/huggingface_config.py", "if _value(values, name, ours) != ours:",
        "if False:", ("test_interop_gpt2", "other_architectures")),
    "the embedding's dropout for the branches' too": Mutant(
        "comet_np/interop/huggingface_config.py", "if resid != embd:", "if False:",
        ("test_interop_gpt2", "other_architectures")),
    "heads by transformers' common name are not read": Mutant(
        "comet_np/interop/huggingface_config.py", '"num_attention_heads": "n_head"}', "}",
        ("test_interop_gpt2", "transformers_default")),
    # --- the benchmark --------------------------------------------------------------------------
    "a killed worker's children live on": Mutant(
        "benchmarks/processes.py", "os.killpg(worker.pid, signal.SIGKILL)", "worker.kill()",
        ("test_bench", "takes_too_long")),
    "a benchmark that is lost by one worker": Mutant(
        "benchmarks/processes.py", "except WorkerFailed as error:", "except OSError as error:",
        ("test_bench", "outlive_a_failed_one")),
    "results written at the end": Mutant(
        "benchmarks/processes.py", "            self.all_ran = False\n        self.save()",
        "            self.all_ran = False", ("test_bench", "outlive_a_failed_one")),
    "a benchmark against a ViT that routes for nothing": Mutant(
        "benchmarks/vision_workers.py", "h = m * h", "h = 1 * h",
        ("test_bench", "pytorch_takes_our_step_of_each_vision")),
    "a benchmark against another mixture": Mutant(
        "benchmarks/model_workers.py", "weight[mine, None] * mlp(", "mlp(",
        ("test_bench", "pytorch_takes and moe")),
    "SIGHUP that is heard under nohup": Mutant(
        "experiments/signals.py", "not in (signal.SIG_IGN, None)", "is not None",
        ("test_processes", "ignored_stays")),
    "a request that a library may swallow": Mutant(
        "experiments/signals.py", "stop = _of_command or Stop()", "stop = Stop()",
        ("test_processes", "swallowed")),
    "a line for each step in a file": Mutant(
        "experiments/progress.py", "(0.1 if self._terminal else LINE_EVERY)", "0.1",
        ("test_streams", "a_minute")),
    "output that ends a run": Mutant(
        "experiments/streams.py", "except OSError as error:", "except LookupError as error:",
        ("test_streams", "first_error")),
    "a formula in a name": Mutant(
        "experiments/figures.py", 'text.replace("$", r"\\$")', "text",
        ("test_streams", "dollar")),
    "a figure written in place": Mutant(
        "experiments/figures.py", "write_atomically(file, png.getbuffer())",
        "file.write_bytes(png.getbuffer())", ("test_streams", "whole_or_not")),
    "one remedy for all errors": Mutant(
        "comet_np/errors.py", "REMEDIES.get(error.errno or 0, _ELSEWHERE)",
        "REMEDIES[errno.ENOSPC]", ("test_streams", "remedy")),
    # --- the fair fight -------------------------------------------------------------------------
    "infer reads all neurons": Mutant(
        "comet_np/models/mlp.py", "m.any(axis=0)", "m.any(axis=0) >= 0",
        ("test_infer", "not_read")),
    "infer takes what all neurons would": Mutant(
        "comet_np/models/mlp.py", "b[winners]", "b[:len(winners)]",
        ("test_infer", "forward_gives")),
    "infer gathers once": Mutant(
        "comet_np/models/mlp.py", "range(0, len(winners), step or 1)", "range(1)",
        ("test_infer", "few_at_once")),
    "a wrong inference is timed": Mutant(
        "benchmarks/inference_workers.py", "if not error <= CLOSE:", "if error == CLOSE:",
        ("test_bench", "not_timed")),
    "PyTorch's other masks are timed": Mutant(
        "benchmarks/inference_workers.py", "> FLIPPED:", "> 1:", ("test_bench", "refused_where")),
    "He's variance halved": Mutant(
        "comet_np/models/mlp.py", "math.sqrt(2 / N_in)", "math.sqrt(1 / N_in)",
        ("test_mlp", "of_he")),
    "a score that diverged as bad input": Mutant(
        "experiments/training/record.py", "except NaNScore as error:",
        "except LookupError as error:", ("test_training", "no_bad_input")),
    "one seed is enough for a choice": Mutant(
        "experiments/selection.py", "values.mean(axis=1)", "np.nanmean(values, axis=1)",
        ("test_fair", "one_divergence")),
    "the worst setting chosen": Mutant(
        "experiments/selection.py", "np.nanargmax(means)", "np.nanargmin(means)",
        ("test_fair", "is_chosen")),
    "a choice by the last epoch": Mutant(
        "experiments/selection.py", "sign * max(sign * v for v in curve.values)",
        "curve.values[-1]", ("test_fair", "is_chosen")),
    "a choice that sees the test set": Mutant(
        "experiments/selection.py", "trained(setting, seed, without_test,",
        "trained(setting, seed, data,", ("test_fair", "sees_no_test")),
    "reported on the seeds of the choice": Mutant(
        "experiments/selection.py", "chosen=True) for seed in spec.reporting]",
        "chosen=True) for seed in spec.choosing]", ("test_fair", "is_chosen")),
    "one seed for choice and report": Mutant(
        "experiments/selection.py", "set(self.choosing) & set(self.reporting)",
        "set(self.choosing) & set()", ("test_fair", "bad_settings")),
    "a finished training done again": Mutant(
        "experiments/selection.py", "if not (folder / RESULT).exists():", "if True:",
        ("test_fair", "again_and_again")),
    "equal seconds of the slower one": Mutant(
        "experiments/fair.py", "limit = min(", "limit = max(", ("test_fair", "equal_seconds")),
    "routing that costs nothing": Mutant(
        "experiments/training/config.py", "epochs * each + whole - each", "epochs * each",
        ("test_fair", "multiply_adds")),
    # --- diagnose: the training loop --------------------------------------------------------------
    "a first moment without a memory": Mutant(
        "comet_np/conformance/training.py", "u = beta1 * state.first + (1 - beta1) * g",
        "u = (1 - beta1) * g", OF_OPTIM),
    "a schedule that is ahead": Mutant(
        "comet_np/conformance/training.py", ".get(how, lambda: factor(t))()",
        ".get(how, lambda: factor(t + 1))()", OF_OPTIM),
    "V decays with the rest": Mutant(
        "comet_np/conformance/training.py", "still = still | self.fixed",
        "still = still & self.fixed", RIGHT_LOOPS),
    "rounding, of which Adam makes much, is a mistake": Mutant(
        "comet_np/conformance/training.py",
        "slack = rate * state.rounding / below * (1 + np.abs(u) / below)", "slack = 0 * below",
        ("test_diagnose_training", "adam_makes_a_step")),
    "gradients at the first parameters only": Mutant(
        "comet_np/conformance/diagnose.py", "subjects.append(at)", "subjects.append(subject)",
        RIGHT_LOOPS),
    "parameters that change under its eyes": Mutant(
        "comet_np/conformance/diagnose.py", "_array(name, returned[name]).copy()",
        "_array(name, returned[name])", ("test_diagnose_training", "change_in_place")),
    "scores that learn in their own layer only": Mutant(
        "comet_np/conformance/mlp.py", "dx = dx + dc @ self.V[layer]", "dx = dx + 0.0",
        ("test_diagnose_training", "gradients_is_named and sigmoid and float64")),
    # --- modules that are diagnosed -------------------------------------------------------------
    "a module stays in evaluation": Mutant(
        "comet_np/conformance/modules.py", "            store.update(before)\n",
        "            store.update(before | {\"training\": False})\n",
        ("test_diagnose_modules", "a_module_is_left_as_it_was")),
    "hooks stay": Mutant(
        "comet_np/conformance/modules.py", "                hook.remove()", "                pass",
        ("test_diagnose_modules", "hooks_are_taken_away")),
    "an optimizer keeps the steps of its diagnosis": Mutant(
        "comet_np/conformance/modules.py", "            each.load_state_dict(state)",
        "            pass", ("test_diagnose_modules", "an_optimizer_is_left_as_it_was")),
    "parameters keep the steps of their diagnosis": Mutant(
        "comet_np/conformance/modules.py", "                tensor.copy_(value)",
        "                pass", ("test_diagnose_modules", "an_optimizer_is_left_as_it_was")),
    "kernels are not turned": Mutant(
        "comet_np/conformance/modules.py", "array.T if self.transposed else array", "array",
        ("test_diagnose_modules", "names_are_proposed")),
    # --- diagnose, of layers and networks -------------------------------------------------------
    "a norm's variance always unbiased": Mutant(
        "comet_np/conformance/layers.py", 'if choices["variance"] == "unbiased":', "if True:",
        ("test_diagnose_layers", "they_are_our_layers")),
    "attention's triangle one to the right": Mutant(
        "comet_np/conformance/layers.py", "seen = seen | np.eye(T, k=1, dtype=bool)",
        "seen = seen | np.eye(T, k=2, dtype=bool)", ("test_diagnose_layers", "sees-next")),
    "rows of a mixer's masks by token": Mutant(
        "comet_np/conformance/networks.py", "            routed = routed.swapaxes(1, 2)\n",
        "            pass\n", ("test_diagnose_layers", "our_model and square")),
    "the head's part of a tied table twice": Mutant(
        "comet_np/conformance/networks.py", '{"embedding": whole - of_head,',
        '{"embedding": whole + of_head,', ("test_diagnose_layers", "told_which and gpt2-")),
    "hanging on rounding in one token is none": Mutant(
        "comet_np/conformance/networks.py", "made.decided.reshape(self.lead).all(axis=1)",
        "made.decided.reshape(self.lead).any(axis=1)",
        ("test_diagnose_layers", "near_tie_of_one_token")),
    # --- tasks in sequence, and transfer --------------------------------------------------------
    "backward transfer from the first task's network": Mutant(
        "experiments/continual.py", "float((final - learnt)[:-1].mean())",
        "float((final - R[0])[:-1].mean())", ("test_continual", "measures_by_hand")),
    "forward transfer against the task before": Mutant(
        "experiments/continual.py", "(learnt[1:] - alone)", "(learnt[1:] - learnt[:-1])",
        ("test_continual", "measures_by_hand")),
    "nothing is forgotten that the last task brings": Mutant(
        "experiments/continual.py", "R[:-1, :-1].max(axis=0)", "R[:, :-1].max(axis=0)",
        ("test_continual", "measures_by_hand")),
    "the Fisher information is of absolute gradients": Mutant(
        "experiments/ewc.py", "total += flat * flat", "total += abs(flat)",
        ("test_continual", "fisher_information")),
    "the Fisher information is of the true labels": Mutant(
        "experiments/ewc.py", "backend.asarray(np.array([drawn]))", "examples.y[row:row + 1]",
        ("test_continual", "fisher_information")),
    "EWC holds on to the last task's parameters alone": Mutant(
        "experiments/ewc.py", "self.anchor += share * (self.flat - self.anchor)",
        "self.anchor[...] = self.flat", ("test_continual", "adds_up_the_penalties")),
    "EWC pulls twice as strongly": Mutant(
        "experiments/ewc.py", "g += self.strength *", "g += 2 * self.strength *",
        ("test_continual", "the_loss_and_the_penalty")),
    "EWC weighs by images of the next task": Mutant(
        "experiments/continual.py", "lessons.training[before], lessons.spec.penalty[1]",
        "lessons.training[task], lessons.spec.penalty[1]",
        ("test_continual", "those_of_the_networks and ewc")),
    "EWC forgets all tasks but the last": Mutant(
        "experiments/lessons.py", '("flat", "importance", "anchor") if',
        '("flat",) if', ("test_continual", "those_of_the_networks and ewc")),
    "an answer among the classes of all tasks": Mutant(
        "experiments/sequences.py", "argmax(output[:, self.first:self.last], axis=-1) + self.first",
        "argmax(output, axis=-1)", ("test_continual", "knows_its_classes")),
    "a loss over the classes of all tasks before": Mutant(
        "experiments/continual.py", 'heads if spec.loss_over == "task" else [', "[",
        ("test_continual", "or_all_met and task")),
    "pixels are permuted in the first task, too": Mutant(
        "experiments/sequences.py", "if self.permuted and number:", "if self.permuted:",
        ("test_continual", "pixels_are_permuted")),
    "each colour's pixels in an order of its own": Mutant(
        "experiments/sequences.py", "x.reshape(len(x), -1, len(pixels))[..., pixels]",
        "x.reshape(len(x), len(pixels), -1)[:, pixels]", ("test_continual", "pixels_are_permuted")),
    "groups of classes are those of one seed": Mutant(
        "experiments/sequences.py", 'stream(seed, "classes", name)', 'stream(0, "classes", name)',
        ("test_continual", "groups_that_the_seed_draws")),
    "the learning rate is chosen on the test images": Mutant(
        "experiments/lessons.py", "self.accuracy(learner, 0, self.validation)",
        "self.accuracy(learner, 0, self.test[0])", ("test_continual", "is_judged_on")),
    "the learning rate is chosen on images of the last task": Mutant(
        "experiments/lessons.py", 'self.examples(data[0], "val")', 'self.examples(data[-1], "val")',
        ("test_continual", "is_judged_on")),
    "the last learning rate is taken": Mutant(
        "experiments/lessons.py", "tried[0] > state.best", "tried[0] > -1",
        ("test_continual", "is_that_of_the_best")),
    "dropout drops the same in each task": Mutant(
        "experiments/lessons.py", 'seed_of(run.seed, "task", task))', "run.seed)",
        ("test_continual", "dropout_is_drawn_anew")),
    "the tasks are learnt by networks that begin anew": Mutant(
        "experiments/continual.py", "lessons.kept(task), task - 1", "lessons.fresh(task), task - 1",
        ("test_continual", "those_of_the_networks and standard")),
    "alone is not alone": Mutant(
        "experiments/continual.py", "learner = lessons.fresh(task)", "learner = lessons.kept(task)",
        ("test_continual", "those_of_the_networks and permuted")),
    "fewer examples are not among more": Mutant(
        "experiments/transfer.py", "np.flatnonzero(data.y_train == label)[:shots]",
        "np.flatnonzero(data.y_train == label)[shots:2 * shots]",
        ("test_transfer", "fewer_examples_are_among_more")),
    "the few examples are those of one seed": Mutant(
        "experiments/transfer.py", 'stream(seed, "few")', 'stream(0, "few")',
        ("test_transfer", "other_seeds_draw")),
    "test images are among the few examples": Mutant(
        "experiments/transfer.py", "np.concatenate([data.x_train, data.x_val])",
        "np.concatenate([data.x_train, data.x_test])", ("test_transfer", "some_classes_are_drawn")),
    "the fresh network has learnt the first task": Mutant(
        "experiments/transfer.py", '("fresh", lessons.fresh(1))', '("fresh", lessons.kept(1))',
        ("test_transfer", "what_is_carried")),
    "the fresh network learns one epoch less": Mutant(
        "experiments/transfer.py", "examples, epochs=epochs)",
        'examples, epochs=epochs - (name == "fresh"))', ("test_transfer", "what_is_carried")),
    "the gain is not paired": Mutant(
        "experiments/lessons.py", "ours[seed] - theirs[seed]", "ours[seed] - theirs[0]",
        ("test_transfer", "what_the_files_say")),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_the_right_text_occurs_once(mutant):
    """So that the list stays true to the code."""
    assert (ROOT / mutant.file).read_text().count(mutant.right) == 1


def run_pytest(folder, files, select, *arguments):
    """Run some tests of a copy."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    environment.pop("COMET_DATA", None)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-m",
         "not hunt", *arguments, *(f"tests/{file}.py" for file in files), "-k", select],
        cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=300, check=False)


def hunted(mutant, copies, number):
    """Return what pytest says of a mutant."""
    folder = copies.get()
    file = folder / mutant.file
    text = file.read_text()
    try:
        file.write_text(text.replace(mutant.right, mutant.wrong))
        os.utime(file, (number, number))  # a time of its own, by which Python knows its byte code
        return run_pytest(folder, mutant.tests[:1], mutant.tests[1], "-x")
    finally:
        file.write_text(text)
        os.utime(file, (0, 0))
        copies.put(folder)


def unharmed(copies):
    """Return what pytest says of the right program, of all tests that mutants should fail."""
    folder = copies.get()
    tests = sorted({mutant.tests for mutant in MUTANTS.values()})
    try:
        return run_pytest(folder, sorted({file for file, _ in tests}),
                          " or ".join(f"({file} and ({select}))" for file, select in tests))
    finally:
        copies.put(folder)


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Return a queue of copies of the project."""
    copies = SimpleQueue()
    for _ in range(AT_ONCE):
        folder = tmp_path_factory.mktemp("copy")
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, folder / name)
        copies.put(folder)
    return copies


@pytest.fixture(scope="module")
def hunt(request, copies):
    """Return what pytest says, by name, of the mutants that are selected: of several at a time.

    And of the right program, by no name, which takes longest and so begins.
    """
    items = request.session.items
    names = [item.callspec.params["name"] for item in items
             if item.function is test_mutants_are_caught]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = {}
        if any(item.function is test_the_right_program_passes_all_these_tests for item in items):
            answers[None] = pool.submit(unharmed, copies)
        yield answers | {name: pool.submit(hunted, MUTANTS[name], copies, number)
                         for number, name in enumerate(names, start=1)}
        pool.shutdown(cancel_futures=True)


@pytest.mark.hunt
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name, hunt):
    file, tests = MUTANTS[name].tests
    for package in ("torch", "timm"):
        if package in tests or (package == "torch" and file.startswith(
                ("test_interop", "test_diagnose"))):
            pytest.importorskip(package, reason=f"{package}, of the crosscheck extra, is not "
                                                "installed")
    answer = hunt[name].result()
    assert answer.returncode == 1, answer.stdout  # tests failed; all else is another error
    assert " failed" in answer.stdout.splitlines()[-1]


@pytest.mark.hunt
def test_the_right_program_passes_all_these_tests(hunt):
    """Or it would prove nothing that the mutants fail."""
    answer = hunt[None].result()
    assert answer.returncode == 0, answer.stdout
