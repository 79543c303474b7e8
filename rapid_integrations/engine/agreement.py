"""The question agreement of requests: which tokens measure it, and the values of prompts seen before.

Both prompts of a request end with the question and the text that the template puts after it. The
probabilities that both models give those tokens measure how far the drafter's context covers the question
(:func:`rapid_integrations.engine.decoding.transfer.question_agreement`). Reading them takes logits during the
prefill, so the result is remembered for equal prompts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from rapid_integrations.engine.cache.shared_prefill import Reader
from rapid_integrations.engine.decoding.transfer import question_agreement

MAX_ENDING_TOKENS = 64
"""Upper limit on the tokens that measure the agreement: a long question and the end of a template."""
MIN_COVERED = 0.5
"""From this agreement on, the drafter's context counts as covering the question."""
_MAX_REMEMBERED = 4096


class QuestionAgreements:
    """Question agreements by the prompts they were measured on, least recently used first out."""

    def __init__(self) -> None:
        self._values: OrderedDict[bytes, float] = OrderedDict()

    def get(self, key: bytes) -> float | None:
        """The remembered value for prompts with this :func:`digest`; ``None`` if there is none."""
        return self._values.get(key)

    def measure(self, key: bytes, target: Reader, drafter: Reader, known: float | None) -> float:
        """The agreement of a request whose prompts were read, which is remembered.

        Args:
            key: The prompts' :func:`digest`.
            target: The target's reader, with the probabilities of the prompt's last tokens.
            drafter: The drafter's reader, with the same.
            known: The value that was remembered when the request started, if any. Nothing was measured then.
        """
        value = question_agreement(target.ending_probs, drafter.ending_probs) if known is None else known
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > _MAX_REMEMBERED:
            self._values.popitem(last=False)
        return value


def digest(readers: Sequence[Reader]) -> bytes:
    """A key that is equal for equal prompts of target and drafter."""
    result = blake2b()
    for reader in readers:
        result.update(np.array([reader.prompt.size, reader.state.tokens[-1]], dtype=np.int64).data)
        result.update(reader.prompt.data)
    return result.digest()


def shared_ending(left: Sequence[int], right: Sequence[int]) -> int:
    """The number of tokens that measure the agreement of two prompts.

    Both prompts end with them. The first shared token is left out: the token before it differs, so its
    probabilities cannot be compared. Equal prompts give 0: a drafter that read the same text lacks nothing.
    """
    if left == right:
        return 0
    limit = min(MAX_ENDING_TOKENS + 1, len(left), len(right))
    pairs = zip(left[: -limit - 1 : -1], right[: -limit - 1 : -1], strict=True)
    num_equal = next((place for place, (one, other) in enumerate(pairs) if one != other), limit)
    return max(0, num_equal - 1)
