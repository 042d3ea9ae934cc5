"""Compile kernels for chips that are not here, and read what the compiler made of them.

    python -m bench.ahead masked lowrank

prints one JSON line for every kernel of the cases in bench/compiled/masked.py and lowrank.py (of all files: no name).
A case calls a launcher on meta tensors; each kernel that it would start is compiled, with the argument types and
alignments of that very call, for every architecture of the case.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rankwise.kernels.backend import Launch, backend, recording

SHARED = {80: 163, 89: 99, 90: 227, 100: 227}  # KiB that one block may have (CUDA programming guide, table of limits)
TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.int8: "i8",
    torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip
WIDE = re.compile(r"\bLDG(?:STS)?\.(?:\w+\.)*(?:64|128|256)\b")  # in SASS, of global memory
ARCHS = (80, 89, 90, 100)
COMMON = (80, 89, 90)  # for which every configuration is compiled
Pattern = str | Mapping[int, str]  # one for all architectures, or one for each
UNITS = {80: r"mma\.sync", 89: r"mma\.sync", 90: "wgmma", 100: r"tcgen05\.mma"}  # of tiles from 64 rows


@dataclass(frozen=True)
class Case:
    """One call whose kernels are compiled.

    Args:
        name: says shape, dtype and number of tokens.
        call: a launcher on meta tensors.
        contains: by kernel, patterns that the PTX of each variant of it must have, e.g. `mma.sync|wgmma`.
        loads: bits that the widest global load of each kernel must have at least (asynchronous copies count).
        narrow: by kernel, so many global loads of less than 64 bits its loops may have together; 0 where none is named.
        wide: by kernel, so many loops at least whose global loads are all wider.
        archs: compute capabilities.
        weights: weights that one thread handles in one round of the longest loop of the case's first kernel.
        per_weight: so many instructions a weight that loop may have, for all architectures or for each; None: not
            looked at.
    """

    name: str
    call: Callable[[], Any]
    contains: Mapping[str, tuple[Pattern, ...]] = field(default_factory=dict)
    loads: int = 128
    narrow: Mapping[str, int] = field(default_factory=dict)
    wide: Mapping[str, int] = field(default_factory=dict)
    archs: tuple[int, ...] = ARCHS
    weights: float = 0.0
    per_weight: float | Mapping[int, float] | None = None


def compiled(case: Case, arch: int) -> list[dict[str, Any]]:
    """Resources and instructions of each distinct kernel of a case."""
    with backend("triton"), recording(arch) as launches:
        case.call()
    found: dict[str, dict[str, Any]] = {}
    for launch in launches:
        made = compile_launch(launch, "cuda", arch, 32)
        key = launch.kernel.__name__ + made.asm["ptx"]
        if key not in found:
            found[key] = {"kernel": launch.kernel.__name__, **_read(made)}
    return list(found.values())


def compile_launch(launch: Launch, *target: Any) -> Any:
    """Compile as the jit would: integers that are 1 become constants, and what 16 divides is marked, unless forbidden.

    Args:
        launch: recorded on meta tensors.
        target: Triton's backend, architecture and threads of a warp.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for at, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        special = not parameter.do_not_specialize
        kind = "constexpr" if parameter.is_constexpr else _type(value, special)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(at,)] = value
        elif special and (isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)):
            attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {key: value for key, value in launch.options.items() if key != "launch_pdl"}
    return triton.compile(source, target=GPUTarget(*target), options=options)


