from __future__ import annotations

import copy
import json
import re

import pytest
from helpers.prompt_texts import PROSE, QUESTION, TEMPLATES, TOOL, tool_turns
from helpers.small_tokenizers import FAMILIES, TOOL_FAMILIES, tokenizer_named, tool_tokenizer
from tokenizers import AddedToken

from rapid_integrations.errors import PromptError
from rapid_integrations.prompts import Message, PromptParts, ToolCall, encode_prompt


@pytest.mark.parametrize("family", TOOL_FAMILIES)
def test_tools_have_the_tokens_of_apply_chat_template(family):
    tokenizer = tool_tokenizer(family)
    tool = json.loads(json.dumps(TOOL).replace("<|im_end|> [INST]", "").replace("</s>", "x"))
    function = {"name": "search", "arguments": {"query": "ships"}}
    call = {"type": "function", "id": "abc123def", "function": function}
    chat = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42 ships.", "tool_call_id": "abc123def", "name": "search"},
    ]
    expected = tokenizer.apply_chat_template(chat, tools=[tool], add_generation_prompt=True)["input_ids"]
    parts = PromptParts.from_messages(tool_turns("42 ships.")[1:], tools=[tool])
    assert encode_prompt(parts, tokenizer) == expected


def test_a_system_message_that_the_template_omits_is_folded_beside_tool_calls():
    tokenizer = tool_tokenizer("mistral")
    parts = PromptParts.from_messages(tool_turns("42"), tools=[TOOL])
    assert f"[INST] Be brief.\n\n{QUESTION}[/INST]" in tokenizer.decode(encode_prompt(parts, tokenizer))


@pytest.mark.parametrize("call_id", ["call_<|im_end|>", None, ""])
def test_call_ids_of_any_form_are_accepted(call_id):
    call = Message.of("assistant", "", tool_calls=(ToolCall("search", {}, call_id),))
    result = Message.of("tool", "42", tool_call_id=call_id or "")
    tokenizer = tool_tokenizer("mistral")
    text = tokenizer.decode(
        encode_prompt(PromptParts.from_messages([("user", "Hi"), call, result]), tokenizer)
    )
    (asked,) = re.findall(r'"id": "([0-9a-f]{9})"', text)
    assert f'"call_id": "{asked}"' in text


def test_arguments_are_escaped_if_the_template_changes_a_message():
    tokenizer = copy.deepcopy(tool_tokenizer("hermes"))
    written, rewritten = "{{ message.content }}", "{{ message.content | upper }}"
    tokenizer.chat_template = tokenizer.chat_template.replace(written, rewritten)
    call = Message.of("assistant", "", tool_calls=(ToolCall("search", {"query": 'a "b"\n'}),))
    text = tokenizer.decode(encode_prompt(PromptParts.from_messages([("user", "Hi"), call]), tokenizer))
    assert '"arguments": {"query": "a \\"b\\"\\n"}' in text
    assert "user\nHi" in text


@pytest.mark.parametrize("template", [True, False])
def test_tools_require_a_template_that_supports_them(template):
    tokenizer = tokenizer_named("llama3" if template else "llama2")
    message = "it does not support tools" if template else "need a chat template that supports them"
    with pytest.raises(PromptError, match=message):
        encode_prompt(PromptParts.from_messages([("user", "Hi")], tools=[TOOL]), tokenizer)
    with pytest.raises(PromptError, match="it leaves a tool call out" if template else message):
        encode_prompt(PromptParts.from_messages(tool_turns("42")), tokenizer)


def test_several_calls_raise_if_the_template_refuses_them():
    call = ToolCall("search", {})
    parts = PromptParts.from_messages([("user", "Hi"), Message.of("assistant", "", tool_calls=(call, call))])
    with pytest.raises(PromptError, match="only supports single tool-calls at once"):
        encode_prompt(parts, tool_tokenizer("llama3"))


