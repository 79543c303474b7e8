"""The engine's interface to structured output: which tokens may follow a given beginning of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class TokenConstraint(Protocol):
    """Limits the answer of one request.

    The allowed tokens are a function of the answer's tokens alone. Any state of an implementation is a cache
    of that function, so a rejected draft or a failed round leaves nothing to undo.
    """

    def allowed(self, tokens: Sequence[int], count: int) -> Tensor:
        """The tokens that may come next.

        Called in the engine's worker thread only, with a beginning of the answer that was itself allowed.

        Args:
            tokens: The answer so far, draft tokens included.
            count: Number of positions, at least one. The last row is for the position after all of
                ``tokens``, the row before it for the position before the last token, and so on.

        Returns:
            ``[count, vocab]`` bool, with the engine's vocabulary. A row without true values is a dead end; a
            row after an end-of-sequence token is all true.
        """
        ...
