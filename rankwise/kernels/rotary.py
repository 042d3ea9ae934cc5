"""Rotary position embedding (RoFormer, 2104.09864) of queries and keys, and the way of keys and values into pages.

The rotated pair of component i is `i + rotary_dim / 2`, the layout of the Llama family in transformers.
"""

import torch

from rankwise.kernels import native
from rankwise.kernels.backend import cdiv, launch, power_of_two, tl, triton, use_triton

HEADS = 8  # of a program


@triton.jit
def _rotate(
    source, target, cos, sin, head, heads, source_head, target_head,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Some heads of one token. Components from `2 HALF` are copied; HALF 0 copies them all."""
    if HALF > 0:
        i = tl.arange(0, PADDED)
        mask = (head < heads)[:, None] & (i < HALF)[None, :]
        a = tl.load(source + head[:, None] * source_head + i[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(source + head[:, None] * source_head + i[None, :] + HALF, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(cos + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
        s = tl.load(sin + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
        at = target + head[:, None] * target_head + i[None, :]
        tl.store(at, (a * c - b * s).to(target.dtype.element_ty), mask=mask)
        tl.store(at + HALF, (b * c + a * s).to(target.dtype.element_ty), mask=mask)
    if 2 * HALF < HEAD_DIM:
        j = 2 * HALF + tl.arange(0, REST)
        mask = (head < heads)[:, None] & (j < HEAD_DIM)[None, :]
        x = tl.load(source + head[:, None] * source_head + j[None, :], mask=mask, other=0.0)
        tl.store(target + head[:, None] * target_head + j[None, :], x.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _rotary(
    q, k, v, q_out, k_out, v_out, cos, sin, positions, slots,
    q_token, q_head, k_token, k_head, v_token, v_head, qo_token, qo_head,
    ko_block, ko_slot, ko_head, vo_block, vo_slot, vo_head, cos_row,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr,
    REST: tl.constexpr, WHOLE: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAGED: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One token, some heads of q, k or v. PAGED: k and v go where `slots` says, nowhere if that is negative."""
    Q_PARTS: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    KV_PARTS: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = tl.arange(0, HEADS)
    if HALF > 0:
        row = tl.load(positions + token).to(tl.int64) * cos_row
        cos, sin = cos + row, sin + row
    slot = tl.load(slots + token).to(tl.int64) if PAGED else token
    block, place = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    if part < Q_PARTS:
        head += part * HEADS
        source, target = q + token * q_token, q_out + token * qo_token
        _rotate(source, target, cos, sin, head, Q_HEADS, q_head, qo_head, HEAD_DIM, HALF, PADDED, REST)
    elif slot >= 0:
        if part < Q_PARTS + KV_PARTS:
            head += (part - Q_PARTS) * HEADS
            source, target = k + token * k_token, k_out + block * ko_block + place * ko_slot
            _rotate(source, target, cos, sin, head, KV_HEADS, k_head, ko_head, HEAD_DIM, HALF, PADDED, REST)
        else:
            head += (part - Q_PARTS - KV_PARTS) * HEADS
            source, target = v + token * v_token, v_out + block * vo_block + place * vo_slot
            _rotate(source, target, cos, sin, head, KV_HEADS, v_head, vo_head, HEAD_DIM, 0, PADDED, WHOLE)


def _launch(
    q: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor | None,
    q_out: torch.Tensor | None, k_out: torch.Tensor, v_out: torch.Tensor | None,
    cos: torch.Tensor | None = None, sin: torch.Tensor | None = None, positions: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> None:  # fmt: skip
    (tokens, kv_heads, dim), heads = k.shape, 0 if q is None else q.shape[1]
    half = 0 if cos is None else cos.shape[1]
    parts = cdiv(heads, HEADS) + cdiv(kv_heads, HEADS) * (1 if v is None else 2)
    padded = power_of_two(max(1, half))
    # No program gets to what is absent; k stands for it.
    q, q_out, v, v_out = (x if x is not None else k for x in (q, q_out, v, v_out))
    launch(
        _rotary, (tokens, parts), q, k, v, q_out, k_out, v_out, cos, sin, positions, slots,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *q_out.stride()[:2], *_rows(k_out), *_rows(v_out),
        0 if cos is None else cos.stride(0),
        Q_HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=dim, HALF=half, PADDED=padded,
        REST=power_of_two(max(1, dim - 2 * half)), WHOLE=power_of_two(dim),
        BLOCK_SIZE=1 if slots is None else k_out.shape[1], PAGED=slots is not None, HEADS=HEADS,
        num_warps=max(1, HEADS * padded // 256),
    )  # fmt: skip


def _rows(x: torch.Tensor) -> tuple[int, ...]:
    """Strides of block, slot and head; `[tokens, heads, head_dim]` has one slot a block."""
    return x.stride()[:3] if x.ndim == 4 else (x.stride(0), 0, x.stride(1))


@torch.library.custom_op("rankwise::rotary", mutates_args=())
def _op(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    _launch(q, k, None, q_out, k_out, None, cos, sin, positions)
    return q_out, k_out


@torch.library.custom_op("rankwise::rotary_", mutates_args=("q", "k"))
def _op_(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> None:
    _launch(q, k, None, q, k, None, cos, sin, positions)


@torch.library.custom_op("rankwise::rotary_to_cache_", mutates_args=("q", "k_cache", "v_cache"))
def _to_cache_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor,
    k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor,
) -> None:  # fmt: skip
    _launch(q, k, v, q, k_cache, v_cache, cos, sin, positions, slots)


@torch.library.custom_op("rankwise::write_cache_", mutates_args=("k_cache", "v_cache"))
def _write_op(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    _launch(None, k, v, None, k_cache, v_cache, slots=slots)


_op.register_fake(lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)))
for _in_place in (_op_, _to_cache_op, _write_op):
    _in_place.register_fake(lambda *_: None)


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by their positions, computed in fp32 and rounded once.

    Args:
        q: `[tokens, heads, head_dim]`, the last dimension contiguous.
        k: `[tokens, kv_heads, head_dim]`, likewise.
        cos: `[positions, rotary_dim / 2]`, the last dimension contiguous, fp32 for exactness. Components from
            `rotary_dim` on stay as they are (partial rotary).
        sin: like `cos`.
        positions: `[tokens]` int32 or int64, rows of `cos` and `sin`; also of padding tokens.

    Returns:
        The rotated queries and keys, contiguous. On a GPU they have no gradient.
    """
    if use_triton(q):
        return _op(q, k, cos, sin, positions)
    c, s = _angles(cos, sin, positions)
    return rotate_reference(q, c, s), rotate_reference(k, c, s)


def rotary_(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> None:
    """`rotary` in place; q and k may be views into a packed projection."""
    if use_triton(q):
        _op_(q, k, cos, sin, positions)
    else:
        c, s = _angles(cos, sin, positions)
        q.copy_(rotate_reference(q, c, s))
        k.copy_(rotate_reference(k, c, s))


def rotary_to_cache_(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor,
    k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor,
) -> None:  # fmt: skip
    """Rotate q in place; write k, rotated, and v, as it is, into a paged cache; k and v themselves stay.

    Args:
        q: as for `rotary`.
        k: as for `rotary`.
        v: `[tokens, kv_heads, head_dim]`, the last dimension contiguous.
        cos: as for `rotary`.
        sin: as for `rotary`.
        positions: as for `rotary`.
        k_cache: `[num_blocks, block_size, kv_heads, head_dim]`, the last dimension contiguous, any floating dtype.
        v_cache: like `k_cache`.
        slots: `[tokens]` int32 or int64, `block * block_size + place` for each token, all different; -1 is padding and
            writes nothing.
    """
    if use_triton(q):
        _to_cache_op(q, k, v, cos, sin, positions, k_cache, v_cache, slots)
    elif _suits(q, k, v, cos, sin, positions, k_cache, v_cache, slots):
        strides = *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], cos.stride(0), *k_cache.stride()[:3]
        sizes = q.shape[1], k.shape[1], q.shape[2], cos.shape[1], k_cache.shape[1], *strides
        tensors = q, k, v, k_cache, v_cache, cos, sin, positions, slots
        native.call("rotary", q.numel(), *tensors, sizes, len(q), native.wide(q))
    else:
        c, s = _angles(cos, sin, positions)
        q.copy_(rotate_reference(q, c, s))
        write_cache_reference(rotate_reference(k, c, s), v, k_cache, v_cache, slots)


def _suits(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor,
    k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor,
) -> bool:  # fmt: skip
    """Whether `native.c` does it: fp32 angles, int32 places, caches in the dtype of q."""
    angles = cos.dtype == sin.dtype == torch.float32 and cos.stride() == sin.stride() and cos.stride(-1) == 1
    places = positions.dtype == slots.dtype == torch.int32 and positions.is_contiguous() and slots.is_contiguous()
    return angles and places and k_cache.stride() == v_cache.stride() and native.usable(q, k, v, k_cache, v_cache)


def write_cache_(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write keys and values as they are into a paged cache; arguments as for `rotary_to_cache_`."""
    (_write_op if use_triton(k) else write_cache_reference)(k, v, k_cache, v_cache, slots)


def rotate_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `[tokens, heads, head_dim]` by the angles of each token, `[tokens, 1, rotary_dim / 2]`."""
    half = cos.shape[-1]
    a, b, rest = x.to(torch.promote_types(x.dtype, cos.dtype)).split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1).to(x.dtype)


def write_cache_reference(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """`write_cache_` in plain PyTorch."""
    if bool((slots < 0).any()):
        (kept,) = torch.where(slots >= 0)
        k, v, slots = k[kept], v[kept], slots[kept]
    size = k_cache.shape[1]
    at = (slots.long() // size, slots.long() % size)
    k_cache.index_put_(at, k.to(k_cache.dtype))
    v_cache.index_put_(at, v.to(v_cache.dtype))


def _angles(cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return cos[positions][:, None], sin[positions][:, None]
