"""Text into token windows, the same windows every time."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from rankwise.errors import RankwiseError

ALLOWED = "a .txt or .jsonl file, embedded:python-docs, embedded:python-docs-test, wikitext2 or c4"
SEPARATOR = "\n\n"  # between documents, as in the usual WikiText-2 protocol
HELD_OUT = 6  # one topic in this many belongs to embedded:python-docs-test
C4_DOCUMENTS = 4000  # enough for 256 windows of 2048 tokens
HUB = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": ("allenai/c4", "en"),
}


def read_text(source: str, split: str = "train") -> str:
    """The text behind a name, documents joined by a blank line.

    Args:
        source: see `ALLOWED`. A `.jsonl` row is a JSON string, or an object with a field `text`.
        split: `train` (calibration) or `test` (evaluation); only hub data sets look at it.

    Raises:
        RankwiseError: unknown name, unreadable file, or a data set that cannot be had.
    """
    if source in ("embedded:python-docs", "embedded:python-docs-test"):
        return _embedded(held_out=source.endswith("-test"))
    if source in HUB:
        return _from_hub(source, split)
    path = Path(source)
    if path.suffix not in (".txt", ".jsonl"):
        raise RankwiseError("text", source, f"allowed: {ALLOWED}")
    try:
        raw = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RankwiseError(
            "text", f"{source} ({error.__class__.__name__})", "a readable UTF-8 file is expected"
        ) from None
    return raw if path.suffix == ".txt" else SEPARATOR.join(_json_lines(raw, source))


def token_windows(text: str, tokenizer: Any, seq_len: int) -> torch.Tensor:
    """All whole windows of a text: `[windows, seq_len]` int64, without overlap.

    Each begins as the tokenizer begins a text: with the special tokens that it puts in front, if any (Llama's and
    Gemma's `<bos>`). A model that was trained with them predicts badly without.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    opening = opening_of(tokenizer)[: seq_len - 1]
    length = seq_len - len(opening)
    count = len(ids) // length
    windows = torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)
    return torch.cat([torch.tensor(opening, dtype=torch.int64).expand(count, -1), windows], dim=1)


def opening_of(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts in front of a text."""
    found: list[int] = tokenizer("a", verbose=False)["input_ids"]
    plain: list[int] = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    return next((found[:at] for at in range(len(found)) if plain and found[at : at + len(plain)] == plain), [])


def take_windows(
    windows: torch.Tensor, count: int, source: str, *, shuffle: bool = False, seed: int = 0
) -> torch.Tensor:
    """The first `count` windows, in text order or in the order that `seed` fixes.

    Raises:
        RankwiseError: the text is too short.
    """
    if len(windows) < count:
        raise RankwiseError(
            "text",
            f"{source} holds {len(windows)} windows of {windows.shape[-1]} tokens",
            f"{count} needed: give a longer text, fewer windows or a smaller --seq-len",
        )
    if shuffle:
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        windows = windows[order]
    return windows[:count]


def _embedded(*, held_out: bool) -> str:
    """CPython's own manual pages, some 400 kB of English; every sixth topic is held out for tests.

    The manual repeats whole passages inside other topics: what the held-out part says, the other part leaves out.
    """
    from pydoc_data.topics import topics

    pages = [topics[name].split(SEPARATOR) for name in sorted(topics)]
    tests: dict[str, str] = {}
    for page in pages[::HELD_OUT]:
        for paragraph in page:
            tests.setdefault(_squeezed(paragraph), paragraph)
    if held_out:
        return SEPARATOR.join(tests.values())
    others = [paragraph for i, page in enumerate(pages) if i % HELD_OUT for paragraph in page]
    return SEPARATOR.join(paragraph for paragraph in others if _squeezed(paragraph) not in tests)


def _squeezed(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _json_lines(raw: str, source: str) -> Iterable[str]:
    for number, line in enumerate(raw.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RankwiseError("text", f"{source} line {number}: {error}", "one JSON value a line") from None
        text = row.get("text") if isinstance(row, dict) else row
        if not isinstance(text, str):
            raise RankwiseError("text", f"{source} line {number}", "an object with a string field `text`, or a string")
        yield text


def _from_hub(name: str, split: str) -> str:
    try:
        from datasets import load_dataset
    except ImportError:
        raise RankwiseError("text", name, "needs the extra: pip install 'rankwise[datasets]'") from None
    path, config = HUB[name]
    try:
        if name == "c4":  # hundreds of gigabytes: stream the head of the split that was asked for
            rows = load_dataset(path, config, split="train" if split == "train" else "validation", streaming=True)
            return SEPARATOR.join(row["text"] for row in rows.take(C4_DOCUMENTS))
        return SEPARATOR.join(load_dataset(path, config, split=split)["text"])
    except (OSError, ValueError, RuntimeError) as error:
        reason = f"{name} ({error.__class__.__name__}: {str(error)[:120]})"
        raise RankwiseError("text", reason, "the hub must be reachable, or the data set in its cache") from None
