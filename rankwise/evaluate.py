"""Quality: perplexity over fixed windows."""

import math
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from rankwise.progress import Track, silent

LARGEST = 700.0  # nats a token; exp of more overflows


@torch.no_grad()
def perplexity(model: Any, windows: torch.Tensor, *, track: Track = silent) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each window.

    Args:
        model: causal language model, on any device.
        windows: `[N, T]` token ids, T ≥ 2; each window is a context of its own.
        track: progress.

    Returns:
        Perplexity (no unit; NaN if the logits hold one); logits are reduced in fp32 whatever the model's dtype.
    """
    device = next(model.parameters()).device
    total = 0.0
    with track("perplexity", len(windows)) as advance:
        for window in windows:
            ids = window[None].to(device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            total += float(cross_entropy(logits, ids[0, 1:], reduction="sum"))
            advance()
    mean = total / (windows.numel() - len(windows))
    return math.inf if mean >= LARGEST else math.exp(mean)
