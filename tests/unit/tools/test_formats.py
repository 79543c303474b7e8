import copy

import pytest
from helpers.small_tokenizers import tokenizer_named, tool_tokenizer

from rapid_integrations import ConfigurationError, PromptError
from rapid_integrations.tools.formats import FORMATS, find_format
from rapid_integrations.tools.parsing import AnswerText, ToolCall, parse_answer

OWN = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"content": "text"},
    },
}


@pytest.mark.parametrize("family", FORMATS)
def test_the_format_is_detected_by_the_chat_template(family):
    assert find_format(tool_tokenizer(family)) is FORMATS[family]
    assert find_format(tool_tokenizer("hermes"), family) is FORMATS[family]


@pytest.mark.parametrize("family", ["llama3", "gemma", "llama2", "word_level"])
@pytest.mark.parametrize("name", [None, "hermes"])
def test_a_template_without_tools_raises(family, name):
    with pytest.raises(
        PromptError, match="does not support tools: use a model that was trained to call tools"
    ):
        find_format(tokenizer_named(family), name)


def templated(template, **own):
    tokenizer = copy.deepcopy(tool_tokenizer("hermes"))
    tokenizer.chat_template = template
    for name, value in own.items():
        setattr(tokenizer, name, value)
    return tokenizer


def test_an_unknown_format_raises():
    tokenizer = templated("{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ConfigurationError, match=rf"pass tool_format= \(one of {', '.join(FORMATS)}\)"):
        find_format(tokenizer)
    assert find_format(tokenizer, "mistral").name == "mistral"
    with pytest.raises(ConfigurationError, match="tool_format='json' is unknown"):
        find_format(tokenizer, "json")


@pytest.mark.parametrize(
    "markup",
    [
        "[TOOL_CALLS]{{ call.name }}[ARGS]{{ call.arguments }}",
        "<tool_call>{{ call.name }}<arg_key>{{ key }}</arg_key>{{ value }}</tool_call>",
        "<tool_call><function={{ call.name }}></function></tool_call>",
    ],
    ids=["newer mistral", "arg_key", "function"],
)
def test_other_bodies_in_known_tags_are_an_unknown_format(markup):
    template = "{{ tools }}{% for call in calls %}" + markup + "{% endfor %}"
    with pytest.raises(ConfigurationError, match="its format is unknown"):
        find_format(templated(template))
    assert find_format(templated(template, response_template=OWN)).name == "own"
    with pytest.raises(ConfigurationError, match="cannot force a call: the tool format 'own'"):
        find_format(templated(template, response_template=OWN)).forced_start("f")


def test_the_template_for_tools_is_used_among_several():
    plain = tokenizer_named("chatml").chat_template
    tokenizer = templated({"default": plain, "tool_use": tool_tokenizer("hermes").chat_template})
    assert find_format(tokenizer) is FORMATS["hermes"]


def test_the_response_template_of_the_tokenizer_is_used():
    tokenizer = templated(tool_tokenizer("hermes").chat_template, response_template=OWN)
    own = find_format(tokenizer)
    assert (own.name, own.response_template) == ("hermes", OWN)
    assert own.forced_start("f") == FORMATS["hermes"].forced_start("f")
    (thought, text, call) = parse_answer(
        'hm</think>Yes.<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', own, start="<think>"
    )
    assert thought == AnswerText("hm", "reasoning")
    assert text == AnswerText("Yes.")
    assert (call.name, call.arguments) == ("f", {"a": 1})


def test_the_parser_knows_the_beginning_of_the_answer_in_the_chat_template():
    template = tool_tokenizer("hermes").chat_template[: -len("{% endif %}")] + "<think>\n{% endif %}"
    own = find_format(templated(template, response_template=OWN))
    assert own.generation_prompt.endswith("assistant\n<think>\n")
    assert parse_answer("hm</think>Yes.", own) == [AnswerText("hm", "reasoning"), AnswerText("Yes.")]


def test_special_tokens_of_the_markup_are_visible():
    visible = {family: FORMATS[family].visible_controls(tool_tokenizer(family)) for family in FORMATS}
    assert visible == {
        "hermes": frozenset(),
        "llama3": frozenset({"<|python_tag|>"}),
        "mistral": frozenset({"[TOOL_CALLS]"}),
    }


@pytest.mark.parametrize("family", FORMATS)
@pytest.mark.parametrize("name", ["search", 'sea"rch\\', "söarch"])
def test_the_beginning_of_a_forced_call_is_parsed_with_the_answer(family, name):
    start = "".join(text for text, _ in FORMATS[family].forced_start(name))
    (call,) = parse_answer(' {"q": "x"}' + FORMATS[family].closing, FORMATS[family], start=start)
    assert call == ToolCall(name, {"q": "x"}, call.id)
    ((opening, trusted),) = FORMATS[family].forced_start(None)
    assert trusted
    assert start.startswith(opening)
