"""The draft model that `LLM` is told of: loaded beside the model, and refused where the two cannot work together."""

from typing import Any

from rankwise.engine.runtime.blocks import BlockPool
from rankwise.engine.runtime.decoder import Decoder
from rankwise.engine.runtime.engine import EngineConfig
from rankwise.engine.runtime.loader import convert
from rankwise.engine.runtime.speculative import Drafter
from rankwise.errors import RankwiseError
from rankwise.zoo import load_model


def load_draft(source: str, dtype: str, device: str, length: int, tokenizer: Any, vocabulary: int) -> Decoder:
    """Load a draft model, usually a compressed checkpoint of the model itself.

    Args:
        source: as for `zoo.load_model`, and likewise `dtype` and `device`.
        length: tokens of a sequence that it must be able to take.
        tokenizer: of the model that it drafts for.
        vocabulary: logits of that model.

    Raises:
        RankwiseError: its tokens are not the model's, it was made for shorter sequences, or nothing loadable is there.
    """
    try:
        loaded, own = load_model(source, dtype, device)
    except RankwiseError as error:
        raise RankwiseError("draft" if error.field == "model" else error.field, error.value, error.allowed) from error
    there = loaded.get_input_embeddings().num_embeddings
    if there != vocabulary:
        raise RankwiseError("draft", f"{source} (a vocabulary of {there})", f"the model's has {vocabulary}")
    if own.get_vocab() != tokenizer.get_vocab():
        raise RankwiseError("draft", f"{source} (another tokenizer)", "it must have the model's, token for token")
    longest = loaded.config.max_position_embeddings
    if longest < length:
        raise RankwiseError("draft", f"{source} (made for {longest} tokens)", f"at least max_model_len, {length}")
    return convert(loaded, length)


def make_drafter(decoder: Decoder, config: EngineConfig, tokens: int, sequences: int) -> Drafter:
    """What guesses for an engine, with as many blocks of its own.

    Args:
        decoder: the draft model.
        config: of the engine.
        tokens: it guesses in a step.
        sequences: while more than so many decode, nothing is guessed.
    """
    pool = BlockPool(config.blocks, config.block_size, share=config.share)
    limits = {"most_sequences": sequences, "most_tokens": config.most_tokens, "most_length": config.most_length}
    return Drafter(decoder, pool, tokens=tokens, graphs=config.graphs, **limits)
