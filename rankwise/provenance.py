"""Where a result comes from. No time and no host in it, so that equal jobs give equal bytes."""

import importlib.metadata
import json
import platform
from dataclasses import asdict
from typing import Any

import torch

import rankwise
from rankwise.config import CompressConfig
from rankwise.files import read_json

LIBRARIES = ("transformers", "safetensors")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide the result; torch's says what it was built for.

    rankwise itself need not be installed.
    """
    own = {"python": platform.python_version(), "rankwise": rankwise.__version__, "torch": str(torch.__version__)}
    return own | {name: importlib.metadata.version(name) for name in LIBRARIES}


def identify_job(config: CompressConfig, weights: str) -> dict[str, Any]:
    """What an interrupted job must have in common with the command that continues it."""
    text = config.text
    identity = {
        "model": config.model,
        "weights": weights,
        "options": config.method.options(),
        "calibration": {key: getattr(text, key) for key in text.__dataclass_fields__ if key != "measure"},
        "plan": config.plan.read_text(encoding="utf-8") if config.plan else None,
        "curvature": str(config.curvature) if config.curvature else None,
        "refit": config.refits,
        "heal": config.heal,
        "score_only": config.score_only,
        "scores": read_json(config.scores / "scores.json") if config.scores else None,
        **({"precision": asdict(config.precision)} if config.precision else {}),
        **({"budget": asdict(config.budget), "candidates": config.candidates} if config.budget else {}),
        **({"embeddings": config.embeddings} if config.embeddings else {}),
        **({"rounding": "feedback" if config.feeds_back else "nearest"} if _rounds(config) else {}),
    }
    return dict(json.loads(json.dumps(identity)))


def provenance(config: CompressConfig, curvature: dict[str, Any], weights: str) -> dict[str, Any]:
    """What plan.json says of a plan's making.

    Args:
        config: the command.
        curvature: identity of the second moments.
        weights: how numbers are stored.
    """
    job = identify_job(config, weights)
    options = {"method": "plan", "sides": config.method.sides} if config.plan else job["options"]
    facts = {"model": job["model"], "weights": weights, "options": options, "calibration": job["calibration"]}
    facts |= {key: job[key] for key in ("precision", "budget", "embeddings", "rounding") if key in job}
    return {**facts, "curvature": curvature, "versions": versions()}


def _rounds(config: CompressConfig) -> bool:
    """Whether the command may store layers in 4 bits."""
    return bool(config.budget or config.plan or (config.precision and config.precision.quantised))
