import copy
import dataclasses
import inspect
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.fake_pipeline import PROMPT, FakePipeline, word_tokenizer
from langchain_core.caches import InMemoryCache
from langchain_core.language_models.llms import BaseLLM
from langchain_core.load import dumpd, dumps, loads
from langchain_core.runnables import ConfigurableField, RunnableSequence
from llama_index.core.llms.llm import LLM
from llama_index.core.llms.utils import resolve_llm
from llama_index.core.prompts import PromptTemplate
from pydantic import BaseModel

from rapid_integrations import (
    ChatRapid,
    ConfigurationError,
    EngineLimits,
    GenerationOptions,
    RapidError,
    RapidLLM,
    RapidPromptTemplate,
    RetrievedContext,
)
from rapid_integrations.events import Completion, TextDelta
from rapid_integrations.hosts.call import OPTION_NAMES
from rapid_integrations.loading_options import LoadingOptions
from rapid_integrations.pipeline import RapidPipeline


@pytest.fixture
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture
def loads_of(monkeypatch: pytest.MonkeyPatch, pipeline: FakePipeline) -> list[tuple[Any, ...]]:
    """The calls of ``RapidPipeline.from_pretrained``, which returns the fake pipeline."""
    calls: list[tuple[Any, ...]] = []

    def from_pretrained(*args: Any, **kwargs: Any) -> FakePipeline:
        calls.append((args, kwargs))
        return pipeline

    monkeypatch.setattr(RapidPipeline, "from_pretrained", from_pretrained)
    return calls


def loaded_model() -> Any:
    return SimpleNamespace(config=SimpleNamespace(_name_or_path="my/model"))


