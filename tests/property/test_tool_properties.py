from __future__ import annotations

import json

import pytest
from helpers.small_tokenizers import TOOL_FAMILIES, tool_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from rapid_integrations.prompts import Message, PromptParts, Segment, encode_prompt
from rapid_integrations.prompts.chat_template import _short_id
from rapid_integrations.tokenization.encoding import control_tokens
from rapid_integrations.tools.formats import FORMATS, ToolFormat
from rapid_integrations.tools.parsing import AnswerParser, AnswerText, ToolCall, parse_answer

# A response template like those of tokenizers: its parser fails on text that is not JSON.
STRICT = ToolFormat(
    "own",
    {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "reasoning_content": {"open": "<think>", "close": "</think>"},
            "tool_calls": {
                "open_pattern": r"\s*<call:(?P<name>\w+)>",
                "close_pattern": r"</call>\s*",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
            },
            "content": {},
        },
    },
    None,
)
# Families whose template omits a system message beside tool calls
OMITS_SYSTEM = ("mistral",)
PARSED = {**FORMATS, "own": STRICT}
FRAGMENTS = [
    *("<call:f>", "</call>", "<think>", "</think>", "{}"),
    *(
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "<|python_tag|>",
        "\n",
        " ",
        "{",
        "}",
        "[",
        "]",
        ",",
        ";",
    ),
    *('{"name": "f", "arguments": {}}', '{"name": "g", "parameters": {"a": "b"}}', '"', "text", "\\", "ü"),
]
answers = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=4)), max_size=12).map("".join)
INJECTIONS = [
    *("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "[INST]", "[/INST]", "</s>", "<s>"),
    *("[TOOL_CALLS]", "<tool_call>", "</tool_call>", "<|python_tag|>", "[AVAILABLE_TOOLS]", '"', "\\", "\n"),
    *("type", "object", "properties", "name", "{{ x }}", "ü", " ", "  x "),
]
untrusted = st.one_of(
    st.lists(st.sampled_from(INJECTIONS), min_size=1, max_size=3).map("".join),
    st.text(min_size=1, max_size=5),
)
plain_json = st.recursive(
    st.one_of(untrusted, st.integers(-9, 9), st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(untrusted, inner, max_size=2)),
    max_leaves=5,
)


def without_ids(parts):
    return [(part.name, part.arguments) if isinstance(part, ToolCall) else part for part in parts]


def joined(parts):
    pieces = []
    for part in parts:
        last = pieces[-1] if pieces else None
        if isinstance(part, AnswerText) and isinstance(last, AnswerText) and part.kind == last.kind:
            pieces[-1] = AnswerText(pieces[-1].text + part.text, part.kind)
        else:
            pieces.append(part)
    return pieces


@pytest.mark.parametrize("family", PARSED)
@settings(deadline=None, max_examples=150)
@given(answer=answers, data=st.data())
def test_a_streamed_answer_has_the_parts_of_the_whole(family, answer, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=4)))
    parser = AnswerParser(PARSED[family])
    parts = []
    for start, end in zip([0, *cuts], [*cuts, len(answer)], strict=True):
        parts += parser.feed(answer[start:end])
    parts += parser.flush()
    assert without_ids(joined(parts)) == without_ids(parse_answer(answer, PARSED[family]))


@pytest.mark.parametrize("family", PARSED)
@settings(deadline=None, max_examples=150)
@given(answer=answers)
def test_no_text_is_lost(family, answer):
    parts = parse_answer(answer, PARSED[family])
    shown = "".join(
        json.dumps([part.name, part.arguments]) if isinstance(part, ToolCall) else part.text for part in parts
    )
    assert shown.count("text") == answer.count("text")
    if "<think>" not in answer and all(isinstance(part, AnswerText) for part in parts):
        assert shown == answer


def prompt(text, name, arguments, schema):
    tool = {
        "type": "function",
        "function": {
            "name": name,
            "description": text,
            "parameters": {
                "type": "object",
                "properties": {
                    text: {"type": "string", "description": text, "enum": [text], "default": schema}
                },
                "required": [text],
                text: schema,
            },
        },
    }
    messages = [
        Message.of("system", text),
        Message.of("user", text),
        Message.of("assistant", text, tool_calls=(ToolCall(name, arguments, text),)),
        Message.of("tool", text, tool_call_id=text, name=text),
    ]
    parts = PromptParts.from_messages(messages, tools=[tool])
    return PromptParts(parts.messages, tools=parts.tools, answer_start=(Segment("query", name),))


@pytest.mark.parametrize("family", TOOL_FAMILIES)
@settings(deadline=None, max_examples=60)
@given(
    text=untrusted,
    name=untrusted,
    arguments=st.dictionaries(untrusted, plain_json, max_size=2),
    schema=plain_json,
)
def test_tools_and_calls_add_no_control_token(family, text, name, arguments, schema):
    tokenizer = tool_tokenizer(family)
    controls = set(control_tokens(tokenizer).ids.values())

    def controls_of(parts):
        return [i for i in encode_prompt(parts, tokenizer) if i in controls]

    text, name = text.strip() or "x", name.strip() or "x"
    assert controls_of(prompt(text, name, arguments, schema)) == controls_of(prompt("x", "x", {}, None))


@pytest.mark.parametrize("family", TOOL_FAMILIES)
@settings(deadline=None, max_examples=60)
@given(
    text=st.text(min_size=1, max_size=8),
    arguments=st.dictionaries(st.text(max_size=3), plain_json, max_size=2),
)
def test_a_prompt_has_the_text_of_the_chat_template(family, text, arguments):
    tokenizer = tool_tokenizer(family)
    text = text.strip() or "x"
    parts = prompt(text, "f", arguments, [text])
    parts = PromptParts(parts.messages, tools=parts.tools)
    call_id = _short_id(text)
    if family in OMITS_SYSTEM:  # encode_prompt would fold the system message
        parts = PromptParts(parts.messages[1:], tools=parts.tools)
    chat = [
        *([{"role": "system", "content": text}] if family not in OMITS_SYSTEM else []),
        {"role": "user", "content": text},
        {
            "role": "assistant",
            "content": text,
            "tool_calls": [
                {"type": "function", "id": call_id, "function": {"name": "f", "arguments": arguments}}
            ],
        },
        {"role": "tool", "content": text, "tool_call_id": call_id, "name": text},
    ]
    written = tokenizer.apply_chat_template(
        chat, tools=list(parts.tools), tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(encode_prompt(parts, tokenizer)) == tokenizer.decode(
        tokenizer(written, add_special_tokens=False)["input_ids"]
    )
