"""`diagnose`: is another implementation right, and if not, which known mistake explains it?"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError, unknown
from ..gates import Comet, Layerwise, TopK
from ..models.gpt2 import GPT2Config
from ..models.mixer import MixerConfig
from ..models.mlp import MLPConfig
from ..models.vit import ViTConfig
from ..optim import OptimizerConfig
from .layers import AttentionSubject, LayerNormSubject
from .mistakes import Choices, Mistake
from .mlp import ROWS, MLPSubject
from .networks import GPT2Subject, MixerSubject, ViTSubject
from .search import (
    Agreement,
    NotApplicable,
    Search,
    floored,
    relative,
    search,
    tolerance,
    unseen,
)
from .training import Plan, Training

Array = Any
Named = Mapping[str, Array]
GATES = {"comet": Comet, "layerwise": Layerwise, "top-k": TopK}
FLOATS = ("float32", "float64")
SETTINGS = {"mlp": ("p_k", "activation", "ties", "gate", "loss"), "layer-norm": ("eps",),
            "attention": ("heads", "causal")}
NETWORKS: dict[Any, Any] = {ViTConfig: ViTSubject, MixerConfig: MixerSubject,
                            GPT2Config: GPT2Subject}
OTHERS = 3  # causes that compute the same are named, at most
NAMED = 8  # mistakes that would not show, at most
FEW = 24  # rows, on which what is wrong is seen to be so


class Finding(NamedTuple):
    """What was found of one stage: the output, the gradients or the training.

    stage : str. unit : str, of what was compared: rows, gradients, parameters.
    found : Search, or None if the stage was not reached.
    first : the first intermediate that differs, in the order of computation, in words, or None.
    unseen : mistakes that would not have shown.
    """

    stage: str
    unit: str
    found: Search | None
    first: str | None = None
    unseen: tuple[Mistake, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether all that was compared agrees with the specification."""
        return self.found is not None and self.found.ok

    @property
    def undecided(self) -> bool:
        """Whether too little could be compared, and nothing explains it."""
        if self.found is None or self.found.causes or self.found.ok:
            return False
        return 2 * self.found.right.decided < self.found.right.items

    @property
    def cause(self) -> str | None:
        """What explains the differences, in a sentence; None if nothing does, or there are none."""
        if self.found is None or not self.found.causes:
            return None
        best = self.found.causes[0]
        counted = f": {_all(best.decided)} {self.unit} explained" * (best.decided > 1)
        return " AND ".join(map(str, best.mistakes)) + counted

    @property
    def lines(self) -> list[str]:
        """The finding in words, a line a fact, but for its cause."""
        if self.found is None:
            return ["not compared: what comes before it has to be put right first"]
        right, near = self.found.right, self.found.right.items - self.found.right.decided
        left_out = f"; {near} hang on rounding" if near else ""
        if self.undecided:
            return [f"cannot be told: only {right.decided} of {right.items} {self.unit} do not "
                    "hang on rounding (diagnose a copy in float64)"]
        if self.ok:
            lines = [f"agrees in all {right.decided} {self.unit}{left_out}"]
            if self.unseen:
                lines.append(f"mistakes that would not show here: {_names(self.unseen)}")
            return lines
        lines = [f"differs in {right.decided - right.explained} of {right.decided} {self.unit}"
                 f"{left_out}" if right.items else "cannot be computed with parameters of these "
                                                   "shapes"]
        if self.first:
            lines.append(f"the first that differs: {self.first}")
        lines += [f"or, which computes the same here: {' AND '.join(map(str, other.mistakes))}"
                  for other in self.found.causes[1:1 + OTHERS]]
        if not self.cause:
            lines.append("None of the known mistakes explains it, nor two of them")
            if self.found.closest is not None:
                close = self.found.closest
                lines.append(f"closest: {' AND '.join(map(str, close.mistakes))} "
                             f"({close.explained} of {close.decided} {self.unit} explained)")
        return lines


def _all(number: int) -> str:
    return "both" if number == 2 else f"all {number}"


def _names(mistakes: Sequence[Mistake]) -> str:
    """Return the names of mistakes, those of k together."""
    of_k = [each.name for each in mistakes if each.decision in ("k", "k_width")]
    others = list(dict.fromkeys(each.name for each in mistakes if each.name not in of_k))
    more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
    parts = [", ".join(others[:NAMED]) + more] if others else []
    if of_k:
        parts.append(", ".join(dict.fromkeys(of_k)) + " (the same k at these widths)")
    return "; ".join(parts)