def _type(value: Any, special: bool) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if value is None or (special and value == 1 and isinstance(value, int) and not isinstance(value, bool)):
        return "constexpr"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _read(made: Any) -> dict[str, Any]:
    """Registers, spills, shared memory, PTX and SASS."""
    import triton.backends.nvidia as nvidia

    tools = Path(nvidia.__file__).parent / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", cubin)
        sass = _run(tools / "nvdisasm", "-c", cubin)
    figures = {key.lower(): int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return figures | {"shared": int(made.metadata.shared), "ptx": made.asm["ptx"], "sass": sass}


def _run(*command: Any) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def load_bits(ptx: str) -> int:
    """Width of the widest global load or asynchronous copy."""
    widths = [0]
    for vector, bits in re.findall(r"ld\.global(?:\.\w+(?:::\w+)?)*?(?:\.v(\d))?\.[bfus](\d+)", ptx):
        widths.append(int(vector or 1) * int(bits))
    widths += [8 * int(count, 0) for count in re.findall(r"cp\.async\.c[ag]\.shared\.global[^\n;]*?, (0x\w+|\d+)", ptx)]
    return 128 if "cp.async.bulk" in ptx else max(widths)


def loops(sass: str) -> list[list[str]]:
    """Instructions of each loop: from a label to the last branch back to it.

    Waits that the assembler has put behind the kernel's exit branch back as well, and are none.
    """
    labels: dict[str, int] = {}
    ends: dict[str, int] = {}
    code: list[str] = []
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label.group(1)] = len(code)
        elif re.search(r"/\*[0-9a-f]{4,}\*/", line) and ";" in line:
            code.append(line)
            back = re.search(r"\bBRA\b.*?`\((\.L_x_\d+)\)", line)
            start = labels.get(back.group(1), len(code)) if back else len(code)
            if back and len(code) - start > 1 and not any(re.search(r"\bEXIT\b", line) for line in code[start:]):
                ends[back.group(1)] = len(code)
    return [code[labels[label] : end] for label, end in ends.items()]


def is_narrow(line: str) -> bool:
    """Whether an instruction loads less than 64 bits from global memory."""
    return bool(re.search(r"\bLDG(?:STS)?\.", line)) and not WIDE.search(line)


def early_loads(sass: str) -> int | None:
    """Wide loads straight before a wait for the launch before, at the best of the waits; None where nothing waits."""
    counts, count = [], 0
    for line in sass.splitlines():
        if re.search(r"\.L_x_\d+:|\b(?:BRA|EXIT)\b", line):
            count = 0
        elif "ACQBULK" in line:
            counts.append(count)
        else:
            count += bool(WIDE.search(line))
    return max(counts, default=None)


def figures(kernel: dict[str, Any], case: Case, arch: int) -> dict[str, Any]:
    """What a kernel's code shows, and what the case wants of it."""
    name, ptx, sass = kernel["kernel"], kernel.pop("ptx"), kernel.pop("sass")
    found = loops(sass)
    patterns = [p if isinstance(p, str) else p[arch] for p in case.contains.get(name, ())]
    return kernel | {
        "load_bits": load_bits(ptx),
        "wanted_load_bits": case.loads,
        "loop": max(map(len, found), default=0),
        "narrow": len({line for loop in found for line in loop if is_narrow(line)}),
        "most_narrow": case.narrow.get(name, 0),
        "wide": sum(any(map(WIDE.search, loop)) and not any(map(is_narrow, loop)) for loop in found),
        "least_wide": case.wide.get(name, 0),
        "early": early_loads(sass),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "missing": [pattern for pattern in patterns if not re.search(pattern, ptx)],
    }


def report(family: str) -> list[dict[str, Any]]:
    """One row for each kernel of each case on each architecture, without the code itself."""
    rows = []
    for case in importlib.import_module(f"bench.compiled.{family}").CASES:
        for arch in case.archs:
            kernels = compiled(case, arch)
            absent = sorted(set(case.contains) - {kernel["kernel"] for kernel in kernels})
            made = [{"family": family, "case": case.name, "arch": arch, **figures(k, case, arch)} for k in kernels]
            made[0]["missing"] += absent
            if case.per_weight is not None:
                most = case.per_weight if isinstance(case.per_weight, float) else case.per_weight[arch]
                made[0] |= {"per_weight": made[0]["loop"] / case.weights, "budget": most}
            rows += made
    return rows


def main(families: Sequence[str]) -> None:
    """Print the rows of all families."""
    for family in families:
        for row in report(family):
            print(json.dumps(row), flush=True)  # noqa: T201


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "families", nargs="*", default=[p.stem for p in sorted(Path(__file__).parent.glob("compiled/*.py"))]
    )
    main(parser.parse_args(sys.argv[1:]).families)
