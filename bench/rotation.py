"""A model whose residual stream is turned by a random orthogonal matrix: the same function, other weights.

Weights that were rounded to a 4-bit grid before they came here would make any rounding to 4 bits look harmless. Turned
(as in QuaRot, 2404.00456), they lie on no grid: norm weights are folded into the layers that follow, the embedding and
the head become two matrices, and every matrix that reads or writes the residual stream is multiplied by Q.
"""

from typing import Any

import torch
from torch import nn

from rankwise.errors import RankwiseError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # RMSNorm before attention, before the MLP and at the end; no more


def orthogonal(size: int, seed: int = 0) -> torch.Tensor:
    """Q `[size, size]` fp64, drawn evenly from all orthogonal matrices (QR of a Gaussian, signs of R's diagonal)."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


@torch.no_grad()
def rotate(model: Any, seed: int = 0) -> torch.Tensor:
    """Turn the residual stream h into `Qᵀ h`, in place; logits stay as they were up to rounding.

    A layer that reads the stream, `y = W (g ⊙ x)` with norm weights g, becomes `W diag(g) Q`, so its input moments
    become `Qᵀ diag(g)⁻¹ C diag(g)⁻¹ Q`; one that writes to it, `W x + b`, becomes `Qᵀ W x + Qᵀ b`.

    Args:
        model: a causal language model of one of `FAMILIES`, in host memory.
        seed: of Q.

    Returns:
        Q, fp64.

    Raises:
        RankwiseError: another family.
    """
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise RankwiseError("model", kind, f"allowed: {', '.join(FAMILIES)}")
    base, q = model.model, orthogonal(model.config.hidden_size, seed)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    _put(base.embed_tokens.weight, base.embed_tokens.weight.double() @ q)
    for block in base.layers:
        attention, mlp = block.self_attn, block.mlp
        _read(block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj], q)
        _write(attention.o_proj, q)
        _read(block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], q)
        _write(mlp.down_proj, q)
    _read(base.norm, [model.lm_head], q)
    return q


def _read(norm: Any, linears: list[Any], q: torch.Tensor) -> None:
    for linear in linears:
        _put(linear.weight, (linear.weight.double() * norm.weight.double()) @ q)
    norm.weight.fill_(1)


def _write(linear: Any, q: torch.Tensor) -> None:
    _put(linear.weight, q.T @ linear.weight.double())
    if linear.bias is not None:
        _put(linear.bias, q.T @ linear.bias.double())


def _put(parameter: torch.Tensor, value: torch.Tensor) -> None:
    parameter.copy_(value.to(parameter.dtype))
