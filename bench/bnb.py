"""nf4 by rankwise against nf4 by bitsandbytes: the same codes, and the same perplexity, in one run on the same windows.

    python -m bench.bnb --test wikitext-2-raw/test.txt

All linear layers of the decoder blocks are rounded to nf4, by `rankwise.compress` and by bitsandbytes' `Linear4bit`,
which also computes. A code that differs must be a tie: a number midway between two levels, up to the last bits of fp32.
`--rotate` turns the residual stream first (`bench.rotation`), for a model whose weights were on a 4-bit grid before.
Rows go to bench/results/cpu/bnb.jsonl; the exit code is 1 if perplexities are further apart than 0.2 %, or a code that
differs is no tie.
"""

import argparse
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.rotation import rotate
from bench.sheet import append
from rankwise.anatomy import block_linears
from rankwise.evaluate import perplexity
from rankwise.kernels.fragments import split_nibbles
from rankwise.kernels.nf4 import BLOCK, LEVELS, NF4, quantize_nf4
from rankwise.pipeline import compress
from rankwise.plan import LayerSpec, RankPlan
from rankwise.progress import on_terminal
from rankwise.provenance import versions
from rankwise.text import read_text, take_windows, token_windows
from rankwise.zoo import EMBEDDED, load_model, quiet_transformers

RESULTS = Path(__file__).parent / "results" / "cpu" / "bnb.jsonl"
APART = 0.002  # of perplexity
NEAR = 2.0**-22  # of a block's largest number: two units in the last place of 1 in fp32


def main() -> None:
    """Measure the model as it is, by us and by bitsandbytes; compare the codes."""
    options = parse()
    quiet_transformers()
    model, tokenizer = fresh(options)
    text = token_windows(read_text(options.test, "test"), tokenizer, options.seq_len)
    windows = take_windows(text, options.windows, options.test)
    found = {"dense": measured(model, windows), "rankwise": measured(ours(model), windows)}
    theirs, codes = by_bitsandbytes(fresh(options)[0])
    found["bitsandbytes"] = measured(theirs, windows)
    apart = abs(found["rankwise"]["perplexity"] / found["bitsandbytes"]["perplexity"] - 1)
    row = identity(options) | {"codes": codes, "apart": apart} | found
    append(options.out, row)
    print(json.dumps(row, indent=1))  # noqa: T201
    sys.exit(apart > APART or codes["differing"] != codes["ties"] or codes["absmax_differing"] > 0)


def fresh(options: argparse.Namespace) -> tuple[Any, Any]:
    """The dense model, rotated if that is asked for, and its tokenizer."""
    model, tokenizer = load_model(options.model, options.dtype, "cpu")
    if options.rotate:
        rotate(model)
    return model, tokenizer


def measured(model: Any, windows: torch.Tensor) -> dict[str, float]:
    """Perplexity, and seconds that it took."""
    started = time.monotonic()
    value = perplexity(model, windows, track=on_terminal)
    return {"perplexity": value, "seconds": round(time.monotonic() - started, 1)}


def ours(model: Any) -> Any:
    """The model with every linear layer of its blocks in nf4."""
    linears = {name: linear for block in block_linears(model) for name, linear in block.items()}
    specs = {name: LayerSpec("dense", *w.weight.shape, min(w.weight.shape), "nf4") for name, w in linears.items()}
    return compress(model, RankPlan(specs))


def by_bitsandbytes(model: Any) -> tuple[Any, dict[str, int]]:
    """The same by bitsandbytes, without double quantisation; and how its codes compare with ours."""
    import bitsandbytes  # not a dependency: only this comparison needs it

    total = {"all": 0, "differing": 0, "ties": 0, "absmax_differing": 0}
    for block in block_linears(model):
        for name, old in block.items():
            made = bitsandbytes.nn.Linear4bit(
                old.in_features, old.out_features, old.bias is not None, model.dtype, False, "nf4"
            )
            made.weight = bitsandbytes.nn.Params4bit(
                old.weight.data.clone(), False, quant_type="nf4", compress_statistics=False
            )
            made.bias = old.bias
            made = made.to("cpu").eval()
            for key, count in compared(old.weight.data, made.weight).items():
                total[key] += count
            model.set_submodule(name, made)
    return model, total


def compared(w: torch.Tensor, theirs: Any) -> dict[str, int]:
    """Codes of a matrix `[m, n]`: how many there are, differ from bitsandbytes', and are ties of those."""
    mine = quantize_nf4(w)
    absmax = theirs.quant_state.absmax.view(mine.absmax.shape)
    other = NF4(theirs.data.view(torch.uint8).view(mine.codes.shape), absmax)
    a, b = (split_nibbles(packed.codes, high_first=True).long() for packed in (mine, other))
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    scaled = (w.double().unflatten(1, (-1, BLOCK)) / mine.absmax.double().clamp(min=1e-38)[..., None]).flatten(1)
    midway = (scaled - (levels[a] + levels[b]) / 2).abs() <= NEAR
    differing = a != b
    ties = differing & midway & ((a - b).abs() == 1)
    return {
        "all": a.numel(),
        "differing": int(differing.sum()),
        "ties": int(ties.sum()),
        "absmax_differing": int((mine.absmax != absmax).sum()),
    }


def identity(options: argparse.Namespace) -> dict[str, Any]:
    """What ran."""
    made = {"bench": "bnb", "device": "cpu", "threads": torch.get_num_threads()}
    made |= {"versions": versions() | {"bitsandbytes": importlib.metadata.version("bitsandbytes")}}
    keys = ("model", "dtype", "rotate", "windows", "seq_len")
    return made | {key: getattr(options, key) for key in keys} | {"test": Path(options.test).name}


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", required=True, help="text to measure on")
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--rotate", action="store_true", help="turn the residual stream first")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    try:
        importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        parser.error("bitsandbytes: not installed; run: pip install bitsandbytes")
    return options


if __name__ == "__main__":
    main()
