"""Text to tokens and tokens to text, where the text is not trusted and the tokens are not all there yet.

:func:`encode_plain` and :func:`encode_with_offsets` read a text as text only: nothing in it becomes a control
token. :class:`TextAssembler` turns tokens into text piece by piece and ends it at a stop string;
:func:`token_pieces` says afterwards which token added what.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from rapid_integrations._text_pieces import PieceCache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MARKUP = re.compile(r"[<\[].*[>\]]", re.DOTALL)
_PIPED = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)
_MAX_WINDOW_TOKENS = 32
_MAX_CHARACTER_TOKENS = 4  # a UTF-8 character has at most four bytes


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """The tokens of a tokenizer that steer a model and that no untrusted text may produce.

    These are the tokens marked special, less the unknown token, and markup that is only "added": ``<|…|>``
    tokens and whatever stands literally in the chat template (``<tool_call>``, ``<think>``). Added whitespace
    or HTML tokens, as Gemma has them, are ordinary text.

    Attributes:
        ids: Each control string's token id.
        strip: The control strings that swallow whitespace before (first) or after them (second).
        pattern: Matches any control string, the longest first; ``None`` where there is none.
        special_ids: Every id that decoding leaves out, the unknown token's included.
        lock: To be held while encoding: a fast tokenizer keeps its per-call settings in shared state.
        pieces: Of long texts that were encoded; the lock is theirs, too.
    """

    ids: dict[str, int]
    strip: dict[str, tuple[bool, bool]]
    pattern: re.Pattern[str] | None
    special_ids: frozenset[int]
    lock: threading.Lock
    pieces: PieceCache


_controls: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, ControlTokens]] = WeakKeyDictionary()
_controls_lock = threading.Lock()


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    """Return the control tokens of ``tokenizer``; worked out once, and again when its tokens change."""
    version = (len(tokenizer), tuple(tokenizer.all_special_tokens), tokenizer.chat_template)
    with _controls_lock:
        known = _controls.get(tokenizer)
        if known is None or known[0] != version:
            lock = known[1].lock if known else threading.Lock()
            known = (version, _find_controls(tokenizer, lock))
            _controls[tokenizer] = known
        return known[1]


def _find_controls(tokenizer: PreTrainedTokenizerBase, lock: threading.Lock) -> ControlTokens:
    template = str(tokenizer.chat_template or "")
    unknown = tokenizer.unk_token_id
    if unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        unknown = None  # GPT-2 names its end of text "unknown" as well; byte-level text never needs it
    ids: dict[str, int] = {}
    strip: dict[str, tuple[bool, bool]] = {}
    for token_id, token in tokenizer.added_tokens_decoder.items():
        text = token.content
        markup = bool(_PIPED.fullmatch(text) or (_MARKUP.fullmatch(text) and text in template))
        if text and token_id != unknown and (token.special or markup):
            ids[text] = token_id
            strip[text] = (token.lstrip, token.rstrip)
    longest_first = sorted(ids, key=len, reverse=True)
    return ControlTokens(
        ids=ids,
        strip=strip,
        pattern=re.compile("|".join(map(re.escape, longest_first))) if ids else None,
        special_ids=frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special),
        lock=lock,
        pieces=PieceCache(),
    )


def encode_plain(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Encode untrusted text: no control token comes out, whatever the text holds. Usable from any thread.

    Args:
        text: Any text; ``""`` gives no tokens.
        tokenizer: A transformers tokenizer.

    Returns:
        Token ids, without any begin- or end-of-sequence token.
    """
    if not text:
        return []
    controls = control_tokens(tokenizer)
    with controls.lock:
        ids = controls.pieces.encode(text, tokenizer, _encoded)
    forbidden = frozenset(controls.ids.values())
    if forbidden.isdisjoint(ids):
        return ids
    # Some tokenizers look control strings up as whole words, or match added tokens in spite of the setting. A
    # string that is cut in two is no longer one.
    pieces = _encode(_cut_control_strings(text, controls), tokenizer, controls)
    return [i for piece in pieces for i in piece if i not in forbidden]


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, controls: ControlTokens) -> list[list[int]]:
    with controls.lock:
        return _encoded(texts, tokenizer)


def _encoded(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )
    return list(encoded["input_ids"])


def _cut_control_strings(text: str, controls: ControlTokens) -> list[str]:
    assert controls.pattern is not None
    pattern = re.compile(controls.pattern.pattern, re.IGNORECASE)  # a normaliser may lowercase
    cuts = [match.start() + max(1, len(match.group()) // 2) for match in pattern.finditer(text)]
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True) if start < end]


def encode_with_offsets(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Where in ``text`` its tokens begin, for counting and cutting.

    Args:
        text: Any text, read as by :func:`encode_plain`.
        tokenizer: A transformers tokenizer. One without offsets is asked word by word, and the tokens of a
            word are taken to be equally long.

    Returns:
        Character offsets, one a token, never decreasing.
    """
    if not text:
        return []
    controls = control_tokens(tokenizer)
    if tokenizer.is_fast:
        with controls.lock:
            encoded = tokenizer(
                text, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False,
                return_offsets_mapping=True, verbose=False,
            )  # fmt: skip
        starts: list[int] = []
        latest = 0
        for start, _ in encoded["offset_mapping"]:
            latest = max(latest, start)
            starts.append(latest)
        return starts
    words = list(re.finditer(r"\s*\S+", text)) or list(re.finditer(r"\s+", text))
    starts = []
    for word, ids in zip(words, _encode([word.group() for word in words], tokenizer, controls), strict=True):
        count = max(1, len(ids))
        starts += (word.start() + len(word.group()) * i // count for i in range(count))
    return starts


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