class Report(NamedTuple):
    """What `diagnose` found.

    findings : a Finding a stage, in order.
    """

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether all that was compared agrees with the specification."""
        return all(finding.ok for finding in self.findings)

    @property
    def cause(self) -> str | None:
        """What explains the first stage that differs, in a sentence; None if nothing does."""
        return next((finding.cause for finding in self.findings if not finding.ok), None)

    @property
    def mistakes(self) -> tuple[str, ...]:
        """The names of the mistakes found, of all stages, in order."""
        return tuple(dict.fromkeys(
            mistake.name for finding in self.findings if finding.found is not None
            for best in finding.found.causes[:1] for mistake in best.mistakes))

    def __str__(self) -> str:
        """Return the verdict, and the finding of each stage."""
        if self.ok:
            verdict = "RIGHT, as far as was compared"
        elif any(not finding.ok and not finding.undecided for finding in self.findings):
            verdict = f"WRONG: {self.cause or 'and no known mistake explains it'}"
        else:
            verdict = "UNDECIDED"
        width = max(len(finding.stage) for finding in self.findings)
        lines, told = [verdict], self.cause
        for finding in self.findings:
            words = finding.lines
            if finding.cause and finding.cause != told:
                words.insert(1, finding.cause)
            for i, line in enumerate(words):
                lines.append(f"  {finding.stage * (i == 0):{width}}  {line}")
        return "\n".join(lines)


def diagnose(fn: Callable[[Array], Array], named: Named, model: str | Any = "mlp", *,
             gradients: Callable[[Array, Array], Named] | None = None,
             intermediates: Callable[[Array], Named] | None = None,
             step: Callable[[Array, Array], Named] | None = None,
             optimizer: OptimizerConfig | None = None, lr: float = 0.1,
             schedule: str = "constant", total: int | None = None, warmup: int = 0,
             **settings: Any) -> Report:
    """Compare a function with the specification, and name the mistake that explains a difference.

    Inputs on which mistakes show (zero rows, nearly empty ones, large and small ones) go through
    `fn`. If its outputs differ from the specification's, each known mistake is tried, then each
    pair of them. Nothing is asked of `fn` but outputs.

    Parameters
    ----------
    fn : callable
        ``fn(x) -> output``, NumPy arrays: of an MLP (B, N_0) -> (B, N_L), of a layer tokens
        (B, T, D) -> (B, T, D), of a ViT or an MLP-Mixer images (B, colours, rows, columns) ->
        logits (B, classes), of a GPT-2 tokens, int (B, T), -> logits (B, T, vocabulary).
    named : mapping of str to array
        Its parameters under the published names: of an MLP ``fc{l}.weight`` (N_l, N_{l-1}),
        ``fc{l}.bias`` (N_l,), and the routing weights V, ``spec_{l}.weight``; of a layer norm
        ``weight`` and ``bias``; of attention ``qkv.weight`` (3 D, D) and ``out.weight`` (D, D), or
        timm's or PyTorch's names; of a network those that `comet_np.interop` reads.
    model : str or configuration
        What it should be: "mlp", "layer-norm" or "attention", with `settings`; or an MLPConfig,
        ViTConfig, MixerConfig or GPT2Config, which says all.
    gradients : callable, optional
        ``gradients(x, labels) -> {name: gradient}`` of the mean cross-entropy, labels int (B,) or,
        of a GPT-2, (B, T); or of the loss given. Of a layer of ``sum(labels * fn(x))``, labels of
        the output's shape.
    intermediates : callable, optional
        ``intermediates(x) -> {"c_1": ..., "m_1": ..., "a_1": ..., "x_1": ...}``, any of them: the
        first that differs is named.
    step : callable, optional
        ``step(x, labels) -> {name: parameter}``: one step of the training loop of an MLP, which
        begins with `named`, and all parameters after it, V too. It is called some six times, with
        another batch each time.
    optimizer : OptimizerConfig, optional
        What `step` should be; plain SGD if not given.
    lr : float
        The learning rate; the highest one, with a schedule.
    schedule, total, warmup
        As of `comet_np.schedules.schedule`; of a short run (total=10) most shows.
    settings
        Of "mlp": p_k, activation, ties and gate ("comet", "layerwise", "top-k", None, or one of
        `comet_np.gates`, which has its own p_k and ties), as of `comet_np.models.mlp.MLPConfig`.
        Of an MLP loss, "cross_entropy" or "mse" (the mean over examples and outputs; labels are
        then targets (B, N_L)). Of "layer-norm": eps. Of "attention": heads, and causal.

    Returns
    -------
    Report
        `ok`; `cause`, a sentence, or None; `mistakes`, names; printed it says all.

    Raises
    ------
    UserError
        If the parameters do not fit together, or `fn` returns what is no output.
    """
    # Copies: a loop may change its arrays in place.
    arrays = {str(name): _array(name, array).copy() for name, array in named.items()}
    if not arrays:
        raise UserError("named holds no parameters: give them by name, as of state_dict()")
    dtype = np.result_type(*arrays.values())
    allowed = tolerance(*(array.dtype for array in arrays.values()))
    subject = _subject(model, arrays, settings, allowed)
    if step is not None and not isinstance(subject, MLPSubject):
        raise UserError("step is compared with an MLP's training: for other models compare "
                        "gradients, and the loop with an MLP in it")
    findings = [_of_output(fn, subject, dtype, allowed, intermediates)]
    choices = _chosen(findings[-1].found, subject.right)
    if gradients is not None:
        findings.append(Finding("gradients", "gradients", None) if choices is None else
                        _of_gradients(gradients, subject, choices, dtype, allowed))
        choices = choices and _chosen(findings[-1].found, choices)
    if step is not None:
        plan = Plan(optimizer or OptimizerConfig(), lr, schedule, total, warmup)
        findings.append(Finding("training", "changes of parameters", None) if choices is None else
                        _of_training(step, plan, subject, arrays, choices, dtype, allowed))
    return Report(tuple(findings))


def _subject(model: Any, named: Named, settings: dict[str, Any], allowed: float) -> Any:
    """Return what is to be checked."""
    if not isinstance(model, str):
        known = ("loss",) if isinstance(model, MLPConfig) else ()
        for name in sorted(settings.keys() - set(known)):
            raise UserError(f"{name} is given, and the {type(model).__name__} says all: change it "
                            "there")
        if isinstance(model, MLPConfig):
            subject = MLPSubject(named, model.gate, model.activation, allowed, model.scale,
                                 settings.get("loss", "cross_entropy"))
            if subject.widths != model.widths:
                raise UserError(f"the parameters are those of widths {subject.widths}, the "
                                f"configuration's are {model.widths}")
            return subject
        for config, network in NETWORKS.items():
            if isinstance(model, config):
                return network(named, model, allowed)
    if model not in SETTINGS:
        raise unknown("model", model, [*SETTINGS, *(f"a {config.__name__}" for config in (
            MLPConfig, *NETWORKS))])
    for name in sorted(settings.keys() - set(SETTINGS[model])):
        raise unknown("setting", name, SETTINGS[model])
    if model == "layer-norm":
        return LayerNormSubject(named, allowed, **settings)
    if model == "attention":
        return AttentionSubject(named, allowed, **settings)
    gate: Any = settings.get("gate", "comet")
    if isinstance(gate, str):
        if gate not in GATES:
            raise unknown("gate", gate, GATES)
        gate = GATES[gate](settings.get("p_k", 0.5), settings.get("ties", "strict"))
    return MLPSubject(named, gate, settings.get("activation", "softplus"), allowed,
                      loss=settings.get("loss", "cross_entropy"))


def _array(name: str, array: Any) -> Array:
    """Return a parameter as a NumPy array of floats."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
    array = np.asarray(array)
    if array.dtype.name not in FLOATS:
        raise UserError(f"{name} must be float32 or float64, got {array.dtype}: diagnose a copy of "
                        "the model in float32 or float64")
    return array


