"""What README and docs say: commands parse, Python compiles, links lead somewhere, tables match their results."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from rankwise.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


def lines(prefix: str) -> list[str]:
    """Command lines in the fences of all pages, comments and alignment taken off."""
    blocks = [block for page in PAGES for _, block in FENCE.findall(page.read_text(encoding="utf-8"))]
    found = [line for block in blocks for line in block.splitlines() if line.startswith(prefix)]
    return sorted({" ".join(shlex.split(line, comments=True)[1:]) and line for line in found})


@pytest.mark.parametrize("line", lines("rankwise "))
def test_commands_parse(line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    assert command.make_context(name, arguments).params


@pytest.mark.parametrize("line", lines("make "))
def test_make_targets_exist(line: str) -> None:
    target = shlex.split(line, comments=True)[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_compiles_and_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for language, block in FENCE.findall(text):
        if language == "python":
            compile(block, page.name, "exec")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_tables_match_their_result_files() -> None:
    done = subprocess.run([sys.executable, "-m", "bench.tables", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_layout_of_the_readme_is_the_tree() -> None:
    layout = next(block for _, block in FENCE.findall((ROOT / "README.md").read_text()) if "rankwise/\n" in block)
    names = {name for line in layout.splitlines()[1:] for name in re.findall(r"\b(\w+\.py|\w+/)", line.split("   ")[0])}
    package = {path.name for path in (ROOT / "rankwise").iterdir()}
    known = package | {path.name for path in ROOT.iterdir()}
    assert {name.rstrip("/") for name in names} <= known
