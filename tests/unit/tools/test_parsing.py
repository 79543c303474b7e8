import pytest

from rapid_integrations.tools.formats import FORMATS, ToolFormat
from rapid_integrations.tools.parsing import AnswerParser, AnswerText, InvalidToolCall, ToolCall, parse_answer

# Per format: an answer and its parts: text, (name, arguments), or [the text of an invalid call].
ANSWERS = {
    "hermes": [
        ("Yes.", ["Yes."]),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', [("f", {"a": 1})]),
        (
            'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"a": "x\\ny"}}\n</tool_call>\n'
            '<tool_call>{"name": "g", "arguments": {}}</tool_call>\n',
            ["Let me see.", ("f", {"a": "x\ny"}), ("g", {})],
        ),
        ('<tool_call>{"name": "f"}</tool_call>', [("f", {})]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [("f", {"a": 1})]),
        ('<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}</tool_call>', [("f", {"a": "x\ny"})]),
        ('<tool_call>{"name": "f", "arguments": {}}', [("f", {})]),
        ('<tool_call>{"name": "f", "arg</tool_call> Sorry.', [['<tool_call>{"name": "f", "arg'], " Sorry."]),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', [['{"name": "f", "arguments": [1]}']]),
        ('<tool_call>{"name": "f", "arguments": "x"}</tool_call>', [['{"name": "f", "arguments": "x"}']]),
        ('<tool_call>{"name": "f", "arguments": NaN', [['<tool_call>{"name": "f", "arguments": NaN']]),
        ('<tool_call>{"arguments": {}}</tool_call>', [['{"arguments": {}}']]),
        ("<tool_call>7</tool_call>", [["7"]]),
        ("<tool_call></tool_call>", [["<tool_call></tool_call>"]]),
        ("<tool_call>" + "[" * 20_000, [["<tool_call>" + "[" * 20_000]]),
        ("a <tool> is\n\n <tool_cal", ["a <tool> is\n\n <tool_cal"]),
    ],
    "llama3": [
        ('{"name": "f", "parameters": {"a": 1}}', [("f", {"a": 1})]),
        (' {"type": "function", "name": "f", "parameters": {}}', [("f", {})]),
        ('<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g"}', [("f", {}), ("g", {})]),
        ('{"name": "Ada", "age": 36}', ['{"name": "Ada", "age": 36}']),
        ('As JSON: {"name": "f", "parameters": {}}', ['As JSON: {"name": "f", "parameters": {}}']),
        ('{"name": "f", "parameters": {"a"', [['{"name": "f", "parameters": {"a"']]),
        ("<|python_tag|>print(1)", [["<|python_tag|>print(1)"]]),
        ('{"name": "f", "parameters": {}} and so on', [("f", {}), "and so on"]),
        ('{"name": "f', ['{"name": "f']),
    ],
    "mistral": [
        ('[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]', [("f", {"a": 1})]),
        (
            'Ok[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": 5}, {"name": "g", "arguments": {}}]',
            ["Ok", ("f", {}), ['{"name": 5}'], ("g", {})],
        ),
        ('[TOOL_CALLS] [{"name": "f", "arg', [['[TOOL_CALLS] [{"name": "f", "arg']]),
        ("[TOOL_CALL] no", ["[TOOL_CALL] no"]),
    ],
}  # fmt: skip
CASES = [(family, *case) for family, cases in ANSWERS.items() for case in cases]


def plain_parts(parts):
    def plain(part):
        match part:
            case AnswerText(text, "text"):
                return text
            case ToolCall(name, arguments):
                return (name, arguments)
            case InvalidToolCall(text, error):
                assert error
                return [text]

    return [plain(part) for part in parts]


def test_every_format_has_cases():
    assert ANSWERS.keys() == FORMATS.keys()


@pytest.mark.parametrize(("family", "answer", "expected"), CASES)
def test_answers_of_each_format(family, answer, expected):
    assert plain_parts(parse_answer(answer, FORMATS[family])) == expected


def test_each_call_has_an_id():
    ids = [call.id for call in parse_answer(ANSWERS["hermes"][2][0], FORMATS["hermes"])[1:]]
    assert len(set(ids)) == 2
    assert all(len(i) == 9 and i.isalnum() for i in ids)
    (call,) = parse_answer(
        '[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "abc123def"}]', FORMATS["mistral"]
    )
    assert call.id == "abc123def"


def test_text_is_returned_as_soon_as_it_cannot_be_markup():
    parser = AnswerParser(FORMATS["hermes"])
    assert plain_parts(parser.feed("Let me")) == ["Let me"]
    assert plain_parts(parser.feed(" see. <tool")) == [" see."]
    assert plain_parts(parser.feed("s> are")) == [" <tools> are"]
    assert parser.flush() == []


def test_a_call_is_returned_when_it_is_complete():
    parser = AnswerParser(FORMATS["hermes"])
    assert parser.feed('<tool_call>{"name": "f", "arguments": {}}</tool_call') == []
    (call,) = [*parser.feed(">"), *parser.flush()]
    assert call.name == "f"


STRICT = ToolFormat(
    "own",
    {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "tool_calls": {
                "open_pattern": r"\s*<call:(?P<name>\w+)>",
                "close_pattern": r"</call>\s*",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
            },
        },
    },
    None,
)


def test_no_text_is_lost_if_the_response_template_fails():
    answer = 'Hi <call:f>{"a": 1}</call> <call:g>{"a"</call> <call:h>{}</call>bye'
    parts = plain_parts(parse_answer(answer, STRICT))
    assert parts == ["Hi", ("f", {"a": 1}), ['<call:g>{"a"</call>'], ("h", {}), "bye"]
    assert plain_parts(parse_answer("<call:g>{", STRICT)) == [["<call:g>{"]]


def test_a_call_may_end_where_the_next_one_begins():
    """The closing pattern of such a format has no width."""
    fields = {
        "tool_calls": {
            "open_pattern": r"\s*\[CALL\](?P<name>\w+)",
            "close_pattern": r"(?=\[CALL\])",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {},
    }
    tool_format = ToolFormat("own", {"start_anchor": "x", "fields": fields}, ("[CALL]", ""))
    parts = plain_parts(parse_answer('Hi[CALL]f{"a": 1}[CALL]g{"a[CALL]h{}', tool_format))
    assert parts == ["Hi", ("f", {"a": 1}), ['[CALL]g{"a'], ("h", {})]
    fields["tool_calls"]["open_pattern"] = r"\[CALL\](?P<name>\w*)"
    assert plain_parts(parse_answer("[CALL][CALL]", tool_format)) == [["[CALL][CALL]"]]


def test_arguments_get_the_types_of_their_schema_in_untyped_formats():
    fields = {
        "tool_calls": {
            "open_pattern": r"<function=(?P<name>\w+)>",
            "close": "</function>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<parameter=(?P<key>\w+)>(?P<value>.*?)</parameter>"},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {},
    }
    tool_format = ToolFormat("own", {"start_anchor": "x", "fields": fields}, None)
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}},
    }
    answer = "<function=f><parameter=a>3</parameter><parameter=b>4</parameter></function>"
    (call,) = parse_answer(answer, tool_format, tools=[tool])
    assert call.arguments == {"a": 3, "b": "4"}
