"""Text into the same token windows every time."""

import copy
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from rankwise.errors import RankwiseError
from rankwise.text import C4_DOCUMENTS, opening_of, read_text, take_windows, token_windows

EMBEDDED = ("embedded:python-docs", "embedded:python-docs-test")
LONG = 80  # characters; shorter paragraphs ("Changed in version 3.1") stand in many places


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def paragraphs(text: str) -> list[str]:
    return [part.strip() for part in text.split("\n\n") if len(part.strip()) >= LONG]


# --- files ------------------------------------------------------------------------------------------------------------


def test_text_files_are_read_as_they_are(tmp_path: Path) -> None:
    assert read_text(write(tmp_path / "a.txt", "one\n\n two — ü\n")) == "one\n\n two — ü\n"


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(["one", "two\nlines", "ü"], id="strings"),
        pytest.param([{"text": "one", "id": 1}, {"text": "two\nlines"}, {"text": "ü"}], id="objects"),
        pytest.param(["one", {"text": "two\nlines"}, "ü"], id="mixed"),
    ],
)
@pytest.mark.parametrize("ascii_only", [True, False], ids=["escaped", "raw"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_json_lines_are_joined_by_a_blank_line(rows: list[Any], ascii_only: bool, ending: str, tmp_path: Path) -> None:
    lines = ["", *(json.dumps(row, ensure_ascii=ascii_only) for row in rows), "  ", ""]
    assert read_text(write(tmp_path / "a.jsonl", ending.join(lines))) == "one\n\ntwo\nlines\n\nü"


@pytest.mark.parametrize("code", [0x85, 0x2028, 0x2029], ids=["next-line", "line-separator", "paragraph-separator"])
def test_json_strings_may_hold_unicode_line_ends(code: int, tmp_path: Path) -> None:
    text = f"before{chr(code)}after"
    raw = json.dumps({"text": text}, ensure_ascii=False)
    assert chr(code) in raw  # JSON does not ask for it to be escaped; only \n ends a line
    assert read_text(write(tmp_path / "a.jsonl", raw + "\n")) == text


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        pytest.param('{"text": "cut', "one JSON value a line", id="cut"),
        pytest.param("plain words", "one JSON value a line", id="no-json"),
        pytest.param('{"body": "x"}', "string field `text`", id="other-field"),
        pytest.param('{"text": 3}', "string field `text`", id="number-in-field"),
        pytest.param("[1]", "string field `text`", id="list"),
        pytest.param("null", "string field `text`", id="null"),
    ],
)
def test_bad_json_lines_are_numbered(bad: str, reason: str, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", f'"fine"\n\n{bad}\n"fine"\n')
    with pytest.raises(RankwiseError, match=reason) as caught:
        read_text(source)
    assert f"{source} line 3" in str(caught.value)


@pytest.mark.parametrize("name", ["notes.md", "data.json", "noextension", "", "embedded:other", "wikitext103", "a.TXT"])
def test_unknown_sources_list_the_known_ones(name: str) -> None:
    with pytest.raises(RankwiseError) as caught:
        read_text(name)
    assert all(known in str(caught.value) for known in (".txt", ".jsonl", *EMBEDDED, "wikitext2", "c4"))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("problem", ["missing", "folder", "binary"])
def test_unreadable_files_are_named(problem: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    if problem == "folder":
        path.mkdir()
    if problem == "binary":
        path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(RankwiseError, match="a readable UTF-8 file is expected") as caught:
        read_text(str(path))
    assert str(path) in str(caught.value)


# --- the embedded text ------------------------------------------------------------------------------------------------


def test_embedded_parts_are_complete() -> None:
    expected = {part for topic in topics.values() for part in paragraphs(topic)}
    found = {part for name in EMBEDDED for part in paragraphs(read_text(name))}
    assert found == expected


def test_embedded_test_part_is_not_in_the_training_part() -> None:
    train, test = (paragraphs(read_text(name)) for name in EMBEDDED)
    known = set(train)
    shared = sum(len(part) for part in test if part in known)
    assert shared < 0.01 * sum(len(part) for part in test), "CPython repeats whole topics inside others"


def test_embedded_parts_are_large_enough_and_always_the_same() -> None:
    train, test = (read_text(name) for name in EMBEDDED)
    assert len(train) > 200_000
    assert len(test) > 30_000
    assert [read_text(name) for name in EMBEDDED] == [train, test]


# --- hub data sets ----------------------------------------------------------------------------------------------------


class Hub:
    """Stands in for the hub: real data sets, made in memory."""

    def __init__(self, rows: list[str]) -> None:
        self.rows, self.calls = rows, []  # type: list[str], list[tuple[Any, ...]]

    def load_dataset(self, path: str, name: str, *, split: str, streaming: bool = False) -> Any:
        self.calls.append((path, name, split, streaming))
        from datasets import Dataset

        data = Dataset.from_dict({"text": [f"{split}: {row}" for row in self.rows], "id": list(range(len(self.rows)))})
        return data.to_iterable_dataset() if streaming else data


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    pytest.importorskip("datasets")
    stand_in = Hub(["one", "", "two\nlines"])
    monkeypatch.setattr("datasets.load_dataset", stand_in.load_dataset)
    return stand_in


@pytest.mark.parametrize("split", ["train", "test"])
def test_wikitext_rows_are_joined(split: str, hub: Hub) -> None:
    assert read_text("wikitext2", split) == f"{split}: one\n\n{split}: \n\n{split}: two\nlines"
    assert hub.calls == [("Salesforce/wikitext", "wikitext-2-raw-v1", split, False)]


@pytest.mark.parametrize(("split", "loaded"), [("train", "train"), ("test", "validation")])
def test_c4_is_streamed_from_its_head(split: str, loaded: str, hub: Hub) -> None:
    hub.rows = [str(number) for number in range(C4_DOCUMENTS + 5)]
    documents = read_text("c4", split).split("\n\n")
    assert documents == [f"{loaded}: {number}" for number in range(C4_DOCUMENTS)]
    assert hub.calls == [("allenai/c4", "en", loaded, True)]


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
@pytest.mark.parametrize(
    "error",
    [ConnectionError("no route to host"), FileNotFoundError("not in the cache"), ValueError("bad"), RuntimeError("x")],
    ids=lambda error: type(error).__name__,
)
def test_an_unreachable_hub_is_one_clear_line(
    error: Exception, name: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(RankwiseError, match="the hub must be reachable") as caught:
        read_text(name)
    assert caught.value.field == "text"
    assert f"{name} ({type(error).__name__}: {error})" in str(caught.value)


def test_a_stream_that_breaks_off_is_no_shorter_text(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        yield {"text": "first"}
        raise ConnectionError("reset")

    from datasets import IterableDataset

    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: IterableDataset.from_generator(broken))
    with pytest.raises(RankwiseError, match="the hub must be reachable"):
        read_text("c4")


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_the_missing_extra_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RankwiseError, match=r"pip install 'rankwise\[datasets\]'"):
        read_text(name)


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seq_len", [2, 7, 100])
def test_windows_are_the_token_stream_cut_up(seq_len: int, tokenizer: Any) -> None:
    text = read_text("embedded:python-docs")[:5000]
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    windows = token_windows(text, tokenizer, seq_len)
    assert windows.dtype == torch.int64
    assert len(ids) - seq_len < windows.numel() <= len(ids)
    assert windows.flatten().tolist() == ids[: windows.numel()]
    assert windows.shape[1] == seq_len


def marking(tokenizer: Any, single: str) -> Any:
    """The tokenizer with another template."""
    other = copy.deepcopy(tokenizer)
    pair = [("<s>", 0), ("</s>", 1)]
    other.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=pair)
    return other


@pytest.mark.parametrize(
    ("single", "opening"), [("<s> $A </s>", [0]), ("</s> <s> $A", [1, 0]), ("$A </s>", []), ("$A", [])]
)
def test_a_window_begins_as_the_tokenizer_begins_a_text(single: str, opening: list[int], tokenizer: Any) -> None:
    text = read_text("embedded:python-docs")[:2000]
    windows = token_windows(text, marking(tokenizer, single), 10)
    own = 10 - len(opening)
    assert windows[:, : len(opening)].tolist() == [opening] * len(windows)
    assert torch.equal(windows[:, len(opening) :], token_windows(text, tokenizer, own))
    assert token_windows("", marking(tokenizer, single), 10).shape == (0, 10)
    assert token_windows(text, marking(tokenizer, single), 1).shape[1] == 1


def test_what_cannot_be_told_from_the_text_is_no_opening() -> None:
    """A tokenizer that splits a word otherwise behind a special token."""

    def odd(text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1, 5, 2] if add_special_tokens else [9] * len(text)}

    assert opening_of(odd) == []
    assert token_windows("abcd", odd, 2).tolist() == [[9, 9], [9, 9]]


