"""Which baseline does what, how often."""

import pytest

from rapid_integrations.benchmark.baselines import BASELINES, choose_baselines
from rapid_integrations.benchmark.plan import SUITES, BenchmarkPlan
from rapid_integrations.benchmark.work import make_task
from rapid_integrations.errors import ConfigurationError


def words(text: str) -> int:
    return len(text.replace(".", " .").split())


def plan(**changes) -> BenchmarkPlan:
    given = {
        "suites": SUITES,
        "contexts": (512, 1024),
        "batches": (1, 2),
        "repeats": 5,
        "cold_tokens": 2048,
        "baselines": choose_baselines((), has_drafter=True),
        "retrievals": ("gold", "unrelated"),
    }
    return BenchmarkPlan(**{**given, **changes})


def cells(suite: str, **changes):
    groups = plan(suites=(suite,), **changes).groups(words)
    return [cell for group in groups for cell in group.cells]


def test_decoding_is_measured_with_every_retrieval_for_rapid_and_with_the_first_for_the_rest():
    found = [(c.baseline.name, c.retrieval, c.repeats) for c in cells("decode", contexts=(512,))]
    assert found == [
        ("generate", None, 5),
        ("assisted", None, 5),
        ("lookup", None, 5),
        ("plain", None, 5),
        ("lossless", "gold", 5),
        ("rapid", "gold", 5),
        ("rapid", "unrelated", 5),
        ("self", "gold", 5),
    ]


def test_cold_runs_are_fewer_for_longer_documents_and_use_the_own_retriever():
    found = {(c.task.context, c.baseline.name): c for c in cells("prefill")}
    assert all(c.cold and len(c.task.questions) == 1 for c in found.values())
    assert found[512, "rapid"].repeats == 4
    assert found[1024, "rapid"].repeats == 2
    assert found[1024, "rapid"].retrieval == "natural"
    assert found[1024, "plain"].retrieval is None


def test_baselines_that_reread_the_document_run_at_least_once():
    found = {c.baseline.name: c.repeats for c in cells("end-to-end", contexts=(1024,))}
    assert found == {"hf-pipeline": 1, "hf-llm": 1, "rapid-langchain": 2, "rapid-llamaindex": 2}


def test_questions_are_asked_in_turn_and_at_once():
    found = [(c.baseline.name, c.together) for c in cells("questions", contexts=(1024,))]
    assert found == [
        ("generate", False), ("plain", False), ("plain", True), ("rapid", False), ("rapid", True),
    ]  # fmt: skip


def test_a_batch_asks_its_number_of_questions_about_one_document():
    found = cells("batch", contexts=(512, 8192))
    assert {len(c.task.questions) for c in found} == {1, 2}
    assert {c.task.context for c in found} == {512}
    assert len({c.task.document for c in found}) == 1


def test_the_earlier_name_of_the_prefill_suite_is_accepted():
    assert plan(suites=("reading", "decode")).suites == ("prefill", "decode")


def test_only_needed_runtimes_are_loaded_and_generate_always():
    chosen = choose_baselines(("plain",), has_drafter=True)
    assert plan(baselines=chosen).runtimes == ("transformers", "rapid")
    chosen = choose_baselines(("self",), has_drafter=False)
    assert plan(baselines=chosen, suites=("decode",)).runtimes == ("transformers", "self")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suites": ("speed",)}, "no suite 'speed'"),
        ({"batches": (0,)}, "at least one question"),
        ({"contexts": ()}, "nothing to measure"),
        ({"suites": ("batch",), "baselines": (BASELINES["self"],)}, "baselines self takes part in batch"),
    ],
)  # fmt: skip
def test_a_plan_that_measures_nothing_is_refused(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        plan(**changes)


def test_baselines_are_chosen_by_name():
    chosen = choose_baselines(("rapid", "generate"), has_drafter=True)
    assert [c.name for c in chosen] == ["generate", "rapid"]
    without = {c.name for c in choose_baselines((), has_drafter=False)}
    assert set(BASELINES) - without == {"assisted", "rapid"}
    with pytest.raises(ConfigurationError, match="no baseline 'vllm'"):
        choose_baselines(("vllm",), has_drafter=True)
    with pytest.raises(ConfigurationError, match="assisted need a drafter"):
        choose_baselines(("assisted",), has_drafter=False)


def test_documents_have_their_length_in_the_models_own_tokens():
    def twice(text: str) -> int:
        return 2 * words(text)

    task = make_task(context=2000, num_questions=2, seed=1, count_tokens=twice)
    assert task.context == 2000
    assert len(task.questions) == 2
    assert abs(twice(task.document) - 2000) <= 60


def test_a_document_that_cannot_have_its_length_is_an_error():
    lengths = iter([100, 4000, 100])
    with pytest.raises(ConfigurationError, match="tokens has 100"):
        make_task(context=1000, num_questions=1, seed=1, count_tokens=lambda text: next(lengths))
