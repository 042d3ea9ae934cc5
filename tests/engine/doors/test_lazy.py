"""`import rankwise` costs nothing and still teaches transformers the format, in whatever order they are imported."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise
from rankwise.engine.doors import lazy

HEAVY = ("torch", "transformers", "triton", "numpy", "scipy", "safetensors", "matplotlib", "jinja2")
WINDOWS = torch.randint(2, 512, (4, 32), generator=torch.Generator().manual_seed(3))


def python(code: str, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, far from the sources."""
    command = [sys.executable, *options, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Path:
    plan = rankwise.allocate(tiny_model, WINDOWS, rankwise.Global(ratio=0.6, rank_multiple=1))
    small = rankwise.compress(tiny_model, plan)
    return rankwise.save(small, None, plan, tmp_path_factory.mktemp("checkpoint") / "small")


@pytest.fixture(scope="module")
def tiny_model(model_folder: Callable[[str], Path]) -> Any:
    return rankwise.load_model(str(model_folder("llama")))[0]


def test_import_brings_nothing_heavy() -> None:
    code = "import sys, json, rankwise; print(json.dumps(sorted({n.split('.')[0] for n in sys.modules})))"
    loaded = set(json.loads(python(code).stdout))
    assert loaded & set(HEAVY) == set()
    assert "rankwise" in loaded


HELP = """
import io, json, sys
from contextlib import redirect_stdout, suppress
from rankwise.cli import main
pages = {}
for command in sys.argv[1:]:
    page = io.StringIO()
    with redirect_stdout(page), suppress(SystemExit):
        main([*command.split(), "--help"])
    pages[command] = page.getvalue()
print(json.dumps([pages, sorted({n.split(".")[0] for n in sys.modules})]))
"""
COMMANDS = ("", "compress", "inspect", "eval", "generate", "bench", "report", "demo")


def test_help_of_every_command_imports_no_torch() -> None:
    pages, loaded = json.loads(python(HELP, *COMMANDS).stdout)
    assert set(loaded) & set(HEAVY) == set()
    assert all("Usage:" in pages[command] for command in COMMANDS)


def test_help_through_the_module_imports_no_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "rankwise.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert imported & set(HEAVY) == set()
    assert "compress" in done.stdout


LOAD = """
import sys, torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(sum(type(m).__name__ == "PivotLinear" for m in model.modules()))
assert "rankwise.engine.doors.hf" in sys.modules
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import rankwise\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM\nimport rankwise",
        "import transformers.quantizers.auto\nimport rankwise\nfrom transformers import AutoModelForCausalLM",
    ],
    ids=["rankwise-first", "transformers-first", "registry-first"],
)
def test_the_order_of_imports_does_not_matter(imports: str, checkpoint: Path) -> None:
    plan = rankwise.RankPlan.load(checkpoint / "plan.json")
    assert plan.counts()["pivot"]
    assert python(imports + LOAD, str(checkpoint)).stdout.strip() == str(plan.counts()["pivot"])


ONE_FINDER = """
import importlib, sys
import rankwise
from rankwise.engine.doors import lazy
for _ in range(3):
    importlib.reload(rankwise)
finders = [f for f in sys.meta_path if type(f).__name__ == "_Finder"]
assert len(finders) == 1, finders
assert finders[0].find_spec("json", None) is None
assert finders[0] in sys.meta_path
"""


def test_one_finder_waits_however_often_rankwise_is_imported() -> None:
    python(ONE_FINDER)


def test_the_finder_leaves_once_it_has_served() -> None:
    """transformers is loaded here: nothing waits any more, and importing again registers at once."""
    importlib.import_module(lazy.REGISTRY)
    importlib.reload(rankwise)
    assert not any(type(finder).__name__ == "_Finder" for finder in sys.meta_path)
    registry = importlib.import_module(lazy.REGISTRY)
    assert "rankwise" in registry.AUTO_QUANTIZER_MAPPING


@pytest.mark.parametrize("name", rankwise.__all__)
def test_public_names_resolve(name: str) -> None:
    found = getattr(rankwise, name)
    assert getattr(found, "__name__", name) == name or name == "__version__"
    assert name in dir(rankwise)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'rankwise' has no attribute 'sqeeze'"):
        rankwise.sqeeze  # noqa: B018
