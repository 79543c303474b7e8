from __future__ import annotations

import pytest
from helpers.prompt_texts import LINES, ONE_LINE, PROSE, QUESTION, SENTENCES, TEMPLATES

from rapid_integrations.prompts import PromptParts

MARKDOWN = "# Harbour\n\n" + "\n\n---\n\n".join(" ".join(SENTENCES[i : i + 8]) for i in range(0, 40, 8))


FAQ = "\n\n".join(f"Question: how many in {i}?\nAnswer: {s}" for i, s in enumerate(SENTENCES))


DOCUMENTS = {"prose": PROSE, "lines": LINES, "one line": ONE_LINE, "markdown": MARKDOWN, "faq": FAQ}


ONE_LINE_TEMPLATES = {
    "llama_index": " ".join(TEMPLATES["llama_index"].split()),
    "instruction": "Answer the question based only on the following context: {doc} Question: {q}",
    "question first": "Question: {q} Context: {doc} Answer:",
}


SENTENCES_ONLY = {"tail sentence": "{doc} {q}", "head sentence": "{q} {doc}"}


# If the document ends with a labelled question, a question before the document is not found.
AMBIGUOUS = [("question first", "faq"), ("langchain hub", "faq"), ("question, document", "faq")]


@pytest.mark.parametrize(
    ("template", "document"),
    [
        (template, document)
        for template in TEMPLATES
        for document in DOCUMENTS
        if (template, document) not in AMBIGUOUS
    ],
)
def test_common_prompt_templates(template, document):
    doc = DOCUMENTS[document]
    text = TEMPLATES[template].format(doc=doc, q=QUESTION)
    parts = PromptParts.from_text(text)
    assert parts.context == doc
    assert parts.query == QUESTION
    assert parts.text == text


@pytest.mark.parametrize("document", ["prose", "one line", "markdown"])
@pytest.mark.parametrize("template", ONE_LINE_TEMPLATES)
def test_templates_without_line_breaks(template, document):
    doc = DOCUMENTS[document]
    parts = PromptParts.from_text(ONE_LINE_TEMPLATES[template].format(doc=doc, q=QUESTION))
    assert (parts.context, parts.query) == (doc, QUESTION)


def test_rules_of_dashes_inside_the_document():
    doc = f"Harbour\n-------\n\n{PROSE}\n\nEnd\n---------------\n\n{LINES[:300]}"
    for template in ("labels", "llama_index"):
        parts = PromptParts.from_text(TEMPLATES[template].format(doc=doc, q=QUESTION))
        assert (parts.context, parts.query) == (doc, QUESTION)
    fenced = f"Context:\n----------\n{doc}\n----------\nQuestion: {QUESTION}"
    assert PromptParts.from_text(fenced).context == doc


@pytest.mark.parametrize("template", SENTENCES_ONLY)
def test_a_prompt_of_one_line_is_divided_into_sentences(template):
    parts = PromptParts.from_text(SENTENCES_ONLY[template].format(doc=ONE_LINE, q=QUESTION))
    assert (parts.context, parts.query) == (ONE_LINE, QUESTION)


def test_a_question_at_the_end_of_a_paragraph():
    parts = PromptParts.from_text(f"{PROSE} {QUESTION}")
    assert parts.query == QUESTION
    assert len(parts.context) > len(PROSE) * 0.8
    assert parts.text == f"{PROSE} {QUESTION}"


def test_a_question_in_german():
    parts = PromptParts.from_text(f"{PROSE}\n\nFasse das Dokument in drei Sätzen zusammen.")
    assert (parts.context, parts.query) == (PROSE, "Fasse das Dokument in drei Sätzen zusammen.")


@pytest.mark.parametrize(
    "text",
    ["What is RAPID?", "Hello", "Write a poem.\nAbout ships.\n\nIt shall rhyme.", "word " * 300, "x" * 5000],
)
def test_a_prompt_without_a_document_is_all_query(text):
    parts = PromptParts.from_text(text)
    assert parts.context == ""
    assert parts.query == text.strip()
    assert parts.text == text


def test_a_document_must_be_long_and_most_of_the_text():
    short = "The keeper counted. " * 20
    assert PromptParts.from_text(f"Context:\n{short}\n\nQuestion: {QUESTION}").context == ""
    mostly_question = f"Context:\n{ONE_LINE[:600]}\n\nQuestion: {'Is it so, or is it not? ' * 40}"
    assert PromptParts.from_text(mostly_question).context == ""
