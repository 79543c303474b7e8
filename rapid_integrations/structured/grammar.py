"""Turn an output format into a constraint of the engine.

llguidance (installed by the extra ``structured``) parses an answer while it is generated and computes which
tokens may follow. This module writes its grammars for JSON schemas, regular expressions and choices, and
adapts its matchers to the engine's ``TokenConstraint``.
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

# Between the tokens of JSON: nothing, one space, or a line break with its indentation. Without a limit, a
# model could write whitespace without end.
_JSON_SPACE = r"[ ]?|\n[ ]{0,24}"
_JSON_OPTIONS = {
    "whitespace_pattern": _JSON_SPACE,
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,  # raise for unsupported keywords
}
_MAX_CACHED_GRAMMARS = 32
# A round needs each position when it drafts, and again when it verifies.
_MAX_CACHED_ROWS = 128


def can_constrain() -> bool:
    """Whether llguidance is installed."""
    return find_spec("llguidance") is not None


class OutputConstraints:
    """Creates constraints for the answers of one target, and caches their compiled grammars. Thread-safe.

    Args:
        tokenizer: The tokenizer of the target.
        eos_token_ids: The tokens that end an answer.
        vocab_size: The size of the engine's vocabulary, including padding.
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
        """Create a constraint for one answer.

        Args:
            output_format: The format, which must not be empty.
            tool: The name of the tool whose arguments the format describes, for error messages.

        Raises:
            ConfigurationError: llguidance does not support the format, or is not installed.
            UnsupportedModelError: The model has no end-of-sequence token, or the text of a token depends on
                the tokens around it.
        """
        if not can_constrain():
            raise ConfigurationError(
                "json_schema, regex and choices need llguidance, which is not installed: "
                "pip install 'rapid-integrations[structured]'."
            )
        if not self._eos_token_ids:
            raise UnsupportedModelError(
                "the model has no end-of-sequence token, so an answer with an output format could not end: "
                "set eos_token_id in its generation config."
            )
        with self._lock:
            matcher = self._matchers.get(output_format)
            if matcher is None:
                vocabulary = vocabulary_of(self._tokenizer, self._eos_token_ids)
                try:
                    matcher = self._matchers[output_format] = _compile(output_format, vocabulary)
                except _UnsupportedFormatError as error:
                    raise _configuration_error(output_format, tool, str(error)) from None
                if len(self._matchers) > _MAX_CACHED_GRAMMARS:
                    self._matchers.popitem(last=False)
            self._matchers.move_to_end(output_format)
            return GrammarConstraint(matcher.deep_copy(), self._eos_token_ids, self._vocab_size)


