"""What an answer may consist of, as the engine sees it: the tokens that may follow any beginning of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class TokenConstraint(Protocol):
    """Limits the answer of one request.

    What may follow is a function of the answer's tokens alone. State that an implementation keeps is a cache
    of that function, so that a rejected draft, or a round that failed, leaves nothing to undo.
    """

    def allowed(self, tokens: Sequence[int], count: int) -> Tensor:
        """The tokens that may come next.

        Called in the engine's worker thread only, with a beginning of the answer that was itself allowed.

        Args:
            tokens: The answer so far, draft tokens included.
            count: How many positions are asked for, at least one: the last is behind all of ``tokens``, the
                one before it behind all but the last of them, and so on.

        Returns:
            ``[count, vocab]`` bool, vocab being the engine's. A row that is false throughout is a dead end;
            one behind an end-of-sequence token is true throughout.
        """
        ...
