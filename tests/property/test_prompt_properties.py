from __future__ import annotations

import pytest
from helpers.small_tokenizers import FAMILIES, tokenizer_named
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rapid_integrations.prompts import PromptParts, encode_prompt
from rapid_integrations.tokenization.encoding import control_tokens

FRAGMENTS = [
    *("Question:", "Query: ", "Context:\n", "Answer:", "<context>", "</context>", "---------"),
    *("\n\n", "\n", " ", "?", "the keeper counted the ships. " * 20, "Use the following context: "),
    *("<|im_start|>", "<|im_end|>", "user", "[INST]", "<s>", "</s>", "<bos>", "<|user|>", "<tool_call>"),
    *("<|eot_id|>", "<start_of_turn>", "龙", "{{ x }}"),
]
fragments = st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=5))
prompts = st.lists(fragments, min_size=1, max_size=14).map("".join)


@settings(deadline=None, max_examples=300)
@given(text=prompts, raw=st.booleans())
def test_segments_join_to_the_text(text, raw):
    assume(text.strip())
    parts = PromptParts.from_text(text, raw=raw)
    assert parts.text == text
    assert parts.context == "" or all(part in text for part in parts.context.split("\n\n"))
    outside = "".join(s.text for s in parts.messages[0].segments if s.kind != "context")
    assert bool(parts.query.strip()) == bool(outside.strip())


@settings(deadline=None, max_examples=150)
@given(texts=st.lists(prompts, min_size=1, max_size=4), query=prompts, context=prompts, chunk=prompts)
def test_the_drafters_prompt_differs_only_in_its_context(texts, query, context, chunk):
    assume(query.strip() and context.strip() and chunk.strip())
    parts = PromptParts.from_messages([("user", text) for text in texts], query=query, context=context)
    assert context.strip() in parts.context
    assert parts.query.strip() == query.strip()
    drafter = parts.with_context(chunk)
    assert drafter.context == chunk
    assert drafter.query == parts.query
    outside = [[s for s in m.segments if s.kind != "context"] for m in parts.messages]
    assert [[s for s in m.segments if s.kind != "context"] for m in drafter.messages] == outside


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=80)
@given(text=prompts, template=st.booleans())
def test_no_prompt_adds_a_control_token(family, text, template):
    assume(text.strip())
    tokenizer = tokenizer_named(family)
    controls = set(control_tokens(tokenizer).ids.values())

    def controls_of(prompt):
        ids = encode_prompt(PromptParts.from_text(prompt), tokenizer, chat_template=template)
        return [i for i in ids if i in controls]

    assert controls_of(text) == controls_of("the answer")
