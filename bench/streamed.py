"""Curvature of a model with the shape of Llama-2-70B where only one block is in memory at a time: peak resident memory.

    python -m bench.streamed

The blocks lie on the meta device. When a sweep reaches a block its weights are drawn at random, bf16, the same ones at
every visit, and dropped when the sweep leaves it: `BlockStream.on_device` is the place for that, as it would be for
weights read from a file. Embedding and head stay in memory. Moments go to a folder, a file a block, as in a job.
A row a sweep goes to bench/results/cpu/streamed.jsonl.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.sheet import append
from rankwise.alloc.curvature import Curvature
from rankwise.alloc.seeds import generator
from rankwise.alloc.stream import BlockStream
from rankwise.alloc.sweeps import sweep_backward, sweep_forward
from rankwise.anatomy import block_linears, features
from rankwise.bench.memory import peak, reset_peak
from rankwise.progress import on_terminal
from rankwise.provenance import versions

RESULTS = Path(__file__).parent / "results" / "cpu" / "streamed.jsonl"
CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}


class Drawn(BlockStream):
    """A stream whose blocks have weights only while they run."""

    @contextmanager
    def on_device(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with weights, while the context lasts."""
        block = self.blocks[index]
        fill(block, index)
        try:
            yield block
        finally:
            block.to("meta")


@torch.no_grad()
def fill(module: nn.Module, number: int) -> None:
    """Random weights in the place of none; a function of the number."""
    draws = generator(0, number)
    for parameter in module.to_empty(device=CPU).requires_grad_(False).parameters():
        parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(std=0.02, generator=draws)


def made(blocks: int) -> Any:
    """The model: embedding, norm and head in memory, blocks on the meta device."""
    config = LlamaConfig(**SHAPE, num_hidden_layers=blocks, tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    for number, frame in enumerate((model.model.embed_tokens, model.model.norm, model.lm_head)):
        fill(frame, -number - 1)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model


def main() -> None:
    """Both sweeps, a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64, help="of the one window of each sweep")
    parser.add_argument("--work", type=Path, help="a folder on a disk, not in memory; default: a temporary one")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    model = made(options.blocks)
    window = torch.randint(SHAPE["vocab_size"], (1, options.tokens), generator=generator(0, 0))
    linears = block_linears(model)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        curvature = Curvature(Path(folder), {"blocks": options.blocks})
        stream = Drawn(model, CPU, window)
        forward = measured(lambda: sweep_forward(stream, linears, window, window, curvature, on_terminal))
        backward = measured(lambda: sweep_backward(stream, linears, window, curvature, 0, on_terminal))
        for what, found in (("inputs", forward), ("outputs", backward)):
            written = curvature.file(what, 0).stat().st_size
            write(options, {"sweep": what, **found, "moments_bytes": written, **sizes(model, linears[0])})


def measured(sweep: Callable[[], None]) -> dict[str, Any]:
    """Seconds of a sweep, and the process's peak resident memory."""
    reset_peak(CPU)
    began = time.perf_counter()
    sweep()
    return {"peak_bytes": peak(CPU), "seconds": round(time.perf_counter() - began, 1)}


def sizes(model: Any, block: dict[str, nn.Module]) -> dict[str, Any]:
    """What is in memory by arithmetic: one block, and what is no block."""
    weights = 2 * sum(m * n for m, n in map(features, block.values()))
    frame = sum(parameter.nbytes for parameter in model.parameters() if parameter.device == CPU)
    return {"block_bytes": weights, "frame_bytes": frame}


def write(options: argparse.Namespace, row: dict[str, Any]) -> None:
    """One row to the results."""
    facts = {"bench": "streamed", "device": "cpu", "versions": versions(), "threads": torch.get_num_threads()}
    row = facts | {"shape": SHAPE, "blocks": options.blocks, "tokens": options.tokens, "dtype": "bf16"} | row
    append(options.out, row)
    print(json.dumps(row), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