@pytest.mark.parametrize("text", ["", "ab"])
def test_text_shorter_than_a_window_gives_none(text: str, tokenizer: Any) -> None:
    windows = token_windows(text, tokenizer, 50)
    assert windows.shape == (0, 50)
    with pytest.raises(RankwiseError, match="holds 0 windows of 50 tokens; 1 needed"):
        take_windows(windows, 1, "a.txt")


def test_windows_come_in_text_order() -> None:
    windows = torch.arange(40).view(10, 4)
    assert torch.equal(take_windows(windows, 3, "x"), windows[:3])
    assert torch.equal(take_windows(windows, 10, "x"), windows)


def test_shuffle_depends_on_the_seed_alone() -> None:
    windows = torch.arange(400).view(100, 4)
    torch.manual_seed(1)
    first = take_windows(windows, 60, "x", shuffle=True, seed=5)
    torch.manual_seed(2)
    assert torch.equal(first, take_windows(windows, 60, "x", shuffle=True, seed=5))
    assert not torch.equal(first, take_windows(windows, 60, "x", shuffle=True, seed=6))
    assert not torch.equal(first, windows[:60])
    assert first[:, 0].max() >= 4 * 60  # from all over the text
    assert torch.equal(take_windows(windows, 100, "x", shuffle=True).sort(dim=0).values, windows)  # each one once
    assert torch.equal(take_windows(windows, 20, "x", shuffle=True, seed=5), first[:20])


def test_too_short_texts_say_what_is_there_and_what_is_needed() -> None:
    with pytest.raises(RankwiseError) as caught:
        take_windows(torch.zeros(3, 8, dtype=torch.int64), 4, "short.txt")
    assert str(caught.value).startswith("text: short.txt holds 3 windows of 8 tokens; 4 needed")