def _called(fn: Callable[..., Any], what: str, *arguments: Array) -> Any:
    """Return what a call gives; the arguments are copies."""
    given = [argument.copy() for argument in arguments]
    result = fn(*given)
    for argument, before in zip(given, arguments, strict=True):
        if not np.array_equal(argument, before):
            raise UserError(f"{what} writes into its input: let it work on a copy")
    return result


def _chosen(found: Search | None, right: Choices) -> Choices | None:
    """Return the decisions that explain a stage; None if none do."""
    if found is None or (not found.ok and not found.causes):
        return None
    made = () if found.ok else found.causes[0].mistakes
    return right | {mistake.decision: mistake.value for mistake in made}


def _of_output(fn: Callable[[Array], Array], subject: Any, dtype: Any, allowed: float,
               intermediates: Callable[[Array], Named] | None) -> Finding:
    """Return what explains the outputs."""
    one, other = (_inputs(subject, number, dtype) for number in (1, 2))
    calls = (one, other, other, other)
    got = []
    for x in calls:
        y = np.asarray(_called(fn, "fn", x))
        if y.dtype.kind not in "fiu":
            raise UserError(f"fn must return an array of floats, got {y.dtype}")
        got.append(y.astype("float64"))
    # A stale mask shows in the third call at the latest: what differs after that is chance.
    if not np.array_equal(got[2], got[3], equal_nan=True):
        raise UserError("fn gives two outputs for one input: is dropout, or another source of "
                        "chance, still on? put the model in evaluation, as by model.eval()")
    wide = [x.astype("float64") for x in calls[:3]]
    wide[2] = wide[1]
    wanted = subject.shape(one)
    if got[0].shape != wanted:
        raise UserError(f"fn must return {wanted} for inputs of {one.shape}, got {got[0].shape}")
    seen = np.concatenate(got[:3])
    lost = ~np.isfinite(seen).all(axis=tuple(range(1, seen.ndim)))
    if lost.any():
        zeros = not np.any(np.concatenate(wide)[lost])
        raise UserError(f"fn returns NaN or infinity for {int(lost.sum())} of {len(lost)} rows of "
                        f"finite inputs{', which are all zeros' * zeros}: it must be finite for "
                        f"all{subject.if_nan}")
    calm = _calm(subject, wide, dtype, allowed)
    few = [wide[0][:FEW]]

    def compare(choices: Choices, quick: bool) -> Agreement:
        try:
            y, scale, decided = subject.outputs(few if quick else wide, choices)
        except NotApplicable:
            if not quick:
                raise
            y, scale, decided = subject.outputs(wide[:1], choices)  # if it needs a whole batch
        return Agreement(relative(seen[:len(y)], y, scale), decided & calm[:len(y)])

    found = search(compare, subject.right, subject.mistakes, allowed,
                   subject.numbers_in_pairs)
    first = None
    if not found.ok and intermediates is not None:
        given = _by_name(_called(intermediates, "intermediates", one), "intermediates")
        first = _first(given, subject, wide[0], allowed) if given else None
    hidden = unseen(compare, subject.right, subject.mistakes, allowed) if found.ok else ()
    return Finding("output", subject.unit, found, first, hidden)


