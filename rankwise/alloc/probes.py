"""What it costs to truncate one layer alone: the model's loss on a few windows, measured layer by layer, rank by rank.

The hidden states at the entry of a block are kept, so that a probe runs from the block of its layer onward. The
ranks of one layer go through the rest of the model together: a block visits the device once for all of them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from rankwise.alloc.calibration import Calibration
from rankwise.alloc.curvature import hash_windows
from rankwise.alloc.stream import BlockStream
from rankwise.anatomy import block_linears, weight_of
from rankwise.errors import RankwiseError
from rankwise.files import differing_keys, read_json, write_json

FORMAT = 1
Hidden = list[torch.Tensor]  # [1, T, d] a window


class Probes:
    """Measured losses, nats a token, in one JSON file that is whole after every probe.

    Args:
        path: the file; continued if it is there.
        identity: what the losses belong to.

    Raises:
        RankwiseError: the file holds losses of something else, or is damaged.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, identity
        self.dense: float | None = None
        self.losses: dict[tuple[str, int], float] = {}
        if path.exists():
            self._read(read_json(path))

    def add(self, name: str, rank: int, loss: float) -> None:
        """Keep the loss of the model with layer `name` at `rank`."""
        self.losses[name, rank] = loss
        self._write()

    def add_dense(self, loss: float) -> None:
        """Keep the loss of the model as it is."""
        self.dense = loss
        self._write()

    def _write(self) -> None:
        rows = [{"layer": name, "rank": rank, "loss": loss} for (name, rank), loss in self.losses.items()]
        write_json(self.path, {"identity": self.identity, "dense": self.dense, "probes": rows})

    def _read(self, data: Any) -> None:
        try:
            found, self.dense = data["identity"], data["dense"]
            self.losses = {(row["layer"], row["rank"]): _number(row["loss"]) for row in data["probes"]}
            different = differing_keys(found, self.identity)
        except (KeyError, TypeError, ValueError):
            raise RankwiseError(
                str(self.path), "no losses that can be read", "remove it, or use a new folder"
            ) from None
        if different:
            raise RankwiseError("probes", f"{self.path} was made with other {different}", "use a new folder")


def measure_probes(calibration: Calibration, ranks: dict[str, list[int]], samples: int, sides: str) -> Probes:
    """Measure the loss with one layer truncated at a time, or finish what `calibration.folder` holds of it.

    Args:
        calibration: its model is in host memory, and is left as it was.
        ranks: layer to the ranks to try; a layer's weight becomes the product of its first k components.
        samples: windows to measure on, the first of the calibration's; all if it has fewer.
        sides: the metric of the calibration's factors.

    Returns:
        Losses of every (layer, rank) asked for (others may be among them), and of the dense model. A loss that
        overflows is infinite.

    Raises:
        RankwiseError: no window, a dense model whose loss is no number, or a file of another model, text or metric.
    """
    windows = calibration.windows[:samples]
    if not len(windows) or windows.shape[1] < 2:
        raise RankwiseError("calibration windows", list(windows.shape), "at least one of two tokens is needed")
    text = {"probe_text": hash_windows(windows), "probe_samples": len(windows)}
    identity = {"probes": FORMAT, "sides": sides, **calibration.curvature.identity, **text}
    probes = Probes(calibration.folder / f"probes_{sides}.json", identity)
    if probes.dense is None or any((n, rank) not in probes.losses for n, tried in ranks.items() for rank in tried):
        stream = BlockStream(calibration.model, calibration.device, windows[:1])
        try:
            _run(stream, calibration, windows, ranks, probes)
        finally:
            stream.close()
    return probes


@torch.no_grad()
def _run(
    stream: BlockStream,
    calibration: Calibration,
    windows: torch.Tensor,
    ranks: dict[str, list[int]],
    probes: Probes,
) -> None:
    hidden = [stream.embed(window[None]) for window in windows]
    with calibration.track("layer sensitivity", sum(map(len, ranks.values())) + 1) as advance:
        for index, block in enumerate(block_linears(calibration.model)):
            for name, linear in block.items():
                todo = [rank for rank in ranks.get(name, []) if (name, rank) not in probes.losses]
                for _ in range(len(ranks.get(name, [])) - len(todo)):
                    advance()
                for rank, loss in _truncated(stream, index, linear, name, todo, calibration, windows, hidden):
                    probes.add(name, rank, loss)
                    advance()
            [hidden] = _through(stream, index, [hidden])
        if probes.dense is None:
            loss = _loss(stream, windows, hidden)
            if loss == float("inf"):
                raise RankwiseError("loss", "NaN or Inf before any layer is truncated", "try --dtype fp32 or bf16")
            probes.add_dense(loss)
        advance()


def _truncated(
    stream: BlockStream,
    index: int,
    linear: nn.Module,
    name: str,
    ranks: list[int],
    calibration: Calibration,
    windows: torch.Tensor,
    hidden: Hidden,
) -> Iterator[tuple[int, float]]:
    """Each rank and the loss with one layer of block `index` at that rank."""
    if not ranks:
        return
    u, v = (factor.to(stream.device) for factor in calibration.factors.load(name, max(ranks)))
    variants: list[Hidden] = []
    with stream.on_device(index):
        weight = weight_of(linear)
        original = weight.clone()
        try:
            for rank in ranks:
                weight.copy_(u[:, :rank] @ v[:rank])
                variants.append([stream.run(index, h.to(stream.device)).cpu() for h in hidden])
        finally:
            weight.copy_(original)
    for later in range(index + 1, len(stream)):
        variants = _through(stream, later, variants)
    for rank, variant in zip(ranks, variants, strict=True):
        yield rank, _loss(stream, windows, variant)


def _through(stream: BlockStream, index: int, variants: list[Hidden]) -> list[Hidden]:
    """Hidden states of every variant through block `index`."""
    with stream.on_device(index):
        return [[stream.run(index, h.to(stream.device)).cpu() for h in hidden] for hidden in variants]


def _loss(stream: BlockStream, windows: torch.Tensor, hidden: Hidden) -> float:
    """Mean negative log-likelihood of every token but the first of each window, nats; infinite if it is no number."""
    total = 0.0
    for window, last in zip(windows, hidden, strict=True):
        ids = window.to(stream.device)
        logits = stream.head(window[None], last.to(stream.device))[0, :-1].float()
        total += float(cross_entropy(logits, ids[1:], reduction="sum"))
    return _number(total / (windows.numel() - len(windows)))


def _number(loss: float | None) -> float:
    """NaN, and what JSON says in its place, as infinity."""
    return float("inf") if loss is None or not abs(float(loss)) < float("inf") else float(loss)
