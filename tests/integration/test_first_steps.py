"""From a long text file and a retriever to an answer in at most 15 lines: a newcomer's file, run as it is."""

from collections.abc import Iterator

import pytest
from llama_index.core import Settings

from rapid_integrations.demo import sample_documents

LANGCHAIN = """
from langchain_core.documents import Document
from rapid_integrations import RapidLLM, create_rapid_chain
from rapid_integrations.demo import sample_documents
from rapid_integrations.demo.documents import SAMPLES_PATH

text = (SAMPLES_PATH / "handbook.md").read_text(encoding="utf-8")  # your own long text file
passages = [Document(passage) for passage in text.split("\\n\\n")]

def retrieve(question):  # your own retriever: a function, store.as_retriever(), …
    words = set(question.split())
    return sorted(passages, key=lambda p: -len(words & set(p.page_content.split())))[:4]

chain = create_rapid_chain(RapidLLM.demo(), retrieve, documents=text)
result = chain.invoke(sample_documents()[0].questions[4].question)
print(result["answer"], *result["context"], sep="\\n- ")
"""

LLAMA_INDEX = """
from llama_index.core import Document, Settings, SimpleKeywordTableIndex
from llama_index.core.node_parser import SentenceSplitter
from rapid_integrations import RapidLLM, RapidQueryEngine
from rapid_integrations.demo import sample_documents
from rapid_integrations.demo.documents import SAMPLES_PATH

Settings.llm = RapidLLM.demo()
text = (SAMPLES_PATH / "handbook.md").read_text(encoding="utf-8")  # your own long text file
splitter = SentenceSplitter(chunk_size=100, chunk_overlap=20)
index = SimpleKeywordTableIndex.from_documents([Document(text=text)], transformations=[splitter])

engine = RapidQueryEngine.from_index(index)  # or from_retriever(your_retriever, documents)
response = engine.query(sample_documents()[0].questions[4].question)
print(response, response.get_formatted_sources(), sep="\\n")
"""


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    yield
    Settings._llm = None


@pytest.mark.parametrize("snippet", [LANGCHAIN, LLAMA_INDEX], ids=["langchain", "llama_index"])
def test_a_newcomer_s_file(snippet: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 15
    question = sample_documents()[0].questions[4]
    assert question.kind == "single"
    exec(compile(snippet, "newcomer.py", "exec"), {"__name__": "__main__"})
    answer, *sources = capsys.readouterr().out.splitlines()
    # The subject and the verb: the value is the models' affair, at 4k tokens.
    assert answer.split()[:3] == question.answer.split()[:3]
    assert len(sources) > 1
