"""Chains that an earlier version stored with LangChain's ``dumpd`` still load, and are stored the same way.

``stored/chains_0.1.0.json`` was written before the modules moved into folders. The class paths in it
(``rapid_integrations.llm``, ``.chat``, ``.langchain_prompts``) are part of the format.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.load import dumpd, load
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_core.prompts.chat import HumanMessagePromptTemplate, SystemMessagePromptTemplate
from langchain_core.runnables import RunnableSequence

from rapid_integrations import ChatRapid, RapidChatPromptTemplate, RapidLLM, RapidPromptTemplate
from rapid_integrations.langchain import RapidChatPromptValue, RapidPromptValue

STORED: dict[str, Any] = json.loads((Path(__file__).parent / "stored" / "chains_0.1.0.json").read_text())
ALLOWED = [
    RapidLLM, ChatRapid, RapidPromptTemplate, RapidChatPromptTemplate, RapidPromptValue, RapidChatPromptValue,
    RunnableSequence, StrOutputParser, PromptTemplate, HumanMessage,
    SystemMessagePromptTemplate, HumanMessagePromptTemplate,
]  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:The function `load` is in beta")


def restore(name: str) -> Any:
    return load(STORED[name], allowed_objects=ALLOWED, valid_namespaces=["rapid_integrations"])


def class_paths(data: Any) -> Iterator[list[str]]:
    """Every ``id`` in LangChain's JSON form, from the outside in."""
    if isinstance(data, dict):
        if "lc" in data:
            yield data["id"]
        data = list(data.values())
    if isinstance(data, list):
        for item in data:
            yield from class_paths(item)


# A stored chain keeps the options that it was stored with, also where a default has changed since.
STORED_DEFAULTS: dict[str, Any] = {"retrieval_chunk_tokens": 512, "retrieval_min_tokens": 4096}


def test_a_chain_of_an_llm_loads() -> None:
    chain = restore("llm chain")
    prompt, llm, parser = chain.steps
    assert [type(step) for step in chain.steps] == [RapidPromptTemplate, RapidLLM, StrOutputParser]
    assert (prompt.template, prompt.input_variables) == (
        "Context: {context} Question: {question}",
        ["context", "question"],
    )
    assert llm.target == "some/model"
    assert llm.options == RapidLLM("some/model", temperature=0.5, stop=["END"], **STORED_DEFAULTS).options
    assert parser.parse("text") == "text"


def test_a_chain_of_a_chat_model_loads() -> None:
    prompt, chat = restore("chat chain").steps
    assert (type(prompt), type(chat)) == (RapidChatPromptTemplate, ChatRapid)
    assert (chat.target, chat.drafter, chat.seed) == ("some/model", "some/drafter", 3)
    assert chat.options == ChatRapid("some/model", seed=3, **STORED_DEFAULTS).options
    value = prompt.invoke({"context": "A lease.", "question": "When?"})
    assert [(message.type, message.content) for message in value.to_messages()] == [
        ("system", "Be brief."),
        ("human", "A lease.\n\nWhen?"),
    ]
    assert (value.query, value.context) == ("When?", "A lease.")


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("prompt value", RapidPromptValue, "Context: A lease. Question: When?"),
        ("chat prompt value", RapidChatPromptValue, "Human: A lease.\n\nWhen?"),
    ],
)
def test_prompt_values_load(name: str, kind: type, text: str) -> None:
    value = restore(name)
    assert type(value) is kind
    assert (value.query, value.context, value.to_string()) == ("When?", "A lease.", text)


@pytest.mark.parametrize("name", STORED)
def test_a_loaded_object_is_stored_under_the_same_class_paths(name: str) -> None:
    assert list(class_paths(dumpd(restore(name)))) == list(class_paths(STORED[name]))


@pytest.mark.parametrize(("package", "other"), [("langchain", "llama_index"), ("llama_index", "langchain")])
def test_names_of_one_framework_do_not_load_the_other(package: str, other: str) -> None:
    program = f"""
import sys
import rapid_integrations.{package} as package
heavy = [name for name in sys.modules if name.startswith(("langchain", "llama_index", "torch"))]
assert not heavy, heavy
for name in package.__all__:
    getattr(package, name)
assert any(name.startswith("{package}") for name in sys.modules)
assert not [name for name in sys.modules if name.split(".")[0].startswith("{other}")]
assert not set(package.__all__) - set(dir(package))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
