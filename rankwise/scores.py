"""Scores: everything that a plan of any size needs, measured once: spectra, what was learnt, full-rank factors."""

from dataclasses import asdict, dataclass, fields
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rankwise.alloc.budget import Choices
from rankwise.alloc.curvature import model_hash
from rankwise.alloc.learnt import Ordered
from rankwise.alloc.methods import method_by_name
from rankwise.alloc.methods.base import Method
from rankwise.alloc.store import FactorStore
from rankwise.anatomy import block_linears, features
from rankwise.errors import RankwiseError
from rankwise.files import open_tensors, read_json, write_json, write_tensors
from rankwise.plan import KINDS, RankPlan
from rankwise.storage import Precision

FORMAT = 1
INDEX, CHOICES, FACTORS = "scores.json", "choices.safetensors", "factors"
ROUNDED = ("dense", "lowrank")  # kinds that are planned for 4 bits: coefficients of pivot layers round badly


@dataclass
class Scores:
    """A folder of scores.

    Args:
        folder: `scores.json`, `factors/`, and `choices.safetensors` where a method has learnt.
        facts: the model's name, what the curvature belongs to, the method's options, versions.
        store: the factors.
        learnt: every layer's choices with learnt losses; None for closed-form methods.
    """

    folder: Path
    facts: dict[str, Any]
    store: FactorStore
    learnt: dict[str, Choices] | None

    def method(self, **changes: Any) -> Method:
        """The method that the scores were made with, with other options where `changes` says so."""
        options: dict[str, Any] = dict(self.facts["options"])
        made = method_by_name(options.pop("method"))
        known = {f.name for f in fields(made)}
        given: dict[str, Any] = {key: value for key, value in (options | changes).items() if key in known}
        given |= {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
        return made(**given)

    def allocate(self, ratio: float, weights: str, **changes: Any) -> RankPlan:
        """A plan of any ratio; the model sees no text.

        Raises:
            RankwiseError: the budget cannot be met.
        """
        method = self.method(ratio=ratio, **changes)
        if self.learnt is None:
            return method.allocate(self.store, weights)
        return method.again(self.learnt, self.store, weights)

    def allocate_in(self, precision: Precision | None, ratio: float, weights: str) -> tuple[RankPlan, dict[str, Any]]:
        """A plan of any ratio, its numbers stored in one precision (None: as `weights`), and the method's options.

        Raises:
            RankwiseError: the budget cannot be met, or the choices that were learnt are of other ranks.
        """
        block, multiple = precision.block if precision else 1, int(self.facts["options"]["rank_multiple"])
        options = self.facts["options"] | {"ratio": ratio, "rank_multiple": lcm(multiple, block)}
        if self.learnt is not None and multiple % block:
            found = f"{precision}, and scores that were learnt with rank multiple {multiple}"
            raise RankwiseError("weights", found, f"allowed: scores made with --rank-multiple {block}")
        if precision and precision.quantised and self.learnt is None and len(options["kinds"]) > len(ROUNDED):
            options["kinds"] = list(ROUNDED)
        plan = self.allocate(ratio, weights, rank_multiple=options["rank_multiple"], kinds=tuple(options["kinds"]))
        return plan if precision is None else plan.stored_as(precision), options


def finish_scores(folder: Path, facts: dict[str, Any], learnt: dict[str, Choices] | None) -> None:
    """Complete a folder that holds `factors/`; `scores.json` goes last."""
    if learnt is not None:
        write_tensors(folder / CHOICES, _pack(learnt), {})
    write_json(folder / INDEX, {"format": FORMAT, "learnt": learnt is not None, **facts})


def open_scores(folder: Path, model: Any) -> Scores:
    """Open a folder of scores for the model that they were made from.

    Raises:
        RankwiseError: no such folder, another format, or another model.
    """
    facts = require_scores(folder)
    if facts["curvature"]["model"] != model_hash(model):
        made = f"{folder} was made from {facts['model']}, in other weights or another dtype"
        raise RankwiseError("scores", made, "the same model and --dtype are needed")
    store = FactorStore(
        folder / FACTORS, [{n: features(m) for n, m in block.items()} for block in block_linears(model)]
    )
    learnt = _unpack(folder / CHOICES) if facts["learnt"] else None
    if learnt is not None:
        learnt = {name: learnt[name] for name in store.shapes}  # in model order
    return Scores(folder, facts, store, learnt)


def require_scores(folder: Path) -> dict[str, Any]:
    """The facts of a folder that `finish_scores` completed.

    Raises:
        RankwiseError: no such folder, or another format.
    """
    if not (folder / INDEX).is_file():
        raise RankwiseError("scores", f"{folder} (no {INDEX} in it)", "a folder written with --score-only is expected")
    facts = read_json(folder / INDEX)
    found = facts.get("format") if isinstance(facts, dict) else None
    if found != FORMAT:
        raise RankwiseError("scores", f"{folder / INDEX}: format {found!r}", f"this version reads format {FORMAT}")
    return dict(facts)


def _pack(learnt: dict[str, Choices]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in learnt.items():
        kinds = torch.tensor([KINDS.index(kind) for kind in entry.kind])
        parts = asdict(entry) | {"kind": kinds, "dense_cost": torch.tensor([entry.dense_cost])}
        tensors |= {f"{name}:{part}": torch.as_tensor(np.ascontiguousarray(value)) for part, value in parts.items()}
    return tensors


def _unpack(path: Path) -> dict[str, Choices]:
    with open_tensors(path) as file:
        parts: dict[str, dict[str, Any]] = {}
        for key in file.keys():  # noqa: SIM118
            name, _, part = key.rpartition(":")
            parts.setdefault(name, {})[part] = file.get_tensor(key).numpy()
    found: dict[str, Choices] = {}
    for name, entry in parts.items():
        entry["kind"] = tuple(KINDS[i] for i in entry["kind"])
        entry["dense_cost"] = int(entry["dense_cost"][0])
        found[name] = Ordered(**entry) if "order" in entry else Choices(**entry)
    return found
