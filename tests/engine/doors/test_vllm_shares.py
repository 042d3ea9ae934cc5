"""Shares of tensor-parallel ranks, without vLLM: together they are the layer."""

import pytest
import torch
from fourbit import PRECISIONS, random_layer

from rankwise.engine.doors.vllm.groups import halves, whole
from rankwise.engine.doors.vllm.parts import Part
from rankwise.engine.doors.vllm.shares import Cut, share
from rankwise.engine.layers import tensor_shapes
from rankwise.engine.runtime.mixed import packed_linear
from rankwise.errors import RankwiseError
from rankwise.kernels.native_linear import HostGroup, Layer, suits
from rankwise.layerspec import LayerSpec
from rankwise.storage import Precision

M, N = 192, 256
CPU = torch.device("cpu")
STORED = [Precision("fp32"), *PRECISIONS]


def spec_of(kind: str, precision: Precision, m: int = M, n: int = N) -> LayerSpec:
    rank = {"dense": min(m, n)}.get(kind, 64 if precision.block < 128 else 128)
    if kind == "lowrank" and rank * (m + n) > m * n:
        pytest.skip("no such layer")
    return LayerSpec(kind, m, n, rank, "fp32").stored_as(precision)


def tensors_of(spec: LayerSpec) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What a checkpoint has of a random layer, and what the layer makes of some inputs."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, spec.in_features, generator=generator)
    if not spec.compressed:
        weight = torch.randn(spec.out_features, spec.in_features, generator=generator)
        return {"weight": weight}, x @ weight.T
    layer = random_layer(spec, False, torch.float32, generator)
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert stored.keys() == tensor_shapes(spec).keys()
    return stored, layer(x)


def inputs(spec: LayerSpec) -> torch.Tensor:
    return torch.randn(3, spec.in_features, generator=torch.Generator().manual_seed(5))


def loaded(
    spec: LayerSpec,
    cut: Cut,
    ranks: int,
    stored: dict[str, torch.Tensor],
    late: str = "",
    dtype: torch.dtype = torch.float32,
) -> Part:
    part = Part("layer", spec, cut, ranks, dtype, CPU)
    for name in sorted(stored, key=lambda name: (name.startswith(late) if late else 0, name)):
        part.load(name, stored[name])
    part.finish()
    return part


