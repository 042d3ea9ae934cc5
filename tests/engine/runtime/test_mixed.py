"""Groups with layers in 4 and 8 bits say what the layers say, and the engine what transformers says."""

import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from fourbit import PRECISIONS, in_turn, random_layer, wide_model
from tensors import DEVICE, needs_triton
from transformers import AutoModelForCausalLM

import rankwise
from rankwise.bench.memory import tensor_bytes, tensors_in
from rankwise.engine.layers import CompressedLinear
from rankwise.engine.runtime.engine import Engine, EngineConfig
from rankwise.engine.runtime.hostint4 import HostInt4, suits
from rankwise.engine.runtime.loader import convert, packed
from rankwise.engine.runtime.mixed import Mixed, Quantised, packed_linear, stored
from rankwise.engine.runtime.params import SamplingParams
from rankwise.kernels import Packed, backend, native, quantize_int4
from rankwise.kernels.int4 import dequantize_int4
from rankwise.kernels.native_linear import HostGroup
from rankwise.kernels.native_linear import suits as suits_functions
from rankwise.kernels.swiglu import swiglu
from rankwise.plan import LayerSpec
from rankwise.storage import Precision

WINDOWS = torch.randint(2, 512, (4, 24), generator=torch.Generator().manual_seed(3))
MIXTURE = [PRECISIONS[0], Precision("fp32"), *(Precision("int4", *more) for more in ((32, True), (64,)))]
MIXTURE += [Precision("int8"), Precision("int4", 128, True)]
NEW = 12
GREEDY = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind in several precisions."""
    model = wide_model()
    plan = rankwise.allocate(model, WINDOWS, rankwise.Uniform(0.5, rank_multiple=32))
    small = rankwise.compress(model, in_turn(plan, MIXTURE))
    folder = tmp_path_factory.mktemp("mixed")
    small.save_pretrained(folder)
    return folder


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(2, 500) for _ in range(rng.randrange(1, 30))] for _ in range(6)]


def test_greedy_tokens_are_those_of_transformers(checkpoint: Path) -> None:
    reference, model = (AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32) for _ in range(2))
    options: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 1, "do_sample": False}
    wanted = [reference.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts()]
    running = Engine(
        convert(model.to(DEVICE), 128), EngineConfig(blocks=60, block_size=4, most_tokens=16, most_length=80)
    )
    assert not any(
        t.numel() for n, t in model.state_dict().items() if n.endswith(("_nf4", "_int4", "_int8", "_absmax"))
    )
    sequences = [running.add(prompt, GREEDY) for prompt in prompts()]
    for _ in running.run():
        pass
    assert [sequence.output for sequence in sequences] == wanted


def layers(specs: list[LayerSpec], dtype: torch.dtype, bias: bool = True) -> list[CompressedLinear]:
    """Random layers of the same input."""
    generator = torch.Generator().manual_seed(7)
    return [random_layer(spec, bias, dtype, generator).to(DEVICE) for spec in specs]


SPECS = {
    "dense": LayerSpec("dense", 96, 128, 96),
    "lowrank": LayerSpec("lowrank", 192, 128, 64),
    "pivot": LayerSpec("pivot", 96, 128, 64),
    "odd": LayerSpec("pivot", 100, 128, 64),  # 36 rows of coefficients: no multiple of 16
}


def close(a: torch.Tensor, b: torch.Tensor, limit: float) -> None:
    assert a.shape == b.shape
    assert float((a.double() - b.double()).norm() / b.double().norm()) < limit


@pytest.fixture(params=[True, False], ids=["library", "no library"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With the functions of gcc where they are, and without: then PyTorch multiplies int4."""
    if not request.param:
        monkeypatch.setattr(native, "library", lambda: None)
    return bool(request.param)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_a_group_is_its_layers(precision: Precision, dtype: torch.dtype) -> None:
    specs = [spec.stored_as(precision) for spec in SPECS.values() if spec.rank % precision.block == 0]
    specs.insert(1, SPECS["lowrank"])
    members = layers(specs, dtype)
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    residual = torch.randn(2, 5, sum(spec.out_features for spec in specs)).to(DEVICE, dtype)
    wanted = torch.cat([member(x.float()) if dtype == torch.float32 else member(x) for member in members], dim=-1)
    group = packed(members)
    close(packed_linear(x, group), wanted, 1e-5 if dtype == torch.float32 else 1e-2)
    close(packed_linear(x, group, residual) - residual, wanted, 1e-5 if dtype == torch.float32 else 2e-2)
    normed = torch.nn.functional.rms_norm(x, (128,), eps=1e-6)
    close(packed_linear(x, group, eps=1e-6), packed_linear(normed, group), 1e-5 if dtype == torch.float32 else 1e-2)
    assert packed_linear(x[:0], group).shape == (0, 5, wanted.shape[-1])


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("first", "second"), [("dense", "dense"), ("dense", "pivot"), ("pivot", "pivot")])
def test_a_gate_and_what_it_gates(first: str, second: str) -> None:
    specs = [SPECS[first].stored_as(Precision("int4", 32)), SPECS[second].stored_as(Precision("int4", 64, True))]
    members = layers(specs, torch.bfloat16)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)
    wanted = swiglu(*(member(x) for member in members))
    group = packed(members)
    assert isinstance(group, Mixed | HostGroup)
    assert group.place is None
    close(packed_linear(x, group, swiglu=True), wanted, 2e-2)


