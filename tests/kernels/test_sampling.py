"""Reductions of logits equal fp64; draws follow the filtered distribution exactly."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import DEVICE, TOLERANCE, TRITON_DTYPES, draw, in_triton, needs_triton, relative_error

from rankwise.kernels.sampling import chosen_logprobs, logsumexp_argmax, probabilities, sample

BACKENDS = [
    *(pytest.param(dtype, None, id=f"torch-{dtype}".replace("torch.", "")) for dtype in TOLERANCE),
    *(pytest.param(d, "triton", id=f"triton-{d}".replace("torch.", ""), marks=needs_triton) for d in TRITON_DTYPES),
]
EITHER = [None, pytest.param("triton", marks=needs_triton)]


def running(backend: str | None) -> Any:
    return in_triton() if backend else nullcontext()


def row(*values: float) -> torch.Tensor:
    return torch.tensor(values, device=DEVICE)


@pytest.mark.parametrize("shape", [(3, 100), (2, 4096), (1, 9001), (5, 1), (0, 7)], ids=str)
@pytest.mark.parametrize(("dtype", "backend"), BACKENDS)
def test_reductions_equal_fp64(dtype: torch.dtype, backend: str | None, shape: tuple[int, int]) -> None:
    logits = 5 * draw(*shape, dtype=dtype)
    with running(backend):
        total, best = logsumexp_argmax(logits)
        tokens = best[:, None].expand(-1, 2)
        chosen, one = chosen_logprobs(logits, tokens), chosen_logprobs(logits, best)
    expected = logits.double().log_softmax(-1)
    assert relative_error(total, logits.double().logsumexp(-1)) <= 1e-6
    assert torch.equal(best, logits.argmax(-1))
    assert torch.allclose(chosen.double(), expected.gather(-1, tokens), atol=1e-5)
    assert torch.equal(one, chosen[:, 0])


@pytest.mark.parametrize("backend", EITHER)
def test_of_equal_logits_the_first_is_best(backend: str | None) -> None:
    logits = torch.zeros(2, 9000, device=DEVICE)
    logits[1, [4095, 4096, 8999]] = 7.0
    with running(backend):
        assert logsumexp_argmax(logits)[1].tolist() == [0, 4095]


@pytest.mark.parametrize("backend", EITHER)
def test_logits_of_minus_infinity_count_nothing(backend: str | None) -> None:
    logits = torch.full((1, 9000), float("-inf"), device=DEVICE)
    logits[0, 8000], logits[0, 17] = 1e4, 1e4
    with running(backend):
        total, best = logsumexp_argmax(logits)
        assert chosen_logprobs(logits, best).isfinite().all()
    assert total.tolist() == pytest.approx([1e4 + 0.6931472], rel=1e-7)
    assert best.tolist() == [17]


@pytest.mark.parametrize("backend", EITHER)
def test_rows_of_a_larger_tensor(backend: str | None) -> None:
    logits = draw(4, 60, dtype=torch.float32)[::2, :50]
    with running(backend):
        assert relative_error(logsumexp_argmax(logits)[0], logits.double().logsumexp(-1)) <= 1e-6


def shares(logits: torch.Tensor, **filters: Any) -> torch.Tensor:
    """How often each token of one row is drawn when `uniform` takes 4000 even steps."""
    steps = (torch.arange(4000, device=DEVICE) + 0.5) / 4000
    many = {key: torch.full((4000,), value, device=DEVICE) for key, value in filters.items()}
    drawn = sample(logits.expand(4000, -1), steps.float(), **many)
    return drawn.bincount(minlength=logits.shape[-1]).double() / 4000


def filtered(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    """The distribution to draw from, one token after another in plain Python."""
    p = (logits.double() / temperature).softmax(-1)
    order = p.argsort(descending=True).tolist()[: top_k or None]
    whole, before, kept = sum(float(p[i]) for i in order), 0.0, []
    for i in order:
        if before < top_p - 1e-12:
            kept.append(i)
        before += float(p[i]) / whole
    kept = [i for i in kept if p[i] >= min_p * p.max()]
    y = torch.zeros_like(p)
    y[kept] = p[kept]
    return y / y.sum()


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 3},
    {"top_p": 0.7},
    {"top_k": 4, "top_p": 0.8},
    {"min_p": 0.3},
    {"temperature": 1.5, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
    {"top_k": 1},
    {"top_p": 1e-6},
    {"top_k": 0, "top_p": 1.0},
    {"top_k": 99},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_follow_the_filtered_distribution(filters: dict[str, Any]) -> None:
    logits = 2 * draw(12, dtype=torch.float32)
    found = shares(logits[None], **filters)
    assert (found - filtered(logits, **filters)).abs().max() <= 1 / 4000


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_probabilities_are_what_is_drawn_from(filters: dict[str, Any]) -> None:
    """Of rows side by side, one of which has no filters."""
    logits, width = 2 * draw(2, 700, dtype=torch.float32), {"top_p": 1.0, "min_p": 0.0, "top_k": 0, "temperature": 1.0}
    many = {key: torch.tensor([value, width[key]], device=DEVICE) for key, value in filters.items()}
    found = probabilities(logits, **many)
    assert torch.allclose(found[0].double(), filtered(logits[0], **filters), atol=1e-6)
    assert torch.allclose(found[1].double(), logits[1].double().softmax(-1), atol=1e-6)


def test_zero_temperature_takes_the_largest() -> None:
    logits = draw(3, 40, dtype=torch.float32)
    drawn = sample(logits, row(0.1, 0.5, 0.9), temperature=row(0.0, 0.0, 1.0))
    assert torch.equal(drawn[:2], logits.argmax(-1)[:2])


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_ends_of_the_uniform_numbers_stay_within_what_is_kept(filters: dict[str, Any]) -> None:
    logits = torch.cat((draw(300, dtype=torch.float32), torch.full((50,), float("-inf"), device=DEVICE)))
    possible = filtered(logits, **filters) > 0
    many = {key: torch.full((2,), value, device=DEVICE) for key, value in filters.items()}
    assert possible[sample(logits.expand(2, -1), row(0.0, 1 - 2**-24), **many)].all()


@pytest.mark.parametrize("top_k", [(0, 0, 0), (0, 700, 20), (20, 256, 1)], ids=str)
def test_only_part_of_a_large_vocabulary_is_sorted_and_nothing_changes(top_k: tuple[int, int, int]) -> None:
    logits = draw(3, 3000, dtype=torch.float32)
    logits[0] *= 4
    k, p = torch.tensor(top_k, device=DEVICE), row(0.9, 0.95, 0.99)
    for step in (0.0, 0.3, 0.77, 0.999):
        together = sample(logits, torch.full((3,), step, device=DEVICE), top_k=k, top_p=p)
        values, order = logits.double().sort(-1, descending=True)
        for i in range(3):
            kept = filtered(logits[i], top_k=int(k[i]), top_p=float(p[i]))[order[i]]
            at = (kept.cumsum(0) > step).nonzero()[0, 0]
            near = order[i, max(0, at - 1) : at + 2]  # the sums round
            assert together[i] in near
            assert values[i, at].isfinite()


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_a_row_draws_alike_whatever_the_others_ask_for(data: Any) -> None:
    logits = draw(4, 30, dtype=torch.float32)
    uniform = torch.tensor(data.draw(st.lists(st.floats(0, 0.999), min_size=4, max_size=4)), device=DEVICE)
    uniform = uniform.float()
    k = torch.tensor(data.draw(st.lists(st.integers(0, 30), min_size=4, max_size=4)), device=DEVICE)
    p = torch.tensor(data.draw(st.lists(st.sampled_from([1.0, 0.9, 0.3]), min_size=4, max_size=4)), device=DEVICE)
    together = sample(logits, uniform, top_k=k, top_p=p)
    for i in range(4):
        alone = {} if k[i] == 0 and p[i] == 1 else {"top_k": k[i : i + 1], "top_p": p[i : i + 1]}
        assert sample(logits[i : i + 1], uniform[i : i + 1], **alone)[0] == together[i]


@needs_triton
def test_the_operation_keeps_its_promises_to_the_compiler() -> None:
    checks = ["test_schema", "test_faketensor"]
    torch.library.opcheck(torch.ops.rankwise.logsumexp_argmax, (draw(2, 9).float(),), test_utils=checks)
