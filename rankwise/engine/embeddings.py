"""Embedding tables and heads in 8 bits: the modules, and putting them in place of a model's own.

A tied head multiplies by the table's own bytes. Rounding is to the nearest code, each token's row with its own scale.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rankwise.engine.layers import CompressedLinear, QuantisedLinear
from rankwise.errors import RankwiseError
from rankwise.kernels.int8 import Int8, int8_linear, take_rows
from rankwise.layerspec import LayerSpec
from rankwise.quantize import quantize
from rankwise.storage import EMBEDDINGS


class CodedEmbedding(CompressedLinear):
    """`E[ids]`, with `weight_int8 [vocabulary, hidden]` and `weight_scale [vocabulary, 1]`.

    Args:
        spec: of the table as a dense layer, in int8.
        dtype: of what comes out.
        device: where it is made.
        factor: what comes out is multiplied by it (Gemma).
    """

    def __init__(self, spec: LayerSpec, dtype: torch.dtype, device: torch.device | str, factor: float = 1.0) -> None:
        super().__init__(spec, False, dtype, device)
        self.factor = factor

    @property
    def num_embeddings(self) -> int:
        """Tokens of the vocabulary."""
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        """The hidden size."""
        return self.in_features

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`[...]` int64 to `[..., hidden]`."""
        rows = take_rows(self.table(), ids, self.weight.dtype)
        return rows if self.factor == 1 else rows * float(torch.tensor(self.factor, dtype=rows.dtype))

    def table(self) -> Int8:
        """The codes and scales."""
        found = self.matrix("weight")
        assert isinstance(found, Int8)
        return found


class TiedHead(nn.Module):
    """`y = E x + b` with the table of a `CodedEmbedding`; `weight` is a guard, as in every compressed layer."""

    def __init__(self, embedding: CodedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple: it is no part of this module, and saved once
        self.weight = embedding.weight
        self.bias = bias

    @property
    def embedding(self) -> CodedEmbedding:
        """Whose table it is."""
        return self._embedding[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., hidden]` to `[..., vocabulary]`."""
        return int8_linear(x, self.embedding.table(), self.bias)


@torch.no_grad()
def code_embeddings(model: Any, weights: str = "int8") -> dict[str, str]:
    """Round a model's embedding table, and its head, in place; a model where that was done stays as it is.

    Args:
        model: a causal language model with an ordinary table.
        weights: `int8`.

    Returns:
        Module name to weights: the table, and the head unless it is tied to it.

    Raises:
        RankwiseError: other weights, a module of another kind, or NaN or Inf in it.
    """
    if weights not in EMBEDDINGS:
        raise RankwiseError("embeddings", weights, f"allowed: {', '.join(EMBEDDINGS)}")
    ends = find_ends(model)
    names = dict.fromkeys(ends, weights)
    if not any(isinstance(module, CodedEmbedding) for module in ends.values()):
        own = {name: module.weight for name, module in ends.items()}
        place_embeddings(model, names, next(iter(own.values())).device)
        for name, weight in own.items():
            module = model.get_submodule(name)
            for suffix, tensor in quantize(weight, module_spec(weight, weights)).items():
                module.get_buffer("weight" + suffix).copy_(tensor)
    return names


def find_ends(model: Any) -> dict[str, Any]:
    """The embedding table by its name, and the head unless it is tied to it.

    Raises:
        RankwiseError: they are of a kind that cannot be coded.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    tied = head is None or isinstance(head, TiedHead) or head.weight is table.weight
    for module, kinds in ((table, (nn.Embedding, CodedEmbedding)), (head, (nn.Linear, CompressedLinear, TiedHead))):
        if module is not None and not isinstance(module, kinds):
            raise RankwiseError("embeddings", type(module).__name__, "allowed: models with an ordinary table and head")
    return {names[id(module)]: module for module in ([table] if tied else [table, head])}


def place_embeddings(model: Any, names: Mapping[str, str], device: torch.device | str) -> None:
    """Put empty modules in the place of a model's table and head; one that is not named is tied to the table.

    Raises:
        RankwiseError: the names are others than those of this model.
    """
    ends, head = find_ends(model), model.get_output_embeddings()
    if not names.keys() <= ends.keys() or next(iter(ends)) not in names:
        raise RankwiseError("embeddings", ", ".join(names), f"this model has {', '.join(ends)}")
    table = next(iter(ends.values()))
    factor = float(getattr(table, "scalar_embed_scale", 1.0))
    new = CodedEmbedding(module_spec(table.weight, "int8"), table.weight.dtype, device, factor)
    model.set_submodule(next(iter(ends)), new)
    if head is None:
        return
    name = next(n for n, module in model.named_modules() if module is head)
    if name in names:
        spec = module_spec(head.weight, "int8")
        top = QuantisedLinear(spec, head.bias is not None, head.weight.dtype, device)
        if head.bias is not None:
            top.bias = head.bias
        model.set_submodule(name, top)
    else:
        model.set_submodule(name, TiedHead(new, head.bias))


def module_spec(weight: torch.Tensor, weights: str) -> LayerSpec:
    """A table `[vocabulary, hidden]` as a layer."""
    rows, columns = weight.shape
    return LayerSpec("dense", rows, columns, min(rows, columns), weights)


def coded_tensors(model: Any, tensors: Mapping[str, torch.Tensor], weights: str) -> dict[str, torch.Tensor]:
    """A model's saved tensors as they would be with coded tables: empty tensors of the right sizes in their place."""
    found, ends, head = dict(tensors), find_ends(model), model.get_output_embeddings()
    tied = [name for name, module in model.named_modules() if module is head and name not in ends]
    for name in tied:
        found.pop(f"{name}.weight", None)
    for name, module in ends.items():
        for part, stored in module_spec(module.weight, weights).tensors.items():
            found[f"{name}.{part}"] = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
        found[f"{name}.weight"] = module.weight.new_empty(1)
    return found