def _calm(subject: Any, calls: Sequence[Array], dtype: Any, allowed: float) -> Array:
    """Return at which rows the output, as it should be, does not hang on rounding.

    They are those at which it hardly moves if all weights do so by their last digits.
    """
    calm = np.ones(sum(map(len, calls)), bool)
    try:
        y, scale, _ = subject.outputs(calls, subject.right)
        for number in range(2):
            rough = subject.jittered(4 * float(np.finfo(dtype).eps), number)
            moved, _, _ = rough.outputs(calls, subject.right)
            calm &= relative(moved, y, scale) < allowed / 4
    except NotApplicable:
        pass
    return calm


def _first(given: Named, subject: Any, x: Array, allowed: float) -> str:
    """Return the first intermediate that differs, in the order of computation, or that none does.
    """
    wanted, decided = subject.intermediates(x, subject.right)
    for name in given:
        if name not in wanted:
            raise unknown("intermediate", name, list(wanted))
    for name, want in wanted.items():
        if name in given:
            got = np.asarray(given[name], "float64")
            if got.shape != want.shape:
                return f"{name}, which should have the shape {want.shape}, got {got.shape}"
            size = np.abs(want).max(axis=tuple(range(1, want.ndim)))
            error = relative(got, want, floored(size, allowed))
            wrong = (error > allowed) & decided
            if wrong.any():
                return f"{name} ({int(wrong.sum())} of {len(wrong)} rows)"
    return f"none of those given: it is behind {[name for name in wanted if name in given][-1]}"