class TestConstruction:
    def test_it_is_an_llm_of_both_frameworks(self, pipeline: FakePipeline) -> None:
        llm = RapidLLM(pipeline)
        assert isinstance(llm, BaseLLM)
        assert isinstance(llm, LLM)
        assert resolve_llm(llm) is llm

    def test_fields_and_options_agree(self) -> None:
        flat = GenerationOptions().flat()
        assert set(flat) == OPTION_NAMES
        for name, default in flat.items():
            assert RapidLLM.model_fields[name].default == default
        assert RapidLLM("x").options == GenerationOptions()

    def test_loading_arguments_reach_the_pipeline(self, loads_of: list[Any]) -> None:
        llm = RapidLLM.from_pretrained(
            "some/model", Path("small") / "model", embeddings="e", dtype="float32", device_map="cpu",
            revision="r", drafter_revision="s", local_files_only=True, chat_template=False, temperature=0.5,
            limits=EngineLimits(max_active_requests=2), quantization_config={"load_in_8bit": True},
        )  # fmt: skip
        assert loads_of == []
        assert llm.invoke(PROMPT)
        assert llm.complete(PROMPT).text
        ((args, kwargs),) = loads_of
        assert args == ("some/model", str(Path("small") / "model"))
        assert set(kwargs) == {"options", *LoadingOptions.names()} - {"target", "drafter"}
        assert kwargs["options"].sampling.temperature == 0.5
        assert (kwargs["dtype"], kwargs["device_map"], kwargs["embeddings"]) == ("float32", "cpu", "e")
        assert (kwargs["revision"], kwargs["drafter_revision"]) == ("r", "s")
        assert kwargs["local_files_only"] is True
        assert kwargs["chat_template"] is False
        assert kwargs["limits"].max_active_requests == 2

    def test_every_loading_option_is_a_field_and_shown_by_from_pretrained(self) -> None:
        for option in dataclasses.fields(LoadingOptions):
            if option.name != "target":
                assert RapidLLM.model_fields[option.name].default == option.default
            for owner in (RapidLLM, ChatRapid):
                assert option.name in inspect.signature(owner.from_pretrained).parameters
        assert RapidLLM("x", limits={"max_active_requests": 3}).limits == EngineLimits(max_active_requests=3)

    def test_an_output_format_is_kept_as_plain_data(self) -> None:
        class Person(BaseModel):
            name: str

        for given in ({"json_schema": Person}, {"regex": "a|b"}, {"choices": ["a", "b"]}):
            llm = RapidLLM("x", **given)
            assert llm.options == GenerationOptions().override(**given)
            config = json.loads(json.dumps(llm.to_config()))
            assert config == llm.to_config()
            assert RapidLLM(**config).options == llm.options
            assert json.loads(json.dumps(llm.describe()))
            assert pickle.loads(pickle.dumps(llm)).options == llm.options
            assert llm.model_copy(update={name: None for name in given}).options == GenerationOptions()
        with pytest.raises(ConfigurationError, match="contradict"):
            RapidLLM("x", regex="a", choices=["a"])

    def test_a_torch_dtype_is_kept_by_name(self) -> None:
        torch = pytest.importorskip("torch")
        assert RapidLLM("x", dtype=torch.bfloat16, drafter_dtype="auto").to_config()["dtype"] == "bfloat16"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "needs a target"),
            ({"target": "x", "temprature": 1}, r"did you mean temperature\?"),
            ({"target": "x", "temperature": -1}, "temperature=-1"),
            ({"target": "x", "max_tokens": 5, "max_new_tokens": 5}, "same option"),
            ({"target": "x", "acceptance": "sometimes"}, "acceptance='sometimes'"),
            ({"target": "x", "limits": {"max_active_requests": 0}}, "max_active_requests=0"),
            ({"target": loaded_model()}, "needs tokenizer= too"),
            (
                {"target": FakePipeline(), "drafter": "x"},
                "drafter cannot be given together with a RapidPipeline",
            ),
        ],
    )
    def test_invalid_arguments_raise(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigurationError, match=message) as raised:
            RapidLLM(**arguments)
        assert isinstance(raised.value, RapidError)

    def test_a_field_that_does_not_exist_cannot_be_set(self, pipeline: FakePipeline) -> None:
        with pytest.raises(ValueError, match="temprature"):
            RapidLLM(pipeline).temprature = 1

    def test_a_changed_field_applies_to_the_next_call(self, pipeline: FakePipeline) -> None:
        llm = RapidLLM(pipeline)
        llm.temperature = 0.5
        assert "temperature 0.5" in llm.invoke(PROMPT)
        llm.temperature = -1
        with pytest.raises(ConfigurationError, match="temperature=-1"):
            llm.invoke(PROMPT)

    def test_changing_the_target_loads_another_pipeline(self, loads_of: list[Any]) -> None:
        llm = RapidLLM("first")
        llm.invoke(PROMPT)
        llm.temperature = 0.5
        llm.invoke(PROMPT)
        assert len(loads_of) == 1
        llm.target = "second"
        llm.invoke(PROMPT)
        assert [args[0] for args, _ in loads_of] == ["first", "second"]

    def test_names(self, pipeline: FakePipeline) -> None:
        assert RapidLLM("some/model").model_name == "some/model"
        assert RapidLLM(loaded_model(), tokenizer=word_tokenizer()).model_name == "my/model"
        assert RapidLLM(pipeline).model_name == "fake"
        assert (
            repr(RapidLLM("m", "d", temperature=0.5)) == "RapidLLM(target='m', drafter='d', temperature=0.5)"
        )


