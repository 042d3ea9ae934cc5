"""What the dense model says of every token, on disk: its likeliest next tokens, so that it need not stay in memory."""

from pathlib import Path
from typing import Any

import torch

from rankwise.alloc.curvature import hash_windows, model_hash
from rankwise.files import open_tensors, write_tensors
from rankwise.progress import Track, silent

KEPT = 64  # likeliest tokens a position; the rest of the vocabulary counts as one more outcome


class Teacher:
    """Log-probabilities of the dense model, one file a window; a file says which window and model it is of.

    Args:
        folder: where the files are, or will be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, number: int) -> Path:
        """The file of window `number`."""
        return self.folder / f"teacher_{number:05d}.safetensors"

    @torch.no_grad()
    def listen(self, model: Any, windows: torch.Tensor, *, track: Track = silent) -> None:
        """Run the dense model over `windows [N, T]`, or over those that are not done yet."""
        device, known = next(model.parameters()).device, model_hash(model)
        with track("teacher", len(windows)) as advance:
            for number, window in enumerate(windows):
                identity = {"model": known, "window": hash_windows(window)}
                if not self._is_of(number, identity):
                    logits = model(input_ids=window[None].to(device), use_cache=False).logits[0].float()
                    top, index = logits.log_softmax(-1).topk(min(KEPT, logits.shape[-1]), dim=-1)
                    write_tensors(self.file(number), {"logp": top, "index": index.int()}, identity)
                advance()

    def _is_of(self, number: int, identity: dict[str, str]) -> bool:
        """True if the window's file is there and was made for this model and these tokens."""
        if not self.file(number).exists():
            return False
        with open_tensors(self.file(number)) as file:
            return bool(file.metadata() == identity)

    def divergence(self, number: int, logits: torch.Tensor) -> torch.Tensor:
        """Mean Kullback-Leibler divergence of the student from the teacher over a window, nats a token.

        Args:
            number: the window.
            logits: `[T, vocab]` of the student, any float dtype.

        Returns:
            A scalar; what lies outside the teacher's likeliest tokens counts as one outcome, so it is a lower bound
            of the divergence over the whole vocabulary.
        """
        with open_tensors(self.file(number)) as file:
            logp = file.get_tensor("logp").to(logits.device).float()
            index = file.get_tensor("index").to(logits.device).long()
        student = logits.float()
        log_q = student.gather(-1, index) - student.logsumexp(-1, keepdim=True)
        p = logp.exp()
        loss = (p * (logp - log_q)).sum(-1)
        if index.shape[-1] < logits.shape[-1]:
            rest = (1 - p.sum(-1)).clamp_min(1e-6)
            left = (1 - log_q.exp().sum(-1)).clamp_min(1e-6)
            loss = loss + rest * (rest.log() - left.log())
        return loss.mean()
