"""The two sweeps that measure curvature: forward for the inputs, backward for the output gradients.

One block at a time: what a sweep has finished is on the disk, and a later call goes on from there. Several processes
(`rankwise.distributed`) share out the windows; the main one adds up the sums, gathers hidden states and writes.
"""

import json
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from rankwise.alloc.exchange import rows_to_main
from rankwise.alloc.moments import MAGNITUDES, GradientSums, InputSums
from rankwise.alloc.seeds import generator
from rankwise.alloc.stream import BlockStream
from rankwise.distributed import from_main, is_main, own
from rankwise.errors import RankwiseError
from rankwise.files import read_tensors, write_tensors
from rankwise.progress import Track


class Files(Protocol):
    """Where a curvature keeps its blocks."""

    @property
    def has_inputs(self) -> bool:
        """True if the input moments of every block are there."""
        ...

    def file(self, what: str, index: int) -> Path:
        """The file that holds `inputs`, `outputs`, `hidden` or `grad` of block `index`."""
        ...


def sweep_forward(
    stream: BlockStream,
    linears: list[dict[str, nn.Module]],
    windows: torch.Tensor,
    gradient_windows: torch.Tensor | None,
    curvature: Files,
    track: Track,
) -> None:
    """Input moments of every block; the blocks' inputs on the gradient windows are kept for the way back."""
    there, total = from_main(lambda: curvature.has_inputs), 0 if gradient_windows is None else len(gradient_windows)
    hidden = [] if there else [stream.embed(windows[number][None]) for number in own(len(windows))]
    kept = [] if gradient_windows is None else [stream.embed(gradient_windows[n][None]) for n in own(total)]
    with track("input moments", len(stream)) as advance:
        for index, layers in enumerate(linears):
            _keep(kept, total, curvature.file("hidden", index))
            done = from_main(curvature.file("inputs", index).exists)
            sums = InputSums({} if done else layers)
            with torch.no_grad(), stream.on_device(index), sums.listening():
                for number, h in enumerate(hidden):
                    sums.start_window()
                    hidden[number] = stream.run(index, h.to(stream.device)).cpu()
            if not done:
                sums.merge(stream.device)
                if is_main():
                    _write_inputs(sums, windows.numel(), curvature.file("inputs", index))
            with torch.no_grad(), stream.on_device(index):
                kept = [stream.run(index, h.to(stream.device)).cpu() for h in kept]
            advance()
    _keep(kept, total, curvature.file("hidden", len(stream)))


def _write_inputs(sums: InputSums, tokens: int, path: Path) -> None:
    moments, groups = sums.finish(tokens)
    sizes = {MAGNITUDES + leader: size for leader, size in sums.magnitudes(tokens).items()}
    write_tensors(path, moments | sizes, {"groups": json.dumps(groups, sort_keys=True)})


def _keep(hidden: list[torch.Tensor], total: int, path: Path) -> None:
    if total and not from_main(path.exists):
        _write_rows([h[0] for h in hidden], total, "hidden", path)


def _write_rows(rows: list[torch.Tensor], total: int, key: str, path: Path) -> None:
    """All processes' rows, one for each of `total` windows, as one tensor."""
    found = rows_to_main(rows, total)
    if is_main():
        write_tensors(path, {key: torch.stack(found)}, {})


def sweep_backward(
    stream: BlockStream,
    linears: list[dict[str, nn.Module]],
    windows: torch.Tensor,
    curvature: Files,
    seed: int,
    track: Track,
) -> None:
    """Output-gradient moments, last block first; each block's forward is recomputed from its kept input."""
    last = len(stream)
    with track("output-gradient moments", last + 1) as advance:
        if not from_main(lambda: any(curvature.file("grad", i).exists() for i in range(last + 1))):
            grads = _head_gradients(stream, windows, curvature, seed)
            _write_rows(grads, len(windows), "grad", curvature.file("grad", last))
        advance()
        for index in reversed(range(last)):
            above, below = curvature.file("grad", index + 1), curvature.file("grad", index)
            if from_main(partial(_is_next, above, below)):
                sums, grads = _block_gradients(stream, index, linears[index], curvature)
                sums.merge(stream.device)
                if is_main():
                    write_tensors(curvature.file("outputs", index), sums.finish(windows.numel()), {})
                _write_rows(grads, len(windows), "grad", below)
            if is_main() and below.exists():
                above.unlink(missing_ok=True)
            advance()


def _is_next(above: Path, below: Path) -> bool:
    return above.exists() and not below.exists()


def _head_gradients(stream: BlockStream, windows: torch.Tensor, curvature: Files, seed: int) -> list[torch.Tensor]:
    """Gradients `[T, d]` at the last block's output of the summed loss under labels drawn from the model.

    The labels are a function of seed and window: the same whichever process draws them.
    """
    grads = []
    rows = _load(curvature.file("hidden", len(stream)), "hidden")
    for number, hidden in zip(own(len(windows)), rows, strict=True):
        leaf = hidden[None].to(stream.device).requires_grad_()
        logits = stream.head(windows[number][None], leaf)[0].float()
        if not torch.isfinite(logits).all():
            raise RankwiseError(
                "logits", "NaN or Inf", "check the norm and the head behind the blocks, or try --dtype fp32"
            )
        odds = logits.detach().softmax(-1).cpu()
        labels = torch.multinomial(odds, 1, generator=generator(seed, number))[:, 0]
        loss = cross_entropy(logits, labels.to(stream.device), reduction="sum")
        grads.append(_gradient(loss, leaf, None, "the head"))
    return grads


def _block_gradients(
    stream: BlockStream, index: int, layers: dict[str, nn.Module], curvature: Files
) -> tuple[GradientSums, list[torch.Tensor]]:
    """One block's sums for F, and the gradients `[T, d]` at its input, of this process's windows."""
    hidden = _load(curvature.file("hidden", index), "hidden")
    above = _load(curvature.file("grad", index + 1), "grad")
    sums = GradientSums(layers)
    grads = []
    with stream.on_device(index), sums.listening():
        for h, g in zip(hidden, above, strict=True):
            leaf = h[None].to(stream.device).requires_grad_()
            out = stream.run(index, leaf)
            grads.append(_gradient(out, leaf, g[None].to(stream.device), f"block {index}"))
    return sums, grads


def _gradient(out: torch.Tensor, leaf: torch.Tensor, above: torch.Tensor | None, where: str) -> torch.Tensor:
    """Gradient `[T, d]` at `leaf`; parameters gather none, whether they are frozen or not."""
    (grad,) = torch.autograd.grad(out, leaf, above)
    if not torch.isfinite(grad).all():
        raise RankwiseError("gradients", f"NaN or Inf behind {where}", "try --dtype fp32 or bf16")
    return grad[0].cpu()


def _load(path: Path, key: str) -> torch.Tensor:
    """This process's windows, `[M', T, d]`."""
    rows = read_tensors(path)[key]
    part = own(len(rows))
    return rows[part.start :: part.step].clone()  # aligned memory: the same sums as from a tensor just computed
