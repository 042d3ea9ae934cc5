"""Freeze what bitsandbytes makes of one matrix, double quantisation included, as `bnb.json` beside this file.

    pip install bitsandbytes && python tests/frozen/freeze_bnb.py

The numbers are a formula, so the file holds what came out alone: small tensors in hex, large ones as SHA-256.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

SHAPE = (5, 4096)  # 320 blocks, so the second group of 256 is not full


def numbers() -> torch.Tensor:
    """`[5, 4096]` fp32, exact in bf16; every block has another largest number, block 7 is all zeros."""
    at = torch.arange(SHAPE[0] * SHAPE[1])
    block = at // 64
    w = ((at * 37) % 101 - 50) / 32 * (1 + (block * 29) % 83 / 64)
    return (w * (block != 7)).bfloat16().float().view(SHAPE)


def raw(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes."""
    return tensor.contiguous().numpy().tobytes()


def freeze() -> dict[str, Any]:
    """What the file holds."""
    import bitsandbytes
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    w = numbers()
    codes, plain = quantize_4bit(w, blocksize=64, quant_type="nf4")
    _, state = quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    parts = {name.removesuffix(".bitsandbytes__nf4"): raw(t) for name, t in state.as_dict(packed=True).items()}
    undone = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    hashed = {"codes": codes, "single": dequantize_4bit(codes, plain), "double": dequantize_4bit(codes, state)}
    return {
        "bitsandbytes": bitsandbytes.__version__,
        "single_absmax": raw(plain.absmax).hex(),
        "double_absmax": raw(undone).hex(),
        "parts": {name: found.hex() for name, found in parts.items()},
        "sha256": {name: hashlib.sha256(raw(t)).hexdigest() for name, t in hashed.items()},
    }


if __name__ == "__main__":
    text = json.dumps(freeze(), indent=1) + "\n"
    Path(__file__).with_name("bnb.json").write_text(text, encoding="utf-8")
