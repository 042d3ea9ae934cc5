"""Options as dataclasses, checked when they are made."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankwise.budgets import ByteBudget
from rankwise.errors import RankwiseError
from rankwise.jobs import is_free
from rankwise.storage import EMBEDDINGS, Precision
from rankwise.weights import raised

DTYPES = ("auto", "bf16", "fp16", "fp32")
ROUNDINGS = ("feedback", "nearest")
EMBEDDED_TEXT = "embedded:python-docs"


def check(name: str, value: Any, ok: bool, allowed: str) -> None:
    """Raise a RankwiseError for `name` unless `ok`."""
    if not ok:
        raise RankwiseError(name, value, f"allowed: {allowed}")


def check_count(name: str, value: Any, lowest: int) -> None:
    """`value` must be a whole number from `lowest`."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    check(name, value, whole and value >= lowest, f"a whole number from {lowest}")


def check_seed(value: Any) -> None:
    """`value` must be a whole number from 0 that fits 32 bits."""
    check_count("seed", value, 0)
    check("seed", value, value < 2**32, f"0 to {2**32 - 1}")


def check_fraction(name: str, value: Any) -> None:
    """`value` must be a number in (0, 1]."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    check(name, value, number and 0 < value <= 1, "above 0 and at most 1")


@dataclass(frozen=True)
class TextConfig:
    """Which windows of which text calibrate.

    The text becomes one token stream, cut into windows without overlap: the first `samples` windows give
    the input moments, the first `gradient_samples` those that output gradients weight; of the windows after them up
    to eight judge what was fitted, and the next `measure` give the perplexities written into the checkpoint. With
    `shuffle` the windows are drawn in an order fixed by `seed`.

    Args:
        text: a `.txt` or `.jsonl` file, `embedded:python-docs`, `wikitext2` or `c4`.
        samples: windows for the second moments of inputs.
        gradient_samples: windows for what output gradients say; may be more than `samples`.
        seq_len: tokens a window.
        measure: held-out windows for perplexity before and after; 0 skips it.
        shuffle: draw windows from all over the text.
        seed: fixes the shuffle, the sampled labels and everything that methods draw.
        learn: the text that methods learn from, refitting and healing included; None is the windows of `samples`.
            Windows that judge or measure are left out of it.
        learn_samples: windows of `learn`, from its start; 0 takes all, up to 256.
    """

    text: str = EMBEDDED_TEXT
    samples: int = 64
    gradient_samples: int = 16
    seq_len: int = 1024
    measure: int = 4
    shuffle: bool = False
    seed: int = 0
    learn: str | None = None
    learn_samples: int = 0

    def __post_init__(self) -> None:
        check_count("learn_samples", self.learn_samples, 0)
        unused = self.learn_samples > 0 and self.learn is None
        check("learn_samples", self.learn_samples, not unused, "0 without a text to learn from")
        check_count("samples", self.samples, 1)
        check_count("gradient_samples", self.gradient_samples, 1)
        check_count("seq_len", self.seq_len, 2)
        check_count("measure", self.measure, 0)
        check_seed(self.seed)


@dataclass(frozen=True)
class CompressConfig:
    """Everything that `rankwise compress` is told.

    Args:
        model: hub id, folder, `.gguf` file or `embedded:smollm2-135m`.
        out: the checkpoint folder to write; must not exist.
        method: allocation method and its options (`Global(...)`, `Rankwise(...)`; see `alloc.methods.METHODS`).
        text: calibration windows.
        device: `auto`, `cpu`, `cuda` or `cuda:N`; the model stays in host memory, one block at a time goes there.
        dtype: `auto` (as stored), `bf16`, `fp16` or `fp32`.
        curvature: folder of second moments to reuse, or to fill if it does not exist yet.
        plan: a plan to carry out instead of allocating one.
        restart: throw away unfinished work of an earlier run instead of continuing it.
        refit: solve the kept factors again for the compressed model's own inputs; None is the method's own choice.
        heal: steps of distillation after that; 0 is none.
        score_only: write spectra, what was learnt and factors into `out`, and no checkpoint.
        scores: such a folder: make the plan from it, without text.
        precision: how every layer's numbers are stored; None is the model's dtype, or what `plan` says. For nf4 and
            int4 the method's rank multiple is raised so that groups divide the ranks.
        budget: bytes instead of a ratio: then precisions are chosen layer by layer, together with kinds and ranks.
        rounding: to 4 or 8 bits: `feedback` makes up for errors in the metric of the curvature, `nearest` does not;
            None is `feedback` unless the plan is made from scores, which hold no curvature.
        candidates: with a `budget`: plans of nearly the least predicted loss that are carried out, and judged on
            windows that nothing was fitted to; 1 trusts the prediction.
        embeddings: what the embedding table and the head are stored in: `int8`, or None: as they are.
    """

    model: str
    out: Path
    method: Any
    text: TextConfig = field(default_factory=TextConfig)
    device: str = "auto"
    dtype: str = "auto"
    curvature: Path | None = None
    plan: Path | None = None
    restart: bool = False
    refit: bool | None = None
    heal: int = 0
    score_only: bool = False
    scores: Path | None = None
    precision: Precision | None = None
    budget: ByteBudget | None = None
    rounding: str | None = None
    candidates: int = 3
    embeddings: str | None = None

    def __post_init__(self) -> None:
        check_count("heal", self.heal, 0)
        check_count("candidates", self.candidates, 1)
        check("embeddings", self.embeddings, self.embeddings in (None, *EMBEDDINGS), ", ".join(EMBEDDINGS))
        self._check_bytes()
        scored = self.score_only and self.precision is not None
        check("score_only", "with weights", not scored, "one of score_only and weights: scores hold no weights")
        if self.precision is not None:
            object.__setattr__(self, "method", raised(self.method, self.precision))
        for name in ("scores", "plan", "refit", "heal", "embeddings"):
            given = getattr(self, name)
            check("score_only", f"with {name}", not (self.score_only and given), f"one of score_only and {name}")
        check("scores", "with plan", not (self.scores and self.plan), "one of scores and plan")
        check("refit", "with scores", not (self.scores and self.refit), "without scores, which hold no curvature")
        check("dtype", self.dtype, self.dtype in DTYPES, ", ".join(DTYPES))
        check("out", str(self.out), is_free(self.out, self.restart), "a folder that does not exist yet")

    def _check_bytes(self) -> None:
        if self.rounding is not None:
            check("rounding", self.rounding, self.rounding in ROUNDINGS, ", ".join(ROUNDINGS))
            known = not (self.scores and self.rounding == "feedback")
            check("rounding", "feedback with scores", known, "nearest with scores, which hold no curvature")
        if self.budget is None:
            return
        field = "size" if self.budget.bits is None else "bits_per_weight"
        for name in ("scores", "plan", "precision", "score_only"):
            check(field, f"with {name}", not getattr(self, name), f"one of {field} and {name}")
        check("method", self.method.name, self.method.spends_bytes, f"rankwise or global with {field}")

    @property
    def feeds_back(self) -> bool:
        """True if what is rounded to 4 or 8 bits is rounded by what the curvature says."""
        return self.rounding == "feedback" or (self.rounding is None and self.scores is None)

    @property
    def narrows(self) -> bool:
        """True if channels may be taken out of MLPs; scores have no budget, and a plan says itself which go."""
        return self.method.width_multiple > 0 and not (self.plan or self.scores or self.score_only)

    @property
    def refits(self) -> bool:
        """True if factors are to be refitted."""
        if self.scores or self.score_only:
            return False
        return bool(self.method.refits if self.refit is None else self.refit)

    @property
    def learns(self) -> bool:
        """True if something is learnt from text beyond the curvature."""
        trains = self.method.learns and not self.plan and not self.scores
        return bool(trains or self.refits or (self.heal and not self.score_only))
