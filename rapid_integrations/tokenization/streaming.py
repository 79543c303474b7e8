"""Turn tokens into text while they arrive, and end the text at a stop string.

:class:`TextAssembler` joins a detokenizer and a :class:`StopScanner`: it takes tokens and returns only text
that later tokens cannot change. :func:`token_pieces` says, once an answer is complete, which token added
which text.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from rapid_integrations.tokenization.encoding import control_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_WINDOW_TOKENS = 32
_MAX_CHARACTER_TOKENS = 4  # a UTF-8 character has at most four bytes


class TextAssembler:
    """Takes tokens and returns text that can no longer change; ends at a stop string.

    Special tokens have no text, except those in ``visible``. The returned pieces join to the tokenizer's
    decoding of all tokens, however the tokens were split over calls. There is one exception: if a
    SentencePiece tokenizer falls back to bytes, and an invalid byte follows a valid character in the same
    run, decoding the whole run would lose the character; the assembler keeps it.

    Args:
        tokenizer: A transformers tokenizer.
        stop: Stop strings, none of them empty. The text ends at the one that begins earliest; that string and
            all text after it are dropped. The text ends only when no stop string that begins earlier could
            still complete.
        visible: Special tokens that count as text, such as the markup of tool calls.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        *,
        visible: Collection[str] = (),
    ) -> None:
        self._detokenizer = _Detokenizer(tokenizer, visible)
        self._stop = StopScanner(stop)
        self._pieces: list[str] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stop.stopped

    @property
    def text(self) -> str:
        """All text returned so far."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def feed(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens.

        Args:
            token_ids: The tokens after those taken so far.

        Returns:
            New text that is final. Incomplete characters and possible beginnings of a stop string are held
            back.
        """
        if self.stopped or not token_ids:
            return ""
        return self._record(self._stop.feed(self._detokenizer.feed(token_ids)))

    def flush(self) -> str:
        """Return, after the last token, the text that was held back; ``""`` after a stop string."""
        return self._record(self._stop.feed(self._detokenizer.flush(), final=True))

    def _record(self, text: str) -> str:
        if text:
            self._pieces.append(text)
        return text


def token_pieces(
    token_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    visible: Collection[str] = (),
) -> tuple[str, ...]:
    """Split the text of an answer into the piece that each token added.

    Args:
        token_ids: The answer's tokens.
        tokenizer: A transformers tokenizer.
        text: The answer as :class:`TextAssembler` returned it, possibly ended by a stop string.
        visible: As in :class:`TextAssembler`.

    Returns:
        One piece per token; together they are ``text``. A piece is empty if its token has no text, begins a
        character that a later token completes, or comes after the end of ``text``. Without any piece if the
        tokens do not decode to ``text``.
    """
    assembler = TextAssembler(tokenizer, visible=visible)
    pieces = [assembler.feed([token]) for token in token_ids]
    if pieces:
        pieces[-1] += assembler.flush()
    if not "".join(pieces).startswith(text):
        return ()
    remaining = len(text)
    for index, piece in enumerate(pieces):
        pieces[index] = piece[:remaining]
        remaining -= len(pieces[index])
    return tuple(pieces)


class _Detokenizer:
    """Decodes a sliding window of tokens, so that the cost of a token does not grow with the answer.

    The window keeps the tokens of the previous piece of text, because the text of a piece depends on whether
    another precedes it (leading spaces, word suffixes).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, visible: Collection[str] = ()) -> None:
        self._tokenizer = tokenizer
        controls = control_tokens(tokenizer)
        self._special_ids = controls.special_ids.difference(controls.ids[text] for text in visible)
        self._window: list[int] = []
        self._newest = 0  # index in the window where the newest decoded piece begins
        self._num_emitted = 0  # characters of the window's text that were returned

    def feed(self, token_ids: Sequence[int]) -> str:
        self._window += (i for i in token_ids if i not in self._special_ids)
        if self._newest == len(self._window):
            return ""
        whole = ""
        for num_omitted in range(min(_MAX_CHARACTER_TOKENS, len(self._window) - self._newest)):
            end = len(self._window) - num_omitted
            decoded = self._decode(self._window[:end])
            whole = whole or decoded
            # A replacement character at the end may be an incomplete character.
            if not decoded.endswith(_REPLACEMENT):
                return self._emit(decoded, end)
        final = whole.rstrip(_REPLACEMENT)
        new = final[self._num_emitted :]
        self._num_emitted = max(self._num_emitted, len(final))
        if len(self._window) > _MAX_WINDOW_TOKENS:
            new += self._settle(whole)
        return new

    def flush(self) -> str:
        new = self._decode(self._window)[self._num_emitted :]
        self._num_emitted += len(new)
        return new

    def _emit(self, decoded: str, end: int) -> str:
        """Return the new part of ``decoded``, the text of the window up to ``end``, and slide the window."""
        new = decoded[self._num_emitted :]
        context = self._decode(self._window[self._newest : end]) if self._newest else ""
        if context:
            self._window = self._window[self._newest :]
            self._newest, self._num_emitted = end - self._newest, len(context)
        else:  # tokens without text give no context to the next ones, so earlier ones stay
            self._newest, self._num_emitted = end, max(self._num_emitted, len(decoded))
        return new

    def _settle(self, decoded: str) -> str:
        """Return the text of all but the last few tokens of a window full of invalid bytes.

        A cut is valid if the texts before and after it join to the whole text. At a distance from the end of
        more tokens than a character has bytes, later tokens cannot change the text before the cut.
        """
        for cut in range(
            len(self._window) - _MAX_CHARACTER_TOKENS, len(self._window) - _MAX_WINDOW_TOKENS // 2, -1
        ):
            before, after = self._decode(self._window[:cut]), self._decode(self._window[cut:])
            if after and before + after == decoded:
                new = before[self._num_emitted :]
                already_emitted = max(0, self._num_emitted - len(before))
                self._window, self._newest, self._num_emitted = self._window[cut:], 0, already_emitted
                return new
        return ""

    def _decode(self, token_ids: list[int]) -> str:
        # The window contains no special token that must be skipped.
        return str(
            self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )


class StopScanner:
    """Passes text through until a stop string begins in it.

    Args:
        stop: Non-empty strings.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def feed(self, text: str, *, final: bool = False) -> str:
        """Take more text.

        Args:
            text: The text after that taken so far.
            final: Whether this is the end of the text, so that nothing is held back.

        Returns:
            Text that precedes every stop string, including one that later text might complete.
        """
        if self.stopped:
            return ""
        text = self._held + text
        complete = min((start for stop in self._stop if (start := text.find(stop)) >= 0), default=len(text))
        possible = len(text) if final else min(self._possible_starts(text), default=len(text))
        self.stopped = complete < len(text) and complete <= possible
        end = min(complete, possible)
        self._held = "" if self.stopped or final else text[end:]
        return text[:end]

    def _possible_starts(self, text: str) -> list[int]:
        """Return the earliest offset of each stop string whose beginning is the end of ``text``."""
        starts = []
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:length]):
                    starts.append(len(text) - length)
                    break
        return starts
