"""Random models of three families, compressed in every kind and mixture, as folders; and what transformers says."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, LlamaConfig, Phi3Config, Qwen2Config

import rankwise
from rankwise.layerspec import LayerSpec
from rankwise.storage import Precision
from rankwise.text import read_text
from rankwise.zoo import load_model

VOCABULARY = 512
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
GEMMA_LAYERS = ["sliding_attention", "full_attention"]
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**COMMON, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**COMMON, tie_word_embeddings=False),  # biases of q, k and v
    "gemma3": lambda: Gemma3TextConfig(
        **COMMON, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    ),
}
FAMILIES = tuple(CONFIGS)
CONFIGS["phi3"] = lambda: Phi3Config(**COMMON)  # q, k and v are one matrix on disk, gate and up another
PLAIN = Precision("fp32")
NF4, INT8, INT4 = Precision("nf4"), Precision("int8"), Precision("int4", 32)
OTHERS = [Precision("int4", 128, True), Precision("int4", 64)]
MIXTURES: dict[str, list[tuple[str, Precision]]] = {
    "lowrank": [("lowrank", PLAIN)],
    "pivot": [("pivot", PLAIN)],
    "nf4": [("dense", NF4)],
    "int4": [("dense", INT4)],
    "mixed": [
        *[(kind, PLAIN) for kind in ("lowrank", "pivot", "dense")],
        *[(kind, how) for how in (NF4, INT8, INT4, *OTHERS) for kind in ("pivot", "dense", "lowrank")],
    ],
}
NARROW = "narrow"  # without some channels, on top of the mixture of that name
MIXTURES[NARROW] = [("dense", PLAIN), ("lowrank", PLAIN), ("pivot", PLAIN), ("dense", INT4), ("lowrank", NF4)]
LENGTHS = (1, 7, 20, 47)
RANKS = (40, 72, 24, 100)  # of layers that are not in 4 bits: no two of a fused layer alike


def model_of(family: str) -> Any:
    """A random model in fp32; biases and norms are random too, so that a lost one shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif "proj" in name:
            parameter.mul_(4)
    model.config.architectures = [type(model).__name__]
    return model


def compressed(family: str, mixture: str, folder: Path, tokenizer: Any = None) -> Path:
    """A checkpoint whose layers take a mixture's kinds in turn."""
    model, kinds = model_of(family), MIXTURES[mixture]
    windows = torch.randint(2, VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(3))
    ratio, channels = (0.4, 128) if mixture == NARROW else (0.5, 0)
    method = rankwise.Global(ratio=ratio, rank_multiple=1, channel_multiple=channels)
    plan = rankwise.allocate(model, windows, method)
    assert any(spec.dense_shape for _, spec in plan) == (mixture == NARROW)
    for number, (name, spec) in enumerate(list(plan)):
        m, n, (kind, precision) = spec.out_features, spec.in_features, kinds[number % len(kinds)]
        if precision.block >= min(m, n):
            precision = INT4
        rank = {"dense": min(m, n)}.get(kind, 2 * precision.block if precision.block == 32 else precision.block)
        if precision.block == 1 and kind != "dense":
            rank = min(RANKS[number % 4], m * n // (m + n))
        plan.layers[name] = LayerSpec(kind, m, n, rank, "fp32", dense_shape=spec.dense_shape).stored_as(precision)
    return rankwise.save(rankwise.compress(model, plan), tokenizer, plan, folder)


def prompts(count: int) -> list[list[int]]:
    """Random token ids; four lengths in turn, one of them longer than Gemma's window."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, VOCABULARY, (LENGTHS[i % 4],), generator=generator).tolist() for i in range(count)]


def smollm(folder: Path) -> Path:
    """SmolLM2-135M in every kind, some of it in 4 bits, with its tokenizer."""
    model, tokenizer = load_model("embedded:smollm2-135m", "bf16")
    ids = torch.tensor(tokenizer(read_text("embedded:python-docs")[:20_000]).input_ids)
    method = rankwise.Global(ratio=0.8, rank_multiple=64)
    plan = rankwise.allocate(model, ids[: 8 * 256].view(8, 256), method)
    for number, (name, spec) in enumerate(list(plan)):
        precision = (Precision("bf16"), Precision("bf16"), NF4, Precision("int4", 64))[number % 4]
        plan.layers[name] = spec.stored_as(precision)
    return rankwise.save(rankwise.compress(model, plan), tokenizer, plan, folder)


def text_prompts(folder: Path, count: int) -> list[list[int]]:
    """Pieces of English."""
    text = read_text("embedded:python-docs-test")
    ids = AutoTokenizer.from_pretrained(folder)(text).input_ids
    return [ids[64 * i : 64 * i + LENGTHS[i % 4]] for i in range(count)]


def asked_and_said(
    folder: Path, candidates: list[list[int]] | None = None, tie: float = 1e-5, count: int = 64, tokens: int = 32
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and what transformers says to them, greedily, in fp32.

    Prompts of one length run together, so that nothing is padded. Those are left out in whose answer two tokens are
    all but equally likely somewhere: there the order of a sum decides, and no two programs need agree.

    Args:
        folder: of the model.
        candidates: prompts to choose from; default: random ones.
        tie: in logits; about ten times what vLLM and transformers were seen to differ by.
        count: of prompts.
        tokens: of an answer.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    how = {"do_sample": False, "max_new_tokens": tokens, "output_logits": True, "return_dict_in_generate": True}
    candidates, said = candidates or prompts(count + count // 4), dict[int, list[int]]()
    for length in LENGTHS:
        which = [number for number, ids in enumerate(candidates) if len(ids) == length]
        out = model.generate(torch.tensor([candidates[number] for number in which]), **how)
        best = torch.stack(out.logits).topk(2).values
        clear = ((best[..., 0] - best[..., 1]) > tie).all(0)
        answers = zip(which, out.sequences[:, length:].tolist(), clear.tolist(), strict=True)
        said |= {number: answer for number, answer, kept in answers if kept}
    kept = sorted(said)[:count]
    assert len(kept) == count
    return [candidates[number] for number in kept], [said[number] for number in kept]
