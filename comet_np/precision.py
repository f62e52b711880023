"""Precision: the number formats of a training run, as one object."""

from typing import NamedTuple

from .errors import UserError, unknown


class Precision(NamedTuple):
    """In which format a training run multiplies, sums and keeps its numbers.

    The losses, the optimizer's norm and column sums accumulate in `accumulate` or better. Routing
    scores are always products of whole `accumulate` numbers, since fewer bits flip masks.

    Attributes
    ----------
    compute : str
        How the matrix products of the trained layers read their operands: as `master`, or "tf32",
        float32 of which the tensor cores of a GPU (since Ampere) may read 10 bits of mantissa.
    accumulate : str
        Dtype of sums, activations and gradients.
    master : str
        Dtype of parameters and optimizer state.
    """

    compute: str
    accumulate: str
    master: str

    @property
    def tf32(self) -> bool:
        """Whether products of the trained layers are TF32."""
        return self.compute == "tf32"

    def check(self, backend: str) -> None:
        """Raise a UserError unless the backend of this name can compute so."""
        if self.tf32 and backend != "cupy":
            raise UserError("TF32 is a format of NVIDIA's tensor cores: use --backend cupy, or "
                            "--precision float32")


PRECISIONS = {
    "float64": Precision("float64", "float64", "float64"),
    "float32": Precision("float32", "float32", "float32"),
    "tf32": Precision("tf32", "float32", "float32"),
}


def precision(name: str) -> Precision:
    """Return the precision called `name`.

    Raises
    ------
    UserError
        If there is none of that name.
    """
    if name not in PRECISIONS:
        raise unknown("precision", name, PRECISIONS)
    return PRECISIONS[name]
