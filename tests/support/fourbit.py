"""Models wide enough for every group of quantised weights, and plans that store them so."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rankwise.engine.layers import CompressedLinear, build_layer
from rankwise.plan import LayerSpec, RankPlan
from rankwise.storage import Precision

PRECISIONS = [
    Precision("nf4"),
    Precision("int8"),
    *(Precision("int4", group, asymmetric) for asymmetric in (False, True) for group in (32, 64, 128)),
]


def wide_model(dtype: torch.dtype = torch.float32, hidden: int = 256, intermediate: int = 384) -> Any:
    """A random Llama; 128 divides its inputs."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.mul_(4)
    model.config.architectures = [type(model).__name__]
    return model


def in_turn(plan: RankPlan, precisions: list[Precision]) -> RankPlan:
    """The plan's layers dense, lowrank and pivot in turn, in ranks that groups make up; precisions in turn as well."""
    layers = {}
    for number, (name, spec) in enumerate(plan):
        precision = precisions[(number // 3) % len(precisions)]
        m, n, rank = spec.out_features, spec.in_features, max(32, precision.block)
        kind = ("dense", "lowrank", "pivot")[number % 3]
        rank = min(m, n) if kind == "dense" else rank
        layers[name] = LayerSpec(kind, m, n, rank, "fp32").stored_as(precision)
    return RankPlan(layers, provenance=dict(plan.provenance), factors=plan.factors)


def random_layer(spec: LayerSpec, bias: bool, dtype: torch.dtype, generator: torch.Generator) -> CompressedLinear:
    """A layer of random codes; a pivot layer's rows in random order."""
    layer = build_layer(spec, bias, dtype, "cpu")
    for name, tensor in layer.state_dict().items():
        if name == "pivot_index":
            tensor.copy_(torch.randperm(spec.out_features, generator=generator))
        elif tensor.dtype == torch.uint8:
            tensor.copy_(torch.randint(0, 16 if name.endswith("_zero") else 256, tensor.shape, generator=generator))
        elif tensor.dtype == torch.int8:
            tensor.copy_(torch.randint(-127, 128, tensor.shape, generator=generator))
        else:
            fine = spec.precision.weights == "int8" and name.endswith("_scale")  # codes are 16 times as large
            tensor.copy_((0.1 / 16 if fine else 0.1) * torch.randn(tensor.shape, generator=generator))
    return layer
