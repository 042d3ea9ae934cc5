"""Tensors of bitsandbytes are read as bitsandbytes reads them; what it made is frozen in frozen/bnb.json.

Where bitsandbytes is installed, the frozen file is made again and compared, and it reads what we wrote.
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise.bnb import check_quantization, quantised_names, read_nf4
from rankwise.errors import RankwiseError
from rankwise.kernels.nf4 import dequantize_nf4, quantize_nf4

PLACE = Path(__file__).parent / "frozen"
FROZEN = json.loads((PLACE / "bnb.json").read_text())
DTYPES = {"absmax": torch.uint8, "quant_state": torch.uint8}  # of double quantisation; all others are fp32


def script() -> Any:
    """What froze it."""
    spec = importlib.util.spec_from_file_location("freeze_bnb", PLACE / "freeze_bnb.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tensor(text: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=dtype)


def digest(found: torch.Tensor) -> str:
    return hashlib.sha256(found.contiguous().numpy().tobytes()).hexdigest()


def stored(double: bool) -> dict[str, torch.Tensor]:
    """The matrix `w` as transformers saves it."""
    parts = {name: tensor(text, DTYPES.get(name, torch.float32)) for name, text in FROZEN["parts"].items()}
    if not double:
        state = {key: value for key, value in json.loads(bytes(parts["quant_state"])).items() if "nested" not in key}
        parts["quant_state"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        parts["absmax"] = tensor(FROZEN["single_absmax"], torch.float32)
        del parts["nested_absmax"], parts["nested_quant_map"]
    found = {f"w.{name}": part for name, part in parts.items() if name != "quant_state"}
    codes = quantize_nf4(script().numbers()).codes
    return found | {"w.quant_state.bitsandbytes__nf4": parts["quant_state"], "w": codes.view(-1, 1)}


def test_our_codes_are_those_of_bitsandbytes() -> None:
    found = quantize_nf4(script().numbers())
    assert digest(found.codes) == FROZEN["sha256"]["codes"]
    assert torch.equal(found.absmax.flatten(), tensor(FROZEN["single_absmax"], torch.float32))


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_numbers_are_those_of_bitsandbytes(double: bool) -> None:
    name, there = ("double" if double else "single"), stored(double)
    assert quantised_names(set(there)) == {"w"}
    found = read_nf4("w", there.__getitem__)
    assert torch.equal(found.absmax.flatten(), tensor(FROZEN[f"{name}_absmax"], torch.float32))
    assert bytes(found.codes.flatten().tolist()) == bytes(there["w"].flatten().tolist())
    assert digest(dequantize_nf4(found)) == FROZEN["sha256"][name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8], ids=str)
def test_codes_may_be_kept_in_any_dtype(dtype: torch.dtype) -> None:
    there = stored(True)
    plain = read_nf4("w", there.__getitem__)
    there["w"] = there["w"].flatten().view(dtype)[:, None]
    assert torch.equal(read_nf4("w", there.__getitem__).codes, plain.codes)


STATE = "w.quant_state.bitsandbytes__nf4"
Change = Callable[[dict[str, torch.Tensor]], Any]


def state(**changes: Any) -> Change:
    def change(there: dict[str, torch.Tensor]) -> None:
        made = json.loads(bytes(there[STATE])) | changes
        there[STATE] = torch.tensor(list(json.dumps(made).encode()), dtype=torch.uint8)

    return change


def cut(name: str) -> Change:
    return lambda there: there.update({name: there[name].flatten()[:-1].clone()})


DAMAGE: dict[str, tuple[Change, str]] = {
    "fp4": (state(quant_type="fp4"), "w: quant_type: fp4; allowed: nf4"),
    "blocks-of-128": (state(blocksize=128), "w: blocksize: 128; allowed: 64"),
    "no-matrix": (state(shape=[20480]), r"w: shape: \[20480\]; allowed: \[out, in\]"),
    "blocks-over-rows": (state(shape=[640, 32]), r"w: shape: \[640, 32\]; allowed: columns that 64 divides"),
    "another-size": (state(shape=[6, 4096]), "w: 10240 bytes; 12288 expected"),
    "no-shape": (
        lambda there: there.update({STATE: torch.zeros(9, dtype=torch.uint8)}),
        "w.quant_state.*: not readable",
    ),
    "codes-cut": (cut("w"), "w: 10239 bytes; 10240 expected"),
    "absmax-cut": (cut("w.absmax"), "w.absmax: 319 numbers; 320 expected"),
    "nested-absmax-cut": (cut("w.nested_absmax"), "w.nested_absmax: 1 numbers; 2 expected"),
    "nested-map-cut": (cut("w.nested_quant_map"), "w.nested_quant_map: 255 numbers; 256 expected"),
    "nested-blocks-of-0": (state(nested_blocksize=0), "w: nested_blocksize: 0; the folder is damaged"),
    "nested-mean": (state(nested_offset="much"), "w: nested_offset: much; the folder is damaged"),
    "levels": (lambda there: there["w.quant_map"].neg_(), "w.quant_map: other levels than those of nf4"),
    "inf": (lambda there: there["w.nested_absmax"].fill_(float("inf")), "w.absmax: NaN or Inf"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_what_is_no_nf4_is_refused(change: Change, message: str) -> None:
    there = stored(True)
    change(there)
    with pytest.raises(RankwiseError, match=message):
        read_nf4("w", there.__getitem__)


def test_fp4_is_known_by_its_name() -> None:
    with pytest.raises(RankwiseError, match=r"a\.quant_state\.bitsandbytes__fp4: fp4; allowed: bitsandbytes__nf4"):
        quantised_names({"a", "a.quant_state.bitsandbytes__fp4", "b", "b.quant_state.bitsandbytes__nf4"})


GOOD = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
CONFIGS: dict[str, tuple[Any, str]] = {
    "none": (None, "quant_method: None"),
    "empty": ({}, "quant_method: None"),
    "gptq": ({"quant_method": "gptq"}, "quant_method: gptq .here.; allowed: bitsandbytes"),
    "8-bit": (GOOD | {"load_in_8bit": True}, "load_in_8bit: True .here.; allowed: load_in_4bit"),
    "neither": (GOOD | {"load_in_4bit": False}, "load_in_4bit: False .here.; allowed: True"),
    "fp4": (GOOD | {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type: fp4 .here.; allowed: nf4"),
    "fp4-by-default": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "bnb_4bit_quant_type: fp4 .here.; allowed: nf4",
    ),
}


@pytest.mark.parametrize(("config", "message"), CONFIGS.values(), ids=CONFIGS)
def test_other_quantisations_are_refused(config: Any, message: str) -> None:
    check_quantization({"quantization_config": GOOD}, "here")
    for nothing in (None, [], {}):
        with pytest.raises(RankwiseError, match="quant_method: None"):
            check_quantization(nothing, "here")
    with pytest.raises(RankwiseError, match=message):
        check_quantization({"quantization_config": config}, "here")


def test_bitsandbytes_still_makes_the_frozen_file() -> None:
    pytest.importorskip("bitsandbytes")
    assert script().freeze() | {"bitsandbytes": ""} == FROZEN | {"bitsandbytes": ""}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitsandbytes_reads_our_bytes(dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    w = torch.randn(37, 192, generator=torch.Generator().manual_seed(0))
    packed = quantize_nf4(w)
    code = functional.get_4bit_type("nf4", device="cpu")
    state = functional.QuantState(packed.absmax.flatten(), w.shape, code, 64, "nf4", dtype)
    read = functional.dequantize_4bit(packed.codes.view(-1, 1), state)
    assert torch.equal(read, dequantize_nf4(packed, dtype))
