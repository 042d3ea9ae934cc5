"""`native*.c` on a CPU: compiled once a machine by the compiler that is there, and called; without one PyTorch does it.

The library lies in the user's cache under a name that says its source, compiler and processor. The first process that
wants it waits for the compiler, for some seconds; the others load it.
"""

import ctypes
import hashlib
import logging
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from threading import Lock, Thread

import torch

from rankwise.files import cache_folder
from rankwise.kernels.backend import chosen

HERE = Path(__file__).parent
SOURCES = [HERE / f"native{part}.c" for part in ("", "_attention", "_linear", "_blocks")]
HEADERS = [HERE / "native.h", HERE / "native_dot.h", HERE / "native_linear.h", HERE / "native_scatter.h"]
FLAGS = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-Wno-psabi", "-shared", "-fPIC"]
DTYPES = (torch.bfloat16, torch.float32)
LANES = 16  # of which a head's dimension must be a multiple
PATIENCE = 600  # seconds: it takes some ten of a core, which others may want too
ALONE = 1 << 15  # elements that one thread does on its own: waking others takes longer

_PLAIN = {torch.Tensor, torch.nn.Parameter}
_NUMBERS = {int, float, type(None)}
_P, _L, _F, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_FUNCTIONS = {
    "attention": [*[_P] * 8, _L, _L, _F, _I, _I],
    "rotary": [*[_P] * 10, _L, _I, _I],
    "norm": [*[_P] * 5, *[_L] * 5, _F, _F, _I, _I],
    "gated": [*[_P] * 3, *[_L] * 4, _I, _I, _I],
    "linears": [*[_P] * 3, *[_L] * 2, _I],
    "blocks": [*[_P] * 4, *[_L] * 2, *[_F] * 3, _I],
    "has_four_bits": [],
}


ANSWERING = ("attention", "linears", "blocks", "has_four_bits")  # with a number: others have no result

_one_at_a_time = Lock()


def start() -> None:
    """Look for the compiled functions, or compile them, in a thread of its own; whoever needs them waits for it."""
    Thread(target=library, daemon=True).start()


def library() -> ctypes.CDLL | None:
    """The compiled functions; None where they cannot be had."""
    with _one_at_a_time:
        return _loaded()


@lru_cache(maxsize=1)
def _loaded() -> ctypes.CDLL | None:
    """gcc alone, with which OpenMP's threads are those of PyTorch."""
    compiler = shutil.which("gcc")
    if platform.system() != "Linux" or compiler is None:
        return None
    try:
        return load(build(compiler, cache_folder() / "native"))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        logging.getLogger(__name__).info("native.c is not used, decoding on the CPU is slower: %s", error)
        return None


def load(path: Path) -> ctypes.CDLL:
    """The functions of a compiled library.

    Raises:
        OSError: it cannot be loaded.
        AttributeError: a function is missing.
    """
    found = ctypes.CDLL(str(path))
    for name, types in _FUNCTIONS.items():
        getattr(found, name).argtypes, getattr(found, name).restype = types, _I if name in ANSWERING else None
    return found


def build(compiler: str, folder: Path) -> Path:
    """Compile into a folder unless it is there; two processes at once do no harm.

    Raises:
        OSError: the folder cannot be written.
        subprocess.SubprocessError: the compiler fails, or takes more than a minute.
    """
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    facts = [*(path.read_bytes() for path in (*HEADERS, *SOURCES)), version, " ".join(FLAGS).encode(), _processor()]
    path = folder / f"{hashlib.blake2b(b'|'.join(facts), digest_size=12).hexdigest()}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch, "native.so")
            command = [compiler, *FLAGS, *map(str, SOURCES), "-o", str(made), "-lm"]
            subprocess.run(command, capture_output=True, check=True, timeout=PATIENCE)
            made.replace(path)
    return path


def _processor() -> bytes:
    """What `-march=native` depends on: a home folder may be shared by different machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})).encode()


def usable(*tensors: torch.Tensor) -> bool:
    """Whether the functions take these tensors: plain, on the CPU, all bf16 or all fp32, and no gradient is wanted."""
    dtype, wanted = tensors[0].dtype, torch.is_grad_enabled()
    if tensors[0].is_cuda or dtype not in DTYPES or chosen() != "auto" or torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if type(tensor) not in _PLAIN or tensor.dtype != dtype or not tensor.is_cpu:
            return False
        if (wanted and tensor.requires_grad) or (tensor.stride(-1) != 1 and tensor.shape[-1] > 1):
            return False
    return library() is not None


def call(name: str, elements: int, *arguments: object) -> int:
    """Run a function on tensors, numbers and tuples of sizes; the number of threads is added.

    Args:
        name: of the function.
        elements: that it works on, from which follows whether one thread does it.
        arguments: its own, in order; None is a null pointer, the dtype is said by 0 or 1.
    """
    given = [
        a if type(a) in _NUMBERS else (_L * len(a))(*a) if type(a) is tuple else a.data_ptr()  # type: ignore[attr-defined]
        for a in arguments
    ]
    threads = 1 if elements <= ALONE else torch.get_num_threads()
    return int(getattr(library(), name)(*given, threads) or 0)


@lru_cache(maxsize=1)
def has_tiles() -> bool:
    """Whether the processor multiplies tiles (AMX), which PyTorch's own products use and the functions do not."""
    asked = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return asked is not None and bool(asked())


def wide(x: torch.Tensor) -> int:
    """How the functions are told the dtype: 0 for bf16, 1 for fp32."""
    return int(x.dtype == torch.float32)
