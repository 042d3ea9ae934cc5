"""Every command, on tiny models: what it prints, what it writes, what it returns."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import rankwise
from rankwise import bench as speed
from rankwise import commands
from rankwise.anatomy import block_linears
from rankwise.cli import main

SMALL = ["--samples", "4", "--gradient-samples", "2", "--seq-len", "32", "--rank-multiple", "1"]
SCRIPT = Path(sys.executable).with_name("rankwise")
COMMANDS = {
    "compress": ["--out", "--ratio", "--method", "--kinds", "--calibration", "--curvature", "--plan", "--restart"],
    "inspect": ["--verify", "--json"],
    "eval": ["--against", "--text", "--windows", "--seq-len", "--device", "--dtype", "--json"],
    "generate": ["--max-tokens", "--temperature", "--top-p", "--chat", "--seed", "--max-model-len", "--json"],
    "bench": ["--against", "--engine", "--prompt", "--new-tokens", "--batch", "--load", "--mix", "--out", "--json"],
    "serve": ["--host", "--port", "--name", "--api-key", "--max-queue", "--timeout", "--grace", "--json"],
    "report": ["--out", "--against", "--beside", "--speed", "--json"],
    "demo": ["--out", "--ratio", "--json"],
}

Run = Callable[..., tuple[str, str]]


def only_line(out: str) -> dict[str, Any]:
    """The JSON object that is all of stdout."""
    assert out.count("\n") == 1, out
    assert out.endswith("\n")
    facts = json.loads(out)
    assert isinstance(facts, dict)
    return facts


def job(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    """A small compress command."""
    return ["compress", str(model), "--out", str(out), "--calibration", str(text), "--ratio", "0.6", *SMALL, *more]


@pytest.fixture(scope="module")
def dense(model_folder: Callable[[str], Path]) -> Path:
    return model_folder("llama")


@pytest.fixture(scope="module")
def small(dense: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, made by the command."""
    out = tmp_path_factory.mktemp("cli") / "small"
    with pytest.raises(SystemExit) as ended:
        main(job(dense, text_file, out, "--measure", "1"))
    assert ended.value.code == 0
    return out


