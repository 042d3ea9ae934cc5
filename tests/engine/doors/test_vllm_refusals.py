"""What the last line of vLLM's server is when it refuses a model; vLLM itself is not needed here."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError, model_validator

from rankwise.engine.doors.vllm import refusals
from rankwise.errors import RankwiseError

OURS = RankwiseError("layers.0.q_proj", "not in the checkpoint", "write the checkpoint again")


class Config(BaseModel):
    """As vLLM's are: what goes wrong inside becomes pydantic's error."""

    @model_validator(mode="after")
    def refuse(self) -> "Config":
        raise OURS


def test_our_reason_is_found_behind_others() -> None:
    outer = RuntimeError("Engine core initialization failed")
    outer.__cause__ = OURS
    assert refusals.reason_of(outer) == str(OURS)
    with pytest.raises(ValidationError) as raised:
        Config()
    assert refusals.reason_of(raised.value) == str(OURS)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "Unknown quantization method: rankwise. Must be one of ['awq']",
            "plugin: rankwise (vLLM did not load it); install rankwise in vLLM's environment; VLLM_PLUGINS, if set, "
            "must name it",
        ),
        (
            "Model architectures ['Odd'] are not supported for now. Supported architectures: ['A']",
            "model: architectures ['Odd'] (vLLM has no such model); serve it with --engine rankwise",
        ),
        ("9 heads cannot be\n split by 2", "vLLM: 9 heads cannot be split by 2"),
    ],
)
def test_what_vllm_says_becomes_one_line(said: str, reason: str) -> None:
    assert refusals.reason_of(ValueError(said)) == reason


def test_other_errors_stay_as_they_are() -> None:
    assert refusals.reason_of(OSError("address in use")) is None


def test_another_process_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first refusal is the cause; what else is logged is not noted."""
    monkeypatch.setenv(refusals.NOTE, str(tmp_path / "refusal"))
    parent, logger = logging.getLogger("vllm"), logging.getLogger("vllm.v1.engine.core")
    before = list(parent.handlers)
    try:
        refusals.note_refusals()
        refusals.note_refusals()
        assert len(parent.handlers) == len(before) + 1
        for error in (OSError("no"), OURS, RankwiseError("a", "b", "c")):
            try:
                raise error
            except (OSError, RankwiseError):
                assert refusals.noted() == (None if isinstance(error, OSError) or error is OURS else str(OURS))
                logger.exception("failed")
        assert refusals.noted() == str(OURS)
    finally:
        parent.handlers = before


@pytest.mark.parametrize(
    ("body", "code", "last"),
    [
        ("from rankwise.errors import RankwiseError\nraise RankwiseError('a', 'b', 'c')", 1, "error: a: b; c"),
        ("raise OSError('address in use')", 1, "OSError: address in use"),
        ("raise SystemExit(3)", 3, ""),
    ],
)
def test_the_last_line(body: str, code: int, last: str, tmp_path: Path) -> None:
    """With a module that fails in the server's place."""
    (tmp_path / "failing.py").write_text(body)
    script = "from rankwise.engine.doors.vllm import refusals\nrefusals.SERVER = 'failing'\nrefusals.main()"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == code
    assert (done.stderr.splitlines() or [""])[-1] == last
