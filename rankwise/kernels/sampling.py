"""From logits to tokens: logarithm of the sum, greedy choice, log-probabilities, and draws by inverse transform."""

import torch

from rankwise.kernels.backend import cdiv, launch, power_of_two, tl, triton, use_triton

BLOCK = 4096  # logits that one program reduces; fixed, so a row's result does not depend on the others


@triton.jit
def _tops(logits, tops, totals, places, row_stride, vocabulary, parts, BLOCK: tl.constexpr):
    """Largest logit of a part of a row, where it is first, and `Σ exp(logit - largest)`."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    col = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * row_stride + col, mask=col < vocabulary, other=float("-inf")).to(tl.float32)
    top = tl.max(x, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    at = row * parts + part
    tl.store(tops + at, top)
    tl.store(totals + at, tl.sum(tl.exp(x - base), 0))
    tl.store(places + at, tl.min(tl.where(x == top, col, 2147483647), 0))


@triton.jit
def _merge(tops, totals, places, logsumexp, best, parts, PARTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    x = tl.load(tops + row * parts + part, mask=part < parts, other=float("-inf"))
    total = tl.load(totals + row * parts + part, mask=part < parts, other=0.0)
    place = tl.load(places + row * parts + part, mask=part < parts, other=2147483647)
    top = tl.max(x, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    tl.store(logsumexp + row, base + tl.log(tl.sum(total * tl.exp(x - base), 0)))
    tl.store(best + row, tl.min(tl.where(x == top, place, 2147483647), 0).to(tl.int64))


def _launch(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, vocabulary = logits.shape
    parts = cdiv(vocabulary, BLOCK)
    tops, totals = torch.empty((2, rows, parts), dtype=torch.float32, device=logits.device).unbind()
    places = torch.empty((rows, parts), dtype=torch.int32, device=logits.device)
    logsumexp = torch.empty(rows, dtype=torch.float32, device=logits.device)
    best = torch.empty(rows, dtype=torch.int64, device=logits.device)
    launch(
        _tops, (parts, rows), logits, tops, totals, places, logits.stride(0), vocabulary, parts,
        BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    launch(_merge, (rows,), tops, totals, places, logsumexp, best, parts, PARTS=power_of_two(parts), num_warps=1)
    return logsumexp, best


_op = torch.library.custom_op("rankwise::logsumexp_argmax", _launch, mutates_args=())


@_op.register_fake
def _(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return logits.new_empty(len(logits), dtype=torch.float32), logits.new_empty(len(logits), dtype=torch.int64)


def logsumexp_argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`log Σ exp(logits)` and the place of the largest logit of each row; on a GPU in one pass over the logits.

    Args:
        logits: `[rows, vocabulary]`, the last dimension contiguous.

    Returns:
        `[rows]` fp32 (fp64 for fp64 logits in PyTorch), and `[rows]` int64, the least index where several are largest.
    """
    if use_triton(logits):
        return _op(logits)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.logsumexp(-1), logits.argmax(-1)


