"""Records of answers: to JSON and back, also from earlier versions."""

import json

import pytest
from helpers.evaluation_pipelines import ScriptedPipeline

from rapid_integrations.engine.stats import RapidStats, RetrievedChunk
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation import AnswerRecord, demo_tasks, evaluate

TASKS = demo_tasks(context=512, num_questions=6, seed=2)


def test_records_survive_json_completely():
    stats = RapidStats(
        prompt_tokens=3, completion_tokens=7, agreement=0.1 + 0.2, decode_s=1 / 3, queue_s=1e-17
    )
    pipeline = ScriptedPipeline(lambda call: "Tür “1”\n\ud800\u2028", lambda call: stats)
    report = evaluate(pipeline, TASKS, ["lc", "rapid"], sweep={"transfer_strength": (2.5,)})
    for record in report.answers:
        again = AnswerRecord.from_dict(json.loads(json.dumps(record.as_dict())))
        assert again == record
    chunks = {record.method: record.stats.retrieved_chunks for record in report.answers}
    assert chunks["lc"] == ()
    assert all(isinstance(chunk, RetrievedChunk) for chunk in chunks["rapid"])
    assert chunks["rapid"]


@pytest.mark.parametrize("change", [{"stats": None}, {"colour": "red"}, {"setting": {"retrieval": "gold"}}])
def test_other_data_is_an_error(change):
    report = evaluate(ScriptedPipeline(lambda call: "x"), TASKS[:1], ["lc"])
    with pytest.raises(ConfigurationError, match="not an answer of this version of rapid eval"):
        AnswerRecord.from_dict({**report.answers[0].as_dict(), **change})


def test_records_of_version_0_1_0_are_read():
    """That version had another name for a statistic, ``grounding`` instead of ``question_agreement``."""
    stats = RapidStats(completion_tokens=3, question_agreement=0.25)
    record = evaluate(ScriptedPipeline(lambda call: "x", lambda call: stats), TASKS[:1], ["lc"]).answers[0]
    stored = json.loads(json.dumps(record.as_dict()))
    stored["stats"]["grounding"] = stored["stats"].pop("question_agreement")
    assert AnswerRecord.from_dict(stored) == record
    assert record.stats.question_agreement == 0.25
