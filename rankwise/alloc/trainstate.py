"""What a training leaves in its folder: its state, written atomically, and a log of its steps."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankwise.distributed import is_main
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


class StateFile:
    """Tensors, an optimiser and how far it all is, in one safetensors file that is whole after every save.

    Args:
        path: its folder is made if missing.
        identity: what the state belongs to; another one's is not continued.
        what: the field that an error names.
    """

    def __init__(self, path: Path, identity: dict[str, Any], what: str) -> None:
        self.path, self.what = path, what
        self.identity = json.loads(json.dumps(json_ready(identity), default=str))
        path.parent.mkdir(parents=True, exist_ok=True)

    def save(
        self,
        tensors: Mapping[str, torch.Tensor],
        optimiser: torch.optim.Optimizer,
        trained: Mapping[str, nn.Parameter],
        progress: dict[str, Any],
    ) -> None:
        """Write it all; `trained` gives the optimiser's parameters their names."""
        moments = {f"optimiser.{key}.{name}": v for name, p in trained.items() for key, v in optimiser.state[p].items()}
        everything = {name: tensor.detach().cpu() for name, tensor in (dict(tensors) | moments).items()}
        metadata = {"identity": json.dumps(self.identity), "progress": json.dumps(json_ready(progress))}
        write_tensors(self.path, everything, metadata)

    def load(
        self, optimiser: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter]
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The optimiser as it was, and the tensors and progress; None where nothing was saved.

        Raises:
            RankwiseError: the file belongs to something else.
        """
        if not self.path.exists():
            return None
        with open_tensors(self.path) as file:
            metadata = file.metadata()
            if different := differing_keys(json.loads(metadata["identity"]), self.identity):
                allowed = "use a new folder, or --restart"
                raise RankwiseError(self.what, f"{self.path} was made with other {different}", allowed)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name in [name for name in tensors if name.startswith("optimiser.")]:
            _, key, of = name.split(".", 2)
            value = tensors.pop(name)
            optimiser.state[trained[of]][key] = value if key == "step" else value.to(trained[of])
        return tensors, json.loads(metadata["progress"])


class TrainState:
    """A mask training's files; everything drawn at random follows from seed and step, so no generator is stored.

    Of several processes all read, and the main one writes.

    Args:
        folder: made if missing.
        identity: what the training is; another one's state is not continued.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.file = folder, StateFile(folder / STATE, identity, "training")

    def save(self, bank: nn.Module, optimiser: torch.optim.Optimizer, progress: Progress) -> None:
        """Write parameters, buffers, optimiser and progress as one file."""
        if not is_main():
            return
        masks = {f"mask.{name}": tensor for name, tensor in bank.state_dict().items()}
        self.file.save(masks, optimiser, dict(bank.named_parameters()), progress.__dict__)

    def load(self, bank: nn.Module, optimiser: torch.optim.Optimizer) -> Progress:
        """Continue where the last save was, if there is one.

        Raises:
            RankwiseError: the folder holds another training.
        """
        found = self.file.load(optimiser, dict(bank.named_parameters()))
        progress = Progress() if found is None else Progress(**found[1])
        if found is not None:
            bank.load_state_dict({name.removeprefix("mask."): tensor for name, tensor in found[0].items()})
        if is_main():
            self._cut_log(progress.step)
        return progress

    def log(self, line: dict[str, Any]) -> None:
        """Append one step's figures to the log, one JSON object a line."""
        if not is_main():
            return
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(json_ready(line), allow_nan=False) + "\n")

    def write_masks(self, importances: dict[str, torch.Tensor], ranks: dict[str, float]) -> None:
        """What was learnt, to be looked at: per layer `[size]` importance of its components, and its rank."""
        if is_main():
            write_tensors(self.folder / MASKS, importances, {"ranks": json.dumps(ranks)})

    def _cut_log(self, step: int) -> None:
        """Drop the lines of steps that will be run again, and a last line that a kill cut off."""
        path = self.folder / LOG
        if not path.exists():
            return
        whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        path.write_text("".join(line for line in whole if json.loads(line)["step"] < step), encoding="utf-8")