@pytest.mark.skipif(DEVICE == "cuda", reason="how a CPU keeps them")
def test_what_stays_in_4_bits_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the functions of gcc."""
    monkeypatch.setattr(native, "library", lambda: None)

    def kept(kind: str, precision: Precision, dtype: torch.dtype) -> bool:
        group = packed(layers([SPECS[kind].stored_as(precision)], dtype, bias=False))
        assert isinstance(group, Packed | Mixed)
        return isinstance(group, Mixed)

    assert all(kept(kind, Precision("int4", 64), torch.bfloat16) for kind in ("dense", "lowrank", "pivot"))
    assert kept("lowrank", Precision("int4", 32, True), torch.bfloat16)
    assert not kept("odd", Precision("int4", 64), torch.bfloat16)
    assert not kept("dense", Precision("int4", 64), torch.float32)
    assert not kept("dense", Precision("nf4"), torch.bfloat16)
    assert not kept("dense", Precision("int8"), torch.bfloat16)
    [layer] = layers([SPECS["dense"].stored_as(Precision("int4", 64))], torch.bfloat16, bias=False)
    group = packed([layer])
    assert isinstance(group, Mixed)
    there = sum(t.nbytes for name, t in layer.state_dict().items() if name != "weight")
    assert tensor_bytes(tensors_in(group)) == there + 96 * 2 * 2  # PyTorch wants a zero beside each scale


@pytest.mark.skipif(DEVICE == "cuda", reason="how a CPU keeps them")
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_what_the_functions_keep(precision: Precision) -> None:
    """All that there is, and nothing twice."""
    members = layers([SPECS["dense"].stored_as(precision)], torch.bfloat16, bias=False)
    if not suits_functions([stored(member) for member in members], torch.bfloat16):
        pytest.skip("codes cannot be looked up here")
    codes, shared = (96 * 128, 128) if precision.weights == "int8" else (96 * 128 // 2, precision.block)
    scale = 2 if str(precision) == f"int4 by {shared}" else 4  # as stored, where nothing stands beside it
    assert tensor_bytes(tensors_in(packed(members))) == codes + 96 * 128 // shared * scale


@pytest.mark.skipif(DEVICE == "cuda", reason="PyTorch's product on a CPU")
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_product_of_pytorch_has_our_codes(group: int, asymmetric: bool) -> None:
    """By a unit vector each, so that every number is seen alone; with zero points to bf16."""
    matrix = torch.randn(48, 256, generator=torch.Generator().manual_seed(2)) + (0.5 if asymmetric else 0.0)
    w = quantize_int4(matrix, group, not asymmetric)
    assert suits(w, torch.bfloat16)
    found = HostInt4.of(w)(torch.eye(256, dtype=torch.bfloat16)).T.float()
    exact = dequantize_int4(w)
    if not asymmetric:
        assert torch.equal(found, exact.bfloat16().float())
    most = w.scale.float().abs().repeat_interleave(group, dim=1) * 15
    assert bool(((found - exact).abs() <= most * 2**-8).all())


@needs_triton
@pytest.mark.parametrize("kind", ["dense", "lowrank", "pivot"])
@pytest.mark.parametrize("precision", [Precision("nf4"), Precision("int4", 64, True)], ids=str)
def test_a_group_in_the_order_of_the_kernels(kind: str, precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr("rankwise.engine.runtime.mixed._on_gpu", lambda w: True)
    members = layers([SPECS[kind].stored_as(precision)], torch.float32)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with backend("torch"):
        wanted = deepcopy(members[0])(x)
    group = packed(members)
    assert isinstance(group, Mixed)
    assert isinstance(group.members[0], Quantised)
    with backend("triton"):
        close(packed_linear(x, group), wanted, 1e-4)


def test_llm_runs_a_folder(checkpoint: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(checkpoint)
    llm = rankwise.LLM(str(checkpoint), max_model_len=60, kv_tokens=240, dtype="fp32")
    [done] = llm.generate("The module", GREEDY)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = torch.tensor([llm.encode("The module")])
    wanted = model.generate(ids, max_new_tokens=NEW, eos_token_id=None, pad_token_id=1, do_sample=False)
    assert done.tokens == wanted[0, ids.shape[1] :].tolist()
