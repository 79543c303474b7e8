"""Constraints that keep an answer to a JSON schema, a regular expression or one of several choices.

llguidance (extra ``structured``) parses the answer and computes which tokens may come next. This module
writes the grammars for it and wraps its matchers as constraints of the engine.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rapid_integrations.errors import ConfigurationError, UnsupportedModelError
from rapid_integrations.structured.output_format import OutputFormat
from rapid_integrations.structured.vocabulary import Vocabulary, vocabulary_of

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

# Whitespace between JSON tokens: none, one space, or a new line with indentation. Without a limit, a model
# could write whitespace forever.
_JSON_SPACE = r"[ ]?|\n[ ]{0,24}"
_JSON_OPTIONS = {
    "whitespace_pattern": _JSON_SPACE,
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,  # an unsupported keyword is an error
}
_MAX_GRAMMARS = 32
# A round of decoding needs the row of each draft position twice: when the token is drafted, and when the
# draft is verified. The cache of rows therefore holds more than one draft.
_MAX_ROWS = 128


def can_constrain() -> bool:
    """Whether llguidance is installed."""
    return find_spec("llguidance") is not None


class OutputConstraints:
    """Makes the constraints for the answers of one target, and caches compiled grammars. Thread-safe.

    Args:
        tokenizer: The target's tokenizer.
        eos_token_ids: The tokens that end an answer.
        vocab_size: The engine's vocabulary, padding included.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: frozenset[int], vocab_size: int
    ) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._matchers: OrderedDict[OutputFormat, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def make(self, output_format: OutputFormat, *, tool: str | None = None) -> GrammarConstraint:
        """A constraint for one answer.

        Args:
            output_format: The format of the answer; not empty.
            tool: The name of the tool whose arguments the format describes, if any, for error messages.

        Raises:
            ConfigurationError: The format is not supported, or llguidance is not installed.
            UnsupportedModelError: The model has no end-of-sequence token, or the text of its tokens depends
                on their position.
        """
        if not can_constrain():
            raise ConfigurationError(
                "json_schema, regex and choices need llguidance, which is not installed: "
                "pip install 'rapid-integrations[structured]'."
            )
        if not self._eos_token_ids:
            raise UnsupportedModelError(
                "the model has no end-of-sequence token, so an answer of a given format could not end: "
                "set eos_token_id in its generation config."
            )
        with self._lock:
            matcher = self._matchers.get(output_format)
            if matcher is None:
                vocabulary = vocabulary_of(self._tokenizer, self._eos_token_ids)
                try:
                    matcher = self._matchers[output_format] = _compile(output_format, vocabulary)
                except _FormatError as error:
                    raise _configuration_error(output_format, tool, str(error)) from None
                if len(self._matchers) > _MAX_GRAMMARS:
                    self._matchers.popitem(last=False)
            self._matchers.move_to_end(output_format)
            return GrammarConstraint(matcher.deep_copy(), self._eos_token_ids, self._vocab_size)


class GrammarConstraint:
    """A :class:`~rapid_integrations.engine.decoding.constraint.TokenConstraint` that follows a grammar.

    Args:
        matcher: A matcher in its initial state; a copy of it is advanced and rolled back.
        eos_token_ids: The tokens that end an answer.
        vocab_size: The engine's vocabulary. Tokens beyond the tokenizer's are not allowed.
    """

    def __init__(self, matcher: LLMatcher, eos_token_ids: frozenset[int], vocab_size: int) -> None:
        self._initial = matcher
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._matcher = matcher.deep_copy()
        self._consumed: list[int] = []  # the tokens in the matcher's state
        # Rows of one bit per token of the vocabulary, by the number of tokens before the position
        self._rows: dict[int, NDArray[np.uint8]] = {}

    def allowed(self, tokens: Sequence[int], count: int) -> Tensor:
        """Which tokens may come next at the last ``count`` positions; see the protocol."""
        rows = [self._row(list(tokens[:end])) for end in range(len(tokens) - count + 1, len(tokens) + 1)]
        bits = np.unpackbits(np.stack(rows), axis=1, count=self._vocab_size, bitorder="little")
        return torch.from_numpy(bits).view(torch.bool)

    def _row(self, tokens: list[int]) -> NDArray[np.uint8]:
        if tokens and tokens[-1] in self._eos_token_ids:
            return ~self._empty_row()
        # Advance the matcher from the longest common prefix of its state and the tokens.
        same = min(len(tokens), len(self._consumed))
        while self._consumed[:same] != tokens[:same]:
            same -= 1
        if same == len(tokens) and (cached := self._rows.get(same)) is not None:
            return cached
        # llguidance does not roll back end-of-sequence tokens, so they are never consumed.
        if not self._matcher.rollback(len(self._consumed) - same):
            self._matcher, same = self._initial.deep_copy(), 0
        self._matcher.consume_tokens(tokens[same:])
        self._consumed = tokens
        self._rows = {at: row for at, row in self._rows.items() if len(tokens) - _MAX_ROWS < at <= same}
        row = self._rows[len(tokens)] = self._compute()
        return row

    def _empty_row(self) -> NDArray[np.uint8]:
        return np.zeros(-(-self._vocab_size // 8), dtype=np.uint8)

    def _compute(self) -> NDArray[np.uint8]:
        """The row for the matcher's state."""
        row = self._empty_row()
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)[: len(row)]
        if self._matcher.is_error():
            # The text is a dead end, or the grammar exceeds a limit. A matcher stays in its error state.
            self._matcher, self._consumed = self._initial.deep_copy(), []
            return row
        row[: len(bits)] = bits
        return row


def _compile(output_format: OutputFormat, vocabulary: Vocabulary) -> LLMatcher:
    from llguidance import LLMatcher

    grammar = _grammar(output_format, drops_first_space=vocabulary.drops_first_space)
    if not vocabulary.canonical:
        # Forced text would have to be tokenized, which this vocabulary cannot do.
        grammar = f'%llguidance {{ "no_forcing": true }}\n{grammar}'
    matcher = LLMatcher(vocabulary.tokenizer, grammar, log_level=0)
    if matcher.is_error():
        raise _FormatError(matcher.get_error())
    matcher.compute_bitmask()
    if matcher.is_error() or (matcher.is_stopped() and not matcher.is_accepting()):
        raise _FormatError("no text of this model's vocabulary matches")
    return matcher


def _grammar(output_format: OutputFormat, *, drops_first_space: bool) -> str:
    """The Lark grammar of an output format.

    If decoding drops a leading space, the grammar describes the text before that space is dropped.
    """
    from llguidance import LLMatcher, regex_to_lark

    if output_format.json_schema is not None:
        schema = json.loads(output_format.json_schema)
        if "x-guidance" in schema:
            raise _FormatError("it has 'x-guidance', which is reserved")
        # A leading space does not change the meaning of JSON, and models write one after a colon.
        return f"start: / ?/ answer\nanswer: %json {json.dumps({**schema, 'x-guidance': _JSON_OPTIONS})}"
    if output_format.regex is not None:
        # Check the pattern alone first: an invalid pattern might become a valid one inside a grammar.
        if error := LLMatcher.validate_grammar(LLMatcher.grammar_from_regex(output_format.regex)):
            raise _FormatError(error)
        # \d is [0-9]: Unicode's other digits differ between Python's tables and llguidance's.
        answer = f"ANSWER: /{regex_to_lark(output_format.regex or '(?:)', use_ascii='d')}/"
        if not drops_first_space:
            return f"start: ANSWER\n{answer}"
        return f'start: " " ANSWER | BARE\n{answer}\nBARE: ANSWER & /([^ ](.|\\n)*)?/'
    texts = list(output_format.choices or ())
    if drops_first_space:
        texts = [f" {text}" for text in texts] + [text for text in texts if not text.startswith(" ")]
    return "start: " + " | ".join(map(json.dumps, texts))


# Error messages quote the beginning and the end of longer messages of llguidance.
_MAX_QUOTED_CHARS = 400


class _FormatError(Exception):
    """llguidance does not support a format; the message is its reason."""


def _configuration_error(output_format: OutputFormat, tool: str | None, message: str) -> ConfigurationError:
    # After the reason, llguidance lists the parser's state or the numbered lines of the grammar.
    reason = re.split(r"\n<state>|\n +\d+ \| ", message)[0].strip()
    if len(reason) > _MAX_QUOTED_CHARS:
        reason = f"{reason[: _MAX_QUOTED_CHARS // 2]} … {reason[-_MAX_QUOTED_CHARS // 2 :]}"
    if tool is not None:
        return ConfigurationError(
            f"the schema of the tool {tool!r}, which must be called, is not supported: {reason}. Change "
            "it, or leave the choice to the model and check the call instead."
        )
    name = next(
        name for name in ("json_schema", "regex", "choices") if getattr(output_format, name) is not None
    )
    return ConfigurationError(
        f"{name} is not supported: {reason}. Change it, or give {name}=None and check the answer instead."
    )