@pytest.mark.filterwarnings("ignore:The function `loads` is in beta")
class TestSerialization:
    def test_langchain_round_trip(self) -> None:
        llm = RapidLLM(
            "some/model", "small/model", temperature=0.5, stop=["x"], top_k=0 + 5, seed=0, num_draft_tokens=0,
            dtype="bfloat16", limits=EngineLimits(max_active_requests=2), system_prompt="Be brief.",
            chat_template=False, device_map={"": 0}, name="mine", pydantic_program_mode="llm",
        )  # fmt: skip
        data = json.loads(dumps(llm))
        assert data["id"] == ["rapid_integrations", "llm", "RapidLLM"]
        assert data["kwargs"]["target"] == "some/model"
        again = loads(dumps(llm), allowed_objects=[RapidLLM], valid_namespaces=["rapid_integrations"])
        assert isinstance(again, RapidLLM)
        assert again.to_config() == llm.to_config()
        assert again.options == llm.options
        assert again.limits == llm.limits
        assert (again.name, again.pydantic_program_mode.value) == ("mine", "llm")
        assert (again.seed, again.num_draft_tokens, again.chat_template) == (0, 0, False)

    def test_a_chain_round_trip(self) -> None:
        chain = RapidPromptTemplate.from_template("{context} {question}") | RapidLLM("some/model")
        again = loads(
            dumps(chain),
            allowed_objects=[RapidLLM, RapidPromptTemplate, RunnableSequence],
            valid_namespaces=["rapid_integrations"],
        )
        assert isinstance(again.first, RapidPromptTemplate)
        assert again.last.to_config() == RapidLLM("some/model").to_config()

    @pytest.mark.parametrize(
        ("arguments", "name"),
        [
            ({"target": loaded_model(), "tokenizer": word_tokenizer()}, "target"),
            ({"target": "x", "retriever": lambda query: []}, "retriever"),
            ({"target": "x", "embeddings": object()}, "embeddings"),
            ({"target": "x", "messages_to_prompt": lambda messages: ""}, "messages_to_prompt"),
            ({"target": "x", "completion_to_prompt": lambda prompt: ""}, "completion_to_prompt"),
            ({"target": "x", "query_wrapper_prompt": PromptTemplate("{query_str}")}, "query_wrapper_prompt"),
        ],
    )
    def test_an_llm_with_a_loaded_object_is_not_serializable(
        self, arguments: dict[str, Any], name: str
    ) -> None:
        llm = RapidLLM(**arguments)
        with pytest.raises(ConfigurationError, match=f"{name} is .* JSON cannot hold"):
            llm.to_dict()
        data = dumpd(llm)
        assert data["type"] == "not_implemented"
        assert "JSON cannot hold" in data["repr"]

    def test_a_quantization_config_becomes_plain_data(self) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
        llm = RapidLLM("x", quantization_config=config)
        assert llm.to_config()["quantization_config"]["load_in_8bit"] is True
        json.dumps(llm.to_config())

    def test_save_writes_the_options(self, tmp_path: Path) -> None:
        RapidLLM("some/model", temperature=0.5).save(tmp_path / "llm.json")
        assert json.loads((tmp_path / "llm.json").read_text())["temperature"] == 0.5

    def test_pickle_carries_the_configuration(self, loads_of: list[Any], pipeline: FakePipeline) -> None:
        llm = RapidLLM("some/model", temperature=0.5, metadata={"owner": "me"}, tags=["t"])
        answer = llm.invoke(PROMPT)
        again = pickle.loads(pickle.dumps(llm))
        assert again.to_config() == llm.to_config()
        assert again.trace_metadata["owner"] == "me"
        assert again.tags == ["t"]
        assert again.invoke(PROMPT) == answer
        assert len(loads_of) == 2

    def test_loaded_models_cannot_be_pickled(self) -> None:
        with pytest.raises(ConfigurationError, match="carries no weights"):
            pickle.dumps(RapidLLM(loaded_model(), tokenizer=word_tokenizer()))


