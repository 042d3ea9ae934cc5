"""What compressing a 7B on one 80 GB GPU would take: operations counted on a small copy of it, time from them.

    python -m bench.estimate

The copy has the blocks and heads of Llama-2-7B, and every width (hidden, feed-forward, vocabulary, tokens a window,
rank multiple) is a share 1/s of the original. So each product, decomposition and solution takes exactly 1/s³ of its
operations (products with a vector, too: there are fewer of them), and whatever else touches memory 1/s² of its bytes.
The copy goes through the stages of `rankwise compress`, and each is counted while it runs (`bench.counts`); rows of
pivot layers are chosen as on a GPU, by exchanges, of which a larger matrix needs somewhat more. Two sizes s
are counted; how far their extrapolations are apart is part of the row.

The seconds are arithmetic with RATES below, no measurements: no GPU is asked. Rows go to
bench/results/cpu/estimate.jsonl.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.counts import counting
from rankwise.alloc.calibration import Calibration
from rankwise.alloc.curvature import collect
from rankwise.alloc.methods import METHODS, Method
from rankwise.alloc.pivots import by_exchange, pivot_form
from rankwise.alloc.refit import refit
from rankwise.alloc.refitted import Refitted
from rankwise.factoring import factors_name, make_factors
from rankwise.linesearch import search_share
from rankwise.pipeline import compress
from rankwise.progress import on_terminal
from rankwise.provenance import versions

RESULTS = Path(__file__).parent / "results" / "cpu" / "estimate.jsonl"
CPU = torch.device("cpu")
SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000}
BLOCKS, HEADS, TOKENS, MULTIPLE = 32, 32, 1024, 64
WINDOWS, GRADIENTS, JUDGES, STEPS, TRAIN_LEN = 64, 24, 8, 256, 512
FEW = 4  # steps of training that are counted, for all of them
SIZES = (32, 16)
# Operations a second that are taken for granted: shares of an H100's data sheet (989e12 in bf16, 67e12 in fp32 and in
# fp64 on tensor cores, 3.35e12 bytes/s) where products run, and what a decomposition of n = 4096 in half a second is.
RATES = {
    ("product", "bfloat16"): 400e12,
    ("product", "float32"): 40e12,
    ("product", "float64"): 40e12,
    ("solve", "float64"): 10e12,
    ("solve", "float32"): 10e12,
    ("eigh", "float64"): 1.2e12,
    ("eigh", "float32"): 2e12,
    ("product with a vector", "float64"): 2 * 2.5e12 / 8,  # reads 8 bytes for two operations
}
BANDWIDTH, DISK = 2.5e12, 2e9  # bytes/s: everything else in device memory; files written, and read once more

Operations = dict[tuple[str, str], float]


class Stages:
    """What every stage of a job did.

    Args:
        size: s; operations count s³ times, bytes s².
        folder: what the job writes.
    """

    def __init__(self, size: int, folder: Path) -> None:
        self.size, self.folder = size, folder
        self.operations: dict[str, Operations] = {}
        self.touched: dict[str, float] = {}
        self.written: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, times: float = 1.0) -> Iterator[None]:
        """Count what runs in the context, `times` over."""
        before = self._bytes()
        with counting() as counted:
            yield
        self.operations[name] = {key: count * times * self.size**3 for key, count in counted.operations.items()}
        self.touched[name] = counted.touched * times * self.size**2
        self.written[name] = (self._bytes() - before) * self.size**2

    def _bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*.safetensors"))


def small_copy(size: int) -> Any:
    """Random weights in bf16; blocks and heads are those of the original."""
    shape = {key: value // size for key, value in SHAPE.items()}
    torch.manual_seed(0)
    config = LlamaConfig(
        **shape, num_hidden_layers=BLOCKS, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        max_position_embeddings=TOKENS, tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def count(method: Method, size: int, folder: Path) -> Stages:
    """One job, stage by stage."""
    model, stages = small_copy(size), Stages(size, folder)
    vocabulary = SHAPE["vocab_size"] // size
    text = torch.randint(vocabulary, (WINDOWS + JUDGES, TOKENS // size), generator=torch.Generator().manual_seed(0))
    inputs, judges = text[:WINDOWS], text[WINDOWS:]
    gradients = inputs[:GRADIENTS] if method.two_sided or method.refits else None
    with stages.stage("moments"):
        curvature = collect(model, inputs, gradients, folder / "curvature", device=CPU, track=on_terminal)
    with stages.stage("factors"):
        store = make_factors(
            model, curvature, method, inputs[:1], folder / factors_name(method), device=CPU, track=on_terminal
        )
    calibration = Calibration(model, store, curvature, inputs, folder / "learning", CPU, 0, on_terminal)
    trains = hasattr(method, "steps")
    with stages.stage("masks" if trains else "plan", STEPS / FEW if trains else 1.0):
        plan = method.allocate(store, "bf16", calibration if method.learns else None)
    target = store
    if method.refits:
        into = Refitted(folder / "refit", store, {})
        with stages.stage("refit"):
            whole = refit(model, plan, store, curvature, inputs, judges, into, device=CPU, track=on_terminal)
            target, _ = search_share(model, plan, whole, curvature, judges, device=CPU, track=on_terminal)
    with stages.stage("layers"), patch("rankwise.pipeline.pivot_form", partial(pivot_form, choose=by_exchange)):
        compress(model, plan, target)
    return stages


def seconds(stages: Stages) -> dict[str, float]:
    """Arithmetic: operations and bytes over `RATES`."""
    found = {}
    for name, operations in stages.operations.items():
        spent = sum(count / RATES[key] for key, count in operations.items())
        found[name] = spent + stages.touched[name] / BANDWIDTH + 2 * stages.written[name] / DISK
    return found


def main() -> None:
    """A row a method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["global", "rankwise", "ara", "llrc", "strs"])
    parser.add_argument("--ratio", type=float, default=0.8)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for name in options.methods:
        found = {}
        for size in SIZES:
            made = METHODS[name]
            few = {"steps": FEW, "train_len": TRAIN_LEN // size} if hasattr(made, "steps") else {}
            few |= {"after": FEW} if hasattr(made, "after") else {}
            channels = {"channel_multiple": MULTIPLE // size} if name == "rankwise" else {}
            method = made(ratio=options.ratio, rank_multiple=MULTIPLE // size, tolerance=0.05, **few, **channels)
            with tempfile.TemporaryDirectory() as folder:
                found[size] = count(method, size, Path(folder))
        rows.append(row(name, options.ratio, found))
        print(name, {key: round(value) for key, value in rows[-1]["seconds"].items()}, rows[-1]["apart"], flush=True)  # noqa: T201
    options.out.write_text("".join(json.dumps(entry) + "\n" for entry in rows), encoding="utf-8")


def row(name: str, ratio: float, found: dict[int, Stages]) -> dict[str, Any]:
    """A method's counts at full size, by the larger copy, and how far the smaller one is from it."""
    small, large = (found[size] for size in SIZES)
    operations: dict[str, dict[str, float]] = {}
    for stage, counts in large.operations.items():
        operations[stage] = {f"{kind}, {dtype}": value for (kind, dtype), value in counts.items()}
    totals = [sum(seconds(stages).values()) for stages in (small, large)]
    facts = {"bench": "estimate", "method": name, "ratio": ratio, "sizes": SIZES, "versions": versions()}
    facts |= {"operations": operations, "touched": large.touched, "written": large.written}
    return facts | {"seconds": seconds(large), "apart": round(totals[0] / totals[1] - 1, 3)}


if __name__ == "__main__":
    main()
