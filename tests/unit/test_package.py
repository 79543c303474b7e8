import json
import subprocess
import sys

import pytest

import rapid_integrations

PUBLIC = {
    "ChatRapid", "Chunk", "Completion", "ConfigurationError", "ContextLengthError", "DeadlineExceededError",
    "DocumentError", "EngineClosedError", "EngineLimits", "EngineMemoryError", "FaissVectorStore",
    "GenerationError", "GenerationOptions", "OutputFormat", "PrefillProgress", "PromptError", "PromptParts",
    "QueueFullError", "RapidChatPromptTemplate", "RapidDecodeEvent", "RapidError", "RapidLLM",
    "RapidPipeline", "RapidPrefillEvent", "RapidPromptTemplate", "RapidQueryEngine", "RapidRetrievalEvent",
    "RapidStats", "RetrievalError", "RetrievalParams", "RetrievedChunk", "RetrievedContext", "Retriever",
    "SamplingParams", "ShapeMismatchError", "SpeculationParams", "TextDelta", "ToolCallError",
    "UnsupportedModelError", "VocabularyMismatchError", "create_rapid_chain",
}  # fmt: skip

LARGE_LIBRARIES = ("torch", "transformers", "langchain", "llama_index", "faiss", "numpy", "pydantic")


def modules_after(statement: str) -> set[str]:
    """The top-level modules a fresh interpreter has loaded after ``statement``."""
    program = (
        f"import sys, json\n{statement}\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(output.stdout))


def hosts(modules: set[str]) -> set[str]:
    return {module for module in modules if module.startswith(("langchain", "llama_index", "langsmith"))}


def test_public_names() -> None:
    assert set(rapid_integrations.__all__) == PUBLIC
    assert sorted(rapid_integrations.__all__) == rapid_integrations.__all__
    for name in rapid_integrations.__all__:
        assert getattr(rapid_integrations, name).__name__ == name
    assert set(dir(rapid_integrations)) >= PUBLIC


def test_every_error_is_public() -> None:
    from rapid_integrations import errors

    assert {name for name, value in vars(errors).items() if isinstance(value, type)} <= PUBLIC


def test_an_unknown_name_raises() -> None:
    with pytest.raises(AttributeError, match="RapidLLN"):
        _ = rapid_integrations.RapidLLN


def test_importing_the_package_loads_no_large_library() -> None:
    loaded = modules_after("import rapid_integrations")
    assert not {module for module in loaded if module.startswith(LARGE_LIBRARIES)}


def test_options_and_errors_load_no_large_library() -> None:
    loaded = modules_after(
        "from rapid_integrations import GenerationOptions, EngineLimits, RapidStats, ContextLengthError"
    )
    assert not {module for module in loaded if module.startswith(("torch", "transformers"))} | hosts(loaded)


def test_the_pipeline_loads_no_host_framework() -> None:
    assert not hosts(
        modules_after("from rapid_integrations import RapidPipeline, PromptParts, Chunk, Retriever")
    )
