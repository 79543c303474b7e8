"""Tool calls through the whole stack, engine included. The models write a scripted text token by token."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from helpers.scripted_tools import MARKUP, call_text
from helpers.small_tokenizers import tool_tokenizer
from helpers.table_models import TableModel
from langchain_core.tools import tool
from llama_index.core.tools import FunctionTool

from rapid_integrations import ChatRapid, ConfigurationError, RapidLLM, RapidPipeline
from rapid_integrations.config import EngineLimits
from rapid_integrations.engine.engine import Engine
from rapid_integrations.loading_options import LoadingOptions
from rapid_integrations.prompts.encoding import _encode_pieces

# The last control token of a prompt, and the text between it and the answer.
ENDS = {
    "hermes": ("<|im_start|>", "assistant\n"),
    "llama3": ("<|end_header_id|>", "\n\n"),
    "mistral": ("[/INST]", ""),
}
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
CALL = {"query": "the keeper's ünknown ship"}
TEXTS = {
    "hermes": f"Let me see.\n{call_text('hermes', 'search', CALL)}",
    "llama3": f"<|python_tag|>{call_text('llama3', 'search', CALL)}",
    "mistral": f"Let me see.{call_text('mistral', 'search', CALL)}",
}


class ScriptedModel(TableModel):
    """Writes a fixed text after a prompt, token by token. The prompt may contain its beginning."""

    def __init__(self, family: str, text: str) -> None:
        self.tokenizer = tool_tokenizer(family)
        end, between = ENDS[family]
        self.end, self.text = self.tokenizer.convert_tokens_to_ids(end), between + text
        super().__init__(torch.zeros(1, 1, len(self.tokenizer)), eos=[self.tokenizer.eos_token_id])

    def row(self, history: list[int]) -> torch.Tensor:
        logits = torch.zeros(self.vocab_size)
        if self.end in history:
            answer = history[len(history) - history[::-1].index(self.end) :]
            begun = 0  # trailing tokens of an incomplete character
            while (written := self.tokenizer.decode(answer[: len(answer) - begun])).endswith(INCOMPLETE):
                begun += 1
            rest = _encode_pieces([(self.text[len(written) :], True)], self.tokenizer)
            logits[[*rest, self.tokenizer.eos_token_id][begun]] = 20.0
        return logits


@tool
def search(query: str) -> str:
    """Search the archive."""
    return query


@tool
def count() -> int:
    """Count the ships."""
    return 7


@pytest.fixture(params=list(MARKUP))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def chat(family: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatRapid]:
    engine = Engine(*(ScriptedModel(family, TEXTS[family]) for _ in range(2)), limits=EngineLimits())
    acquire = SimpleNamespace(acquire=lambda *_: (engine, engine.close))
    monkeypatch.setattr("rapid_integrations.pipeline.ENGINES", acquire)
    pipeline = RapidPipeline(LoadingOptions("scripted", tokenizer=tool_tokenizer(family)))
    yield ChatRapid(pipeline, num_draft_tokens=3, acceptance="lossless")
    pipeline.close()


def test_a_call_reaches_the_message(chat: ChatRapid, family: str) -> None:
    message = chat.bind_tools([search, count]).invoke("Find it.")
    (call,) = message.tool_calls
    assert (call["name"], call["args"]) == ("search", CALL)
    assert message.content == ("" if family == "llama3" else "Let me see.")
    assert message.response_metadata["finish_reason"] == "tool_calls"
    assert message.response_metadata["rapid"]["accepted_tokens"] > 0
    chunks = [chunk for chunk in chat.bind_tools([search]).stream("Find it.") if chunk.tool_call_chunks]
    assert len(chunks) == 1


async def test_a_call_reaches_llama_index(chat: ChatRapid, family: str) -> None:
    llm = RapidLLM(chat.pipeline, num_draft_tokens=3, acceptance="lossless")
    tools = [FunctionTool.from_defaults(search.func), FunctionTool.from_defaults(count.func)]
    assert llm.metadata.is_function_calling_model
    for response in (
        llm.chat_with_tools(tools, "Find it."),
        await llm.achat_with_tools(tools, "Find it."),
        list(llm.stream_chat_with_tools(tools, "Find it."))[-1],
    ):
        (call,) = llm.get_tool_calls_from_response(response)
        assert (call.tool_name, call.tool_kwargs) == ("search", CALL)
        assert response.message.content == (None if family == "llama3" else "Let me see.")
        assert response.raw["rapid"]["accepted_tokens"] > 0
    assert str(llm.predict_and_call(tools, "Find it.")) == CALL["query"]


@pytest.mark.parametrize("choice", ["any", "search"])
def test_a_forced_call_continues_its_given_beginning(
    chat: ChatRapid, family: str, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in (chat.pipeline.engine.target, chat.pipeline.engine.drafter):
        monkeypatch.setattr(model, "text", ENDS[family][1] + call_text(family, "search", CALL))
    message = chat.bind_tools([search, count], tool_choice=choice).invoke("Find it.")
    assert [(call["name"], call["args"]) for call in message.tool_calls] == [("search", CALL)]
    assert message.content == ""


def test_an_unsupported_tool_schema_raises_only_if_the_call_is_forced(chat: ChatRapid) -> None:
    names = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
    parameters = {"type": "object", "properties": {"names": names}}
    definition = {"name": "search", "description": "Search for names.", "parameters": parameters}
    with pytest.raises(
        ConfigurationError, match=r"^the schema of the tool 'search', .*: .*uniqueItems"
    ) as error:
        chat.bind_tools([definition], tool_choice="search").invoke("Find it.")
    assert "json_schema" not in str(error.value)
    assert chat.bind_tools([definition]).invoke("Find it.").tool_calls


def test_control_tokens_of_calls_leave_no_text_without_tools(chat: ChatRapid, family: str) -> None:
    content = chat.invoke("Find it.").content
    assert "search" in content
    assert ("[TOOL_CALLS]" in content, "<|python_tag|>" in content) == (False, False)


def test_a_stop_string_may_be_the_markup_of_a_call(chat: ChatRapid, family: str) -> None:
    markup = {"hermes": "<tool_call>", "llama3": "<|python_tag|>", "mistral": "[TOOL_CALLS]"}[family]
    message = chat.bind_tools([search]).invoke("Find it.", stop=[markup])
    assert (message.tool_calls, message.response_metadata["finish_reason"]) == ([], "stop")
