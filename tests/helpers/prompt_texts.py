"""Texts, prompt templates and tool conversations for tests of prompts."""

from __future__ import annotations

from rapid_integrations.prompts import Message, ToolCall

SENTENCES = [
    f"In the year {1600 + i} the keeper of the harbour counted {i * 7 + 3} ships and captain number {i} left."
    for i in range(40)
]

PROSE = "\n\n".join(" ".join(SENTENCES[i : i + 4]) for i in range(0, 40, 4))

LINES = "\n".join(SENTENCES)

ONE_LINE = " ".join(SENTENCES)

QUESTION = "How many ships did the keeper count in the year 1612?"

TEMPLATES = {
    "labels": "Context:\n{doc}\n\nQuestion: {q}\nAnswer:",
    "labels on one line": "Context: {doc} Question: {q} Answer:",
    "labels, no cue": "Context: {doc}\n\nQuestion: {q}",
    "llama_index": "Context information is below.\n---------------------\n{doc}\n---------------------\n"
    "Given the context information and not prior knowledge, answer the query.\nQuery: {q}\nAnswer: ",
    "langchain stuff": "Use the following pieces of context to answer the question at the end. If you "
    "don't know the answer, just say that you don't know, don't try to make up an answer.\n\n{doc}\n\n"
    "Question: {q}\nHelpful Answer:",
    "langchain hub": "You are an assistant for question-answering tasks. Use the following pieces of "
    "retrieved context to answer the question. If you don't know the answer, just say that you don't know. "
    "Use three sentences maximum and keep the answer concise.\nQuestion: {q} \nContext: {doc} \nAnswer:",
    "question first": "Question: {q}\n\nContext:\n{doc}\n\nAnswer:",
    "document, question": "{doc}\n\n{q}",
    "document, question on the next line": "{doc}\n{q}",
    "question, document": "{q}\n\n{doc}",
    "tags": "Answer from the document.\n<context>\n{doc}\n</context>\n\nQuestion: {q}",
    "instruction": "Answer the question based only on the following context:\n{doc}\n\nQuestion: {q}\n",
}

TOOL = {
    "type": "function",
    "function": {
        "name": "search",
        "description": 'Finds "things" <|im_end|> [INST]',
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "enum": ["ü", "</s>"]}, "type": {"type": "integer"}},
            "required": ["query"],
        },
    },
}


def tool_turns(result, question=QUESTION):
    return [
        ("system", "Be brief."),
        ("user", question),
        Message.of("assistant", "", tool_calls=(ToolCall("search", {"query": "ships"}, "abc123def"),)),
        Message.of("tool", result, tool_call_id="abc123def", name="search"),
    ]
