"""What a training leaves in its folder: its state, written atomically, and a log of its steps."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankwise.errors import RankwiseError
from rankwise.files import differing_keys, json_ready, open_tensors, write_tensors

STATE, LOG, MASKS = "training.safetensors", "training.jsonl", "masks.safetensors"


@dataclass
class Progress:
    """How far a training is.

    Args:
        step: steps done.
        reached: the first step that found the ratio at or below the target, or None.
        finished: nothing is left to do.
    """

    step: int = 0
    reached: int | None = None
    finished: bool = False


class TrainState:
    """The folder's files; everything drawn at random follows from seed and step, so no generator is stored.

    Args:
        folder: made if missing.
        identity: what the training is; another one's state is not continued.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, json.loads(json.dumps(json_ready(identity), default=str))
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, bank: nn.Module, optimiser: torch.optim.Optimizer, progress: Progress) -> None:
        """Write parameters, buffers, optimiser and progress as one file."""
        tensors = {f"mask.{name}": tensor for name, tensor in bank.state_dict().items()}
        for index, parameter in enumerate(bank.parameters()):
            tensors |= {f"optimiser.{index}.{key}": value for key, value in optimiser.state[parameter].items()}
        metadata = {"identity": json.dumps(self.identity), "progress": json.dumps(progress.__dict__)}
        write_tensors(self.folder / STATE, tensors, metadata)

    def load(self, bank: nn.Module, optimiser: torch.optim.Optimizer) -> Progress:
        """Continue where the last save was, if there is one.

        Raises:
            RankwiseError: the folder holds another training.
        """
        path = self.folder / STATE
        if not path.exists():
            self._cut_log(0)
            return Progress()
        with open_tensors(path) as file:
            metadata = file.metadata()
            if different := differing_keys(json.loads(metadata["identity"]), self.identity):
                raise RankwiseError("training", f"{path} was made with other {different}", "use a new folder")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        bank.load_state_dict({n.removeprefix("mask."): t for n, t in tensors.items() if n.startswith("mask.")})
        for index, parameter in enumerate(bank.parameters()):
            start = f"optimiser.{index}."
            state = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
            if state:
                optimiser.state[parameter] = {k: t if k == "step" else t.to(parameter) for k, t in state.items()}
        progress = Progress(**json.loads(metadata["progress"]))
        self._cut_log(progress.step)
        return progress

    def log(self, line: dict[str, Any]) -> None:
        """Append one step's figures to the log, one JSON object a line."""
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(json_ready(line), allow_nan=False) + "\n")

    def write_masks(self, importances: dict[str, torch.Tensor], ranks: dict[str, float]) -> None:
        """What was learnt, to be looked at: per layer `[size]` importance of its components, and its rank."""
        write_tensors(self.folder / MASKS, importances, {"ranks": json.dumps(ranks)})

    def _cut_log(self, step: int) -> None:
        """Drop the lines of steps that will be run again, and a last line that a kill cut off."""
        path = self.folder / LOG
        if not path.exists():
            return
        whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        path.write_text("".join(line for line in whole if json.loads(line)["step"] < step), encoding="utf-8")
