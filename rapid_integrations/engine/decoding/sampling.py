"""From logits to distributions, and the random numbers of one request.

Logits processors are transformers' own. They act on both models' logits before p, q and p̂ are formed.

Random numbers belong to *output positions*: position ``i`` of a request owns three uniforms, which draw the
draft token, accept it, and draw its correction. The token at a position therefore does not depend on the
number of draft tokens, on the boundaries of rounds, or on other requests in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rapid_integrations.config import SamplingParams

DRAFT, ACCEPT, CORRECT = range(3)
"""The purposes of a position's three uniforms."""


class Sampler:
    """One request's logits processors and random numbers.

    Args:
        params: The request's sampling parameters.
        device: The device of the uniforms.
    """

    def __init__(self, params: SamplingParams, device: torch.device | str = "cpu") -> None:
        self.params = params
        self.greedy = params.greedy
        self._penalty = (
            None
            if params.repetition_penalty == 1
            else RepetitionPenaltyLogitsProcessor(penalty=float(params.repetition_penalty))
        )
        self._warpers = LogitsProcessorList()
        if not self.greedy:
            # The order of transformers' generate().
            if params.temperature != 1:
                self._warpers.append(TemperatureLogitsWarper(float(params.temperature)))
            if params.top_k is not None:
                self._warpers.append(TopKLogitsWarper(top_k=params.top_k))
            if params.top_p is not None and params.top_p < 1:
                self._warpers.append(TopPLogitsWarper(top_p=float(params.top_p)))
            if params.min_p:
                self._warpers.append(MinPLogitsWarper(min_p=float(params.min_p)))
        self._uniforms = torch.empty(0, 3)
        if not self.greedy:
            generator = torch.Generator()
            if params.seed is None:
                generator.seed()
            else:
                generator.manual_seed(params.seed)
            shape = (params.max_new_tokens, 3)
            self._uniforms = torch.rand(shape, generator=generator, dtype=torch.float64).to(device)

    def process(
        self,
        logits: Tensor,
        prefix: Sequence[int],
        draft_tokens: Sequence[int] = (),
        allowed: Tensor | None = None,
    ) -> Tensor:
        """Apply the logits processors.

        Args:
            logits: ``[positions, vocab]`` float32. The last row predicts the token after
                ``prefix + draft_tokens``; each row before it the token one position earlier.
            prefix: The tokens before the draft, prompt included. Only the repetition penalty reads them.
            draft_tokens: The tokens between the prefix and the last row.
            allowed: ``[positions, vocab]`` bool, the tokens that a constraint allows. The others become
                ``-inf`` before the warpers, so that ``top_k`` and the like choose among allowed tokens.

        Returns:
            ``[positions, vocab]`` float32.
        """
        if self._penalty is not None:
            tokens = [*prefix, *draft_tokens]
            rows = []
            for length, row in enumerate(logits, start=len(tokens) + 1 - logits.shape[0]):
                seen = torch.tensor([tokens[:length]], device=logits.device)
                rows.append(self._penalty(seen, row[None].clone()))
            logits = torch.cat(rows)
        if allowed is not None:
            logits = logits.masked_fill(~allowed.to(logits.device), -torch.inf)
        if self._warpers:
            # None of the warpers reads its first argument, the tokens.
            no_tokens = torch.empty(logits.shape[0], 0, dtype=torch.long)
            logits = self._warpers(no_tokens, logits.clone())  # type: ignore[arg-type]  # wants FloatTensor
        return logits

    def uniforms(self, position: int, count: int, purpose: int) -> Tensor:
        """The random numbers of output positions ``position … position + count - 1``, ``[count]`` float64."""
        return self._uniforms[position : position + count, purpose]
