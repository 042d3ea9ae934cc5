"""Bad input: exit code 2, one line that names field, value and what is allowed, and a disk that is left as it was."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import rankwise
from rankwise import files
from rankwise.alloc.curvature import FORMAT
from rankwise.cli import main
from rankwise.compression import compress_to_folder
from rankwise.config import CompressConfig, TextConfig
from rankwise.plan import LayerSpec

SMALL = ["--samples", "4", "--gradient-samples", "2", "--seq-len", "32", "--measure", "1", "--rank-multiple", "1"]
WINDOWS = torch.randint(2, 512, (4, 32), generator=torch.Generator().manual_seed(3))
KINDS = ("lowrank", "pivot", "dense")
Q = "model.layers.0.self_attn.q_proj"  # lowrank in the checkpoint below, with a bias
K = "model.layers.0.self_attn.k_proj"  # pivot
V = "model.layers.0.self_attn.v_proj"  # dense

Tree = dict[str, str]


@dataclass
class Lab:
    """The folder a command runs in. It holds `model` (dense), `small` (compressed), `scores` and `learnt` (scores of a
    closed-form and of a learning method, made from `model`) and `text.txt`, to be damaged.

    Args:
        place: the folder; also the working directory.
        families: makes a folder of another family.
        make: makes a random model.
        tokenizer: goes with each.
    """

    place: Path
    families: Callable[[str], Path]
    make: Callable[..., Any]
    tokenizer: Any
    notes: dict[str, str] = field(default_factory=dict)

    def compress(self, *options: str, model: str = "model", text: str = "text.txt", out: str = "out") -> list[str]:
        """The command line of a small job."""
        return ["compress", model, "--out", out, "--calibration", text, "--ratio", "0.7", *SMALL, *options]

    def eval(self, model: str = "small", *options: str) -> list[str]:
        """The command line of a small evaluation."""
        return ["eval", model, "--text", "text.txt", "--windows", "2", "--seq-len", "32", *options]

    def write(self, name: str, content: str | bytes) -> str:
        """A file below the folder."""
        path = self.place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    def edit(self, name: str, change: Callable[[Any], Any]) -> None:
        """Change a JSON file."""
        data = json.loads((self.place / name).read_text())
        change(data)
        (self.place / name).write_text(json.dumps(data))

    def tensors(self, folder: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        """Rewrite a shard."""
        path = self.place / folder / "model.safetensors"
        stored = load_file(path)
        change(stored)
        save_file(stored, path, metadata={"format": "pt"})

    def save(self, model: Any, name: str) -> str:
        """Another model as a folder, with the tokenizer."""
        model.save_pretrained(self.place / name)
        self.tokenizer.save_pretrained(self.place / name)
        return name


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path], tokenizer: Any) -> Path:
    """A checkpoint that holds every kind."""
    model, _ = rankwise.load_model(str(model_folder("qwen2")))
    plan = rankwise.allocate(model, WINDOWS, rankwise.Global(ratio=0.6, rank_multiple=1))
    for number, (name, spec) in enumerate(list(plan)):
        kind, m, n = KINDS[number % 3], spec.out_features, spec.in_features
        rank = min(m, n) if kind == "dense" else min(m, n) // 3
        plan.layers[name] = LayerSpec(kind, m, n, rank, spec.weights)
    small = rankwise.compress(model, plan)
    return rankwise.save(small, tokenizer, plan, tmp_path_factory.mktemp("compressed") / "small")


@pytest.fixture(scope="module")
def scored(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path], text_file: Path
) -> dict[str, Path]:
    """Folders of scores."""
    folder, text = tmp_path_factory.mktemp("scored"), TextConfig(str(text_file), 4, 2, 32, 0)
    methods = {"scores": rankwise.Global(0.7, rank_multiple=1), "learnt": rankwise.Ara(0.7, rank_multiple=1, steps=1)}
    for name, method in methods.items():
        command = CompressConfig(str(model_folder("llama")), folder / name, method, text, score_only=True)
        compress_to_folder(command)
    return {name: folder / name for name in methods}


@pytest.fixture
def lab(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_folder: Callable[[str], Path],
    tiny: Callable[..., Any],
    tokenizer: Any,
    text_file: Path,
    compressed: Path,
    scored: dict[str, Path],
) -> Lab:
    place = tmp_path / "lab"
    shutil.copytree(model_folder("llama"), place / "model")
    shutil.copytree(compressed, place / "small")
    for name, folder in scored.items():
        shutil.copytree(folder, place / name)
    shutil.copy(text_file, place / "text.txt")
    monkeypatch.chdir(place)
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    return Lab(place, model_folder, tiny, tokenizer)


def tree(folder: Path) -> Tree:
    """Every file, folder and link below a folder, with what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        else:
            found[name] = "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def refuse(lab: Lab, arguments: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[str, Tree]:
    """Run a command that must fail; return its error line and what it left in the folder."""
    before = tree(lab.place)
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capfd.readouterr()
    assert ended.value.code == 2, err
    assert out == ""
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert err.endswith(errors[0] + "\n")
    after = tree(lab.place)
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    left = {name: after[name] for name in changed if name in after}
    assert changed == left.keys(), "something was removed"
    assert not changed & before.keys(), "something was changed"
    if not left:
        assert err == errors[0] + "\n"  # nothing was begun, so nothing else was said
    return errors[0], left


@dataclass(frozen=True)
class Case:
    """One kind of bad input.

    Args:
        prepare: damages the lab and gives the command line.
        parts: what the message must contain: field, value and what is allowed.
    """

    prepare: Callable[[Lab], list[str]]
    parts: tuple[str, ...]


def option(*options: str) -> Callable[[Lab], list[str]]:
    return lambda lab: lab.compress(*options)


def prepared(step: Callable[[Lab], Any], command: Callable[[Lab], list[str]]) -> Callable[[Lab], list[str]]:
    def prepare(lab: Lab) -> list[str]:
        step(lab)
        return command(lab)

    return prepare


