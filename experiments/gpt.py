"""GPT-2 on text, standard and with COMET in the MLPs of its blocks: Figures 9, 10 and 12 to 32.

One configuration covers them all; `gpt_figures.FIGURES` says which setting each figure is. The
paper's settings (Sec. 4.3 and A.4) are those of chapter 7, section 6, of the Hugging Face course,
on which it builds, with another learning-rate and activation. Where the paper is silent or says
several things:

- Its learning rate is 5e-4, but the rate "scaled by a factor of 10, from 1e-4 to 1e-3": Figures 18
  to 23 have the 1e-3 of their captions, all others 5e-4.
- The course's own tokenizer is a byte-level BPE of 50,000 entries; here one is trained on the
  training texts of the corpus, for CodeParrot as for WikiText.
- Of CodeParrot the course takes the files that use pandas, sklearn, matplotlib or seaborn. So do
  the figures here; the paper does not say.
- The gradient is clipped to norm 1, the default of transformers' Trainer, with which the course
  trains; so are Adam's betas and eps. Biases and norms do not decay, as in the course.
- "3 epochs or a maximum of 24 hours": 3 epochs here. What a clock stops depends on the machine, and
  its cosine schedule never comes to its end.
- How often perplexity is measured: 10 times an epoch here.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from ..errors import UserError, unknown
from ..models.gpt2 import SIZES, GPT2Config
from ..optim import OptimizerConfig
from ..schedules import schedule
from ..settings import option
from .datasets import Dataset, existing, named
from .datasets.corpora import CORPORA, find, is_file_name
from .datasets.text import text_data, tokenizer_of
from .experiment import Cell, Place
from .grid import check_compared, check_count, numbers
from .training import Diverged, RunConfig, TrainConfig, run_memory, run_work, train
from .variants import VARIANTS_OF_BLOCKS, WITHOUT_P_K, Variant

ENTRIES = {"bpe": None, "gpt2": 50_257, "bytes": 256}  # of a tokenizer; None: --vocabulary


class Panel(NamedTuple):
    """A panel of the figure: what its models share."""

    corpus: str
    size: str
    lr: float
    accumulate: int
    precision: str
    p_k: float


@dataclass(frozen=True)
class TextCell:
    """One cell: one model trained on one corpus, cut into texts in one way, from one seed."""

    corpus: str
    tokenizer: str
    vocabulary: int
    context: int
    filtered: bool
    train: int | None
    validation: int | None
    run: RunConfig


@dataclass(frozen=True)
class GPTConfig:
    """GPT-2 on text; the defaults are the paper's. The help texts are those of the command line."""

    corpora: tuple[str, ...] = option(("wikitext", "codeparrot"),
                                      f"texts, of {', '.join(CORPORA)}; or files of your own")
    models: tuple[str, ...] = option(("standard", "comet"),
                                     f"models to compare, of {', '.join(VARIANTS_OF_BLOCKS)}")
    p_k: tuple[float, ...] = option((0.5,), "proportion of neurons that stay active")
    seeds: int | tuple[int, ...] = option(3, "number of seeds, or a list of them: of weights, data "
                                             "order and dropout")
    sizes: tuple[str, ...] = option(tuple(SIZES), f"networks: {', '.join(SIZES)}, or "
                                    "DEPTHxWIDTHxHEADS, as 4x128x4")
    tokenizer: str = option("gpt2", "gpt2: its own files; bpe: trained on the corpus; bytes")
    vocabulary: int = option(50_000, "entries of the tokenizer, for --tokenizer bpe")
    context: int = option(128, "tokens of a text, T")
    positions: int = option(1024, "the most tokens that the network can take")
    filtered: bool = option(True, "of codeparrot only the files that use pandas, sklearn, "
                                  "matplotlib or seaborn")
    train: int | None = option(None, "use only so many training texts")
    validation: int | None = option(None, "use only so many validation texts")
    activation: str = option("tanh", "activation f of the MLPs; GPT-2's own is gelu_new")
    dropout: float = option(0.1, "rate of dropout: of the embedding, of attention's weights, and "
                                 "of what is added to the residual stream")
    ties: str = option("strict", "ties in the cap: strict (the paper), threshold, index")
    optimizer: OptimizerConfig = field(default=OptimizerConfig(
        "adamw", weight_decay=0.1, decay_biases=False, clip_norm=1.0))
    lr: tuple[float, ...] = option((5e-4,), "highest learning rate; several are compared")
    schedule: str = option("warmup_cosine", "constant, cosine or warmup_cosine")
    warmup: int = option(1000, "steps of warm-up, for warmup_cosine")
    batch: int = option(32, "texts in a mini-batch")
    accumulate: tuple[int, ...] = option((8,), "mini-batches whose gradients are summed up for a "
                                               "step; several are compared")
    epochs: int = option(3, "passes over the training texts")
    steps: int | None = option(None, "steps in all, instead of --epochs")
    evaluations: int = option(10, "evaluations in an epoch, or in the whole run with --steps")
    precision: tuple[str, ...] = option(
        ("float16",), "float32, float64, or with products of operands rounded to tf32, float16 or "
        "bfloat16; several are compared")
    recompute: bool = option(False, "compute the inside of a block again in its backward pass, "
                                    "instead of keeping it: less memory, more time")

    variants: ClassVar[dict[str, Variant]] = VARIANTS_OF_BLOCKS

    def __post_init__(self) -> None:
        check_compared(self)
        check_count(self.seeds, len(self.models) * math.prod(map(len, self._axes)))
        if self.tokenizer not in ENTRIES:
            raise unknown("tokenizer", self.tokenizer, ENTRIES)
        if self.context < 2 or self.context > self.positions:
            raise UserError("a text has at least 2 tokens, one to read and one to predict, and at "
                            f"most as many as --positions, got context = {self.context}, "
                            f"positions = {self.positions}")
        if len({short_name(corpus) for corpus in self.corpora}) < len(self.corpora):
            raise UserError("two of the corpora have one name, by which their cells are called: "
                            f"rename a file, got {', '.join(self.corpora)}")
        if self.steps is not None:
            schedule(self.schedule, 0, self.steps, self.warmup)
        cells(self)  # bad settings are refused before the first cell runs

    @property
    def _axes(self) -> tuple[tuple[Any, ...], ...]:
        """What panels differ in, as `Panel` has it."""
        return (self.corpora, self.sizes, self.lr, self.accumulate, self.precision, self.p_k)

    @property
    def entries(self) -> int:
        """V, the entries of the tokenizer."""
        return ENTRIES[self.tokenizer] or self.vocabulary

    @property
    def panels(self) -> list[Panel]:
        """The panels, in order."""
        return [Panel(*values) for values in itertools.product(*self._axes)]

    @property
    def seed_numbers(self) -> Sequence[int]:
        """The seeds: those that are listed, or as many as are asked for, from 0."""
        return numbers(self.seeds)

    def standard(self, panel: Panel) -> GPT2Config:
        """Return the configuration of the standard model."""
        depth, width, heads = shape(panel.size)
        return GPT2Config(self.entries, self.positions, width, depth, heads, gate=None,
                          activation=self.activation, dropout=self.dropout,
                          weight_dropout=self.dropout, context=self.context)

    def training(self, panel: Panel) -> TrainConfig:
        """Return how the models of a panel are trained."""
        return TrainConfig(
            self.optimizer, panel.lr, self.schedule, self.warmup, self.batch, panel.accumulate,
            self.epochs, steps=self.steps, evaluations=self.evaluations,
            precision=panel.precision, recompute=self.recompute)


