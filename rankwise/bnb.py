"""nf4 matrices as transformers saves them with bitsandbytes, read without bitsandbytes.

A matrix `NAME` is several tensors: `NAME`, its codes, in any dtype; `NAME.absmax`, one for each 64 numbers, row after
row; `NAME.quant_map`, the sixteen levels; `NAME.quant_state.bitsandbytes__nf4`, JSON in bytes. With double quantisation
(QLoRA, 2305.14314) `absmax` holds codes too, of 256 levels in `NAME.nested_quant_map`, about a mean that is in the
JSON; 256 of them share a number of `NAME.nested_absmax`.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from rankwise.errors import RankwiseError
from rankwise.kernels.nf4 import BLOCK, LEVELS, NF4

METHOD = "bitsandbytes"
STATE = ".quant_state.bitsandbytes__"
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
DAMAGED = "the folder is damaged; save it again"
ROUNDED = 4e-3  # a level that was cast to bf16 is off by less; levels are further apart

Fetch = Callable[[str], torch.Tensor]  # from a tensor's whole name to the tensor


def check_quantization(config: Any, source: str) -> None:
    """Raise a RankwiseError unless a config.json says 4 bits of bitsandbytes, of the type nf4.

    Args:
        config: what the file holds.
        source: names the folder in errors.
    """
    found = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(found, dict) or found.get("quant_method", METHOD) != METHOD or not found:
        method = found.get("quant_method") if isinstance(found, dict) else None
        raise RankwiseError("quant_method", f"{method} ({source})", f"allowed: {METHOD}")
    if found.get("load_in_8bit", found.get("_load_in_8bit")):
        raise RankwiseError("load_in_8bit", f"True ({source})", "allowed: load_in_4bit with bnb_4bit_quant_type nf4")
    if not found.get("load_in_4bit", found.get("_load_in_4bit")):
        raise RankwiseError("load_in_4bit", f"False ({source})", "allowed: True with bnb_4bit_quant_type nf4")
    kind = found.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' own default
    if kind != "nf4":
        raise RankwiseError("bnb_4bit_quant_type", f"{kind} ({source})", "allowed: nf4")


def quantised_names(names: set[str]) -> set[str]:
    """The matrices, e.g. `model.layers.0.mlp.up_proj.weight`, that have a quant_state among the names of all tensors.

    Raises:
        RankwiseError: one is in fp4.
    """
    found = {name: name.partition(STATE) for name in names if STATE in name}
    for name, (_, _, kind) in sorted(found.items()):
        if kind != "nf4":
            raise RankwiseError(name, kind, "allowed: bitsandbytes__nf4")
    return {matrix for matrix, _, _ in found.values()}


def companions(name: str) -> set[str]:
    """Names of the tensors that may lie beside a matrix of `quantised_names`."""
    return {f"{name}{STATE}nf4", *(name + part for part in PARTS)}


def read_state(name: str, fetch: Fetch) -> dict[str, Any]:
    """The checked quant_state of a matrix: `shape`, and of a double quantisation `nested_blocksize`, `nested_offset`.

    Raises:
        RankwiseError: not nf4 in blocks of 64, or not of a matrix.
    """
    field = f"{name}{STATE}nf4"
    try:
        state = json.loads(bytes(fetch(field).tolist()).decode())
        kind, block, shape = state["quant_type"], state["blocksize"], state["shape"]
    except (ValueError, TypeError, KeyError) as error:
        raise RankwiseError(field, f"not readable ({type(error).__name__})", DAMAGED) from None
    for key, value, allowed in (("quant_type", kind, "nf4"), ("blocksize", block, BLOCK)):
        if value != allowed:
            raise RankwiseError(f"{name}: {key}", value, f"allowed: {allowed}")
    if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise RankwiseError(f"{name}: shape", shape, "allowed: [out, in], of a matrix")
    if shape[1] % BLOCK:
        allowed = f"allowed: columns that {BLOCK} divides, so that no block goes over the end of a row"
        raise RankwiseError(f"{name}: shape", shape, allowed)
    return dict(state)


def read_nf4(name: str, fetch: Fetch) -> NF4:
    """A matrix: the codes byte for byte, absmax in fp32, double quantisation undone in bitsandbytes' arithmetic.

    Args:
        name: of `quantised_names`.
        fetch: reads a tensor.

    Raises:
        RankwiseError: as `read_state`; a tensor is missing, or of a size that does not fit; other levels than nf4's.
    """
    state = read_state(name, fetch)
    rows, columns = state["shape"]
    levels = fetch(f"{name}.quant_map").float()
    if levels.shape != (16,) or not torch.allclose(levels, torch.tensor(LEVELS), rtol=0, atol=ROUNDED):
        raise RankwiseError(f"{name}.quant_map", "other levels than those of nf4", DAMAGED)
    codes = fetch(name).contiguous().flatten().view(torch.uint8)
    _require_size(name, codes.numel(), rows * columns // 2, "bytes")
    absmax = fetch(f"{name}.absmax").flatten()
    _require_size(f"{name}.absmax", absmax.numel(), rows * columns // BLOCK, "numbers")
    if not absmax.is_floating_point():
        absmax = _undo_double(name, state, absmax, fetch)
    if not torch.isfinite(absmax).all():
        raise RankwiseError(f"{name}.absmax", "NaN or Inf", DAMAGED)
    return NF4(codes.view(rows, columns // 2), absmax.float().view(rows, columns // BLOCK))


def _undo_double(name: str, state: Mapping[str, Any], codes: torch.Tensor, fetch: Fetch) -> torch.Tensor:
    """`level[code] · nested_absmax + nested_offset`, each operation rounded to fp32."""
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if not isinstance(block, int) or block < 1:
        raise RankwiseError(f"{name}: nested_blocksize", block, DAMAGED)
    if not isinstance(offset, int | float):
        raise RankwiseError(f"{name}: nested_offset", offset, DAMAGED)
    levels, shared = fetch(f"{name}.nested_quant_map").float(), fetch(f"{name}.nested_absmax").float().flatten()
    _require_size(f"{name}.nested_quant_map", levels.numel(), 256, "numbers")
    _require_size(f"{name}.nested_absmax", shared.numel(), -(-codes.numel() // block), "numbers")
    return levels[codes.long()] * shared.repeat_interleave(block)[: codes.numel()] + torch.tensor(offset)


def _require_size(field: str, found: int, expected: int, what: str) -> None:
    if found != expected:
        raise RankwiseError(field, f"{found} {what}", f"{expected} expected; {DAMAGED}")
