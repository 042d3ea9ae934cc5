"""Operations counted while they run, against what is known of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.counts import counting

A, B = torch.randn(8, 6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
S = torch.eye(6, dtype=torch.float64) * 3 + torch.ones(6, 6, dtype=torch.float64)


@pytest.mark.parametrize(
    ("work", "kind", "expected"),
    [
        (lambda: A @ B, "product", 2 * 8 * 6 * 4),
        (lambda: torch.zeros(8, 4, dtype=torch.float64).addmm_(A, B), "product", 2 * 8 * 6 * 4),
        (lambda: torch.bmm(A[None], B[None]), "product", 2 * 8 * 6 * 4),
        (lambda: A @ B[:, 0], "product with a vector", 2 * 8 * 6),
        (lambda: torch.linalg.eigh(S), "eigh", 9 * 6**3),
        (lambda: torch.linalg.eigvalsh(S), "eigh", 4 * 6**3 // 3),
        (lambda: torch.linalg.svd(A, full_matrices=False), "eigh", 22 * 8 * 6**2),
        (lambda: torch.linalg.cholesky(S), "solve", 6**3 // 3),
        (lambda: torch.linalg.solve(S, B), "solve", 2 * 6**3 // 3 + 2 * 6**2 * 4),
        (lambda: torch.linalg.solve_triangular(S.tril(), B, upper=False), "solve", 6**2 * 4),
        (lambda: torch.linalg.lu_factor_ex(A), "solve", 8 * 6**2 - 6**3 // 3),
    ],
)
def test_textbook_counts(work: Callable[[], Any], kind: str, expected: int) -> None:
    with counting() as counted:
        work()
    assert {key[0] for key in counted.operations} == {kind}
    assert sum(counted.operations.values()) == expected


def test_a_backward_pass_counts_and_views_do_not() -> None:
    weight = A.clone().requires_grad_(True)
    with counting() as counted:
        (weight @ B).sum().backward()
    assert counted.operations == {("product", "float64"): 2 * 2 * 8 * 6 * 4}
    with counting() as counted:
        A.T[1:3].reshape(-1, 1, 8)
    assert not counted.operations
    assert not counted.touched
    with counting() as counted:
        torch.add(A, A)
    assert counted.touched == 3 * 8 * A.numel()


def test_what_is_patched_is_put_back() -> None:
    before = torch.linalg.eigvalsh
    with pytest.raises(ZeroDivisionError), counting():
        _ = 1 / 0
    assert before is torch.linalg.eigvalsh