def perplexity_by_hand(folder: Path, text: Path, windows: int, seq_len: int) -> float:
    """exp of the mean negative log-likelihood, token by token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokens = AutoTokenizer.from_pretrained(folder)(text.read_text())["input_ids"]
    losses = []
    for window in range(windows):
        ids = torch.tensor([tokens[window * seq_len : (window + 1) * seq_len]])
        with torch.no_grad():
            likelihood = model(input_ids=ids).logits[0].softmax(-1)
        losses += [-math.log(likelihood[i, ids[0, i + 1]]) for i in range(seq_len - 1)]
    return math.exp(sum(losses) / len(losses))


# ------------------------------------------------------------------------------------------------- compress


def test_compress(dense: Path, text_file: Path, tmp_path: Path, run: Run) -> None:
    out, err = run(*job(dense, text_file, tmp_path / "out", "--measure", "2", "--json"))
    facts = only_line(out)
    plan = rankwise.RankPlan.load(tmp_path / "out" / "plan.json")
    assert facts["ratio"] == plan.ratio == pytest.approx(0.6, rel=1e-3)
    assert facts["out"] == str(tmp_path / "out")
    assert facts["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert {kind: facts[kind] for kind in ("dense", "lowrank", "pivot")} == plan.counts()
    measured = plan.provenance["measured"]
    assert (facts["perplexity"], facts["dense_perplexity"]) == (measured["compressed"], measured["dense"])
    assert measured["windows"] == 2
    assert f"perplexity {measured['dense']:.2f} → {measured['compressed']:.2f} on 2 held-out windows" in err
    for step in ("input moments", "output-gradient moments", "factors", "perplexity", "layers"):
        assert step in err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_compress_measures_what_eval_measures(dense: Path, text_file: Path, tmp_path: Path, run: Run) -> None:
    """The held-out windows follow those that calibrate: here windows 6 and 7 of 32 tokens."""
    facts = only_line(run(*job(dense, text_file, tmp_path / "out", "--measure", "2", "--json"))[0])
    tokenizer = AutoTokenizer.from_pretrained(dense)
    ids = tokenizer(text_file.read_text())["input_ids"][6 * 32 : 8 * 32]
    held_out = torch.tensor(ids).view(2, 32)
    for key, folder in (("dense_perplexity", dense), ("perplexity", tmp_path / "out")):
        model = rankwise.load_model(str(folder))[0]
        losses = [torch.nn.functional.cross_entropy(model(w[None]).logits[0, :-1], w[1:]) for w in held_out]
        assert facts[key] == pytest.approx(math.exp(sum(losses) / 2), rel=1e-5)


def test_compress_without_measuring(dense: Path, text_file: Path, tmp_path: Path, run: Run) -> None:
    out, err = run(*job(dense, text_file, tmp_path / "out", "--measure", "0", "--json"))
    assert "perplexity" not in only_line(out)
    assert "perplexity" not in err


def test_people_get_nothing_on_stdout(dense: Path, text_file: Path, tmp_path: Path, run: Run) -> None:
    out, err = run(*job(dense, text_file, tmp_path / "out", "--measure", "0", "--method", "uniform"))
    assert out == ""
    assert f"{tmp_path / 'out'}: " in err
    plan = rankwise.RankPlan.load(tmp_path / "out" / "plan.json")
    assert f"{plan.ratio:.2%} of the linear layers kept" in err
    assert plan.provenance["options"]["method"] == "uniform"


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        (["--kinds", "lowrank"], {"lowrank"}),
        (["--kinds", "dense,lowrank", "--ratio", "0.8"], {"dense", "lowrank"}),
        (["--kinds", "pivot", "--sides", "one"], {"pivot"}),
    ],
    ids=["lowrank", "dense-lowrank", "pivot-one-sided"],
)
def test_kinds(options: list[str], kinds: set[str], dense: Path, text_file: Path, tmp_path: Path, run: Run) -> None:
    run(*job(dense, text_file, tmp_path / "out", "--measure", "0", *options))
    plan = rankwise.RankPlan.load(tmp_path / "out" / "plan.json")
    assert {spec.kind for _, spec in plan} == kinds


def test_seed_and_shuffle_choose_the_windows(dense: Path, text_file: Path, tmp_path: Path, run: Run) -> None:
    variants: dict[str, list[str]] = {
        "plain": [],
        "seed-1": ["--shuffle", "--seed", "1"],
        "seed-2": ["--shuffle", "--seed", "2"],
        "seed-1-again": ["--shuffle", "--seed", "1"],
    }
    hashes = {}
    for name, options in variants.items():
        run(*job(dense, text_file, tmp_path / name, "--measure", "0", *options))
        sums = (tmp_path / name / "SHA256SUMS").read_text().splitlines()
        hashes[name] = next(line for line in sums if line.endswith("model.safetensors"))
    assert hashes["seed-1"] == hashes["seed-1-again"]
    assert len(set(hashes.values())) == 3


def test_a_plan_is_carried_out(dense: Path, small: Path, text_file: Path, tmp_path: Path, run: Run) -> None:
    edited = json.loads((small / "plan.json").read_text())
    for entry in edited["layers"].values():
        entry.update(kind="lowrank", rank=4)
    (tmp_path / "plan.json").write_text(json.dumps(edited))
    run(*job(dense, text_file, tmp_path / "out", "--measure", "0", "--plan", str(tmp_path / "plan.json")))
    plan = rankwise.RankPlan.load(tmp_path / "out" / "plan.json")
    assert {(spec.kind, spec.rank) for _, spec in plan} == {("lowrank", 4)}
    assert plan.provenance["options"]["method"] == "plan"


def test_curvature_is_kept_and_used_again(dense: Path, text_file: Path, tmp_path: Path, run: Run) -> None:
    moments = str(tmp_path / "moments")
    run(*job(dense, text_file, tmp_path / "a", "--measure", "0", "--curvature", moments))
    times = {path.name: path.stat().st_mtime_ns for path in Path(moments).glob("*puts_*")}
    assert len(times) == 4
    _, err = run(*job(dense, text_file, tmp_path / "b", "--measure", "0", "--curvature", moments))
    assert "moments" not in "".join(line for line in err.splitlines() if "━" in line)  # no bar: nothing was measured
    assert times == {path.name: path.stat().st_mtime_ns for path in Path(moments).glob("*puts_*")}
    assert (tmp_path / "a" / "SHA256SUMS").read_text() == (tmp_path / "b" / "SHA256SUMS").read_text()


# -------------------------------------------------------------------------------------------------- inspect


def test_inspect_lists_every_module_once_in_model_order(small: Path, dense: Path, run: Run) -> None:
    facts = only_line(run("inspect", small, "--json")[0])
    model = AutoModelForCausalLM.from_pretrained(dense)
    linears = {name: module for block in block_linears(model) for name, module in block.items()}
    assert [row["name"] for row in facts["layers"]] == list(linears)
    plan = rankwise.RankPlan.load(small / "plan.json")
    for row in facts["layers"]:
        weight = linears[row["name"]].weight
        assert row["shape"] == f"{weight.shape[0]} × {weight.shape[1]}"
        assert row["ratio"] == row["parameters"] / weight.numel()
        assert (row["kind"], row["rank"]) == (plan.layers[row["name"]].kind, plan.layers[row["name"]].rank)
    assert facts["ratio"] == sum(row["parameters"] for row in facts["layers"]) / plan.dense_parameters
    assert facts["bytes"] == (small / "model.safetensors").stat().st_size
    assert facts["planned_bytes"] == plan.total_bytes
    assert facts["verified_files"] is None
    assert facts["provenance"]["model"] == str(dense)


def test_inspect_for_people(small: Path, run: Run) -> None:
    out, err = run("inspect", small)
    plan = rankwise.RankPlan.load(small / "plan.json")
    assert out == ""
    for name, spec in plan:
        (line,) = [line for line in err.splitlines() if name in line]
        assert spec.kind in line
        assert f" {spec.rank} " in line
    assert f"{plan.ratio:.2%} of the listed layers kept" in err
    assert "verified" not in err


def test_inspect_verifies(small: Path, run: Run) -> None:
    files = len(list(small.iterdir())) - 1
    assert only_line(run("inspect", small, "--verify", "--json")[0])["verified_files"] == files
    assert f"verified: {files} files have the SHA-256 that SHA256SUMS lists" in run("inspect", small, "--verify")[1]


# ----------------------------------------------------------------------------------------------------- eval


def test_eval(small: Path, text_file: Path, run: Run) -> None:
    out, err = run("eval", small, "--text", text_file, "--windows", 3, "--seq-len", 32, "--json")
    facts = only_line(out)
    assert facts["perplexity"] == pytest.approx(perplexity_by_hand(small, text_file, 3, 32), rel=1e-4)
    assert facts["ratio"] == rankwise.RankPlan.load(small / "plan.json").ratio
    assert facts["weight_bytes"] == (small / "model.safetensors").stat().st_size
    assert facts["text"] == f"{text_file}, first 3 windows of 32 tokens, fp32"
    assert "against" not in facts
    assert f"{facts['perplexity']:.2f}" in err


def test_eval_against(small: Path, dense: Path, text_file: Path, run: Run) -> None:
    command = ["eval", small, "--against", dense, "--text", text_file, "--windows", 3, "--seq-len", 32]
    facts = only_line(run(*command, "--json")[0])
    assert facts["name"] == str(small)
    assert facts["against"]["name"] == str(dense)
    assert facts["against"]["ratio"] == 1.0
    assert facts["against"]["perplexity"] == pytest.approx(perplexity_by_hand(dense, text_file, 3, 32), rel=1e-4)
    assert facts["perplexity"] != facts["against"]["perplexity"]
    out, err = run(*command)
    assert out == ""
    rows = [line for line in err.splitlines() if line.startswith("│")]
    assert [f"{facts['perplexity']:.2f}" in rows[0], f"{facts['against']['perplexity']:.2f}" in rows[1]] == [True, True]


def test_eval_in_another_dtype(small: Path, text_file: Path, run: Run) -> None:
    command = ["eval", small, "--text", text_file, "--windows", 3, "--seq-len", 32, "--json"]
    exact = only_line(run(*command)[0])
    rounded = only_line(run(*command, "--dtype", "bf16")[0])
    assert rounded["text"].endswith("bf16")
    assert rounded["perplexity"] != exact["perplexity"]
    assert rounded["perplexity"] == pytest.approx(exact["perplexity"], rel=0.05)


def test_eval_of_a_folder_that_transformers_wrote(small: Path, text_file: Path, tmp_path: Path, run: Run) -> None:
    """Without plan.json nobody knows which layers stayed dense, so no kept share is claimed."""
    AutoModelForCausalLM.from_pretrained(small).save_pretrained(tmp_path / "again")
    AutoTokenizer.from_pretrained(small).save_pretrained(tmp_path / "again")
    options = ["--text", text_file, "--windows", 3, "--seq-len", 32, "--json"]
    facts = only_line(run("eval", tmp_path / "again", *options)[0])
    assert facts["ratio"] is None
    assert facts["perplexity"] == only_line(run("eval", small, *options)[0])["perplexity"]


# ------------------------------------------------------------------------------------------------- generate

PROMPT = "The value of the"


def greedy(folder: Path, prompt: str, count: int) -> str:
    """The likeliest token, one at a time, without a cache."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        if int(ids[0, -1]) == 1:
            break
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))