@pytest.mark.parametrize("late", ["pivot_index", "pivot_coeff"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 64])
@pytest.mark.parametrize("precision", STORED, ids=str)
@pytest.mark.parametrize("kind", ["dense", "lowrank", "pivot"])
def test_outputs_split_among_ranks(kind: str, precision: Precision, ranks: int, late: str) -> None:
    if kind != "pivot" and late == "pivot_coeff":
        pytest.skip("it has none")
    spec = spec_of(kind, precision)
    stored, wanted = tensors_of(spec)
    size, got = M // ranks, []
    for rank in range(ranks):
        part = loaded(spec, Cut(((rank * size, (rank + 1) * size),), (0, N)), 1, stored, late)
        got.append(packed_linear(inputs(spec), whole([part.module])))
    torch.testing.assert_close(torch.cat(got, dim=-1), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", [Precision("bf16"), *PRECISIONS], ids=str)
@pytest.mark.parametrize("kind", ["dense", "lowrank", "pivot"])
def test_in_bf16_a_group_is_one_call(kind: str, precision: Precision) -> None:
    """Where there is compiled C; a rank's share that lacks some pivots runs as before."""
    spec = spec_of(kind, precision)
    stored, wanted = tensors_of(spec)
    hosted = suits([Layer(torch.zeros(1, 1, dtype=torch.bfloat16), None, None, None, 1)], torch.bfloat16)
    for cuts in ([(0, M)], [(0, M // 2), (M // 2, M)]):
        groups = [whole([loaded(spec, Cut((rows,), (0, N)), 1, stored, dtype=torch.bfloat16).module]) for rows in cuts]
        if hosted and (len(cuts) == 1 or kind != "pivot"):
            assert all(isinstance(group, HostGroup) for group in groups)
        got = torch.cat([packed_linear(inputs(spec).bfloat16(), group) for group in groups], dim=-1)
        assert (got - wanted).norm() < 0.02 * wanted.norm()
    columns = [(rank * N // 2, (rank + 1) * N // 2) for rank in range(2)]
    parts = [
        loaded(
            spec,
            Cut(
                ((0, M),),
                c,
            ),
            2,
            stored,
            dtype=torch.bfloat16,
        ).module
        for c in columns
    ]
    if kind != "dense":
        split = [halves(part) for part in parts]  # type: ignore[arg-type]
        z = sum(
            packed_linear(inputs(spec)[:, a:b].bfloat16(), s.first) for s, (a, b) in zip(split, columns, strict=True)
        )
        assert (split[0].finish(z) - wanted).norm() < 0.02 * wanted.norm()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["dense", "lowrank", "pivot"])
def test_a_layer_fused_on_disk_is_split_in_each_of_its_sections(kind: str) -> None:
    """Phi-3: q, k and v in one matrix; a rank has rows of each."""
    spec = spec_of(kind, Precision("fp32"))
    stored, wanted = tensors_of(spec)
    for rank in range(2):
        rows = ((rank * 64, rank * 64 + 64), (128 + rank * 16, 144 + rank * 16), (160 + rank * 16, 176 + rank * 16))
        part = loaded(spec, Cut(rows, (0, N)), 1, stored)
        got = packed_linear(inputs(spec), whole([part.module]))
        torch.testing.assert_close(got, torch.cat([wanted[:, a:b] for a, b in rows], dim=-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", STORED, ids=str)
@pytest.mark.parametrize("kind", ["dense", "lowrank", "pivot"])
def test_inputs_split_among_ranks(kind: str, precision: Precision) -> None:
    """Ranks add up between the factors, or after the layer: either way it is the layer."""
    spec = spec_of(kind, precision)
    stored, wanted = tensors_of(spec)
    between, after, x = [], [], inputs(spec)
    for rank in range(2):
        columns = rank * N // 2, (rank + 1) * N // 2
        mine = x[:, columns[0] : columns[1]]
        after.append(packed_linear(mine, whole([loaded(spec, Cut(((0, M),), columns), 2, stored).module])))
        if kind != "dense":
            split = halves(loaded(spec, Cut(((0, M),), columns), 2, stored).module)  # type: ignore[arg-type]
            between.append((split, packed_linear(mine, split.first)))
    torch.testing.assert_close(sum(after), wanted, rtol=1e-4, atol=1e-4)
    if kind != "dense":
        z = sum(part for _, part in between)
        assert z.shape == (3, spec.rank)  # type: ignore[union-attr]
        for split, _ in between:
            torch.testing.assert_close(split.finish(z), wanted, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]


def test_a_share_may_be_smaller_than_its_rank() -> None:
    spec = LayerSpec("lowrank", 64, 64, 32, "fp32")
    assert share("layer", spec, Cut(((0, 4),), (0, 64))).matrices == {"lowrank_v": (32, 64), "lowrank_u": (4, 32)}


@pytest.mark.parametrize(("precision", "ranks", "allowed"), [("nf4", 8, "1, 2, 4"), ("int4", 3, "1, 2")])
def test_groups_that_do_not_divide_are_refused(precision: str, ranks: int, allowed: str) -> None:
    spec = LayerSpec("dense", 64, 256, 64, precision, group=128 if precision == "int4" else None)
    columns = 256 // ranks, 2 * (256 // ranks)
    with pytest.raises(RankwiseError, match=rf"tensor_parallel_size: {ranks} .*of mlp.down_proj; allowed: {allowed}$"):
        share("mlp.down_proj", spec, Cut(((0, 64),), columns), ranks)


def damaged(stored: dict[str, torch.Tensor], what: str) -> None:
    if what == "missing":
        del stored["pivot_coeff"]
    elif what == "extra":
        stored["lowrank_u"] = torch.zeros(2, 2)
    elif what == "shape":
        stored["pivot_basis"] = stored["pivot_basis"][1:]
    elif what == "guard":
        stored["weight"] = torch.zeros(M, N)
    else:
        stored["pivot_index"][3] = stored["pivot_index"][4]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "layer.pivot_coeff: not in the checkpoint; write the checkpoint again"),
        ("extra", "layer.lowrank_u: not expected; config.json says pivot, fp32"),
        ("shape", r"layer.pivot_basis: shape \[63, 256\]; config.json says shape \[64, 256\]"),
        ("guard", r"layer.weight: shape \[192, 256\]; config.json says shape \[1\]"),
        ("twice", "layer.pivot_index: no permutation; the tensor is damaged"),
    ],
)
def test_a_damaged_layer_is_refused(what: str, message: str) -> None:
    spec = spec_of("pivot", Precision("fp32"))
    stored, _ = tensors_of(spec)
    damaged(stored, what)
    with pytest.raises(RankwiseError, match=message):
        loaded(spec, Cut(((0, M),), (0, N)), 1, stored)


def test_codes_of_another_dtype_are_refused() -> None:
    spec = spec_of("dense", Precision("nf4"))
    stored, _ = tensors_of(spec)
    stored["weight_nf4"] = stored["weight_nf4"].float()
    with pytest.raises(RankwiseError, match=r"layer.weight_nf4: torch.float32; config.json says uint8"):
        loaded(spec, Cut(((0, M),), (0, N)), 1, stored)


def test_a_part_lets_go_of_what_was_copied() -> None:
    spec = spec_of("pivot", Precision("nf4"))
    part = loaded(spec, Cut(((0, 96),), (0, N)), 1, tensors_of(spec)[0])
    whole([part.module])
    assert not any(tensor.numel() for tensor in part.module.state_dict().values())
