"""Tests of LlamaIndex's messages on their way into a prompt."""

from llama_index.core.llms import ChatMessage

from rapid_integrations.llama_index.messages import keep_messages


def test_messages_keep_role_and_text() -> None:
    text = keep_messages([ChatMessage("Hi"), ChatMessage("Ho", role="model")])
    assert [(m.role, m.text) for m in text.messages] == [("user", "Hi"), ("assistant", "Ho")]
    assert text.parts().query == "Hi"
