"""Streaming detokenization: tokens to text that is final, stop strings, and the text of each token."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from rapid_integrations.tokenization.encoding import control_tokens

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_WINDOW_TOKENS = 32
_MAX_CHARACTER_TOKENS = 4  # a UTF-8 character has at most four bytes


class TextAssembler:
    """Turns tokens into text that can no longer change, up to a stop string.

    Special tokens give no text, except ``visible`` ones. The concatenated pieces equal the tokenizer's
    decoding of all tokens, however the tokens are divided into calls. One exception: if a SentencePiece
    tokenizer spells bytes and a valid character is followed by an invalid byte in the same run, decoding all
    tokens at once would lose the character; here it is kept.

    Args:
        tokenizer: A transformers tokenizer.
        stop: Stop strings, not empty. The one that begins first applies; it and the text after it are
            dropped. The text ends only when no stop string that begins earlier can still complete.
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
        """Add the next tokens.

        Returns:
            New final text. Incomplete characters and possible beginnings of a stop string are held back.
        """
        if self.stopped or not token_ids:
            return ""
        return self._emit(self._stop.feed(self._detokenizer.feed(token_ids)))

    def flush(self) -> str:
        """The text that was held back, at the end of the answer; none after a stop string."""
        return self._emit(self._stop.feed(self._detokenizer.flush(), final=True))

    def _emit(self, text: str) -> str:
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
    """The text that each token adds to an answer.

    Args:
        token_ids: The answer's tokens.
        tokenizer: A transformers tokenizer.
        text: The answer as :class:`TextAssembler` returned it, possibly ended by a stop string.
        visible: As in :class:`TextAssembler`.

    Returns:
        One piece for each token, whose concatenation is ``text``. A piece is empty if the token gives no
        text, begins a character that a later token completes, or comes after the end. No pieces if ``text``
        does not match the tokens.
    """
    assembler = TextAssembler(tokenizer, visible=visible)
    pieces = [assembler.feed([token]) for token in token_ids]
    if pieces:
        pieces[-1] += assembler.flush()
    if not "".join(pieces).startswith(text):
        return ()
    left = len(text)
    for index, piece in enumerate(pieces):
        pieces[index] = piece[:left]
        left -= len(pieces[index])
    return tuple(pieces)


class _Detokenizer:
    """Decodes a sliding window of tokens, so that the cost of a token does not grow with the answer.

    The window includes tokens before the newest piece of text, because the text of a piece depends on whether
    another one precedes it (leading spaces, word suffixes).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, visible: Collection[str] = ()) -> None:
        self._tokenizer = tokenizer
        controls = control_tokens(tokenizer)
        self._special_ids = controls.special_ids.difference(controls.ids[text] for text in visible)
        self._window: list[int] = []
        self._newest = 0  # start of the newest decoded piece, as an index in the window
        self._num_emitted = 0  # characters of the window's text that were returned

    def feed(self, token_ids: Sequence[int]) -> str:
        self._window += (i for i in token_ids if i not in self._special_ids)
        if self._newest == len(self._window):
            return ""
        whole = ""
        for unfinished in range(min(_MAX_CHARACTER_TOKENS, len(self._window) - self._newest)):
            end = len(self._window) - unfinished
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
        """The new text in ``decoded``, the text of the window up to ``end``; slides the window."""
        new = decoded[self._num_emitted :]
        context = self._decode(self._window[self._newest : end]) if self._newest else ""
        if context:
            self._window = self._window[self._newest :]
            self._newest, self._num_emitted = end - self._newest, len(context)
        else:  # tokens without text give no context for later ones
            self._newest, self._num_emitted = end, max(self._num_emitted, len(decoded))
        return new

    def _settle(self, decoded: str) -> str:
        """Emit the window's text except its last few tokens: bytes that never became a character.

        This is possible at a cut where the texts before and after it add up. A cut that is further from the
        end than the bytes of a character does not depend on later tokens.
        """
        for cut in range(
            len(self._window) - _MAX_CHARACTER_TOKENS, len(self._window) - _MAX_WINDOW_TOKENS // 2, -1
        ):
            before, after = self._decode(self._window[:cut]), self._decode(self._window[cut:])
            if after and before + after == decoded:
                new = before[self._num_emitted :]
                done = max(0, self._num_emitted - len(before))
                self._window, self._newest, self._num_emitted = self._window[cut:], 0, done
                return new
        return ""

    def _decode(self, token_ids: list[int]) -> str:
        # Special tokens are not in the window.
        return str(
            self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )


class StopScanner:
    """Passes text through up to the first stop string.

    Args:
        stop: Non-empty strings.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def feed(self, text: str, *, final: bool = False) -> str:
        """Add text.

        Args:
            text: The text after the text added so far.
            final: Whether this is the last text; nothing is then held back.

        Returns:
            The text before any complete or possible stop string.
        """
        if self.stopped:
            return ""
        text = self._held + text
        found = min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=len(text))
        held = len(text) if final else min(self._may_begin(text), default=len(text))
        self.stopped = found < len(text) and found <= held
        end = min(found, held)
        self._held = "" if self.stopped or final else text[end:]
        return text[:end]

    def _may_begin(self, text: str) -> list[int]:
        """The start of each stop string that the end of ``text`` may begin; the earliest for each."""
        starts = []
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:length]):
                    starts.append(len(text) - length)
                    break
        return starts