def _of_gradients(gradients: Callable[[Array, Array], Named], subject: Any,
                  choices: Choices, dtype: Any, allowed: float) -> Finding:
    """Return what explains the gradients, given what explains the output."""
    x, labels = _sure(subject, choices, dtype)
    wide = x.astype("float64")
    try:
        subject.gradients(wide, labels, choices)
    except NotApplicable:
        return Finding("gradients", "gradients", None)
    calls: Sequence[Named] = [
        {name: np.array(array) for name, array in
         _by_name(_called(gradients, "gradients", x, labels), "gradients").items()
         if array is not None} for _ in range(2)]
    names = subject.parameters
    missing = [name for name in names if name not in calls[0]]
    if missing:
        raise UserError(f"gradients must return one for each parameter, missing: "
                        f"{', '.join(missing)}")
    seen = [[call[name].astype("float64") for name in names] for call in calls]
    routing = [name for name in calls[0] if name not in names]  # V's, which have none
    trained = [name for name in routing if np.any(calls[0][name])]

    def compare(tried: Choices, quick: bool) -> Agreement:
        errors = []
        for number, call in enumerate(seen):
            want = subject.gradients(wide, labels, tried, number)
            sizes = np.array([np.abs(each).max(initial=0.0) for each in want.values()])
            floor = sizes.max() / 100  # of a gradient that cancels to nothing, but for rounding
            errors += [relative(got[None], each[None], np.array([max(size, floor)]))[0]
                       for got, each, size in zip(call, want.values(), sizes, strict=True)]
        if tried["V_gradient"] == "any":
            errors += [0.0 if trained else np.inf] * len(routing)
        else:
            errors += [np.inf if name in trained else 0.0 for name in routing]
        return Agreement(np.array(errors), np.ones(len(errors), bool))

    found = search(compare, choices, subject.gradient_mistakes, allowed)
    hidden = (unseen(compare, choices, subject.gradient_mistakes, allowed) if found.ok else ())
    return Finding("gradients", "gradients", found, None, hidden)


def _inputs(subject: Any, number: int, dtype: Any) -> Array:
    """Return a batch of this dtype, or of tokens."""
    x = subject.inputs(number)
    return x if x.dtype.kind == "i" else x.astype(dtype)


def _of_training(step: Callable[[Array, Array], Named], plan: Plan, subject: MLPSubject,
                 named: Named, choices: Choices, dtype: Any, allowed: float) -> Finding:
    """Return what explains the steps of a training loop, given what explains all before them."""
    plan.check()
    points, subjects, batches = [named], [], []
    for number in range(plan.steps):
        at = subject.at(points[-1])
        # Batches of two sizes: or a sum over the batch would be a rate.
        x = _sure(at, choices, dtype, 10 + number)[0][:ROWS // (1 + number % 2)]
        labels = at.labels(x)
        try:
            at.gradients(x.astype("float64"), labels, choices)
        except NotApplicable:
            return Finding("training", Training.unit, None)
        points.append(_after(_called(step, "step", x, labels), named, number + 1))
        subjects.append(at)
        batches.append((x.astype("float64"), labels))
    training = Training(subjects, batches, points, plan, allowed)
    right = choices | training.right | {"calls": "fresh"}
    decided = training.decided(right)
    if 2 * decided.sum() < decided.size:
        raise UserError(f"steps change the parameters by too little to be told from rounding in "
                        f"{dtype}: give a larger lr, or parameters in float64")
    found = search(training.compare, right, training.mistakes, allowed)
    if found.ok:
        return Finding("training", Training.unit, found, None,
                       unseen(training.compare, right, training.visible, allowed))
    error, decided = training.compare(right, False)
    wrong = np.flatnonzero(decided & ~(error <= allowed))
    return Finding("training", Training.unit, found,
                   training.item(int(wrong[0])) if len(wrong) else None)


def _by_name(returned: Any, what: str) -> Named:
    """Return what a function returned, if it is a mapping."""
    if not isinstance(returned, Mapping):
        raise UserError(f"{what} must return a dict of names to arrays, got "
                        f"{type(returned).__name__}")
    return returned


def _after(returned: Any, named: Named, number: int) -> dict[str, Array]:
    """Return copies of the parameters after a step, which must be those of `named`."""
    returned = _by_name(returned, "step")
    missing = [name for name in named if name not in returned]
    if missing:
        raise UserError("step must return all parameters by name, V too, missing: "
                        f"{', '.join(missing)}")
    after = {name: _array(name, returned[name]).copy() for name in named}
    for name, array in after.items():
        was = named[name]
        if array.shape != was.shape or array.dtype != was.dtype:
            raise UserError(f"{name} is {was.dtype} of shape {was.shape}, and step {number} "
                            f"returned {array.dtype} of shape {array.shape}")
        if not np.isfinite(array).all():
            raise UserError(f"{name} is not finite after step {number}: the loop diverges, or "
                            "divides by zero; if it is meant to, give a smaller lr")
    return after


def _sure(subject: Any, choices: Choices, dtype: Any, number: int = 3
          ) -> tuple[Array, Array]:
    """Return inputs, and labels, of which no mask hangs on rounding."""
    x = _inputs(subject, number, dtype)
    _, _, decided = subject.outputs([x.astype("float64")], choices)
    x = x[decided]
    return x, subject.labels(x)