def shape(size: str) -> tuple[int, int, int]:
    """Return depth, width and heads of a size: one of `SIZES`, or as 4x128x4 says them."""
    if size in SIZES:
        found = SIZES[size]
        return found["depth"], found["width"], found["heads"]
    if not re.fullmatch(r"\d{1,3}x\d{1,6}x\d{1,6}", size):
        raise UserError(f"a size of GPT-2 is one of {', '.join(SIZES)}, or DEPTHxWIDTHxHEADS, as "
                        f'4x128x4, got "{size}"')
    depth, width, heads = map(int, size.split("x"))
    return depth, width, heads


def short_name(corpus: str) -> str:
    """Return what a corpus is called in the names of cells and in figures: of a file its stem."""
    return Path(corpus).name.partition(".")[0] if is_file_name(corpus) else corpus


def cells(config: GPTConfig, texts: Mapping[str, int] | None = None) -> list[Cell]:
    """Return the cells, seed by seed, so that a first comparison of all models comes early.

    texts : how many texts of each corpus are trained on; 1 if that is not known yet.
    """
    found = {cell.name: cell for seed in config.seed_numbers for panel in config.panels
             for cell in (cell_of(config, panel, model, seed, (texts or {}).get(panel.corpus, 1))
                          for model in config.models)}
    return list(found.values())  # a model without p_k has one cell for all of them