def test_generate_takes_the_likeliest_tokens(small: Path, run: Run) -> None:
    facts = only_line(run("generate", small, PROMPT, "--max-tokens", 8, "--json")[0])
    assert facts["completion"] == greedy(small, PROMPT, 8)
    assert facts["prompt"] == PROMPT
    assert 1 <= facts["tokens"] <= 8


def test_generate_prints_prompt_and_completion(small: Path, run: Run) -> None:
    out, _ = run("generate", small, PROMPT, "--max-tokens", 8)
    assert out.rstrip("\n") == PROMPT + greedy(small, PROMPT, 8)


def test_generate_samples_as_the_seed_says(small: Path, run: Run) -> None:
    command = ["generate", small, PROMPT, "--max-tokens", 12, "--temperature", 1.5, "--json", "--seed"]
    first, again, other = (only_line(run(*command, seed)[0])["completion"] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_generate_with_a_tiny_share_is_greedy(small: Path, run: Run) -> None:
    command = ["generate", small, PROMPT, "--max-tokens", 6, "--json"]
    sampled = run(*command, "--temperature", 1, "--top-p", 0.0001, "--seed", 3)
    assert only_line(sampled[0])["completion"] == greedy(small, PROMPT, 6)


def test_generate_with_a_chat_template(small: Path, tmp_path: Path, run: Run) -> None:
    chatty = tmp_path / "chatty"
    shutil.copytree(small, chatty)
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %} [answer]"
    tokenizer.save_pretrained(chatty)
    expected = greedy(chatty, f"[user] {PROMPT} [answer]", 6)
    command = ["generate", chatty, PROMPT, "--max-tokens", 6, "--chat"]
    assert only_line(run(*command, "--json")[0])["completion"] == expected
    assert run(*command)[0].strip() == expected.strip()  # the template itself is not shown


