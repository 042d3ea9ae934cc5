"""The GPU suite's contests of attention and of the small operations are fair: all give the exact answer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tensors import DEVICE, in_triton, needs_triton, relative_error

from bench.gpu import attention, runtime

SMALL: dict[str, Callable[..., Any]] = {
    "decode": partial(attention.decode, 3, 70, heads=6, kv_heads=2, dim=16),
    "prefill": partial(attention.prefill, 2, 20, 0, heads=4, kv_heads=2, dim=16),
    "prefill behind a prefix": partial(attention.prefill, 2, 9, 17, heads=4, kv_heads=2, dim=16),
    "norm": partial(runtime.norm, 5, 48),
    "gated": partial(runtime.gated, 5, 48),
    "turned": partial(runtime.turned, 5, 4, 2, 16),
    "logits": partial(runtime.logits, 3, 200),
}


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("build", SMALL.values(), ids=SMALL)
def test_all_give_the_exact_answer(build: Callable[..., Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    contest = build(device=torch.device(DEVICE), dtype=dtype)
    expected = _tuple(contest.reference())
    with in_triton():
        found = {"ours": _tuple(contest.ours())}
    eager = {name: call for name, call in contest.peers.items() if DEVICE == "cuda" or "compile" not in name}
    found |= {name: _tuple(call()) for name, call in eager.items()}
    assert len(found) > 1
    for name, values in found.items():
        for y, x in zip(values, expected, strict=True):
            assert y.shape == x.shape, name
            assert relative_error(y, x) <= contest.tolerance, name


@pytest.mark.parametrize("module", [attention, runtime])
def test_lines_are_complete(module: Any) -> None:
    works = module.works()
    assert len({work.name for work in works}) == len(works)
    assert all(work.bytes > 0 for work in works)


def _tuple(values: Any) -> tuple[torch.Tensor, ...]:
    return values if isinstance(values, tuple) else (values,)