def cell_of(config: Any, panel: Panel, model: str, seed: int, texts: int = 1) -> Cell:
    """Return the cell of one model in a panel; `texts` is how many are trained on."""
    run = config.variants[model](RunConfig(config.standard(panel), config.training(panel), seed),
                                 panel.p_k, config.ties)
    name = "-".join([short_name(panel.corpus), model, panel.size, f"lr{panel.lr:g}",
                     f"batch{config.batch}x{panel.accumulate}", panel.precision,
                     *[f"pk{panel.p_k}"] * (model not in WITHOUT_P_K), f"seed{seed}"])
    return Cell(name, TextCell(panel.corpus, config.tokenizer, config.entries, config.context,
                               config.filtered and panel.corpus == "codeparrot", config.train,
                               config.validation, run),
                run_work(run, texts), run_memory(run))


def prepare(config: GPTConfig, folder: str | None, progress: Any) -> list[Cell]:
    """Make the streams of all corpora, once, and return the cells, whose work is known then.

    Raises
    ------
    UserError
        If a corpus or a package is missing, which is said before any work, or a corpus is too
        short for the settings.
    """
    where, texts = named(folder), {}
    for corpus in config.corpora:  # none is read before all are found
        find(corpus, None if where is None else existing(where))
    for corpus in config.corpora:
        cell = cell_of(config, config.panels[0]._replace(corpus=corpus), config.models[0], 0)
        texts[corpus] = len(load(cell.spec, folder, progress).x_train)
        for panel in config.panels:
            total = config.training(panel).total(texts[corpus])
            schedule(config.schedule, 0, total, config.warmup)
    return cells(config, texts)


def load(spec: TextCell, folder: str | None, progress: Any) -> Dataset:
    """Return the texts of a cell, mapped from the disk; if they are not there they are made."""
    return text_data(spec.corpus, spec.tokenizer, spec.vocabulary, spec.context, folder,
                     spec.filtered, progress).first(spec.train, spec.validation)


def run_cell(spec: TextCell, place: Place) -> dict[str, Any]:
    """Train the cell's model, and leave the tokenizer beside it.

    A training that diverges has a result too, which says where: it is what some figures are about.
    """
    data = load(spec, place.data, place.progress)
    if data.notice:
        place.progress.message(f"{spec.corpus}: {data.notice}")
    try:
        result = train(spec.run, data, place.folder, place.backend, place.progress, place.stop)
    except Diverged as error:
        if place.first:
            (place.folder / "diverged").unlink()  # the state, which can be had again
        why, _, _ = str(error).partition(";")
        result = {"diverged": why, "data": data.digest, "notice": data.notice}
    else:
        if place.first:
            tokenizer_of(data).save(place.folder)
    return result | {"texts": len(data.x_train)}
