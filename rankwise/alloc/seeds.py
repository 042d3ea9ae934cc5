"""Random numbers that are a function of a seed and a number, so that a resumed job draws what it would have drawn."""

import torch

PRIME = 1_000_003  # keeps the streams of neighbouring seeds apart


def generator(seed: int, number: int) -> torch.Generator:
    """One for every number (a step, a window, a pass; negative ones too) of every seed, in host memory."""
    return torch.Generator().manual_seed((seed * PRIME + number) % 2**63)