def chosen_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of chosen tokens, without a tensor of all log-probabilities.

    Args:
        logits: `[rows, vocabulary]`, the last dimension contiguous.
        tokens: `[rows]` or `[rows, choices]` int64.

    Returns:
        fp32 in the shape of `tokens`.
    """
    total, _ = logsumexp_argmax(logits)
    chosen = logits.gather(-1, tokens if tokens.ndim == 2 else tokens[:, None]).to(total.dtype) - total[:, None]
    return chosen.reshape(tokens.shape)


def sample(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    temperature: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw one token a row: the first whose cumulative probability exceeds `uniform`.

    The filters apply in the order temperature, top-k, top-p (of what top-k left), min-p, as in transformers. None for a
    filter saves its work; top-k and top-p both None save the sort. A row needs one random number and draws alike
    whatever the others ask for, so a request's seed fixes its tokens. PyTorch's own operations do it on every device;
    nothing waits for a GPU, so a graph can capture it. On a CPU only as many logits are sorted as the draw needs.

    Args:
        logits: `[rows, vocabulary]`.
        uniform: `[rows]` fp32 in [0, 1).
        temperature: `[rows]` fp32; 0 takes the largest logit.
        top_k: `[rows]` int64; the so many largest stay; 0: all.
        top_p: `[rows]` fp32 in (0, 1]; the fewest tokens stay that have this probability together.
        min_p: `[rows]` fp32 in [0, 1]; tokens of less than this share of the largest probability go.

    Returns:
        `[rows]` int64.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    greedy = logits.argmax(-1) if temperature is not None else None
    if temperature is not None:
        logits = logits / temperature.masked_fill(temperature == 0, 1)[:, None]
    if top_k is None and top_p is None:
        drawn = draw(_unsorted(logits, min_p), uniform)
    else:
        k, share = _filters(logits, top_k, top_p)
        largest, order = _sorted(logits, k, share, min_p)
        drawn = order.gather(-1, draw(largest, uniform)[:, None])[:, 0]
        free = (k == 0) & (share >= 1)
        if logits.device.type != "cpu" or bool(free.any()):
            drawn = torch.where(free, draw(_unsorted(logits, min_p), uniform), drawn)
    return drawn if temperature is None or greedy is None else torch.where(temperature == 0, greedy, drawn)


def probabilities(
    logits: torch.Tensor,
    temperature: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """The distributions that `sample` draws from, filters included.

    Args:
        logits: `[rows, vocabulary]`.
        temperature: `[rows]` fp32, above 0.
        top_k: as for `sample`, and likewise the others.

    Returns:
        `[rows, vocabulary]` fp32; each row sums to 1.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature is not None:
        logits = logits / temperature[:, None]
    p = _unsorted(logits, min_p)
    if top_k is not None or top_p is not None:
        k, share = _filters(logits, top_k, top_p)
        largest, order = _sorted(logits, k, share, min_p)
        free = (k == 0) & (share >= 1)
        p = torch.where(free[:, None], p, torch.zeros_like(p).scatter(-1, order, largest))
    return p / p.sum(-1, keepdim=True)


def draw(p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """First place of each row where the running sum exceeds the share `uniform` of the whole; p is not 0 there.

    Args:
        p: `[rows, places]`, at least 0 and not 0 everywhere; a row need not sum to 1.
        uniform: `[rows]` in [0, 1).
    """
    running = p.cumsum(-1)
    goal = running[:, -1] * uniform
    beyond = (running > torch.minimum(goal, running[:, -1].nextafter(torch.zeros_like(goal)))[:, None]) & (p > 0)
    return beyond.to(torch.uint8).argmax(-1)


def _filters(
    logits: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k and top-p of each row; 0 and 1 for none."""
    rows, device = len(logits), logits.device
    k = torch.zeros(rows, dtype=torch.int64, device=device) if top_k is None else top_k.to(torch.int64)
    return k, torch.ones(rows, dtype=torch.float32, device=device) if top_p is None else top_p


def _unsorted(logits: torch.Tensor, min_p: torch.Tensor | None) -> torch.Tensor:
    """What is drawn from in the order of the vocabulary."""
    p = logits.softmax(-1)
    return p if min_p is None else p * (p >= p.amax(-1, keepdim=True) * min_p[:, None])


def _sorted(
    logits: torch.Tensor, k: torch.Tensor, share: torch.Tensor, min_p: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is drawn from in descending order of probability, and its tokens; k 0 and share 1 for none."""
    k, share = k[:, None], share[:, None]
    whole = logits.logsumexp(-1, keepdim=True)
    values, order = _largest(logits, whole, k, share)
    rank = torch.arange(values.shape[1], device=values.device)
    values = values.masked_fill((k > 0) & (rank >= k), float("-inf"))
    p = (values - torch.where(k > 0, values.logsumexp(-1, keepdim=True), whole)).exp()
    p = p * (p.cumsum(-1) - p < share)
    if min_p is not None:
        p = p * (p >= p[:, :1] * min_p[:, None])
    return p, order


def _largest(
    logits: torch.Tensor, whole: torch.Tensor, k: torch.Tensor, share: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logits of each row in descending order: all of them on a GPU, as many as matter on a CPU."""
    count = 256
    while logits.device.type == "cpu" and count < logits.shape[-1]:
        values, order = logits.topk(count)
        held = (values - whole).exp().sum(-1, keepdim=True)
        if bool(torch.where(k > 0, k <= count, (share >= 1) | (held >= share)).all()):
            return values, order
        count *= 8
    return logits.sort(-1, descending=True)