def check(case: Case, lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    """The message has all parts, and nothing changed on the disk."""
    line, left = refuse(lab, case.prepare(lab), capfd)
    missing = [part for part in case.parts if part not in line]
    assert not missing, line
    assert left == {}


# ------------------------------------------------------------------------------------------------ options

FRACTION = "allowed: above 0 and at most 1"
DTYPES = "allowed: auto, bf16, fp16, fp32"
ALLOWED_TEXT = "allowed: a .txt or .jsonl file, embedded:python-docs, embedded:python-docs-test, wikitext2 or c4"
ALLOWED_OUT = "allowed: a folder that does not exist yet"
OPTIONS = {
    "ratio-0": Case(option("--ratio", "0"), ("ratio: 0.0;", FRACTION)),
    "ratio-1.5": Case(option("--ratio", "1.5"), ("ratio: 1.5;", FRACTION)),
    "ratio-negative": Case(option("--ratio=-0.5"), ("ratio: -0.5;", FRACTION)),
    "ratio-nan": Case(option("--ratio", "nan"), ("ratio: nan;", FRACTION)),
    "ratio-inf": Case(option("--ratio", "inf"), ("ratio: inf;", FRACTION)),
    "tolerance-0": Case(option("--tolerance", "0"), ("tolerance: 0.0;", FRACTION)),
    "method": Case(option("--method", "magic"), ("method: magic;", "allowed: ara, ars, asvd, ", "global", "rankwise")),
    "kind": Case(option("--kinds", "dense,tucker"), ("kinds: tucker;", "allowed: dense, lowrank, pivot")),
    "kinds-none": Case(option("--kinds", ""), ("kinds: ", "allowed: dense, lowrank, pivot")),
    "sides": Case(option("--sides", "three"), ("sides: three;", "allowed: one, two, diagonal")),
    "dtype": Case(option("--dtype", "int8"), ("dtype: int8;", DTYPES)),
    "device-cuda": Case(option("--device", "cuda"), ("device: cuda;", "not on this machine", "auto, cpu, cuda")),
    "device-unknown": Case(option("--device", "abacus"), ("device: abacus;", "allowed: auto, cpu, cuda, cuda:N")),
    "weights-unknown": Case(option("--weights", "int3"), ("weights: int3;", "allowed: bf16, fp16, fp32, nf4, int4")),
    "weights-of-another-dtype": Case(
        option("--weights", "bf16"), ("weights: bf16;", "the model is loaded in fp32", "allowed: fp32, nf4, int4")
    ),
    "weights-whose-blocks-do-not-divide": Case(
        option("--weights", "nf4"),
        ("model.layers.0.self_attn.q_proj.weights: nf4;", "64 does not divide in_features 32", "int4 with group 32"),
    ),
    "group-that-does-not-divide": Case(
        option("--weights", "int4", "--group", "32"),
        ("model.layers.0.mlp.down_proj.group: 32;", "32 does not divide in_features 48", "allowed: int8, bf16"),
    ),
    "group-unknown": Case(option("--weights", "int4", "--group", "48"), ("group: 48;", "for int4: 32, 64, 128")),
    "group-without-int4": Case(option("--group", "64"), ("group: 64;", "allowed: with --weights int4")),
    "asymmetric-nf4": Case(option("--weights", "nf4", "--asymmetric"), ("asymmetric: True;", "true or false for int4")),
    "weights-with-score-only": Case(
        option("--weights", "nf4", "--score-only"), ("score_only: with weights;", "one of")
    ),
    "rank-multiple-0": Case(option("--rank-multiple", "0"), ("rank_multiple: 0;", "a whole number from 1")),
    "rank-multiple-large": Case(
        option("--rank-multiple", "512", "--kinds", "pivot"),
        ("rank_multiple: 512;", "too large for model.layers.0.self_attn.q_proj", "allow the kind dense"),
    ),
    "budget-below-reach": Case(
        option("--ratio", "0.05", "--rank-multiple", "8"),
        ("ratio: 0.05;", "this rank multiple reach 0.", " to 1"),
    ),
    "budget-above-reach": Case(
        option("--ratio", "1", "--kinds", "lowrank"), ("ratio: 1;", "these kinds and this rank multiple reach ")
    ),
    "samples-0": Case(option("--samples", "0"), ("samples: 0;", "allowed: a whole number from 1")),
    "gradient-samples-0": Case(option("--gradient-samples", "0"), ("gradient_samples: 0;", "a whole number from 1")),
    "seq-len-1": Case(option("--seq-len", "1"), ("seq_len: 1;", "allowed: a whole number from 2")),
    "seq-len-beyond-context": Case(option("--seq-len", "129"), ("seq_len: 129;", "allowed: at most 128")),
    "measure-negative": Case(option("--measure=-1"), ("measure: -1;", "allowed: a whole number from 0")),
    "seed-negative": Case(option("--seed=-1"), ("seed: -1;", "allowed: a whole number from 0")),
    "seed-huge": Case(option("--seed", str(2**62)), (f"seed: {2**62};", "allowed: ")),
    "eval-windows-0": Case(lambda lab: lab.eval("model", "--windows", "0"), ("windows: 0;", "a whole number from 1")),
    "eval-seq-len-1": Case(lambda lab: lab.eval("model", "--seq-len", "1"), ("seq_len: 1;", "from 2")),
    "eval-beyond-context": Case(lambda lab: lab.eval("model", "--seq-len", "129"), ("seq_len: 129;", "at most 128")),
    "eval-dtype": Case(lambda lab: lab.eval("model", "--dtype", "int8"), ("dtype: int8;", DTYPES)),
    "eval-device": Case(
        lambda lab: lab.eval("model", "--device", "cuda:0"), ("device: cuda:0;", "not on this machine")
    ),
    "generate-max-tokens": Case(
        lambda lab: ["generate", "model", "a", "--max-tokens", "0"], ("max_tokens: 0;", "a whole number from 1")
    ),
    "generate-temperature": Case(
        lambda lab: ["generate", "model", "a", "--temperature=-1"], ("temperature: -1.0;", "allowed: 0 or more")
    ),
    "generate-temperature-nan": Case(
        lambda lab: ["generate", "model", "a", "--temperature=nan"], ("temperature: nan;", "allowed: 0 or more")
    ),
    "generate-top-p": Case(
        lambda lab: ["generate", "model", "a", "--top-p", "0"], ("top_p: 0.0;", "above 0 and at most 1")
    ),
    "generate-no-prompt": Case(lambda lab: ["generate", "model", ""], ("prompt: ", "allowed: some text")),
    "generate-chat": Case(
        lambda lab: ["generate", "model", "a", "--chat"], ("chat: model;", "no chat template; leave --chat out")
    ),
    "generate-beyond-context": Case(
        lambda lab: ["generate", str(lab.families("gpt2")), "a " * 200, "--max-tokens", "4"], ("128",)
    ),
    "generate-seed-huge": Case(
        lambda lab: ["generate", "model", "a", "--seed", str(2**70)], (f"seed: {2**70};", "allowed: ")
    ),
    "generate-dtype": Case(lambda lab: ["generate", "model", "a", "--dtype", "int8"], ("dtype: int8;", DTYPES)),
    "bench-rounds-0": Case(lambda lab: ["bench", "model", "--rounds", "0"], ("rounds: 0;", "a whole number from 1")),
    "bench-prompt-0": Case(lambda lab: ["bench", "model", "--prompt", "0"], ("prompt: 0;", "a whole number from 1")),
    "demo-ratio": Case(lambda lab: ["demo", "--ratio", "2"], ("ratio: 2.0;", FRACTION)),
    "set-unknown": Case(
        option("--method", "ara", "--set", "stepz=3"), ("set: stepz=3;", "NAME=VALUE, for ara NAME is one of: steps, ")
    ),
    "set-no-value": Case(option("--method", "ara", "--set", "steps"), ("set: steps;", "NAME=VALUE")),
    "set-nothing-to-set": Case(option("--set", "steps=3"), ("set: steps=3;", "NAME is one of: channel_multiple")),
    "set-wrong-type": Case(
        option("--method", "ara", "--set", "steps=many"), ("steps: many;", "allowed: a whole number")
    ),
    "set-out-of-range": Case(option("--method", "ara", "--set", "steps=0"), ("steps: 0;", "a whole number from 1")),
    "set-shared": Case(option("--method", "ara", "--set", "ratio=0.5"), ("set: ratio=0.5;", "NAME=VALUE")),
    "heal-negative": Case(option("--heal=-1"), ("heal: -1;", "allowed: a whole number from 0")),
    "learn-samples-negative": Case(option("--learn-samples=-1"), ("learn_samples: -1;", "a whole number from 0")),
    "learn-samples-of-no-text": Case(
        option("--learn-samples", "3"), ("learn_samples: 3;", "allowed: 0 without a text to learn from")
    ),
    "score-only-and-plan": Case(
        option("--score-only", "--plan", "small/plan.json"), ("score_only: with plan;", "one of score_only and plan")
    ),
    "score-only-and-from": Case(option("--score-only", "--from", "scores"), ("score_only: with scores;", "one of")),
    "score-only-and-refit": Case(option("--score-only", "--refit"), ("score_only: with refit;", "one of")),
    "score-only-and-heal": Case(option("--score-only", "--heal", "3"), ("score_only: with heal;", "one of")),
    "from-and-plan": Case(
        option("--from", "scores", "--plan", "small/plan.json"), ("scores: with plan;", "one of scores and plan")
    ),
    "from-and-refit": Case(
        option("--from", "scores", "--refit"),
        ("refit: with scores;", "allowed: without scores, which hold no curvature"),
    ),
}

OUTS = {
    "out-is-a-folder": Case(
        prepared(lambda lab: (lab.place / "out").mkdir(), lambda lab: lab.compress()), ("out: out;", ALLOWED_OUT)
    ),
    "out-is-a-file": Case(
        prepared(lambda lab: lab.write("out", "precious"), lambda lab: lab.compress()), ("out: out;", ALLOWED_OUT)
    ),
    "out-is-a-dangling-link": Case(
        prepared(lambda lab: (lab.place / "out").symlink_to("nowhere"), lambda lab: lab.compress()),
        ("out: out;", ALLOWED_OUT),
    ),
    "out-is-here": Case(lambda lab: lab.compress(out="."), ("out: .;", ALLOWED_OUT)),
    "out-below-a-file": Case(lambda lab: lab.compress(out="text.txt/out"), ("text.txt/", "Not a directory")),
    "restart-out-is-a-folder": Case(
        prepared(lambda lab: (lab.place / "out").mkdir(), lambda lab: lab.compress("--restart")),
        ("out: out;", ALLOWED_OUT),
    ),
    "demo-out-exists": Case(
        prepared(lambda lab: (lab.place / "demo").mkdir(), lambda lab: ["demo"]), ("out: demo;", ALLOWED_OUT)
    ),
    "report-out-exists": Case(
        prepared(lambda lab: (lab.place / "page").mkdir(), lambda lab: ["report", "small", "--out", "page"]),
        ("out: page;", ALLOWED_OUT),
    ),
}


@pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS)
def test_options(case: Case, lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    check(case, lab, capfd)


def test_a_budget_between_two_steps(lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    """Known only once the spectra are: the work is kept, and no result is written."""
    options = ["--ratio", "0.701", "--rank-multiple", "8", "--kinds", "pivot", "--tolerance", "1e-9"]
    line, left = refuse(lab, lab.compress(*options), capfd)
    assert line.startswith("error: ratio: 0.701; the nearest below that this rank multiple reaches is ")
    assert line.endswith("use a smaller --rank-multiple or a larger --tolerance")
    assert left
    assert all(name.startswith(".out.rankwise") for name in left)


@pytest.mark.parametrize("case", OUTS.values(), ids=OUTS)
def test_where_to_write(case: Case, lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    check(case, lab, capfd)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "model", "--out", "out", "--rato", "0.5"], "No such option: --rato"),
        (["compress", "model"], "Missing option '--out'"),
        (["compress", "--out", "out"], "Missing argument 'MODEL'"),
        (["compress", "model", "--out", "out", "--ratio", "half"], "Invalid value for '--ratio'"),
        (["compress", "model", "--out", "out", "--samples", "1.5"], "Invalid value for '--samples'"),
        (["squeeze", "model"], "No such command 'squeeze'"),
    ],
    ids=["unknown-option", "no-out", "no-model", "no-number", "no-whole-number", "unknown-command"],
)
def test_usage(arguments: list[str], message: str, lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    """What the command line parser refuses by itself."""
    before = tree(lab.place)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capfd.readouterr()
    assert ended.value.code == 2
    assert out == ""
    assert message in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err
    assert tree(lab.place) == before


# --------------------------------------------------------------------------------------------------- text


def text(content: str | bytes, name: str = "other.txt") -> Callable[[Lab], list[str]]:
    return lambda lab: lab.compress(text=lab.write(name, content))


TEXTS = {
    "unknown": Case(lambda lab: lab.compress(text="war-and-peace"), ("text: war-and-peace;", ALLOWED_TEXT)),
    "missing": Case(lambda lab: lab.compress(text="no.txt"), ("text: no.txt (FileNotFoundError)", "readable UTF-8")),
    "folder": Case(
        prepared(lambda lab: (lab.place / "d.txt").mkdir(), lambda lab: lab.compress(text="d.txt")),
        ("text: d.txt (IsADirectoryError)", "a readable UTF-8 file is expected"),
    ),
    "not-utf8": Case(text(b"\xff\xfe" * 100), ("text: other.txt (UnicodeDecodeError)", "readable UTF-8 file")),
    "too-short": Case(
        text("Too short for one window."), ("text: other.txt holds 0 windows of 32 tokens;", "7 needed: give a longer")
    ),
    "empty": Case(text(""), ("text: other.txt holds 0 windows of 32 tokens;", "7 needed")),
    "too-few-windows": Case(
        lambda lab: lab.compress("--samples", "9999"),
        ("text: text.txt holds ", " windows of 32 tokens;", "10002 needed", "fewer windows or a smaller --seq-len"),
    ),
    "jsonl-broken": Case(
        text('{"text": "a"}\n{"text": ', "b.jsonl"), ("text: b.jsonl line 2: ", "one JSON value a line")
    ),
    "jsonl-no-text": Case(
        text('{"body": "a"}', "b.jsonl"), ("text: b.jsonl line 1;", "an object with a string field `text`, or a string")
    ),
    "eval-too-short": Case(
        lambda lab: lab.eval("model", "--text", lab.write("other.txt", "Short.")),
        ("text: other.txt holds 0 windows of 32 tokens;", "2 needed"),
    ),
    "eval-unknown": Case(lambda lab: lab.eval("model", "--text", "c5"), ("text: c5;", ALLOWED_TEXT)),
    "learn-unknown": Case(option("--learn", "c5"), ("text: c5;", ALLOWED_TEXT)),
    "learn-missing": Case(option("--learn", "no.txt"), ("text: no.txt (FileNotFoundError)", "readable UTF-8")),
    "learn-missing-for-a-method": Case(
        option("--method", "ara", "--learn", "no.txt"), ("text: no.txt (FileNotFoundError)", "readable UTF-8")
    ),
    "learn-missing-to-heal": Case(
        option("--from", "scores", "--heal", "2", "--learn", "no.txt"), ("text: no.txt (FileNotFoundError)",)
    ),
    "learn-too-short": Case(
        lambda lab: lab.compress("--learn", lab.write("other.txt", "Too short for one window.")),
        ("text: other.txt holds 0 windows of 32 tokens;", "1 needed: give a longer text"),
    ),
    "learn-too-few-windows": Case(
        option("--learn", "text.txt", "--learn-samples", "9999"),
        ("text: text.txt holds ", " windows of 32 tokens;", "9999 needed"),
    ),
    "calibration-missing-to-heal": Case(
        lambda lab: lab.compress("--from", "scores", "--heal", "2", text="no.txt"), ("text: no.txt (FileNotFound",)
    ),
}


@pytest.mark.parametrize("case", TEXTS.values(), ids=TEXTS)
def test_texts(case: Case, lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    check(case, lab, capfd)


# ------------------------------------------------------------------------------------------------- models


def bert(lab: Lab) -> str:
    sizes = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return lab.save(BertForMaskedLM(BertConfig(**sizes, intermediate_size=48)), "bert")


def t5(lab: Lab) -> str:
    sizes = {"vocab_size": 512, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return lab.save(T5ForConditionalGeneration(T5Config(**sizes)), "t5")


def experts(lab: Lab) -> str:
    sizes = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    more = {"intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    return lab.save(MixtralForCausalLM(MixtralConfig(**sizes, **more)), "mixtral")


def truncate(lab: Lab, name: str, share: float = 0.9) -> None:
    raw = (lab.place / name).read_bytes()
    (lab.place / name).write_bytes(raw[: int(share * len(raw))])


def not_a_number(lab: Lab) -> None:
    lab.tensors("model", lambda stored: stored["model.layers.1.mlp.up_proj.weight"][3, 5].fill_(float("nan")))


ALLOWED_MODEL = "allowed: a hub id, a folder with config.json, a .gguf file or embedded:smollm2-135m"
MODELS = {
    "missing": Case(lambda lab: lab.compress(model="./none"), ("model: ./none (no such folder);", ALLOWED_MODEL)),
    "empty-folder": Case(
        prepared(lambda lab: (lab.place / "none").mkdir(), lambda lab: lab.compress(model="none")),
        ("model: none (no config.json in it);", ALLOWED_MODEL),
    ),
    "junk": Case(
        prepared(lambda lab: lab.write("junk/config.json", "\x00\x01junk"), lambda lab: lab.compress(model="junk")),
        ("model: junk (", ALLOWED_MODEL),
    ),
    "missing-gguf": Case(lambda lab: lab.compress(model="no.gguf"), ("model: no.gguf (no such file);", ALLOWED_MODEL)),
    "garbage-gguf": Case(
        lambda lab: lab.compress(model=lab.write("bad.gguf", "garbage" * 99)),
        ("model: bad.gguf (", "a GGUF file of a causal language model is expected"),
    ),
    "unknown-embedded": Case(lambda lab: lab.compress(model="embedded:gpt-7"), ("embedded:gpt-7", ALLOWED_MODEL)),
    "truncated": Case(
        prepared(lambda lab: truncate(lab, "model/model.safetensors"), lambda lab: lab.compress()),
        ("model: model (", "incomplete", ALLOWED_MODEL),
    ),
    "missing-tensor": Case(
        prepared(
            lambda lab: lab.tensors("model", lambda stored: stored.pop("model.layers.1.mlp.up_proj.weight")),
            lambda lab: lab.compress(),
        ),
        ("model: model: missing keys: model.layers.1.mlp.up_proj.weight;", "the checkpoint is incomplete"),
    ),
    "other-shape": Case(
        prepared(
            lambda lab: lab.tensors(
                "model", lambda stored: stored.update({"model.norm.weight": stored["model.norm.weight"].repeat(2)})
            ),
            lambda lab: lab.compress(),
        ),
        ("model: model", "model.norm.weight"),
    ),
    "not-a-number": Case(
        prepared(not_a_number, lambda lab: lab.compress()),
        ("model.layers.1.mlp.up_proj.weight: NaN or Inf;", "finite weights are needed"),
    ),
    "tokenizer-truncated": Case(
        prepared(lambda lab: truncate(lab, "model/tokenizer.json"), lambda lab: lab.compress()),
        ("tokenizer: model (", "the folder must hold the model's tokenizer files"),
    ),
    "bert": Case(
        lambda lab: lab.compress(model=bert(lab)),
        ("model: BertForMaskedLM;", "a causal language model with decoder blocks is needed"),
    ),
    "bert-eval": Case(
        lambda lab: lab.eval(bert(lab)),
        ("BertForMaskedLM", "a causal language model"),
    ),
    "t5": Case(lambda lab: lab.compress(model=t5(lab)), ("model: t5 (", "T5Config")),
    "t5-eval": Case(lambda lab: lab.eval(t5(lab)), ("model: t5 (", "T5Config")),
    "experts": Case(
        lambda lab: lab.compress(model=experts(lab)),
        ("model.layers.0.mlp.experts.", "shape (2,", "fused expert tensors and convolutions are not supported yet"),
    ),
    "compressed-already": Case(
        lambda lab: lab.compress(model="small"), ("model: ", "stored as rankwise;", "the dense original is needed")
    ),
}


@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
def test_models(case: Case, lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    check(case, lab, capfd)


# -------------------------------------------------------------------------------------------------- plans


def plan_of(lab: Lab, change: Callable[[dict[str, Any]], Any]) -> list[str]:
    """A plan that fits the model, then changed."""
    shapes = {
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (16, 32),
        "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (48, 32),
        "mlp.up_proj": (48, 32),
        "mlp.down_proj": (32, 48),
    }
    layers = {
        f"model.layers.{i}.{name}": {"kind": "pivot", "out_features": m, "in_features": n, "rank": 8}
        for i in range(2)
        for name, (m, n) in shapes.items()
    }
    plan: dict[str, Any] = {"format": 1, "layers": layers}
    change(plan)
    return lab.compress("--plan", lab.write("plan.json", json.dumps(plan)))


def plan(change: Callable[[dict[str, Any]], Any]) -> Callable[[Lab], list[str]]:
    return lambda lab: plan_of(lab, change)


def layer(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plan: plan["layers"][Q].update(values)


PLANS = {
    "missing": Case(option("--plan", "no.json"), ("no.json: no such file;", "a JSON file is expected")),
    "junk": Case(
        lambda lab: lab.compress("--plan", lab.write("p.json", "junk")),
        ("p.json: not readable as JSON", "a JSON file is expected"),
    ),
    "binary": Case(
        lambda lab: lab.compress("--plan", lab.write("p.json", b"\xff\xfe\x00")),
        ("p.json: not readable as JSON", "a JSON file is expected"),
    ),
    "list": Case(
        lambda lab: lab.compress("--plan", lab.write("p.json", "[]")), ("p.json: no layers in it;", "`layers` object")
    ),
    "no-layers": Case(plan(lambda p: p.update(layers={})), ("plan.json: no layers in it;", "`layers` object")),
    "newer-format": Case(
        plan(lambda p: p.update(format=2)), ("plan.json: format 2;", "this version reads format 1: upgrade rankwise")
    ),
    "unknown-module": Case(
        plan(lambda p: p["layers"].update({"model.layers.9.mlp.up_proj": p["layers"][Q]})),
        ("plan: model.layers.9.mlp.up_proj: no such module;", "the model has, e.g., model.layers.0.self_attn.q_proj"),
    ),
    "module-left-out": Case(
        plan(lambda p: p["layers"].pop(Q)), (f"plan: {Q} is not in it;", "a plan lists every linear layer")
    ),
    "other-shape": Case(plan(layer(out_features=64)), (f"plan: {Q}: [out, in] = [64, 32];", "the model has [32, 32]")),
    "unknown-kind": Case(plan(layer(kind="tucker")), (f"{Q}.kind: tucker;", "allowed: dense, lowrank, pivot")),
    "rank-0": Case(plan(layer(rank=0)), (f"{Q}.rank: 0;", "allowed: a whole number from 1")),
    "rank-text": Case(plan(layer(rank="8")), (f"{Q}.rank: 8;", "allowed: a whole number from 1")),
    "rank-too-large": Case(plan(layer(rank=33)), (f"{Q}.rank: 33;", "allowed: 1 to 32")),
    "larger-than-dense": Case(
        plan(layer(kind="lowrank", rank=17)), (f"{Q}.rank: 17;", "larger than dense; allowed for lowrank: 1 to 16")
    ),
    "pivot-of-full-rank": Case(plan(layer(rank=32)), (f"{Q}.rank: 32;", "allowed for pivot: 1 to 31")),
    "unknown-weights": Case(plan(layer(weights="int3")), (f"{Q}.weights: int3;", "allowed: bf16, fp16, fp32")),
    "group-that-does-not-divide-the-rank": Case(
        plan(layer(weights="int4", group=32)),
        (f"{Q}.group: 32;", "32 does not divide rank 8", "ranks that are multiples of 32"),
    ),
    "group-left-out": Case(plan(layer(weights="int4")), (f"{Q}.group: None;", "allowed for int4: 32, 64, 128")),
    "group-without-int4": Case(plan(layer(group=32)), (f"{Q}.group: 32;", "allowed for bf16: none")),
    "unknown-field": Case(plan(layer(colour="red")), (f"{Q}: ", "'colour'", "see LayerSpec for the fields")),
    "field-left-out": Case(plan(lambda p: p["layers"][Q].pop("rank")), (f"{Q}: ", "'rank'", "see LayerSpec")),
    "entry-no-object": Case(plan(lambda p: p["layers"].update({Q: 8})), (f"{Q}: ", "see LayerSpec for the fields")),
    "bytes-no-number": Case(plan(lambda p: p.update(other_bytes="many")), ("plan.json", "other_bytes", "many")),
    "provenance-no-object": Case(plan(lambda p: p.update(provenance="mine")), ("plan.json", "provenance", "mine")),
    "energy-no-number": Case(plan(layer(energy="all")), (f"{Q}.energy: all;",)),
}


@pytest.mark.parametrize("case", PLANS.values(), ids=PLANS)
def test_plans(case: Case, lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    check(case, lab, capfd)


def test_the_plan_that_the_others_change_is_good(lab: Lab) -> None:
    with pytest.raises(SystemExit) as ended:
        main(plan_of(lab, lambda plan: None))
    assert ended.value.code == 0


# ----------------------------------------------------------------------------------------------- curvature


CURVATURES = {
    "other-folder": Case(
        prepared(lambda lab: lab.write("c/notes.txt", "mine"), option("--curvature", "c")),
        ("curvature: c (no curvature.json in it);", "a curvature folder, or a new name"),
    ),
    "of-another-model": Case(
        prepared(
            lambda lab: lab.write("c/curvature.json", json.dumps({"format": FORMAT, "blocks": 2, "model": "another"})),
            option("--curvature", "c"),
        ),
        ("curvature: c was made with model 'another', not ", "use the same model, text, windows and seed"),
    ),
    "junk": Case(
        prepared(lambda lab: lab.write("c/curvature.json", "junk"), option("--curvature", "c")),
        ("c/curvature.json: not readable as JSON",),
    ),
    "a-file": Case(option("--curvature", "text.txt"), ("text.txt",)),
}


@pytest.mark.parametrize("case", CURVATURES.values(), ids=CURVATURES)
def test_curvature_folders(case: Case, lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    check(case, lab, capfd)


# ------------------------------------------------------------------------------------------------- scores


def from_scores(step: Callable[[Lab], Any], *options: str, folder: str = "scores") -> Callable[[Lab], list[str]]:
    return prepared(step, option("--from", folder, *options))


FOLDER = "a folder written with --score-only is expected"
SCORES = {
    "with-a-method": Case(option("--from", "scores", "--method", "uniform"), ("method: uniform;", "left out")),
    "with-a-setting": Case(option("--from", "scores", "--set", "steps=3"), ("set: ['steps=3'];", "left out")),
    "with-kinds": Case(option("--from", "scores", "--kinds", "lowrank"), ("kinds: lowrank;", "left out")),
    "with-sides": Case(option("--from", "scores", "--sides", "one"), ("sides: one;", "left out")),
    "missing": Case(option("--from", "none"), ("scores: none (no scores.json in it);", FOLDER)),
    "a-file": Case(option("--from", "text.txt"), ("scores: text.txt (no scores.json in it);", FOLDER)),
    "a-checkpoint": Case(option("--from", "small"), ("scores: small (no scores.json in it);", FOLDER)),
    "junk": Case(
        from_scores(lambda lab: lab.write("scores/scores.json", "junk")),
        ("scores/scores.json: not readable as JSON", "a JSON file is expected"),
    ),
    "list": Case(
        from_scores(lambda lab: lab.write("scores/scores.json", "[]")),
        ("scores: scores/scores.json: format None;", "this version reads format 1"),
    ),
    "newer-format": Case(
        from_scores(lambda lab: lab.edit("scores/scores.json", lambda s: s.update(format=2))),
        ("scores: scores/scores.json: format 2;", "this version reads format 1"),
    ),
    "another-model": Case(
        lambda lab: lab.compress("--from", "scores", model=lab.save(lab.make("llama", seed=1), "other")),
        (
            "scores: scores was made from ",
            "in other weights or another dtype;",
            "the same model and --dtype are needed",
        ),
    ),
    "another-family": Case(
        lambda lab: lab.compress("--from", "scores", model=lab.save(lab.make("gpt2"), "other")),
        ("scores: scores was made from ", "in other weights or another dtype"),
    ),
    "another-dtype": Case(option("--from", "scores", "--dtype", "bf16"), ("scores: scores was made from ",)),
    "factors-missing": Case(
        from_scores(lambda lab: (lab.place / "scores/factors/factors_001.safetensors").unlink()),
        ("scores/factors/factors_001.safetensors: no such file;", "the folder is incomplete"),
    ),
    "factors-truncated": Case(
        from_scores(lambda lab: truncate(lab, "scores/factors/factors_001.safetensors")),
        ("scores/factors/factors_001.safetensors: ", "truncated or not safetensors"),
    ),
    "choices-missing": Case(
        from_scores(lambda lab: (lab.place / "learnt/choices.safetensors").unlink(), folder="learnt"),
        ("learnt/choices.safetensors: no such file;", "the folder is incomplete"),
    ),
    "budget-below-reach": Case(option("--from", "scores", "--ratio", "0.001"), ("ratio: 0.001;", "reach 0.")),
    "learnt-budget-below-reach": Case(option("--from", "learnt", "--ratio", "0.001"), ("ratio: 0.001;", "reach 0.")),
    "ratio": Case(option("--from", "scores", "--ratio", "2"), ("ratio: 2.0;", FRACTION)),
}


@pytest.mark.parametrize("case", SCORES.values(), ids=SCORES)
def test_folders_of_scores(case: Case, lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    check(case, lab, capfd)


@pytest.mark.parametrize("folder", ["scores", "learnt"])
def test_the_scores_that_the_others_damage_are_good(folder: str, lab: Lab) -> None:
    with pytest.raises(SystemExit) as ended:
        main(lab.compress("--from", folder, text="no.txt"))
    assert ended.value.code == 0


# --------------------------------------------------------------------------------------------- checkpoints


def resize(name: str) -> Callable[[Lab], None]:
    """One row more than the plan says."""
    return lambda lab: lab.tensors("small", lambda stored: stored.update({name: stored[name].repeat(2, 1)}))


def without(*names: str) -> Callable[[Lab], None]:
    return lambda lab: lab.tensors("small", lambda stored: [stored.pop(name) for name in names])


def edited(name: str, change: Callable[[Any], Any]) -> Callable[[Lab], None]:
    return lambda lab: lab.edit(f"small/{name}", change)


def written(name: str, content: str | bytes) -> Callable[[Lab], None]:
    return lambda lab: lab.write(f"small/{name}", content) and None


def flip(name: str) -> Callable[[Lab], None]:
    def change(lab: Lab) -> None:
        raw = bytearray((lab.place / name).read_bytes())
        raw[-9] ^= 16
        (lab.place / name).write_bytes(raw)

    return change


def both_ranks(value: int) -> Callable[[Lab], None]:
    """plan.json and config.json agree with each other and not with the tensors."""

    def change(lab: Lab) -> None:
        lab.edit("small/plan.json", lambda p: p["layers"][Q].update(rank=value))
        lab.edit("small/config.json", lambda c: c["quantization_config"]["layers"][Q].update(rank=value))

    return change


OURS = "a folder written by rankwise is expected"
NOTHING: Callable[[Lab], None] = lambda lab: None  # noqa: E731
CHECKPOINTS = {
    "truncated": (
        lambda lab: truncate(lab, "small/model.safetensors"),
        ("small/model.safetensors: ", "the file is truncated or not safetensors"),
    ),
    "not-safetensors": (
        written("model.safetensors", "junk" * 99),
        ("small/model.safetensors: ", "the file is truncated or not safetensors"),
    ),
    "no-weights": (
        lambda lab: (lab.place / "small/model.safetensors").unlink(),
        ("small/model.safetensors: no such file;", "the folder is incomplete"),
    ),
    "other-shape": (
        resize(f"{Q}.lowrank_u"),
        (f"{Q}.lowrank_u: shape [64, 10];", "the plan says shape [32, 10]"),
    ),
    "missing-factor": (
        without(f"{K}.pivot_coeff"),
        (f"{K}.pivot_coeff: missing;", "the plan says shape [11, 5]"),
    ),
    "rank-in-plan": (
        edited("plan.json", lambda p: p["layers"][Q].update(rank=9)),
        ("small/plan.json: contradicts config.json;", "both must list the same layers and ranks"),
    ),
    "rank-in-config": (
        edited("config.json", lambda c: c["quantization_config"]["layers"][Q].update(rank=9)),
        ("small/plan.json: contradicts config.json;", "both must list the same layers and ranks"),
    ),
    "rank-in-both": (both_ranks(9), (f"{Q}.lowrank_u: shape [32, 10];", "the plan says shape [32, 9]")),
    "newer-format": (
        edited("config.json", lambda c: c["quantization_config"].update(format=2)),
        ("small/config.json: format 2;", "this version reads format 1: upgrade rankwise"),
    ),
    "no-format": (
        edited("config.json", lambda c: c["quantization_config"].pop("format")),
        ("small/config.json: format None;", "this version reads format 1: write it again"),
    ),
    "newer-plan": (
        edited("plan.json", lambda p: p.update(format=2)),
        ("small/plan.json: format 2;", "upgrade rankwise"),
    ),
    "plan-truncated": (
        lambda lab: truncate(lab, "small/plan.json", 0.5),
        ("small/plan.json: not readable as JSON", "a JSON file is expected"),
    ),
    "config-truncated": (
        lambda lab: truncate(lab, "small/config.json", 0.5),
        ("small/config.json: not readable as JSON", "a JSON file is expected"),
    ),
    "config-list": (written("config.json", "[]"), ("small/config.json",)),
    "quantization-text": (
        edited("config.json", lambda c: c.update(quantization_config="rankwise")),
        ("small",),
    ),
    "layer-no-object": (
        edited("config.json", lambda c: c["quantization_config"]["layers"].update({Q: 4})),
        (f"small/config.json: {Q}: ", "see LayerSpec for the fields"),
    ),
    "layers-list": (
        edited("config.json", lambda c: c["quantization_config"].update(layers=[Q])),
        ("small/config.json", "a rankwise plan holds a `layers` object"),
    ),
    "index-empty": (written("model.safetensors.index.json", "{}"), ("small/model.safetensors.index.json",)),
    "index-missing-shard": (
        written("model.safetensors.index.json", json.dumps({"weight_map": {f"{Q}.bias": "model-00007.safetensors"}})),
        ("small/model-00007.safetensors: no such file;", "the folder is incomplete"),
    ),
    "plan-energy-text": (edited("plan.json", lambda p: p["layers"][Q].update(energy="all")), (f"{Q}.energy: all;",)),
}
FOREIGN = {
    "missing": (lambda lab: "none", ("checkpoint: none (no config.json in it);", OURS)),
    "ordinary-model": (
        lambda lab: "model",
        ("checkpoint: model (not compressed by rankwise);", "a rankwise folder is expected"),
    ),
    "junk": (lambda lab: lab.write("junk/a", "a") and "junk", ("checkpoint: junk (no config.json in it);", OURS)),
    "a-file": (lambda lab: "text.txt", ("checkpoint: text.txt (no config.json in it);", OURS)),
    "other-method": (
        lambda lab: lab.write("gptq/config.json", '{"quantization_config": {"quant_method": "gptq"}}') and "gptq",
        ("checkpoint: gptq (not compressed by rankwise);", "a rankwise folder is expected"),
    ),
}


@pytest.mark.parametrize(("damage", "parts"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_inspect_of_a_damaged_checkpoint(
    damage: Callable[[Lab], None], parts: tuple[str, ...], lab: Lab, capfd: pytest.CaptureFixture[str]
) -> None:
    check(Case(prepared(damage, lambda lab: ["inspect", "small"]), parts), lab, capfd)


@pytest.mark.parametrize(("name", "parts"), FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("command", ["inspect", "verify", "report"])
def test_folders_of_others(
    command: str, name: Callable[[Lab], str], parts: tuple[str, ...], lab: Lab, capfd: pytest.CaptureFixture[str]
) -> None:
    def arguments(lab: Lab) -> list[str]:
        folder = name(lab)
        return {
            "inspect": ["inspect", folder],
            "verify": ["inspect", folder, "--verify"],
            "report": ["report", folder, "--out", "page"],
        }[command]

    if (command, parts) == ("verify", FOREIGN["ordinary-model"][1]) or (command, name) == (
        "verify",
        FOREIGN["other-method"][0],
    ):
        parts = ("SHA256SUMS: no such file;", "only checkpoints written by `rankwise` carry hashes")
    check(Case(arguments, parts), lab, capfd)


VERIFY = {
    "flipped-weight": (
        flip("small/model.safetensors"),
        ("small/model.safetensors: its SHA-256 differs;", "the file was changed or damaged"),
    ),
    "flipped-tokenizer": (flip("small/tokenizer.json"), ("small/tokenizer.json: its SHA-256 differs;",)),
    "removed": (
        lambda lab: (lab.place / "small/tokenizer.json").unlink(),
        ("small/tokenizer.json: missing;", "SHA256SUMS lists it"),
    ),
    "no-hashes": (
        lambda lab: (lab.place / "small/SHA256SUMS").unlink(),
        ("small/SHA256SUMS: no such file;", "only checkpoints written by `rankwise` carry hashes"),
    ),
    "garbled-hashes": (written("SHA256SUMS", b"\xff\xfe\x00garbage\n"), ("small/SHA256SUMS",)),
    "empty-hashes": (written("SHA256SUMS", ""), ("small/SHA256SUMS",)),
}


@pytest.mark.parametrize(("damage", "parts"), VERIFY.values(), ids=VERIFY)
def test_verify(
    damage: Callable[[Lab], None], parts: tuple[str, ...], lab: Lab, capfd: pytest.CaptureFixture[str]
) -> None:
    check(Case(prepared(damage, lambda lab: ["inspect", "small", "--verify"]), parts), lab, capfd)


def test_the_checkpoint_that_the_others_damage_is_good(lab: Lab) -> None:
    for arguments in (["inspect", "small", "--verify"], lab.eval("small")):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0


LOADED = {
    "truncated": (CHECKPOINTS["truncated"][0], ("small/model.safetensors: ", "truncated or not safetensors")),
    "no-weights": (CHECKPOINTS["no-weights"][0], ("model: small (", ALLOWED_MODEL)),
    "other-shape": (CHECKPOINTS["other-shape"][0], CHECKPOINTS["other-shape"][1]),
    "missing-factor": (CHECKPOINTS["missing-factor"][0], CHECKPOINTS["missing-factor"][1]),
    "missing-bias": (without(f"{Q}.bias"), ("layers.0.self_attn.q_proj.bias", "incomplete")),
    "missing-norm": (without("model.norm.weight"), ("norm.weight", "incomplete")),
    "missing-dense": (without(f"{V}.weight"), ("layers.0.self_attn.v_proj.weight", "incomplete")),
    "missing-head": (without("lm_head.weight"), ("lm_head.weight", "incomplete")),
    "rank-in-config": (
        CHECKPOINTS["rank-in-config"][0],
        (f"{Q}.lowrank_u: shape [32, 10];", "the plan says shape [32, 9]"),
    ),
    "newer-format": (CHECKPOINTS["newer-format"][0], ("config.json: format 2;", "upgrade rankwise")),
    "unknown-module": (
        edited(
            "config.json",
            lambda c: c["quantization_config"]["layers"].update(
                {"model.layers.9.x": c["quantization_config"]["layers"][Q]}
            ),
        ),
        ("model.layers.9.x",),
    ),
    "layer-not-listed": (
        edited("config.json", lambda c: c["quantization_config"]["layers"].pop(Q)),
        (f"{Q}.weight: shape [1]; the model has shape [32, 32]",),
    ),
    "config-truncated": (CHECKPOINTS["config-truncated"][0], ("model: small (", ALLOWED_MODEL)),
    "tokenizer": (
        lambda lab: truncate(lab, "small/tokenizer.json"),
        ("tokenizer: small (", "the folder must hold the model's tokenizer files"),
    ),
}


@pytest.mark.parametrize(("damage", "parts"), LOADED.values(), ids=LOADED)
def test_eval_of_a_damaged_checkpoint(
    damage: Callable[[Lab], None], parts: tuple[str, ...], lab: Lab, capfd: pytest.CaptureFixture[str]
) -> None:
    check(Case(prepared(damage, lambda lab: lab.eval("small")), parts), lab, capfd)


# --------------------------------------------------------------------------------------------------- disk

FULL = "no space left on the disk"
Usage = namedtuple("Usage", "total used free")


def reference(lab: Lab) -> Tree:
    """What the job makes where there is room."""
    with pytest.raises(SystemExit) as ended:
        main(lab.compress(out="reference"))
    assert ended.value.code == 0
    made = tree(lab.place / "reference")
    shutil.rmtree(lab.place / "reference")
    return made


@pytest.mark.parametrize("free", [0, 100_000])
def test_no_room_is_found_before_work_begins(
    free: int, lab: Lab, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12 - free, free))
    line, left = refuse(lab, lab.compress(), capfd)
    assert f"{FULL} ({free / 1e9:.2f} GB free); " in line
    assert line.endswith(" GB needed")
    assert left == {}


@pytest.mark.parametrize("raised", ["OSError", "SafetensorError"])
@pytest.mark.parametrize("number", [0, 3, 8, 11, 13], ids=lambda n: f"file-{n}")
def test_a_disk_that_fills_up_during_work(
    number: int, raised: str, lab: Lab, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Curvature, factors and refit; what was done is kept, and once there is room the same command goes on."""
    expected, count, write = reference(lab), 0, files.save_file

    def full(tensors: Any, path: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        if count > number:
            Path(path).write_bytes(b"half a file")
            if raised == "OSError":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        write(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full)
        line, left = refuse(lab, lab.compress(), capfd)
    assert f": {FULL}; free some room and run the same command again" in line
    assert "out" not in left
    assert all(name.startswith(".out.rankwise") for name in left)
    assert not [name for name in left if name.endswith(".part")]
    with pytest.raises(SystemExit) as ended:
        main(lab.compress())
    assert ended.value.code == 0
    assert tree(lab.place / "out") == expected
    assert not (lab.place / ".out.rankwise").exists()


@pytest.mark.parametrize("where", ["weights", "tokenizer", "plan", "hashes"])
def test_a_disk_that_fills_up_while_the_checkpoint_is_written(
    where: str, lab: Lab, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerBase, modeling_utils

    from rankwise.engine import checkpoint
    from rankwise.plan import RankPlan

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target, name = {
        "weights": (modeling_utils, "safe_save_file"),
        "tokenizer": (PreTrainedTokenizerBase, "save_pretrained"),
        "plan": (RankPlan, "save"),
        "hashes": (checkpoint, "write_checksums"),
    }[where]
    expected = reference(lab)
    with monkeypatch.context() as patch:
        patch.setattr(target, name, full)
        line, left = refuse(lab, lab.compress(), capfd)
    assert f"out: {FULL}; free some room" in line
    assert "out" not in left
    assert not [name for name in left if "checkpoint" in name]
    with pytest.raises(SystemExit) as ended:
        main(lab.compress())
    assert ended.value.code == 0
    assert tree(lab.place / "out") == expected


@pytest.fixture
def little_disk(lab: Lab) -> Iterator[Callable[[int], Path]]:
    """A file system of so many kilobytes."""
    mounted: list[Path] = []

    def mount(kilobytes: int) -> Path:
        folder = lab.place / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            pytest.skip(f"no mount here: {error}")
        if done.returncode:
            pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("kilobytes", [4, 48, 160, 300], ids=lambda k: f"{k}kB")
def test_a_disk_that_is_really_full(
    kilobytes: int,
    lab: Lab,
    little_disk: Callable[[int], Path],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = little_disk(kilobytes)
    line, _ = refuse(lab, lab.compress(out="disk/out"), capfd)  # found before work begins
    assert f"{FULL} (0.00 GB free)" in line
    assert list(disk.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 10**12))
    line, _ = refuse(lab, lab.compress(out="disk/out"), capfd)
    assert f": {FULL}; free some room and run the same command again" in line
    assert not (disk / "out").exists()
    assert {path.name for path in disk.iterdir()} <= {".out.rankwise"}
    assert not list(disk.rglob("*.part"))
