"""Models whose conditional distributions are tables, for tests that need the closed form.

A :class:`TableModel` has the interface of ``CausalModel``: it reads ragged steps over real ``SequenceKV``
caches and advances them. It stores the tokens as keys, so that a rollback that is off by one, or a mix-up of
caches, changes its logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from rapid_integrations.config import SamplingParams, SpeculationParams
from rapid_integrations.engine.cache.model_state import ModelState
from rapid_integrations.engine.cache.sequence_kv import SequenceKV
from rapid_integrations.engine.decoding.draft_length import AcceptanceByConfidence, DraftLength
from rapid_integrations.engine.decoding.pass_costs import RoundCosts
from rapid_integrations.engine.decoding.round import SpeculativeDecoder
from rapid_integrations.engine.decoding.sampling import Sampler
from rapid_integrations.engine.decoding.sequence import SequenceState
from rapid_integrations.engine.model.batch_entry import Step
from rapid_integrations.engine.stats import RapidStats

Hook = Callable[[Sequence[Step]], None]


class TableModel:
    """Logits are ``table[second to last token, last token]``.

    Args:
        table: ``[vocab, vocab, vocab]`` float32 logits.
        name: Its name in messages.
        eos: End-of-sequence tokens.
        context_window: As a CausalModel's.
        before_pass: Called with the steps of every pass before anything is read; may raise.
    """

    def __init__(
        self,
        table: Tensor,
        *,
        name: str = "table",
        eos: Iterable[int] = (),
        context_window: int = 4096,
        before_pass: Hook | None = None,
    ) -> None:
        self.table = table
        self.name = name
        self.vocab_size = table.shape[-1]
        self.context_window = context_window
        self.device = torch.device("cpu")
        self.eos_token_ids = frozenset(eos)
        self.before_pass = before_pass
        self.passes: list[list[int]] = []

    def shares_cache_with(self, other: object) -> bool:
        """Its keys hold tokens, without positions, so that a copy of them would be a reading."""
        return False

    def forward(self, steps: Sequence[Step]) -> Tensor:
        if self.before_pass is not None:
            self.before_pass(steps)
        self.passes.append([len(step.tokens) for step in steps])
        rows = []
        for step in steps:
            new = torch.tensor(step.tokens, dtype=torch.float32)[None, :, None]
            keys, values = step.cache.write(0, new, -new)
            assert torch.equal(keys, -values)
            step.cache.length += len(step.tokens)
            history = [0, *keys[0, :, 0].long().tolist()]
            for end in range(len(history) - step.num_logits, len(history)):
                rows.append(self.row(history[: end + 1]))
        return torch.stack(rows) if rows else self.table.new_empty(0, self.vocab_size)

    def row(self, history: list[int]) -> Tensor:
        """The logits after the tokens of ``history``, a 0 before the first."""
        return self.table[history[-2], history[-1]]


def random_table(vocab: int, seed: int, scale: float = 1.5) -> Tensor:
    """Independent normal logits."""
    return scale * torch.randn(vocab, vocab, vocab, generator=torch.Generator().manual_seed(seed))


def decoding(
    target_prompt: Sequence[int],
    drafter_prompt: Sequence[int] | None,
    sampling: SamplingParams,
    speculation: SpeculationParams,
    *,
    eos: Iterable[int] = (),
) -> SequenceState:
    """The state of a request before its first round, as the scheduler makes it."""
    return SequenceState(
        target=ModelState(list(target_prompt), SequenceKV(4)),
        drafter=None if drafter_prompt is None else ModelState(list(drafter_prompt), SequenceKV(4)),
        sampler=Sampler(sampling),
        sampling=sampling,
        speculation=speculation,
        draft_length=DraftLength(
            speculation.num_draft_tokens,
            speculation.max_draft_tokens,
            RoundCosts(),
            AcceptanceByConfidence(),
        ),
        eos_token_ids=frozenset(eos),
        stats=RapidStats(),
    )


def decode_all(decoder: SpeculativeDecoder, batch: Sequence[SequenceState]) -> list[list[int]]:
    """Decode until every sequence has all of its tokens."""
    outputs: list[list[int]] = [[] for _ in batch]
    while True:
        running = [
            (sequence, output)
            for sequence, output in zip(batch, outputs, strict=True)
            if len(output) < sequence.sampling.max_new_tokens
            and not (output and output[-1] in sequence.eos_token_ids)
        ]
        if not running:
            return outputs
        for (_, output), tokens in zip(running, decoder.round([s for s, _ in running]), strict=True):
            output.extend(tokens)