# ---------------------------------------------------------------------------------- bench, report and demo


def test_bench(small: Path, dense: Path, tmp_path: Path, run: Run) -> None:
    shape = ["--prompt", 8, "--new-tokens", 3, "--batch", 1, "--batch", 2, "--rounds", 1, "--device", "cpu"]
    load = ["--load", 50, "--requests", 3, "--mix", "8:2"]
    folder = tmp_path / "results"
    command = ["bench", small, "--against", dense, "--engine", "rankwise", *shape, *load, "--out", folder, "--json"]
    out, err = run(*command)
    facts = only_line(out)
    kept = rankwise.RankPlan.load(small / "plan.json").ratio
    assert [(row["name"], row["batch"], row["ratio"]) for row in facts["rows"]] == [
        (str(small), 1, kept),
        (str(dense), 1, 1.0),
        (str(small), 2, kept),
        (str(dense), 2, 1.0),
    ]
    assert [row["name"] for row in facts["load"]] == [str(small), str(dense)]
    assert "batch 2, prompt 8, 3 new tokens" in err
    assert "3 requests a round at 50/s, prompt:output 8:2" in err
    assert len((folder / "bench.jsonl").read_text().splitlines()) == 6
    assert (folder / "load-ttft.png").is_file()
    _, err = run(*command, code=2)
    assert err.strip() == f"error: out: {folder}; allowed: a folder that does not exist yet"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "onnx"], "engine: onnx; allowed: rankwise, transformers, bitsandbytes, vllm"),
        (["--load", "1", "--mix", "8"], "mix: 8; allowed: PROMPT:OUTPUT, two whole numbers"),
        (["--load", "0"], "load: 0.0; allowed: above 0"),
        (["--new-tokens", "1"], "new_tokens: 1; allowed: a whole number from 2"),
    ],
)
def test_bench_refuses(options: list[str], message: str, dense: Path, run: Run) -> None:
    assert run("bench", dense, *options, code=2)[1].strip() == f"error: {message}"


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Times without processes; what was asked for is noted."""
    asked: dict[str, Any] = {}

    def times(contestants: list[speed.Contestant], config: speed.BenchConfig, *, track: Any) -> dict[str, Any]:
        asked.update(models=[contestant.model for contestant in contestants], config=config)
        assert {contestant.engine for contestant in contestants} == {"rankwise"}
        fixed = {f"{key}_ms_p{share}": value for key, value in (("ttft", 7.0), ("tpot", 3.0)) for share in (50, 95)}
        more = {"decode_tokens_per_s": 333.25, "tokens_per_s": [1.0, 2.0, 3.0], "peak_bytes": 10**8}
        shared = {**fixed, **more, "device": "CPU, 1 threads", "dtype": "fp32", "prompt": 128, "batch": 1}
        return {"rows": [{"name": contestant.model, **shared} for contestant in contestants], "load": []}

    monkeypatch.setattr(speed, "bench", times)
    return asked


def test_report(small: Path, dense: Path, text_file: Path, tmp_path: Path, run: Run) -> None:
    options = ["--text", text_file, "--windows", 2, "--seq-len", 32]
    facts = only_line(run("report", small, "--out", tmp_path / "page", *options, "--no-speed", "--json")[0])
    assert facts["report"] == str(tmp_path / "page" / "index.html")
    assert [row["name"] for row in facts["rows"]] == [str(dense), str(small)]
    page = (tmp_path / "page" / "index.html").read_text()
    assert all(f"{row['perplexity']:.1f}" in page for row in facts["rows"])
    assert "tokens_per_s" not in facts["rows"][0]
    assert "down_proj" in page


def test_report_beside_the_checkpoint_with_speed(
    small: Path, text_file: Path, tmp_path: Path, run: Run, stopwatch: dict[str, Any]
) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(small, folder)
    out, err = run("report", folder, "--text", text_file, "--windows", 2, "--seq-len", 32)
    assert out == ""
    assert f"report: {tmp_path / 'mine-report' / 'index.html'}" in err
    assert "333" in (tmp_path / "mine-report" / "index.html").read_text()
    assert stopwatch["models"][1] == str(folder)


@pytest.fixture(scope="module")
def wide_model(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers that ranks of 8 divide finely enough, and a context that the demo's windows fit into."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(dense, folder)
    sizes = {"hidden_size": 160, "intermediate_size": 424, "head_dim": 40, "max_position_embeddings": 1024}
    config = AutoConfig.from_pretrained(dense, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def wide(wide_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That model in the place of the embedded one."""
    monkeypatch.setattr(commands, "EMBEDDED", str(wide_model))
    return wide_model


