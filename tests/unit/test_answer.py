"""An answer turns engine events into text events; the stop matcher ends it at a stop string."""

import pytest
from helpers.small_tokenizers import tokenizer_named

from rapid_integrations.answer import Answer, stop_matcher
from rapid_integrations.engine.requests import Failed, Finished, NewTokens, Prefilled, Request
from rapid_integrations.engine.stats import RapidStats, RetrievedChunk
from rapid_integrations.errors import GenerationError
from rapid_integrations.events import Completion, PrefillProgress, TextDelta
from rapid_integrations.retrieval import RetrievedContext
from rapid_integrations.tokenization.encoding import encode_plain
from rapid_integrations.tokenization.streaming import TextAssembler

TOKENIZER = tokenizer_named("chatml")
RETRIEVED = RetrievedContext("the document", (RetrievedChunk("the document"),), "bm25", "a reason", 0.5)


def new_answer(retrieved: RetrievedContext | None = None, stop: tuple[str, ...] = ()) -> Answer:
    return Answer(Request([1], None), retrieved, TextAssembler(TOKENIZER, stop))


def test_engine_events_become_text_events() -> None:
    answer = new_answer(RETRIEVED)
    tokens = encode_plain("what is the answer", TOKENIZER)
    events = answer.first_events
    for event in (Prefilled(3, 6), NewTokens(tuple(tokens[:2])), NewTokens(tuple(tokens[2:]))):
        assert answer.completion is None
        events += answer.text_events(event)
    events += answer.text_events(Finished("stop", RapidStats(prompt_tokens=6)))
    assert events[:2] == [RETRIEVED, PrefillProgress(3, 6)]
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == "what is the answer"
    completion = events[-1]
    assert completion is answer.completion
    assert isinstance(completion, Completion)
    assert (completion.text, completion.finish_reason) == ("what is the answer", "stop")
    assert completion.token_ids == tuple(tokens)
    stats = completion.stats
    assert (stats.prompt_tokens, stats.retriever, stats.retrieval_s) == (6, "bm25", 0.5)
    assert (stats.retrieval_fallback, stats.retrieved_chunks) == ("a reason", RETRIEVED.chunks)


def test_text_that_may_begin_a_stop_string_follows_at_the_end() -> None:
    answer = new_answer(stop=("answer!",))
    assert answer.first_events == []
    events = answer.text_events(NewTokens(tuple(encode_plain("the answer", TOKENIZER))))
    assert "answer" not in "".join(event.text for event in events if isinstance(event, TextDelta))
    rest, completion = answer.text_events(Finished("length", RapidStats()))
    assert rest == TextDelta("answer", 0)
    assert isinstance(completion, Completion)
    assert completion.text == "the answer"


def test_a_failed_request_raises_its_error() -> None:
    with pytest.raises(GenerationError, match="out of luck"):
        new_answer().text_events(Failed(GenerationError("out of luck")))


def test_the_stop_matcher_ends_at_a_complete_stop_string() -> None:
    assert stop_matcher(TOKENIZER, (), ()) is None
    is_stopped = stop_matcher(TOKENIZER, ("is the",), ())
    assert is_stopped is not None
    results = [is_stopped(token) for token in encode_plain("what is the answer", TOKENIZER)]
    assert results[0] is False
    assert results[-1] is True
