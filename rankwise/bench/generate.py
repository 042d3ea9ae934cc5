"""transformers' own `generate`, on a model as stored or in bitsandbytes' 4 bits.

It takes a batch and gives it back when the longest output is done. Under load those who wait when it is free make the
next batch, prompts padded on the left.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, StoppingCriteria

from rankwise.anatomy import require_context
from rankwise.bench.arrivals import Request
from rankwise.bench.config import BenchConfig, Contestant
from rankwise.bench.gate import require_close
from rankwise.bench.memory import synchronize
from rankwise.bench.runners import model_footprint
from rankwise.bench.stepped import Stamps
from rankwise.zoo import TORCH_DTYPES, load_model, local_folder, model_dtype, resolve_device

LENGTH = 12  # tokens of the gate's prompt


class Generate:
    """As `Runner`."""

    def __init__(self, contestant: Contestant, config: BenchConfig) -> None:
        self.contestant, self.most = contestant, config.together
        self.device = resolve_device(config.device)
        if contestant.engine == "bitsandbytes":
            self.model, self.dtype = _four_bit(contestant.model, config, self.device), "nf4"
        else:
            self.model, _ = load_model(contestant.model, config.dtype, config.device)
            self.dtype = model_dtype(self.model)
        self.model.generation_config.eos_token_id = None  # nothing ends early
        require_context(self.model, config.longest, "prompt and new_tokens")
        self.vocabulary = self.model.get_input_embeddings().num_embeddings
        self.footprint = model_footprint(self.model)

    @torch.inference_mode()
    def gate(self) -> None:
        """Logits with and without the cache."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocabulary, (1, LENGTH), generator=generator).to(self.device)
        cached = self.model(input_ids=ids, use_cache=True).past_key_values
        step = self.model(input_ids=ids[:, :1], past_key_values=cached, use_cache=True).logits[:, -1]
        full = self.model(input_ids=torch.cat([ids, ids[:, :1]], 1), use_cache=False).logits[:, -1]
        require_close(str(self.contestant), step.float().cpu().numpy(), full.float().cpu().numpy())

    @torch.inference_mode()
    def batch(self, prompts: Sequence[list[int]], new_tokens: int) -> Stamps:
        """As `Runner`."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        clock = _Clock(self.device)
        options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, "stopping_criteria": [clock]}
        self.model.generate(ids, attention_mask=mask, **options)
        return [clock.stamps] * len(prompts)

    def serve(self, trace: Sequence[Request]) -> Stamps:
        """As `Runner`."""
        waiting, stamps, start = list(trace), Stamps(), time.perf_counter()
        while waiting:
            now = time.perf_counter() - start
            if waiting[0].arrival > now:
                time.sleep(waiting[0].arrival - now)
                continue
            here = [request for request in waiting[: self.most] if request.arrival <= now]
            waiting = waiting[len(here) :]
            began = time.perf_counter() - start
            [times, *_] = self.batch([request.prompt for request in here], max(request.output for request in here))
            stamps += [[began + t for t in times[: request.output]] for request in here]
        return stamps


class _Clock(StoppingCriteria):
    """Notes when each token is there; stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stamps, self.start = device, list[float](), time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        synchronize(self.device)
        self.stamps.append(time.perf_counter() - self.start)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _four_bit(model: str, config: BenchConfig, device: torch.device) -> Any:
    """NF4 weights in the linear layers, as bitsandbytes quantises them when a model is loaded."""
    compute = TORCH_DTYPES.get(config.dtype, torch.bfloat16)
    scheme = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    source = local_folder(model, config.dtype) or model
    where = {"device_map": {"": str(device)}, "dtype": compute}
    loaded = AutoModelForCausalLM.from_pretrained(source, quantization_config=scheme, **where)
    return loaded.eval().requires_grad_(False)
