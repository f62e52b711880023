"""Figures 9, 10 and 12 to 32: which setting of the `gpt` experiment each of them is."""

from typing import Any, NamedTuple

# The presets, by what they change of `gpt.GPTConfig`, whose defaults are the paper's.
SMOKE = {"corpora": ("python-prose",), "tokenizer": "bytes", "sizes": ("1x16x2",), "context": 32,
         "positions": 32, "train": 200, "validation": 50, "batch": 10, "accumulate": (2,),
         "seeds": 2, "steps": 10, "warmup": 2, "evaluations": 5, "lr": (1e-2,), "dropout": 0.0,
         "precision": ("float32",)}
LAPTOP = {"corpora": ("python-code", "python-prose"), "tokenizer": "bpe", "vocabulary": 2048,
          "sizes": ("4x128x4",), "positions": 128, "train": 8000, "validation": 300, "batch": 16,
          "accumulate": (1,), "seeds": 3, "epochs": 1, "warmup": 50, "evaluations": 10,
          "lr": (1e-3,), "dropout": 0.0, "precision": ("float32",), "filtered": False}
LAPTOP_SIZES = {"small": "4x64x4", "medium": "4x128x4", "large": "6x192x6"}

TITLES = {"wikitext": "WikiText", "codeparrot": "CodeParrot"}
SMALL, MEDIUM, LARGE = ("small",), ("medium",), ("large",)
ALL = SMALL + MEDIUM + LARGE


class Twist(NamedTuple):
    """What a figure changes of the paper's settings, in a few words; and on a laptop, of `LAPTOP`.

    What the laptop compares are the values that a small network tells apart: its rates are some ten
    times those of a large one.
    """

    words: str
    paper: dict[str, Any]
    laptop: dict[str, Any]


COURSE = Twist("a tokenizer of its own", {"tokenizer": "bpe"}, {"train": 5000, "warmup": 32})
GPT2 = Twist("GPT-2's tokenizer", {}, {"tokenizer": "gpt2", "train": 4000, "warmup": 25,
                                       "seeds": 2})
TENFOLD = Twist("lr 1e-3", {"lr": (1e-3,)}, {"lr": (1e-3, 1e-2)})
QUARTER = Twist("batch 32 x 2", {"accumulate": (2,)}, {"batch": 8, "accumulate": (4, 1)})
FP32 = Twist("float32", {"precision": ("float32",)}, {"precision": ("float16", "float32"),
                                                      "train": 3000, "warmup": 20, "seeds": 2})


class Figure(NamedTuple):
    """A figure: the corpus, the sizes of GPT-2, and what is changed."""

    corpus: str
    sizes: tuple[str, ...]
    twist: Twist

    def title(self, name: str) -> str:
        """Return what `comet-np list` says of the figure of this name."""
        return (f"Figure {name[3:]}: {TITLES[self.corpus]}, GPT-2 {', '.join(self.sizes)}, "
                f"{self.twist.words}")

    @property
    def presets(self) -> dict[str, dict[str, Any]]:
        """The presets of the figure."""
        corpora = {"corpora": (self.corpus,)}
        laptop = corpora | {"sizes": tuple(LAPTOP_SIZES[size] for size in self.sizes)}
        return {"smoke": SMOKE, "laptop": LAPTOP | laptop | self.twist.laptop,
                "paper": corpora | {"sizes": self.sizes} | self.twist.paper}


FIGURES = {
    "fig9": Figure("wikitext", ALL, COURSE),
    "fig10": Figure("codeparrot", ALL, COURSE),
    "fig12": Figure("wikitext", SMALL, GPT2),
    "fig13": Figure("wikitext", MEDIUM, GPT2),
    "fig14": Figure("wikitext", LARGE, GPT2),
    "fig15": Figure("codeparrot", SMALL, GPT2),
    "fig16": Figure("codeparrot", MEDIUM, GPT2),
    "fig17": Figure("codeparrot", LARGE, GPT2),
    "fig18": Figure("wikitext", SMALL, TENFOLD),
    "fig19": Figure("wikitext", MEDIUM, TENFOLD),
    "fig20": Figure("wikitext", LARGE, TENFOLD),
    "fig21": Figure("codeparrot", SMALL, TENFOLD),
    "fig22": Figure("codeparrot", MEDIUM, TENFOLD),
    "fig23": Figure("codeparrot", LARGE, TENFOLD),
    "fig24": Figure("wikitext", SMALL, QUARTER),
    "fig25": Figure("wikitext", MEDIUM, QUARTER),
    "fig26": Figure("wikitext", LARGE, QUARTER),
    "fig27": Figure("codeparrot", SMALL, QUARTER),
    "fig28": Figure("codeparrot", MEDIUM, QUARTER),
    "fig29": Figure("codeparrot", LARGE, QUARTER),
    "fig30": Figure("wikitext", SMALL, FP32),
    "fig31": Figure("wikitext", MEDIUM, FP32),
    "fig32": Figure("codeparrot", SMALL, FP32),
}