def test_a_definition_that_is_not_json_raises():
    parts = PromptParts.from_messages([("user", "Hi")], tools=[{"name": {1}}])
    with pytest.raises(PromptError, match="a tool definition or a tool call is not JSON"):
        encode_prompt(parts, tool_tokenizer("hermes"))


CHAT_FAMILIES = [family for family in FAMILIES if tokenizer_named(family).chat_template]


@pytest.mark.parametrize("family", CHAT_FAMILIES)
def test_messages_have_the_tokens_of_apply_chat_template(family):
    tokenizer = tokenizer_named(family)
    asked = TEMPLATES["llama_index"].format(doc=PROSE[:900], q="  What is the answer? \n")
    for messages in (
        [("user", asked)],
        [("user", "  the answer\n"), ("assistant", "is "), ("user", "\n\nwhat?")],
    ):
        chat = [{"role": role, "content": text} for role, text in messages]
        expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert encode_prompt(PromptParts.from_messages(messages), tokenizer) == expected


def test_a_refused_system_message_is_folded_into_the_first_user_message():
    tokenizer = tokenizer_named("gemma")
    messages = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
    folded = [("user", "Be brief.\n\nHi"), *messages[2:]]
    assert encode_prompt(PromptParts.from_messages(messages), tokenizer) == encode_prompt(
        PromptParts.from_messages(folded), tokenizer
    )
    alone = encode_prompt(PromptParts.from_messages([("system", "Be brief.")]), tokenizer)
    assert alone == encode_prompt(PromptParts.from_messages([("user", "Be brief.")]), tokenizer)


def test_the_error_gives_the_reason_of_the_template():
    parts = PromptParts.from_messages([("user", "Hi"), ("user", "Hello?")])
    with pytest.raises(PromptError, match=r"\(user, user\).*roles must alternate.*chat_template=False"):
        encode_prompt(parts, tokenizer_named("gemma"))


def templated(template):
    tokenizer = copy.deepcopy(tokenizer_named("chatml"))
    tokenizer.chat_template = template
    return tokenizer


def test_a_system_message_that_the_template_omits_is_folded():
    tokenizer = templated(
        "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    ids = encode_prompt(PromptParts.from_messages([("system", "Be brief."), ("user", "Hi")]), tokenizer)
    assert tokenizer.decode(ids) == "Be brief.\n\nHi<|im_end|>"


def test_a_template_that_omits_a_message_raises():
    tokenizer = templated("{{ messages[0]['content'] }}<|im_end|>")
    with pytest.raises(PromptError, match="leaves a message out"):
        encode_prompt(PromptParts.from_messages([("user", "Hi"), ("user", "Bye")]), tokenizer)


@pytest.mark.parametrize("change", ["upper", "replace('H', 'J')", "title"])
def test_text_that_the_template_changes_stays_unchanged(change):
    tokenizer = templated("{% for m in messages %}{{ m['content'] | " + change + " }}<|im_end|>{% endfor %}")
    ids = encode_prompt(PromptParts.from_text("Hi <|im_end|> there"), tokenizer)
    assert tokenizer.decode(ids) == "Hi <|im_end|> there<|im_end|>"
    assert ids.count(tokenizer.eos_token_id) == 1


def test_a_template_that_trims_only_some_texts():
    tokenizer = templated(
        "{{ messages[0]['content'] }}\n"
        "{% for m in messages[1:] %}{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    )
    ids = encode_prompt(
        PromptParts.from_messages([("system", " a "), ("user", " b "), ("user", "c")]), tokenizer
    )
    assert tokenizer.decode(ids) == " a \nb<|im_end|>c<|im_end|>"


def test_control_tokens_that_strip_whitespace():
    tokenizer = templated("<|end|>\n{{ messages[0]['content'] }} <|end|>")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|end|>", rstrip=True, lstrip=True, normalized=False)]}
    )
    chat = [{"role": "user", "content": "  Hi"}]
    expected = tokenizer.apply_chat_template(chat, return_dict=False)
    assert encode_prompt(PromptParts.from_text("  Hi"), tokenizer) == expected
