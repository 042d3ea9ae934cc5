"""What the dense model says is kept exactly for its likeliest tokens, and bounded for the rest."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import kl_div

from rankwise.alloc.teacher import KEPT, Teacher

LENGTH = 9


class Speaker(nn.Module):
    """Says the same logits `[T, vocab]` whatever it is asked; counts how often."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.said, self.calls = nn.Parameter(logits, requires_grad=False), 0

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        self.calls += 1
        return type("Output", (), {"logits": self.said[None]})


def random(vocabulary: int, seed: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(LENGTH, vocabulary, generator=torch.Generator().manual_seed(seed))


def windows(count: int = 1) -> torch.Tensor:
    return torch.arange(count * LENGTH).view(count, LENGTH)


def full(teacher: torch.Tensor, student: torch.Tensor) -> float:
    """Over the whole vocabulary, in fp64."""
    p, q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    return float(kl_div(q, p, log_target=True, reduction="sum")) / LENGTH


def heard(folder: Path, logits: torch.Tensor) -> Teacher:
    teacher = Teacher(folder)
    teacher.listen(Speaker(logits), windows())
    return teacher


@pytest.mark.parametrize("vocabulary", [2, 40, KEPT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_of_a_small_vocabulary_it_is_the_divergence(vocabulary: int, dtype: torch.dtype, tmp_path: Path) -> None:
    said, student = random(vocabulary, 1).to(dtype), random(vocabulary, 2).to(dtype)
    found = float(heard(tmp_path, said).divergence(0, student))
    assert found == pytest.approx(full(said, student), rel=1e-4)


@pytest.mark.parametrize("scale", [0.1, 2.0, 6.0])
@pytest.mark.parametrize("vocabulary", [KEPT + 1, 300, 4000])
def test_of_a_large_vocabulary_it_is_a_lower_bound(vocabulary: int, scale: float, tmp_path: Path) -> None:
    """And exactly the divergence with all the rest taken as one outcome."""
    said, student = random(vocabulary, 1, scale), random(vocabulary, 2, scale)
    found = float(heard(tmp_path, said).divergence(0, student))
    assert 0 < found <= full(said, student) * (1 + 1e-4)
    order = said.argsort(-1, descending=True)
    lumped = []
    for logits in (said, student):
        likely = logits.double().softmax(-1).gather(-1, order)
        lumped.append(torch.cat([likely[:, :KEPT], likely[:, KEPT:].sum(-1, keepdim=True)], dim=-1).log())
    assert found == pytest.approx(full(*lumped), rel=1e-3)


@pytest.mark.parametrize("vocabulary", [40, 300])
def test_the_teacher_does_not_differ_from_itself(vocabulary: int, tmp_path: Path) -> None:
    said = random(vocabulary, 1)
    teacher, student = heard(tmp_path, said), said.clone().requires_grad_()
    loss = teacher.divergence(0, student)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-6


def test_a_sure_teacher_and_a_sure_student_are_no_trouble(tmp_path: Path) -> None:
    """Nothing is left for the rest of the vocabulary, in either."""
    said = torch.full((LENGTH, 200), -200.0)
    said[:, 3] = 200.0
    student = said.roll(1, -1).requires_grad_()
    teacher = heard(tmp_path, said)
    assert float(teacher.divergence(0, said)) == pytest.approx(0, abs=1e-4)
    loss = teacher.divergence(0, student)
    loss.backward()
    assert 300 < float(loss.detach()) < 500
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_it_follows_the_window_number(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model, ids = tiny("llama"), torch.randint(2, 512, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    teacher = Teacher(tmp_path)
    teacher.listen(model, ids)
    for number, window in enumerate(ids):
        logits = model(input_ids=window[None]).logits[0]
        assert float(teacher.divergence(number, logits)) == pytest.approx(0, abs=1e-6)
        assert float(teacher.divergence((number + 1) % 3, logits)) > 1e-3


def test_what_was_heard_is_not_asked_again(dies: Any, tmp_path: Path) -> None:
    speaker, ids = Speaker(random(300, 1)), windows(4)
    with pytest.raises(InterruptedError):
        Teacher(tmp_path).listen(speaker, ids, track=dies(2))
    assert speaker.calls == 2
    Teacher(tmp_path).listen(speaker, ids)
    assert speaker.calls == 4


def test_another_text_or_model_is_asked_anew(tmp_path: Path) -> None:
    speaker, ids = Speaker(random(300, 1)), windows(4)
    Teacher(tmp_path).listen(speaker, ids)
    changed = ids.clone()
    changed[2, 5] += 1
    Teacher(tmp_path).listen(speaker, changed)
    assert speaker.calls == 5
    other = Speaker(random(300, 2))
    teacher = Teacher(tmp_path)
    teacher.listen(other, changed)
    assert other.calls == 4
    assert float(teacher.divergence(0, other.said)) == pytest.approx(0, abs=1e-6)
