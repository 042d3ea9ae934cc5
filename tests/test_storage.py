"""What is stored, by hand and for every shape: tensors, bytes, and sizes that groups do not make up."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.errors import RankwiseError
from rankwise.kernels.int4 import GROUPS
from rankwise.kernels.nf4 import BLOCK
from rankwise.plan import LayerSpec
from rankwise.storage import INT4_GROUPS, ITEM_BYTES, NF4_BLOCK, Precision

PRECISIONS = st.sampled_from(
    [Precision(w) for w in ("bf16", "fp16", "fp32", "nf4")]
    + [Precision("int4", group, zero) for group in INT4_GROUPS for zero in (False, True)]
)


def test_groups_are_those_of_the_kernels() -> None:
    assert (INT4_GROUPS, NF4_BLOCK) == (GROUPS, BLOCK)
    assert all(getattr(torch, name).itemsize == size for name, size in ITEM_BYTES.items())


# m = 192, n = 128, k = 64
@pytest.mark.parametrize(
    ("kind", "precision", "size"),
    [
        pytest.param("dense", Precision("nf4"), 192 * 64 + 192 * 2 * 4, id="dense-nf4"),
        pytest.param("dense", Precision("int4", 128), 192 * 64 + 192 * 2, id="dense-int4"),
        pytest.param("dense", Precision("int4", 32, True), 192 * 64 + 192 * 4 * 3, id="dense-asymmetric"),
        pytest.param("lowrank", Precision("nf4"), (64 * 128 + 192 * 64) // 2 + (64 * 2 + 192) * 4, id="lowrank-nf4"),
        pytest.param(
            "pivot", Precision("int4", 64, True), (64 * 128 + 128 * 64) // 2 + (128 + 128) * 3 + 192 * 4, id="pivot"
        ),
        pytest.param("pivot", Precision("bf16"), (64 * 128 + 128 * 64) * 2 + 192 * 4, id="pivot-bf16"),
    ],
)
def test_bytes_by_hand(kind: str, precision: Precision, size: int) -> None:
    rank = 128 if kind == "dense" else 64
    assert LayerSpec(kind, 192, 128, rank).stored_as(precision).bytes == size


def test_names_shapes_and_dtypes() -> None:
    spec = LayerSpec("pivot", 192, 128, 64, "int4", group=32, asymmetric=True)
    assert {name: (stored.shape, stored.dtype) for name, stored in spec.tensors.items()} == {
        "pivot_index": ((192,), "int32"),
        "pivot_basis_int4": ((64, 64), "uint8"),
        "pivot_basis_scale": ((64, 4), "bfloat16"),
        "pivot_basis_zero": ((64, 4), "uint8"),
        "pivot_coeff_int4": ((128, 32), "uint8"),
        "pivot_coeff_scale": ((128, 2), "bfloat16"),
        "pivot_coeff_zero": ((128, 2), "uint8"),
    }
    assert LayerSpec("dense", 4, 64, 4, "nf4").tensors.keys() == {"weight_nf4", "weight_absmax"}
    assert LayerSpec("lowrank", 4, 6, 2, "fp16").tensors.keys() == {"lowrank_u", "lowrank_v"}


@given(st.data(), PRECISIONS, st.integers(1, 300), st.integers(1, 300), st.sampled_from(["dense", "lowrank", "pivot"]))
def test_a_layer_fits_exactly_where_whole_groups_make_up_its_reductions(
    data: st.DataObject, precision: Precision, m: int, n: int, kind: str
) -> None:
    if kind != "dense" and data.draw(st.booleans()):  # else hardly any shape fits
        n, m = n - n % precision.block + precision.block, m + precision.block
    most = {"dense": min(m, n), "lowrank": m * n // (m + n), "pivot": min(m, n) - 1}[kind]
    if most < 1:
        return
    rank = min(m, n) if kind == "dense" else data.draw(st.integers(1, most))
    plain = LayerSpec(kind, m, n, rank)
    fits = n % precision.block == 0 and (kind == "dense" or rank % precision.block == 0)
    if not fits:
        with pytest.raises(RankwiseError, match=rf"{precision.block} does not divide (in_features|rank) \d+; allowed"):
            plain.stored_as(precision)
        return
    spec = plain.stored_as(precision)
    sizes = [torch.empty(t.shape, dtype=getattr(torch, t.dtype), device="meta") for t in spec.tensors.values()]
    assert spec.bytes == sum(t.numel() * t.element_size() for t in sizes)
    if precision.quantised:
        codes = sum(t.numel() for name, t in zip(spec.tensors, sizes, strict=True) if name.endswith(("4",)))
        assert 2 * codes == spec.parameters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("int3",), "weights: int3; allowed: bf16, fp16, fp32, nf4, int4, int8"),
        (("int4",), "group: None; allowed for int4: 32, 64, 128"),
        (("int4", 48), "group: 48; allowed for int4: 32, 64, 128"),
        (("int4", 64.0), "group: 64.0; allowed for int4: 32, 64, 128"),
        (("int4", 64, 1), "asymmetric: 1; allowed: true or false for int4"),
        (("nf4", 64), "group: 64; allowed for nf4: none"),
        (("bf16", None, True), "asymmetric: True; allowed: true or false for int4, false for all others"),
    ],
)
def test_what_does_not_exist_is_refused(options: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RankwiseError) as raised:
        Precision(*options)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("spec", "precision", "message"),
    [
        (("dense", 576, 576, 576), Precision("int4", 128), "group: 128; 128 does not divide in_features 576; "),
        (("dense", 576, 576, 576), Precision("int4", 128), "allowed: int4 with group 32 or 64, int8, bf16, fp16, fp32"),
        (("dense", 64, 48, 48), Precision("nf4"), "weights: nf4; 64 does not divide in_features 48; "),
        (("dense", 64, 48, 48), Precision("int4", 32), "allowed: int8, bf16, fp16, fp32"),
        (("pivot", 128, 128, 40), Precision("int4", 32), "group: 32; 32 does not divide rank 40; "),
        (("pivot", 128, 128, 40), Precision("nf4"), "weights: nf4; 64 does not divide rank 40; "),
        (("pivot", 128, 128, 40), Precision("nf4"), "allowed: ranks that are multiples of 64"),
    ],
)
def test_sizes_that_groups_do_not_divide_say_what_would_fit(
    spec: tuple[str, int, int, int], precision: Precision, message: str
) -> None:
    with pytest.raises(RankwiseError) as raised:
        LayerSpec(*spec).stored_as(precision)
    assert message in str(raised.value)


def test_a_precision_says_itself() -> None:
    assert str(Precision("int4", 64, True)) == "int4 by 64, asymmetric"
    assert [str(Precision(name)) for name in ("nf4", "bf16")] == ["nf4", "bf16"]
