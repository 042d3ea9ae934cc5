"""How numbers are stored: precisions, and the tensors that a matrix becomes in a checkpoint. Plain data, no torch.

In 16 or 32 bits a matrix `[rows, columns]` is one tensor under its own name. In 4 or 8 bits it is several, under its
name and a suffix: codes, two or one a byte, and what the codes of a row, or of consecutive columns of one, share.
"""

from dataclasses import dataclass
from math import prod

from rankwise.errors import RankwiseError

FLOATS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # to torch's names
CODED = ("nf4", "int4", "int8")
WEIGHTS = (*FLOATS, *CODED)
EMBEDDINGS = ("int8",)  # what embedding tables and heads may be stored in
NF4_BLOCK = 64  # columns that share an absmax
INT4_GROUPS = (32, 64, 128)  # columns that may share a scale
ITEM_BYTES = {"uint8": 1, "int8": 1, "bfloat16": 2, "float16": 2, "float32": 4, "int32": 4}


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint.

    Args:
        shape: of the tensor.
        dtype: torch's name for it, e.g. `uint8`.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """That it takes."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Precision:
    """How the numbers of a layer are stored.

    Args:
        weights: `bf16`, `fp16`, `fp32`, `nf4` (QLoRA, 2305.14314), `int4` or `int8`.
        group: of `int4`: columns that share a scale, 32, 64 or 128; None for all others (`nf4` has blocks of 64, and
            in `int8` a row has one scale).
        asymmetric: of `int4`: every group has a zero point of its own.

    Raises:
        RankwiseError: a combination that does not exist.
    """

    weights: str = "bf16"
    group: int | None = None
    asymmetric: bool = False

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise RankwiseError("weights", self.weights, f"allowed: {', '.join(WEIGHTS)}")
        int4 = self.weights == "int4"
        if int4 and (type(self.group) is not int or self.group not in INT4_GROUPS):
            raise RankwiseError("group", self.group, f"allowed for int4: {', '.join(map(str, INT4_GROUPS))}")
        if not int4 and self.group is not None:
            raise RankwiseError("group", self.group, f"allowed for {self.weights}: none; groups are int4's")
        if type(self.asymmetric) is not bool or (self.asymmetric and not int4):
            raise RankwiseError("asymmetric", self.asymmetric, "allowed: true or false for int4, false for all others")

    def __str__(self) -> str:
        group = f" by {self.group}" if self.group else ""
        return f"{self.weights}{group}{', asymmetric' if self.asymmetric else ''}"

    @property
    def quantised(self) -> bool:
        """True for 4 and 8 bits."""
        return self.weights not in FLOATS

    @property
    def block(self) -> int:
        """What divides the columns of every matrix: those that share a scale. 1 where any number of columns will do."""
        return self.group or (NF4_BLOCK if self.weights == "nf4" else 1)

    def require_blocks(self, what: str, columns: int) -> None:
        """Raise a RankwiseError unless whole blocks make up a number of columns; `what` is its name."""
        if columns % self.block == 0:
            return
        field, value = ("group", self.group) if self.group else ("weights", self.weights)
        if what == "rank":
            allowed = f"allowed: ranks that are multiples of {self.block}"
        else:
            groups = [str(group) for group in INT4_GROUPS if columns % group == 0]
            others = [*([f"int4 with group {' or '.join(groups)}"] if groups else []), "int8", *FLOATS]
            allowed = f"allowed: {', '.join(others)}"
        raise RankwiseError(field, value, f"{self.block} does not divide {what} {columns}; {allowed}")

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        """What a matrix becomes: the suffix of each tensor's name, and the tensor."""
        if not self.quantised:
            return {"": Stored((rows, columns), FLOATS[self.weights])}
        if self.weights == "int8":
            return {"_int8": Stored((rows, columns), "int8"), "_scale": Stored((rows, 1), "bfloat16")}
        codes, shared = Stored((rows, columns // 2), "uint8"), (rows, columns // self.block)
        if self.weights == "nf4":
            return {"_nf4": codes, "_absmax": Stored(shared, "float32")}
        zero = {"_zero": Stored(shared, "uint8")} if self.asymmetric else {}
        return {"_int4": codes, "_scale": Stored(shared, "bfloat16"), **zero}


def require_native(weights: str, dtype: str) -> None:
    """Raise a RankwiseError unless weights are coded, or in the 16 or 32 bits that a model is loaded in."""
    if weights in FLOATS and weights != dtype:
        allowed = f"the model is loaded in {dtype}; allowed: {dtype}, {', '.join(CODED)}; see --dtype for the others"
        raise RankwiseError("weights", weights, allowed)


def layer_matrices(kind: str, rank: int, out_features: int, in_features: int) -> dict[str, tuple[int, int]]:
    """Name and shape of the matrices that a layer of a kind is made of."""
    m, n, k = out_features, in_features, rank
    if kind == "lowrank":
        return {"lowrank_v": (k, n), "lowrank_u": (m, k)}
    if kind == "pivot":
        return {"pivot_basis": (k, n), "pivot_coeff": (m - k, k)}
    return {"weight": (m, n)}
