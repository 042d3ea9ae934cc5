"""The texts that benches calibrate on, learn from and test on: WikiText-2, C4 and code, each cut into parts."""

import argparse
import sysconfig
from pathlib import Path
from typing import Any

import torch

from rankwise.text import SEPARATOR, read_text, take_windows, token_windows

DOMAINS = ("wikitext2", "c4", "code")
BOTH = "wikitext2+c4"  # to calibrate on: a window of each, in turn
C4_LEARN = 2 / 3  # of the documents; the others are for tests
CODE_FOLDERS = ("asyncio", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest", "xml", ".")
CODE_TEST = 4  # every so-manieth module is for tests


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Where the texts are, and how much of them is used."""
    parser.add_argument("--train", required=True, help="WikiText-2 train text")
    parser.add_argument("--test", required=True, help="WikiText-2 test text")
    parser.add_argument(
        "--c4", required=True, help=".jsonl of C4 documents: two thirds to learn from, the rest to test"
    )
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=16, help="of each test text")


def train_windows(domain: str, options: argparse.Namespace, tokenizer: Any) -> torch.Tensor:
    """All windows `[N, T]` of a domain that may be calibrated on or learnt from."""
    if domain == BOTH:
        parts = [train_windows(part, options, tokenizer) for part in BOTH.split("+")]
        return torch.stack([part[: min(map(len, parts))] for part in parts], dim=1).flatten(0, 1)
    return token_windows(_train(domain, options), tokenizer, options.seq_len)


def test_windows(domain: str, options: argparse.Namespace, tokenizer: Any) -> torch.Tensor:
    """The first windows `[M, T]` of a domain's held-out part."""
    found = token_windows(_test(domain, options), tokenizer, options.seq_len)
    return take_windows(found, options.windows, domain)


def _train(domain: str, options: argparse.Namespace) -> str:
    if domain == "wikitext2":
        return read_text(options.train)
    if domain == "c4":
        documents = read_text(options.c4).split(SEPARATOR)
        return SEPARATOR.join(documents[: int(len(documents) * C4_LEARN)])
    return _code(held_out=False)


def _test(domain: str, options: argparse.Namespace) -> str:
    if domain == "wikitext2":
        return read_text(options.test, "test")
    if domain == "c4":
        documents = read_text(options.c4).split(SEPARATOR)
        return SEPARATOR.join(documents[int(len(documents) * C4_LEARN) :])
    return _code(held_out=True)


def _code(*, held_out: bool) -> str:
    """Modules of Python's own standard library, in order of their names; generated tables are left out."""
    root = Path(sysconfig.get_path("stdlib"))
    found = sorted({path for folder in CODE_FOLDERS for path in (root / folder).glob("*.py")})
    modules = [path for path in found if "generated" not in path.read_text("utf-8", "ignore")[:2000].lower()]
    return SEPARATOR.join(
        path.read_text("utf-8", "ignore") for i, path in enumerate(modules) if (i % CODE_TEST == 0) == held_out
    )
