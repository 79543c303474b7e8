"""."""

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
    """Tokens in, text out that can no longer change; ends at a stop string.

    Special tokens leave no text, but for ``visible`` ones. Handed-out pieces join to the tokenizer's decoding
    of all tokens, however the tokens were split over calls. One exception: where a SentencePiece tokenizer
    spells bytes and a valid character is followed by an invalid byte in the same run, decoding at once would
    lose the character; here it stays.

    Args:
        tokenizer: A transformers tokenizer.
        stop: Stop strings, none of them empty. The one that begins earliest counts; it and what follows is
            dropped. An answer ends only when no stop string that begins earlier could still complete.
        visible: Special tokens that are text here, such as the markup of tool calls.
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
        """Everything handed out so far."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def feed(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens.

        Returns:
            New text that is final. Held back are incomplete characters and possible beginnings of a stop
            string.
        """
        if self.stopped or not token_ids:
            return ""
        return self._hand_out(self._stop.feed(self._detokenizer.feed(token_ids)))

    def flush(self) -> str:
        """Return what was held back, at the end; nothing after a stop string."""
        return self._hand_out(self._stop.feed(self._detokenizer.flush(), final=True))

    def _hand_out(self, text: str) -> str:
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
    """What each token adds to an answer's text.

    Args:
        token_ids: The answer's tokens.
        tokenizer: A transformers tokenizer.
        text: The answer as :class:`TextAssembler` gave it, perhaps ended by a stop string.
        visible: As in :class:`TextAssembler`.

    Returns:
        One piece a token, that join to ``text``: empty where a token leaves no text, begins a character that
        a later one completes, or stands behind the end. No pieces at all where ``text`` is not what these
        tokens spell.
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
    """Decodes a sliding window of tokens, so that a token costs the same early and late in an answer.

    The window keeps the tokens before the newest piece of text, since a piece's text depends on whether
    something precedes it (leading spaces, word suffixes).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, visible: Collection[str] = ()) -> None:
        self._tokenizer = tokenizer
        controls = control_tokens(tokenizer)
        self._special_ids = controls.special_ids.difference(controls.ids[text] for text in visible)
        self._window: list[int] = []
        self._newest = 0  # index in the window where the newest decoded piece begins
        self._handed_out = 0  # characters of the window's text

    def feed(self, token_ids: Sequence[int]) -> str:
        self._window += (i for i in token_ids if i not in self._special_ids)
        if self._newest == len(self._window):
            return ""
        whole = ""
        for unfinished in range(min(_MAX_CHARACTER_TOKENS, len(self._window) - self._newest)):
            end = len(self._window) - unfinished
            decoded = self._decode(self._window[:end])
            whole = whole or decoded
            # A replacement character at the end may be the beginning of a character.
            if not decoded.endswith(_REPLACEMENT):
                return self._hand_out(decoded, end)
        final = whole.rstrip(_REPLACEMENT)
        new = final[self._handed_out :]
        self._handed_out = max(self._handed_out, len(final))
        if len(self._window) > _MAX_WINDOW_TOKENS:
            new += self._settle(whole)
        return new

    def flush(self) -> str:
        new = self._decode(self._window)[self._handed_out :]
        self._handed_out += len(new)
        return new

    def _hand_out(self, decoded: str, end: int) -> str:
        """Return what is new in ``decoded``, the text of the window up to ``end``, and slide the window."""
        new = decoded[self._handed_out :]
        context = self._decode(self._window[self._newest : end]) if self._newest else ""
        if context:
            self._window = self._window[self._newest :]
            self._newest, self._handed_out = end - self._newest, len(context)
        else:  # tokens without text are no context for those to come
            self._newest, self._handed_out = end, max(self._handed_out, len(decoded))
        return new

    def _settle(self, decoded: str) -> str:
        """Hand out the window's text but for its last few tokens: bytes that never became a character.

        Possible where the text before and after the cut adds up, since a cut further away than a character's
        bytes does not depend on tokens to come.
        """
        for cut in range(
            len(self._window) - _MAX_CHARACTER_TOKENS, len(self._window) - _MAX_WINDOW_TOKENS // 2, -1
        ):
            before, after = self._decode(self._window[:cut]), self._decode(self._window[cut:])
            if after and before + after == decoded:
                new = before[self._handed_out :]
                done = max(0, self._handed_out - len(before))
                self._window, self._newest, self._handed_out = self._window[cut:], 0, done
                return new
        return ""

    def _decode(self, token_ids: list[int]) -> str:
        # What is to be skipped is not in the window.
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
            text: What follows the text taken so far.
            final: No text comes after this; nothing is held back.

        Returns:
            Text that stands before any stop string there is or may come to be.
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
        """Where in ``text`` a stop string begins that the text ends within; each stop string's earliest."""
        starts = []
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:length]):
                    starts.append(len(text) - length)
                    break
        return starts