class GrammarConstraint:
    """A :class:`~rapid_integrations.engine.decoding.constraint.TokenConstraint` that follows a grammar.

    Args:
        matcher: A matcher in its initial state, which is copied.
        eos_token_ids: The tokens that end an answer.
        vocab_size: The size of the engine's vocabulary. Tokens that the tokenizer does not have are never
            allowed.
    """

    def __init__(self, matcher: LLMatcher, eos_token_ids: frozenset[int], vocab_size: int) -> None:
        self._initial = matcher
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._matcher = matcher.deep_copy()
        self._consumed: list[int] = []  # the tokens that the matcher has consumed
        # One bit per token of the vocabulary, by the number of tokens before the position.
        self._rows: dict[int, NDArray[np.uint8]] = {}

    def allowed(self, tokens: Sequence[int], count: int) -> Tensor:
        """Return which tokens are allowed at each of the last ``count`` positions.

        Returns:
            ``[count, vocab_size]`` bool, see ``TokenConstraint.allowed``.
        """
        rows = [self._row(list(tokens[:end])) for end in range(len(tokens) - count + 1, len(tokens) + 1)]
        bits = np.unpackbits(np.stack(rows), axis=1, count=self._vocab_size, bitorder="little")
        return torch.from_numpy(bits).view(torch.bool)

    def _row(self, tokens: list[int]) -> NDArray[np.uint8]:
        if tokens and tokens[-1] in self._eos_token_ids:
            return ~self._empty_row()
        shared = min(len(tokens), len(self._consumed))
        while self._consumed[:shared] != tokens[:shared]:
            shared -= 1
        if shared == len(tokens) and (cached := self._rows.get(shared)) is not None:
            return cached
        # llguidance does not count end-of-sequence tokens in a rollback, so the matcher never consumes one.
        if not self._matcher.rollback(len(self._consumed) - shared):
            self._matcher, shared = self._initial.deep_copy(), 0
        self._matcher.consume_tokens(tokens[shared:])
        self._consumed = tokens
        oldest = len(tokens) - _MAX_CACHED_ROWS
        self._rows = {length: row for length, row in self._rows.items() if oldest < length <= shared}
        row = self._rows[len(tokens)] = self._compute_row()
        return row

    def _empty_row(self) -> NDArray[np.uint8]:
        return np.zeros(-(-self._vocab_size // 8), dtype=np.uint8)

    def _compute_row(self) -> NDArray[np.uint8]:
        row = self._empty_row()
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)[: len(row)]
        if self._matcher.is_error():
            # No token fits, or a limit of llguidance was exceeded. A matcher cannot leave its error state.
            self._matcher, self._consumed = self._initial.deep_copy(), []
            return row
        row[: len(bits)] = bits
        return row


def _compile(output_format: OutputFormat, vocabulary: Vocabulary) -> LLMatcher:
    from llguidance import LLMatcher

    grammar = _grammar(output_format, with_space=vocabulary.drops_first_space)
    if not vocabulary.canonical:
        # Forced text requires the tokenization of literals, which is not known for this vocabulary.
        grammar = f'%llguidance {{ "no_forcing": true }}\n{grammar}'
    matcher = LLMatcher(vocabulary.tokenizer, grammar, log_level=0)
    if matcher.is_error():
        raise _UnsupportedFormatError(matcher.get_error())
    matcher.compute_bitmask()
    if matcher.is_error() or (matcher.is_stopped() and not matcher.is_accepting()):
        raise _UnsupportedFormatError("no text of this model's vocabulary fits")
    return matcher


def _grammar(output_format: OutputFormat, *, with_space: bool) -> str:
    """Write the Lark grammar of an output format.

    Args:
        output_format: The format.
        with_space: Whether decoding drops a leading space. The grammar then describes the text before
            decoding.
    """
    from llguidance import LLMatcher, regex_to_lark

    if output_format.json_schema is not None:
        schema = json.loads(output_format.json_schema)
        if "x-guidance" in schema:
            raise _UnsupportedFormatError("it contains 'x-guidance', which is reserved")
        # JSON allows a leading space, and models write one after a colon.
        return f"start: / ?/ answer\nanswer: %json {json.dumps({**schema, 'x-guidance': _JSON_OPTIONS})}"
    if output_format.regex is not None:
        # Validate the pattern alone first: an invalid one might become a valid one inside a grammar.
        if error := LLMatcher.validate_grammar(LLMatcher.grammar_from_regex(output_format.regex)):
            raise _UnsupportedFormatError(error)
        # \d is [0-9], because Python and llguidance differ in which other digits of Unicode they know.
        answer = f"ANSWER: /{regex_to_lark(output_format.regex or '(?:)', use_ascii='d')}/"
        if not with_space:
            return f"start: ANSWER\n{answer}"
        return f'start: " " ANSWER | BARE\n{answer}\nBARE: ANSWER & /([^ ](.|\\n)*)?/'
    texts = list(output_format.choices or ())
    if with_space:
        texts = [f" {text}" for text in texts] + [text for text in texts if not text.startswith(" ")]
    return "start: " + " | ".join(map(json.dumps, texts))


# Longer messages of llguidance are shortened to their beginning and their end, which has the cause.
_MAX_QUOTED_CHARS = 400


class _UnsupportedFormatError(Exception):
    """llguidance does not support a format; the message is its reason."""


def _configuration_error(output_format: OutputFormat, tool: str | None, error: str) -> ConfigurationError:
    # After the cause, llguidance lists the state of the parser or the numbered lines of the grammar.
    reason = re.split(r"\n<state>|\n +\d+ \| ", error)[0].strip()
    if len(reason) > _MAX_QUOTED_CHARS:
        reason = f"{reason[: _MAX_QUOTED_CHARS // 2]} … {reason[-_MAX_QUOTED_CHARS // 2 :]}"
    if tool is not None:
        return ConfigurationError(
            f"the schema of the tool {tool!r}, which must be called, cannot be honoured: {reason}. Change "
            "it, or leave the choice to the model and check the call instead."
        )
    name = next(
        name for name in ("json_schema", "regex", "choices") if getattr(output_format, name) is not None
    )
    return ConfigurationError(
        f"{name} cannot be honoured: {reason}. Change it, or give {name}=None and check the answer instead."
    )
