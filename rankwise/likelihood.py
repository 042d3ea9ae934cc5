"""lm-eval's language model around one in memory; what a question's choices have in common is run once."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from lm_eval.models.huggingface import HFLM

from rankwise.errors import RankwiseError
from rankwise.progress import Track, silent

Answer = tuple[float, bool]  # log-likelihood in nats; whether every token was the likeliest


@dataclass(frozen=True)
class Question:
    """A context and what may follow it.

    Args:
        context: token ids, at least one.
        places: where each continuation's answer belongs in the list of requests.
        endings: token ids of the continuations, each at least one.
    """

    context: tuple[int, ...]
    places: list[int]
    endings: list[list[int]]

    @property
    def size(self) -> tuple[int, int]:
        """What is padded in a batch: the continuations, many of them, before the contexts."""
        return max(map(len, self.endings)), len(self.context)


class SharedContext(HFLM):
    """`HFLM` that runs every context once and continues all its choices from the same cache.

    Answers are those of `HFLM`, with log-softmax and sums in fp32 whatever the model's dtype.

    Args:
        model: causal language model, on any device.
        tokenizer: its tokenizer.
        batch_size: continuations a batch (a question's are never parted).
        track: progress, one step a continuation.
        stderr: where progress goes while the caller keeps lm-eval's own bars from the screen.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, batch_size: int, track: Track = silent, stderr: TextIO | None = None
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self.track = track
        self.stderr = stderr or sys.stderr
        self.cut: list[int] = []  # requests whose context lost tokens at its start to fit the model
        self.truncated: Counter[str] = Counter()  # how many of them, by task

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[Answer]:
        """Answers to `(context, continuation)` requests, in their order."""
        with redirect_stderr(self.stderr):
            answers = list(super().loglikelihood(requests, disable_tqdm=True))
        self.truncated.update(requests[place].task_name for place in self.cut)
        return answers

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> list[Answer]:
        answers: list[Answer] = [(0.0, False)] * len(requests)
        questions = self._questions([(context, ending) for _, context, ending in requests])
        questions.sort(key=lambda question: question.size, reverse=True)  # like beside like; the dearest first
        with self.track("choices", len(requests)) as advance:
            for batch in _batches(questions, self.batch_size):
                places = [place for question in batch for place in question.places]
                for place, answer in zip(places, self._answer(batch), strict=True):
                    answers[place] = answer
                    advance()
        return answers

    def _questions(self, requests: Sequence[tuple[list[int], list[int]]]) -> list[Question]:
        """Requests of one context as one question; too long a context loses tokens at its start, as in lm-eval."""
        self.cut = []
        found: dict[tuple[int, ...], Question] = {}
        for place, (context, ending) in enumerate(requests):
            room = self.max_length + 1 - len(ending)  # the last token of a continuation is never run
            if not 0 < len(ending) <= self.max_length:
                raise RankwiseError("tasks", f"a choice of {len(ending)} tokens", f"1 to {self.max_length} are needed")
            if len(context) > room:
                self.cut.append(place)
            kept = tuple(context[-room:])
            question = found.setdefault(kept, Question(kept, [], []))
            question.places.append(place)
            question.endings.append(ending)
        return list(found.values())

    def _answer(self, batch: Sequence[Question]) -> Iterator[Answer]:
        endings = [ending for question in batch for ending in question.endings]
        lengths = [len(ending) for ending in endings]
        logits = self._logits(batch, endings)
        real = torch.arange(logits.shape[1])[None] < torch.tensor(lengths)[:, None]
        logits = logits[real.to(self.device)].float()  # [Σ lengths, vocabulary]
        targets = torch.tensor([token for ending in endings for token in ending], device=self.device)
        chosen = logits.gather(1, targets[:, None])[:, 0]
        nats = chosen - logits.logsumexp(-1)
        likeliest = chosen == logits.amax(-1)
        for part, greedy in zip(nats.split(lengths), likeliest.split(lengths), strict=True):
            yield float(part.sum()), bool(greedy.all())

    def _logits(self, batch: Sequence[Question], endings: Sequence[list[int]]) -> torch.Tensor:
        """`[continuations, longest continuation, vocabulary]`: what the model expects at each of their tokens.

        Contexts are padded on the left, as for generation; continuations on the right, where nothing sees it.
        """
        lengths = torch.tensor([len(question.context) for question in batch], device=self.device)
        ids = self._padded([question.context for question in batch], left=True)
        places = torch.arange(ids.shape[1], device=self.device) - (ids.shape[1] - lengths)[:, None]
        mask = (places >= 0).long()
        # Two positions, as indices: for one, or for a slice, torch multiplies bf16 on a CPU without its fast kernel.
        keep = torch.arange(max(ids.shape[1] - 2, 0), ids.shape[1], device=self.device)
        position = {"attention_mask": mask, "position_ids": places.clamp(min=0)}
        out = self.model(input_ids=ids, use_cache=True, logits_to_keep=keep, **position)
        owners = torch.tensor([i for i, question in enumerate(batch) for _ in question.endings], device=self.device)
        first = out.logits[owners, -1:]
        if max(map(len, endings)) == 1:
            return first
        cache = out.past_key_values
        cache.batch_select_indices(owners)
        ids = self._padded([ending[:-1] for ending in endings])
        places = lengths[owners, None] + torch.arange(ids.shape[1], device=self.device)
        mask = torch.cat([mask[owners], torch.ones_like(ids)], 1)
        rest = self.model(input_ids=ids, past_key_values=cache, attention_mask=mask, position_ids=places)
        return torch.cat([first, rest.logits], 1)

    def _padded(self, rows: Sequence[Sequence[int]], left: bool = False) -> torch.Tensor:
        """`[rows, longest]` int64, filled up with token 0."""
        width = max(map(len, rows))
        fill = [[0] * (width - len(row)) for row in rows]
        full = [[*f, *row] if left else [*row, *f] for f, row in zip(fill, rows, strict=True)]
        return torch.tensor(full, device=self.device)


def _batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    batch: list[Question] = []
    for question in questions:
        if batch and sum(len(q.endings) for q in batch) + len(question.endings) > size:
            yield batch
            batch = []
        batch.append(question)
    if batch:
        yield batch
