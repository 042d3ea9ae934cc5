"""Tiny random models of every family, a tokenizer made on the spot, and text: no network, no files of others."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prose import prose

if not torch.cuda.is_available():
    assert "triton" not in sys.modules  # it reads this when it is imported, which transformers does too
    os.environ["TRITON_INTERPRET"] = "1"

from refitting import share_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from rankwise.alloc.refitted import Refitted
from rankwise.alloc.store import FactorStore
from rankwise.cli import main
from rankwise.plan import RankPlan
from rankwise.zoo import quiet_transformers

quiet_transformers()
VOCABULARY = 512
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
LLAMA_LIKE = COMMON | {"intermediate_size": 48, "num_key_value_heads": 2}
LAYER_TYPES = ["sliding_attention", "full_attention"]  # each with angles of its own
GPT2_SIZES = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**LLAMA_LIKE, head_dim=8, sliding_window=16),
    "qwen2": lambda: Qwen2Config(**LLAMA_LIKE),
    "qwen3": lambda: Qwen3Config(**LLAMA_LIKE, head_dim=16),
    "gemma3": lambda: Gemma3TextConfig(**LLAMA_LIKE, head_dim=16, sliding_window=16, layer_types=LAYER_TYPES),
    "phi3": lambda: Phi3Config(**LLAMA_LIKE),
    "opt": lambda: OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32),
    "gpt2": lambda: GPT2Config(**GPT2_SIZES, bos_token_id=0, eos_token_id=1, pad_token_id=1),
}


def make_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **more: Any) -> Any:
    """A random model; every bias and norm weight is random too, so that a lost one shows. `more`: of its config."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    config = type(config).from_dict(config.to_dict() | more) if more else config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif "embed" not in name and "wte" not in name and "wpe" not in name:
            parameter.mul_(4)  # spread the spectrum: at the default scale nothing matters to the loss
    model.config.architectures = [type(model).__name__]
    return model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([prose(60_000, seed=1)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """`tiny("llama")`: a random model of a family."""
    return make_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[[str], Path]:
    """`model_folder("llama")`: the same model as a folder, made once."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("models") / family
            make_model(family).save_pretrained(made[family])
            tokenizer.save_pretrained(made[family])
        return made[family]

    return folder


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """`run("eval", folder, "--json")`: stdout and stderr of a command, if it ends with the right exit code."""

    def command(*arguments: str | Path, code: int = 0) -> tuple[str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert ended.value.code == code, err
        return out, err

    return command


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 kB of text."""
    path = tmp_path_factory.mktemp("text") / "docs.txt"
    path.write_text(prose(20_000), encoding="utf-8")
    return path


@pytest.fixture(params=sorted(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def spoken() -> Callable[..., torch.Tensor]:
    """`spoken(model, 8, 32)`: windows `[8, 32]` that the model itself has said."""

    @torch.no_grad()
    def sample(model: Any, count: int, length: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(2, model.config.vocab_size, (count, 1), generator=generator)
        while ids.shape[1] < length:
            likely = model(input_ids=ids).logits[:, -1].float().softmax(-1)
            ids = torch.cat([ids, torch.multinomial(likely, 1, generator=generator)], dim=1)
        return ids

    return sample


@pytest.fixture
def liked(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """`liked(0.5)`: text likes this share of a refit best; what it likes of random weights is chance."""

    def like(share: float) -> None:
        def loss(model: Any, plan: RankPlan, factors: FactorStore | Refitted, *_: Any) -> float:
            return abs(share_of(factors) - share)

        monkeypatch.setattr("rankwise.linesearch.loss_with", loss)

    return like
