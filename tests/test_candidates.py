"""Candidates: the plan that is really better is taken, and the model is as it was."""

import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from fourbit import wide_model

import rankwise
from rankwise.alloc.curvature import collect
from rankwise.alloc.store import FactorStore, factorize_model
from rankwise.anatomy import block_linears
from rankwise.candidates import Candidate, choose
from rankwise.errors import RankwiseError
from rankwise.evaluate import perplexity
from rankwise.files import read_json, write_json
from rankwise.pipeline import compress
from rankwise.plan import RankPlan
from rankwise.progress import silent
from rankwise.quantize import Rounding, nearest
from rankwise.storage import Precision

CPU = torch.device("cpu")
WINDOWS = torch.randint(2, 512, (8, 48), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, FactorStore, dict[str, RankPlan]]:
    """A model, and plans of which the first claims to lose nothing."""
    folder, model = tmp_path_factory.mktemp("candidates"), wide_model()
    curvature = collect(model, WINDOWS[:4], WINDOWS[4:6], folder / "curvature", device=CPU)
    store = factorize_model(model, curvature, folder / "factors", sides="two", device=CPU)
    low, high = (rankwise.Global(ratio).allocate(store, "fp32") for ratio in (0.2, 0.8))
    rounded = high.stored_as(Precision("int8"))
    claimed = {name: replace(spec, loss=0.0) for name, spec in low}
    return model, store, {"low": replace(low, layers=claimed), "rounded": rounded, "high": high}


def judged(
    source: Any,
    *names: str,
    rounding: Rounding = nearest,
    windows: torch.Tensor = WINDOWS[6:],
    kept: Path | None = None,
) -> RankPlan:
    """What is chosen among some of the plans; with `kept`, in a job that is continued."""
    model, store, plans = source
    candidates = {name: Candidate(plans[name], store, rounding) for name in names}
    with TemporaryDirectory() as folder:
        return choose(candidates, model, windows, kept or Path(folder) / "losses.json", CPU, silent).plan


def test_the_least_measured_loss_decides(source: Any) -> None:
    model, store, plans = source
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chosen = judged(source, *plans)
    measured = {
        name: math.log(perplexity(compress(deepcopy(model), plan, store, rounding=nearest), WINDOWS[6:]))
        for name, plan in plans.items()
    }
    assert chosen is plans[min(measured, key=lambda name: measured[name])]
    assert judged(source, *reversed(plans)) is chosen
    told = {entry["of"]: entry["measured"] for entry in chosen.provenance["candidates"]}
    assert told == pytest.approx(measured)
    assert next(x for x in chosen.provenance["candidates"] if x["of"] == "low")["predicted"] == 0.0
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert block_linears(model)  # it may be compressed


def test_where_text_cannot_tell_the_prediction_decides(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two plans that differ by less than the margin: the first one stays, whichever it is."""
    plans = source[2]
    monkeypatch.setattr("rankwise.candidates.MARGIN", 0.1)
    for names in (("high", "rounded"), ("rounded", "high")):
        assert judged(source, *names) is plans[names[0]]
        first, second = (entry["measured"] for entry in plans[names[0]].provenance["candidates"])
        assert first != second


def test_one_plan_is_not_tried(source: Any) -> None:
    plans = source[2]
    assert judged(source, "low", rounding=pytest.fail) is plans["low"]
    assert judged(source, *plans, rounding=pytest.fail, windows=WINDOWS[:0]) is plans["low"]
    assert plans["low"].provenance["candidates"][0]["measured"] is None


def test_a_model_survives_a_candidate_that_fails(source: Any, tmp_path: Path) -> None:
    """And what was measured before it is not measured again."""
    model, kept = source[0], tmp_path / "losses.json"
    calls = 0

    def fails(*given: Any) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return nearest(*given)

    expected = model(WINDOWS[:1]).logits
    with pytest.raises(KeyboardInterrupt):
        judged(source, "high", "rounded", rounding=fails, kept=kept)
    assert torch.equal(model(WINDOWS[:1]).logits, expected)
    assert block_linears(model)
    [(key, loss)] = read_json(kept).items()
    write_json(kept, {key: loss - 1.0})
    assert judged(source, "low", "high", "rounded", kept=kept) is source[2]["high"]
    told = {entry["of"]: entry["measured"] for entry in source[2]["high"].provenance["candidates"]}
    assert told["high"] == loss - 1.0
    assert told["rounded"] == pytest.approx(loss, abs=0.1)
    again = judged(source, "low", "high", "rounded", rounding=pytest.fail, kept=kept)
    assert told == {entry["of"]: entry["measured"] for entry in again.provenance["candidates"]}


def test_what_cannot_be_run_is_not_taken(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is predicted; and where none can be run the job ends."""
    measured = iter([math.nan, math.inf, 12.0])
    monkeypatch.setattr("rankwise.candidates.perplexity", lambda *_, **__: next(measured))
    assert judged(source, "low", "rounded", "high") is source[2]["high"]
    assert [entry["measured"] for entry in source[2]["high"].provenance["candidates"]][:2] == [math.inf, math.inf]
    monkeypatch.setattr("rankwise.candidates.perplexity", lambda *_, **__: math.nan)
    with pytest.raises(RankwiseError, match="NaN or Inf"):
        judged(source, "low", "high")


def test_a_checkpoint_of_the_model_is_no_compressed_one(source: Any, tmp_path: Path) -> None:
    judged(source, *source[2])
    source[0].save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
