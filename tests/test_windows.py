"""Which windows a command uses, and which it must not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise.alloc.methods import Ara, Global, Rankwise
from rankwise.config import CompressConfig, TextConfig
from rankwise.errors import RankwiseError
from rankwise.text import token_windows
from rankwise.windows import LEARN_WINDOWS, USES, cut_windows, read_texts

SIZES = {"samples": 4, "gradient_samples": 2, "seq_len": 32, "measure": 1}


def config(text: Path, method: Any = None, *, scores: Path | None = None, heal: int = 0, **options: Any) -> Any:
    more = {key: options.pop(key) for key in ("plan", "score_only", "refit") if key in options}
    made = TextConfig(str(text), **(SIZES | options))
    return CompressConfig("model", text.parent / "out", method or Global(), made, scores=scores, heal=heal, **more)


@pytest.fixture
def cut(tiny: Callable[..., Any], tokenizer: Any) -> Callable[[CompressConfig], dict[str, torch.Tensor]]:
    model = tiny("llama")
    return lambda command: cut_windows(command, read_texts(command), model, tokenizer)


@pytest.fixture
def other(text_file: Path, tmp_path: Path) -> Path:
    """The second half of the text."""
    (tmp_path / "other.txt").write_text(text_file.read_text()[10_000:])
    return tmp_path / "other.txt"


def rows(windows: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(window) for window in windows.tolist()}


def test_one_text_gives_five_uses(text_file: Path, tokenizer: Any, cut: Any) -> None:
    every = token_windows(text_file.read_text(), tokenizer, 32)
    found = cut(config(text_file))
    assert tuple(found) == USES
    assert torch.equal(found["inputs"], every[:4])
    assert torch.equal(found["gradients"], every[:2])
    assert torch.equal(found["judges"], every[4:6])
    assert torch.equal(found["measure"], every[6:7])
    assert torch.equal(found["learn"], every[:4])


def test_shuffled_windows_are_still_apart(text_file: Path, cut: Any) -> None:
    found = cut(config(text_file, shuffle=True, seed=3))
    assert not rows(found["learn"]) & (rows(found["judges"]) | rows(found["measure"]))
    assert not torch.equal(found["inputs"], cut(config(text_file))["inputs"])


@pytest.mark.parametrize("method", [Ara(), Rankwise()], ids=["ara", "rankwise"])
def test_another_text_to_learn_from(method: Any, text_file: Path, other: Path, tokenizer: Any, cut: Any) -> None:
    every = token_windows(other.read_text(), tokenizer, 32)
    found = cut(config(text_file, method, learn=str(other), learn_samples=3))
    assert torch.equal(found["learn"], every[:3])
    assert len(cut(config(text_file, method, learn=str(other)))["learn"]) == len(every) < LEARN_WINDOWS


def test_a_long_text_is_not_learnt_whole(text_file: Path, other: Path, cut: Any) -> None:
    found = cut(config(text_file, Ara(), learn=str(other), seq_len=4))
    assert len(found["learn"]) == LEARN_WINDOWS


def test_windows_that_judge_are_never_learnt_from(text_file: Path, tokenizer: Any, cut: Any) -> None:
    """The same text for both: its windows 4 to 6 judge a refit, and measure."""
    every = token_windows(text_file.read_text(), tokenizer, 32)
    found = cut(config(text_file, Rankwise(), learn=str(text_file), learn_samples=9))
    assert torch.equal(found["learn"], torch.cat([every[:4], every[7:12]]))


def test_a_text_that_nothing_learns_from_is_not_read(text_file: Path, tmp_path: Path) -> None:
    nothing = str(tmp_path / "none.txt")
    assert read_texts(config(text_file, Global(), learn=nothing)).keys() == {"calibration"}
    assert read_texts(config(text_file, Ara(), learn=nothing, plan=tmp_path / "p")).keys() == {"calibration"}
    scored = config(text_file, Rankwise(), learn=nothing, score_only=True)
    assert read_texts(scored).keys() == {"calibration"}
    for command in ({"heal": 3}, {"method": Ara()}, {"refit": True}, {"method": Ara(), "score_only": True}):
        with pytest.raises(RankwiseError, match=r"^text: .*none.txt"):
            read_texts(config(text_file, learn=nothing, **command))


def test_plans_from_scores_need_no_text_unless_they_are_healed(tmp_path: Path, text_file: Path, cut: Any) -> None:
    plain = config(tmp_path / "none.txt", Ara(), scores=tmp_path, learn=str(tmp_path / "none.txt"))
    assert read_texts(plain) == {}
    assert {key: tuple(windows.shape) for key, windows in cut(plain).items()} == dict.fromkeys(USES, (0, 32))
    healed = cut(config(text_file, Ara(), scores=tmp_path, heal=3))
    assert [len(healed[use]) for use in USES] == [4, 2, 2, 1, 4]


def test_short_texts_and_long_windows_are_refused(text_file: Path, tmp_path: Path, cut: Any) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(RankwiseError, match=r"^text: .*short.txt holds 0 windows of 32 tokens; 1 needed"):
        cut(config(text_file, Ara(), learn=str(tmp_path / "short.txt")))
    with pytest.raises(RankwiseError, match=r"^text: .*docs.txt holds \d+ windows of 32 tokens; 9999 needed"):
        cut(config(text_file, Ara(), learn=str(text_file), learn_samples=9999))
    with pytest.raises(RankwiseError, match=r"^seq_len: 129; allowed: at most 128"):
        cut(config(text_file, seq_len=129))
