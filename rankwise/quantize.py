"""From matrices to 4 bits by rounding to the nearest code; a better rounding takes the place of `nearest`."""

from collections.abc import Callable

import torch

from rankwise.errors import RankwiseError
from rankwise.kernels import NF4, Int8
from rankwise.kernels import quantized as kernels
from rankwise.kernels.quantized import Stored
from rankwise.layerspec import LayerSpec

# From a layer's name, its matrices by name (and `pivot_index` of a pivot layer) and its spec, to the tensors that are
# stored, by their names below the module; what it returns goes before what it got. It gets a whole layer at once, so
# that it can round a matrix for what the rounded one before it makes; the dense layer is still in the model then.
Rounding = Callable[[str, dict[str, torch.Tensor], LayerSpec], dict[str, torch.Tensor]]


def quantize(matrix: torch.Tensor, spec: LayerSpec) -> dict[str, torch.Tensor]:
    """Round a matrix to the nearest codes.

    Args:
        matrix: `[rows, columns]`, finite.
        spec: its `weights`, `group` and `asymmetric` say how; `nf4`, `int4` or `int8`.

    Returns:
        The stored tensors by their suffix, as `storage.Precision.tensors` lists them.

    Raises:
        RankwiseError: NaN or Inf, or sizes that whole groups do not make up.
    """
    if not torch.isfinite(matrix).all():
        raise RankwiseError("matrix", "NaN or Inf", "finite numbers are needed")
    return stored_tensors(kernels.quantize(matrix, spec.weights, spec.group, not spec.asymmetric))


def stored_tensors(matrix: Stored) -> dict[str, torch.Tensor]:
    """What is stored of a rounded matrix, by suffix, as `storage.Precision.tensors` lists it."""
    if isinstance(matrix, NF4):
        return {"_nf4": matrix.codes, "_absmax": matrix.absmax}
    if isinstance(matrix, Int8):
        return {"_int8": matrix.codes, "_scale": matrix.scale}
    zero = {} if matrix.zero is None else {"_zero": matrix.zero}
    return {"_int4": matrix.codes, "_scale": matrix.scale, **zero}


def nearest(name: str, matrices: dict[str, torch.Tensor], spec: LayerSpec) -> dict[str, torch.Tensor]:
    """The plain `Rounding`: each matrix on its own, whatever its inputs.

    Raises:
        RankwiseError: NaN or Inf; the field names layer and matrix.
    """
    stored: dict[str, torch.Tensor] = {}
    for part in spec.matrices:
        try:
            stored |= {part + suffix: tensor for suffix, tensor in quantize(matrices[part], spec).items()}
        except RankwiseError as error:
            raise RankwiseError(f"{name}.{part}", error.value, error.allowed) from None
    return stored
