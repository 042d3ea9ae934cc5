"""Second moments of every linear layer's inputs and output gradients, streamed block by block.

For a layer `y = W x`, with `W [m, n]`, the one-sided metric is `C = E[x xᵀ]` (`[n, n]`). The two-sided one is a
Kronecker approximation of the loss's Hessian, in the manner of K-FAC (1503.05671): the mean of that C and of
`E[‖g‖² x xᵀ] / E‖g‖²`, and `F = E‖g‖² E[ĝ ĝᵀ]` (`[m, m]`), where g = ‖g‖ ĝ is the gradient at y of the window's summed
negative log-likelihood under labels drawn from the model itself (the true Fisher). `moments.GradientSums` says why
tokens are weighted.

The folder they are streamed to is the job's memory: killed anywhere, the next run continues with the first
block whose file is missing, and computes the same bytes.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankwise.alloc.moments import EMPHASIS, MAGNITUDES, WEIGHTED
from rankwise.alloc.stream import BlockStream
from rankwise.alloc.sweeps import sweep_backward, sweep_forward
from rankwise.anatomy import block_linears, require_finite
from rankwise.distributed import from_main, is_main, require_same
from rankwise.errors import RankwiseError
from rankwise.files import open_tensors, read_json, write_json
from rankwise.jobs import locked
from rankwise.progress import Track, silent

FORMAT = 3  # 2: the inputs' files hold mean magnitudes too; 3: the outputs' files hold weighted input moments
INDEX = "curvature.json"


class Curvature:
    """A folder of second moments, complete or being filled."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return int(self.identity["blocks"])

    @property
    def has_outputs(self) -> bool:
        """True if output-gradient moments are part of it."""
        return all(self.file("outputs", i).exists() for i in range(self.blocks))

    @property
    def has_inputs(self) -> bool:
        """True if the input moments of every block are there."""
        return all(self.file("inputs", i).exists() for i in range(self.blocks))

    @property
    def on_the_way_back(self) -> bool:
        """True if a backward sweep was begun and not finished."""
        return any(self.folder.glob("grad_*.safetensors"))

    def clean(self) -> None:
        """Remove what only the sweeps needed."""
        for what in ("hidden", "grad"):
            for path in self.folder.glob(f"{what}_*.safetensors"):
                path.unlink()

    def file(self, what: str, index: int) -> Path:
        """The file that holds `inputs`, `outputs`, `hidden` or `grad` of block `index`."""
        return self.folder / f"{what}_{index:03d}.safetensors"

    def inputs(self, index: int) -> dict[str, torch.Tensor]:
        """Layer name to C `[n, n]` fp32; layers that read the same tensor share one matrix."""
        path = self.file("inputs", index)
        with open_tensors(path) as file:
            groups = json.loads(file.metadata()["groups"])
            moments = {leader: file.get_tensor(leader) for leader in set(groups.values())}
        return {name: moments[leader] for name, leader in groups.items()}

    def magnitudes(self, index: int) -> dict[str, torch.Tensor]:
        """Layer name to E|x| `[n]` fp32 per input feature; layers that read the same tensor share one vector."""
        with open_tensors(self.file("inputs", index)) as file:
            groups = json.loads(file.metadata()["groups"])
            sizes = {leader: file.get_tensor(MAGNITUDES + leader) for leader in set(groups.values())}
        return {name: sizes[leader] for name, leader in groups.items()}

    def outputs(self, index: int) -> dict[str, torch.Tensor]:
        """Layer name to F `[m, m]` fp32; empty if output gradients were not measured."""
        return self._outputs(index, lambda name: not name.startswith((WEIGHTED, EMPHASIS)))

    def weighted(self, index: int) -> dict[str, torch.Tensor]:
        """Layer name to C `[n, n]` fp32, each token counted as its output gradient says (`moments.GradientSums`)."""
        found = self._outputs(index, lambda name: name.startswith(WEIGHTED))
        return {name.removeprefix(WEIGHTED): moment for name, moment in found.items()}

    def emphasis(self, index: int) -> dict[str, torch.Tensor]:
        """Layer name to the weight of a token in `metric`'s C, by octaves of its position, fp32; 1 in the mean."""
        found = self._outputs(index, lambda name: name.startswith(EMPHASIS))
        return {name.removeprefix(EMPHASIS): (1 + share) / 2 for name, share in found.items()}

    def _outputs(self, index: int, wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
        """What the outputs' file holds under the names that are wanted."""
        if not self.has_outputs:
            return {}
        with open_tensors(self.file("outputs", index)) as file:
            return {name: file.get_tensor(name) for name in filter(wanted, file.keys())}

    def metric(self, index: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """C and F of the two-sided metric; of the one-sided one, where there are no output gradients.

        C is the mean of the plain and of the weighted moments: these know what matters, those have seen more text.
        """
        return self.metric_inputs(index), self.outputs(index)

    def metric_inputs(self, index: int) -> dict[str, torch.Tensor]:
        """C of `metric` alone."""
        inputs, weighted = self.inputs(index), self.weighted(index)
        return {name: moment.add_(inputs[name]).div_(2) for name, moment in weighted.items()} or inputs


def identify(model: Any, windows: torch.Tensor, gradient_windows: torch.Tensor, seed: int) -> dict[str, Any]:
    """What a curvature belongs to: model, text and options, as hashes and numbers."""
    return {
        "format": FORMAT,
        "blocks": len(block_linears(model)),
        "model": model_hash(model),
        "text": hash_windows(windows),
        "gradient_text": hash_windows(gradient_windows),
        "samples": len(windows),
        "gradient_samples": len(gradient_windows),
        "seq_len": windows.shape[1],
        "seed": seed,
    }


def collect(
    model: Any,
    windows: torch.Tensor,
    gradient_windows: torch.Tensor | None,
    folder: Path,
    *,
    device: torch.device,
    seed: int = 0,
    track: Track = silent,
) -> Curvature:
    """Measure the curvature of every linear layer, or finish or reuse what `folder` holds of it.

    Args:
        model: causal language model in host memory.
        windows: `[N, T]` token ids for the input moments.
        gradient_windows: `[M, T]` token ids for the output-gradient moments; None leaves those out.
        folder: where the moments are, or will be.
        device: where blocks compute.
        seed: fixes the sampled labels.
        track: progress.

    Raises:
        RankwiseError: the folder belongs to another model, text or seed; or NaN or Inf in weights or activations.
    """
    linears = block_linears(model)
    places = sorted({parameter.device.type for parameter in model.parameters()})
    if places != ["cpu"]:
        raise RankwiseError("model", f"on {', '.join(places)}", "it must be in host memory: model.to('cpu')")
    require_finite(linears)
    if gradient_windows is not None and gradient_windows.shape[1] != windows.shape[1]:
        lengths = f"{gradient_windows.shape[1]} tokens"
        raise RankwiseError("gradient windows", lengths, f"allowed: {windows.shape[1]}, as the other windows")
    identity = identify(model, windows, windows[:0] if gradient_windows is None else gradient_windows, seed)
    require_same("model or text", identity)
    with locked(folder) if is_main() else nullcontext():
        curvature = from_main(lambda: _claim(folder, identity))
        return _collect(model, linears, windows, gradient_windows, curvature, device, seed, track)


def _collect(
    model: Any,
    linears: list[dict[str, nn.Module]],
    windows: torch.Tensor,
    gradient_windows: torch.Tensor | None,
    curvature: Curvature,
    device: torch.device,
    seed: int,
    track: Track,
) -> Curvature:
    inputs, outputs, back = from_main(lambda: (curvature.has_inputs, curvature.has_outputs, curvature.on_the_way_back))
    need_outputs = gradient_windows is not None and not outputs
    if not inputs or need_outputs:
        stream = BlockStream(model, device, windows[:1])
        try:
            if not back:
                sweep_forward(stream, linears, windows, gradient_windows if need_outputs else None, curvature, track)
            if need_outputs and gradient_windows is not None:
                sweep_backward(stream, linears, gradient_windows, curvature, seed, track)
        finally:
            stream.close()
    if is_main() and curvature.has_outputs:
        curvature.clean()
    return curvature


def _claim(folder: Path, identity: dict[str, Any]) -> Curvature:
    path = folder / INDEX
    if not path.exists():
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise RankwiseError("curvature", f"{folder} (no {INDEX} in it)", "a curvature folder, or a new name")
        write_json(path, identity)
        return Curvature(folder, identity)
    found = read_json(path)
    one_sided = 0 in (identity["gradient_samples"], found.get("gradient_samples"))
    skip = {"gradient_text", "gradient_samples", "seed"} if one_sided else set()
    for key, value in identity.items():
        if key not in skip and found.get(key) != value:
            reason = f"{folder} was made with {key} {found.get(key)!r}, not {value!r}"
            raise RankwiseError("curvature", reason, "use the same model, text, windows and seed, or a new folder")
    if one_sided and identity["gradient_samples"]:
        write_json(path, identity)  # input moments are there, output moments are to be added
        return Curvature(folder, identity)
    return Curvature(folder, found)


def hash_windows(windows: torch.Tensor) -> str:
    """16 hex digits that stand for these token ids."""
    return hashlib.sha256(windows.cpu().numpy().tobytes()).hexdigest()[:16]


def model_hash(model: Any) -> str:
    """Names, shapes, dtypes and a sample of every parameter: another model, another hash, in about a second."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        sample = parameter.detach().reshape(-1)[:: max(1, parameter.numel() // 256)].float()
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode() + sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