class TestCopies:
    def test_copies_share_the_pipeline(self, loads_of: list[Any]) -> None:
        llm = RapidLLM("some/model", metadata={"owner": "me"}, tags=["t"])
        llm.invoke(PROMPT)
        copies = [copy.copy(llm), copy.deepcopy(llm), llm.model_copy(), llm.model_copy(deep=True)]
        for other in copies:
            assert other is not llm
            assert other.pipeline is llm.pipeline
            assert other.invoke(PROMPT) == llm.invoke(PROMPT)
        assert len(loads_of) == 1

    def test_a_pipeline_that_a_copy_loads_is_shared(self, loads_of: list[Any]) -> None:
        llm = RapidLLM("some/model", cache=InMemoryCache())
        configurable = llm.configurable_fields(temperature=ConfigurableField(id="heat"))
        for heat in (0.1, 0.2):
            configurable.invoke(PROMPT, {"configurable": {"heat": heat}})
        llm.invoke(PROMPT)
        llm.model_copy().invoke("another prompt")
        assert len(loads_of) == 1

    def test_a_copy_with_another_model_does_not_change_the_original(self, loads_of: list[Any]) -> None:
        llm = RapidLLM("first")
        llm.invoke(PROMPT)
        llm.model_copy(update={"target": "second"}).invoke(PROMPT)
        llm.invoke(PROMPT)
        assert [args[0] for args, _ in loads_of] == ["first", "second"]

    def test_a_deep_copy_is_independent(self, pipeline: FakePipeline) -> None:
        llm = RapidLLM(pipeline, metadata={"owner": "me"}, tags=["t"])
        other = copy.deepcopy({"llm": llm})["llm"]
        other.temperature = 0.5
        other.tags.append("u")
        other.metadata["owner"] = "you"
        assert (llm.temperature, llm.tags, llm.metadata["owner"]) == (0.0, ["t"], "me")
        assert "temperature 0.5" in other.invoke(PROMPT)

    def test_a_copy_can_change_options(self, pipeline: FakePipeline) -> None:
        llm = RapidLLM(pipeline)
        assert llm.invoke(PROMPT)
        assert "temperature 0.5" in llm.model_copy(update={"temperature": 0.5}).invoke(PROMPT)
        assert llm.model_copy(update={"max_tokens": 2}).max_new_tokens == 2
        with pytest.raises(ConfigurationError, match="temprature"):
            llm.model_copy(update={"temprature": 0.5})
        with pytest.raises(ConfigurationError, match="temperature=-1"):
            llm.model_copy(update={"temperature": -1})


class TestOnEvent:
    async def test_every_entry_point_reports_its_events(self, pipeline: FakePipeline) -> None:
        llm = RapidLLM(pipeline)
        entries = [
            lambda report: llm.invoke(PROMPT, on_event=report),
            lambda report: list(llm.stream(PROMPT, on_event=report)),
            lambda report: llm.bind(on_event=report).invoke(PROMPT),
            lambda report: llm.complete(PROMPT, on_event=report),
            lambda report: list(llm.stream_complete(PROMPT, on_event=report)),
        ]
        for entry in entries:
            events: list[Any] = []
            entry(events.append)
            assert isinstance(events[0], RetrievedContext)
            assert isinstance(events[-1], Completion)
            assert "".join(e.text for e in events if isinstance(e, TextDelta)) == events[-1].text
        events = []
        await llm.ainvoke(PROMPT, on_event=events.append)
        assert isinstance(events[-1], Completion)
        events = []
        assert [part async for part in llm.astream(PROMPT, on_event=events.append)]
        assert isinstance(events[-1], Completion)

    async def test_it_bypasses_the_cache(self, pipeline: FakePipeline) -> None:
        llm = RapidLLM(pipeline, cache=InMemoryCache())
        answer = llm.invoke(PROMPT)
        for asynchronous in (False, True):
            events: list[Any] = []
            again = llm.bind(on_event=events.append)
            assert (await again.ainvoke(PROMPT) if asynchronous else again.invoke(PROMPT)) == answer
            assert (events[-1].text, len(pipeline.requests)) == (answer, 2 + asynchronous)
        assert llm.invoke(PROMPT) == answer
        assert len(pipeline.requests) == 3

    def test_it_must_be_a_function(self, pipeline: FakePipeline) -> None:
        with pytest.raises(ConfigurationError, match="on_event=3 is not allowed"):
            RapidLLM(pipeline).invoke(PROMPT, on_event=3)