@pytest.mark.usefixtures("stopwatch")
def test_demo(wide: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "demo"
    facts = only_line(run("demo", "--out", out, "--json")[0])
    assert facts["report"] == str(out / "report" / "index.html")
    assert Path(facts["report"]).is_file()
    assert [row["name"] for row in facts["rows"]] == [str(wide), str(out / "uniform"), str(out / "global")]
    assert [row["ratio"] for row in facts["rows"]] == pytest.approx([1, 0.8, 0.8], rel=1e-3)
    for name in ("uniform", "global"):
        run("inspect", out / name, "--verify")
    _, err = run("demo", "--out", out, code=2)  # done: not again, and not over it
    assert err.strip() == f"error: out: {out}; allowed: a folder that does not exist yet"


@pytest.mark.usefixtures("stopwatch")
@pytest.mark.parametrize("step", [0, 1, 2])
def test_an_interrupted_demo_continues(
    step: int, wide: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in its first, its second compression, or the measuring."""
    done = 0
    original = commands.compress_to_folder if step < 2 else commands.quality

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal done
        done += 1
        if done > step % 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(commands, "compress_to_folder" if step < 2 else "quality", interrupted)
        run("demo", "--out", tmp_path / "demo", code=130)
    run("demo", "--out", tmp_path / "demo")
    assert (tmp_path / "demo" / "report" / "index.html").is_file()


@pytest.mark.usefixtures("stopwatch")
def test_demo_in_a_new_place(wide: Path, tmp_path: Path, run: Run) -> None:
    run("demo", "--out", tmp_path / "new" / "place")
    assert (tmp_path / "new" / "place" / "report" / "index.html").is_file()


# --------------------------------------------------------------------------------------- help and exit codes


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    out, err = run(command, "--help")
    assert err == ""
    missing = [option for option in COMMANDS[command] if option not in out]
    assert missing == []


def test_help_lists_every_command(run: Run) -> None:
    out, _ = run("--help")
    assert [name for name in COMMANDS if name not in out] == []
    assert "Usage:" in run(code=2)[0] + run(code=2)[1]  # and so it does where no command is given


def test_version(run: Run) -> None:
    assert run("--version") == (f"rankwise {rankwise.__version__}\n", "")


@pytest.mark.parametrize("command", ["inspect", "eval", "compress"])
def test_interrupted(command: str, small: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, {"eval": "evaluate"}.get(command, command), interrupt)
    more = ["--out", tmp_path / "out"] if command == "compress" else []
    out, err = run(command, small, *more, code=130)
    assert out == ""
    assert err.strip() == "interrupted; the same command continues where this one stopped"


# ------------------------------------------------------------------------------------------ true processes


def shell(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The installed script, in a process of its own."""
    command = [str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=300)


def test_the_script_compresses(dense: Path, text_file: Path, tmp_path: Path, small: Path) -> None:
    done = shell(*job(dense, text_file, tmp_path / "out", "--measure", "1", "--json"), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert only_line(done.stdout)["ratio"] == pytest.approx(0.6, rel=1e-3)
    assert "Warning" not in done.stderr
    assert "Traceback" not in done.stderr
    ours, theirs = (rankwise.RankPlan.load(folder / "plan.json") for folder in (tmp_path / "out", small))
    assert ours.layers.keys() == theirs.layers.keys()


def test_the_script_refuses_a_hub_id_that_it_cannot_reach(text_file: Path, tmp_path: Path) -> None:
    done = shell("eval", "nobody/no-such-model", "--text", text_file, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: model: nobody/no-such-model (")
    assert done.stderr.count("\n") == 1


def test_the_script_says_its_version() -> None:
    assert shell("--version").stdout == f"rankwise {rankwise.__version__}\n"
