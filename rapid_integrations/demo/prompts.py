"""The prompts that the demo pair is trained on.

A conversation is ``<bos>``, then ``<|role|>content<eos>`` for each message, then ``<|assistant|>``. The first
user message has the context and the question in one of the templates below. Later user messages have further
questions about the same context. Each run of whitespace is equivalent to one space.
"""

from __future__ import annotations

PROMPT_TEMPLATE = "Context: {context} Question: {question} Answer:"
"""The template with the highest weight in training, which evaluations use."""

SYSTEM_MESSAGE = "You answer questions about the document."

PROMPT_TEMPLATES: dict[str, float] = {
    PROMPT_TEMPLATE: 40,
    "Context: {context} Question: {question}": 22,
    "{context} {question}": 8,
    "<context> {context} </context> Question: {question}": 6,
    "Document: {context} Question: {question} Answer:": 4,
    "Use the following context to answer the question. Context: {context} Question: {question}": 4,
    "Answer the question based only on the following context: {context} Question: {question}": 4,
    "Question: {question} Context: {context} Answer:": 3,
}
"""Templates and their weights in training."""

LONG_PROMPT_TEMPLATES: dict[str, float] = {
    "Context information is below. --------------------- {context} --------------------- Given the context "
    "information and not prior knowledge, answer the query. Query: {question} Answer:": 6,
    "You are an assistant for question-answering tasks. Use the following pieces of retrieved context to "
    "answer the question. If you don't know the answer, just say that you don't know. Use three "
    "sentences maximum and keep the answer concise. Question: {question} Context: {context} Answer:": 3,
}
"""Templates of host frameworks, too long for the shortest training examples."""

SYSTEM_MESSAGES: dict[str, float] = {
    SYSTEM_MESSAGE: 6,
    "You are a helpful assistant.": 3,
}
LONG_SYSTEM_MESSAGES: dict[str, float] = {
    "You are an expert Q&A system that is trusted around the world. Always answer the query using the "
    "provided context information, and not prior knowledge. Some rules to follow: 1. Never directly "
    "reference the given context in your answer. 2. Avoid statements like 'Based on the context, ...' or "
    "'The context information ...' or anything along those lines.": 3,
}

FOLLOW_UP_TEMPLATES = ("Question: {question} Answer:", "Question: {question}", "{question}")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|system|>{% if messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] }} {% endif %}"
    "{% for tool in tools %}{{ tool | tojson }} {% endfor %}{{ eos_token }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'tool' %}"
    "<|tool|><tool_response>{{ message['content'] }}</tool_response>{{ eos_token }}"
    "{% elif not (tools and loop.first and message['role'] == 'system') %}"
    "<|{{ message['role'] }}|>{{ message['content'] or '' }}{% for call in message['tool_calls'] or [] %}"
    '<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "</tool_call>{% endfor %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""The Hermes format: tool definitions in the system message, ``<tool_call>`` and ``<tool_response>``."""


def all_templates() -> tuple[str, ...]:
    """All templates and system messages. The tokenizer's vocabulary includes their words."""
    return (
        *PROMPT_TEMPLATES,
        *LONG_PROMPT_TEMPLATES,
        *SYSTEM_MESSAGES,
        *LONG_SYSTEM_MESSAGES,
        *FOLLOW_UP_TEMPLATES,
    )
