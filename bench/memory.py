"""Memory that `rankwise.LLM` takes on a CPU for checkpoints in several precisions, against what their plans say.

    python -m bench.memory

Makes a checkpoint of every precision, all layers dense, and loads each in a process of its own. What counts is what the
load added to the process's resident memory, in two parts: anonymous memory, and pages of the checkpoint's own files
that stay mapped, which the system may drop when it wants to. The libraries and a model of one tiny layer were there
before. The cache is filled; its bytes as `LLM.plan` states them are taken off, and those of a tokenizer, which are
measured by loading one more beforehand. The rest is set beside `total_bytes` of plan.json. Rows go to
bench/results/cpu/memory.jsonl.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import rankwise
from bench.sheet import append
from rankwise.anatomy import block_linears
from rankwise.bench.memory import of_decoder, peak, reset_peak
from rankwise.engine.runtime.llm import LLM
from rankwise.plan import LayerSpec, RankPlan
from rankwise.provenance import versions
from rankwise.storage import Precision
from rankwise.zoo import EMBEDDED, load_model, quiet_transformers

RESULTS = Path(__file__).parent / "results" / "cpu" / "memory.jsonl"
PRECISIONS = {
    "bf16": Precision(),
    "int8": Precision("int8"),
    "int4 by 32": Precision("int4", 32),
    "int4 by 32, asymmetric": Precision("int4", 32, asymmetric=True),
    "int4 by 64": Precision("int4", 64),
    "nf4": Precision("nf4"),
}
PROMPT, NEW, LENGTH = 64, 16, 512
CPU = torch.device("cpu")


def main() -> None:
    """Measure each precision."""
    options = parse()
    quiet_transformers()
    if options.folder:
        print(json.dumps(measured(options.folder, options.kv_tokens)))  # noqa: T201
        return
    work = options.work or Path(tempfile.mkdtemp(prefix="rankwise-memory-"))
    for name in options.weights or PRECISIONS:
        folder = made(options.model, name, work)
        command = [sys.executable, "-m", "bench.memory", "--folder", folder, "--kv-tokens", str(options.kv_tokens)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = {"bench": "memory", "device": "cpu", "versions": versions(), "model": options.model, "weights": name}
        row |= {"threads": torch.get_num_threads()} | json.loads(done.stdout.strip().splitlines()[-1])
        append(options.out, row)
        print(json.dumps(row), flush=True)  # noqa: T201


def made(model: str, weights: str, work: Path) -> Path:
    """The checkpoint of a precision, made or found."""
    folder = work / weights
    if not folder.exists():
        dense, tokenizer = load_model(model, "bf16")
        linears = {name: linear for block in block_linears(dense) for name, linear in block.items()}
        layers = {name: LayerSpec("dense", *w.weight.shape, min(w.weight.shape)) for name, w in linears.items()}
        plan = RankPlan(layers).stored_as(PRECISIONS[weights])
        small = rankwise.compress(dense, plan)
        plan.other_bytes = sum(t.nbytes for t in {t.data_ptr(): t for t in small.state_dict().values()}.values())
        plan.other_bytes -= plan.bytes
        rankwise.save(small, tokenizer, plan, folder)
    return folder


def measured(folder: Path, kv_tokens: int) -> dict[str, Any]:
    """The child's part."""
    config = AutoConfig.from_pretrained(folder)  # a model that was loaded and freed would leave room to be used again
    warm(config)
    spare, tokens = one_more_tokenizer(folder)
    before = held(folder)
    reset_peak(CPU)
    llm = LLM(str(folder), device="cpu", max_model_len=LENGTH, kv_tokens=kv_tokens)
    loading = peak(CPU)
    for cache in (*llm.engine.keys, *llm.engine.values):
        cache.zero_()  # memory that nobody wrote to is not there yet
    settle()
    loaded = held(folder)
    ids = spare("The history of the world is ")["input_ids"] * PROMPT
    llm.generate(ids[:PROMPT], rankwise.SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True))
    settle()
    after = held(folder)
    kv, planned = llm.plan.blocks * llm.plan.block_bytes, RankPlan.load(folder / "plan.json").total_bytes
    others = kv + tokens
    anonymous, mapped = loaded["anonymous"] - before["anonymous"], loaded["mapped"] - before["mapped"]
    return {
        "dtype": str(config.dtype).removeprefix("torch."),
        "planned": planned,
        "kv": kv,
        "anonymous": anonymous,
        "mapped": mapped,
        "tokenizer": tokens,
        "weight_bytes": anonymous + mapped - others,
        "over": (anonymous + mapped - others) / planned - 1,
        "generating": sum(after.values()) - sum(loaded.values()),
        "decoder": of_decoder(llm.engine.decoder)[0],
        "peak_while_loading": loading,
        "before": sum(before.values()),
    }


def one_more_tokenizer(folder: Path) -> tuple[Any, int]:
    """A tokenizer, and the bytes that it takes; `LLM` will load its own."""
    settle()
    before = held(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settle()
    return tokenizer, sum(held(folder).values()) - sum(before.values())


def warm(config: Any) -> None:
    """Run a tiny model of the same architecture, so that what is loaded or made at the first use is there."""
    small = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}
    tiny = type(config)(**small, num_attention_heads=1, num_key_value_heads=1, head_dim=64)
    AutoModelForCausalLM.from_config(tiny)(torch.zeros(1, 4, dtype=torch.long))


def settle() -> None:
    """Give freed memory back to the system, where the C library can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def held(folder: Path) -> dict[str, int]:
    """Bytes of this process's resident memory: anonymous, and of the folder's files that are mapped."""
    found, counted = {"anonymous": 0, "mapped": 0}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # a mapping: address, permissions, offset, device, inode, path
            counted = len(words) > 5 and words[5].startswith(str(folder.resolve()))
        elif words[0] == "Anonymous:":
            found["anonymous"] += 1024 * int(words[1])
        elif words[0] == "Rss:" and counted:
            found["mapped"] += 1024 * int(words[1])
    return found


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--weights", action="append", choices=PRECISIONS, help="repeatable [all]")
    parser.add_argument("--kv-tokens", type=int, default=2048)
    parser.add_argument("--work", type=Path, help="folder for the checkpoints [a temporary one]")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
