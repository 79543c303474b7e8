"""What runs in another process, here in a thread."""

import multiprocessing
import threading

import pytest
from helpers.benchmark_reports import right_answers

from rapid_integrations.benchmark import processes
from rapid_integrations.benchmark.models import ModelChoice
from rapid_integrations.benchmark.work import Run
from rapid_integrations.engine.model.quantized import Int8Linear
from rapid_integrations.errors import ConfigurationError, GenerationError
from rapid_integrations.evaluation.tasks.task import demo_tasks


class Scripted:
    def run(self, run):
        if run.baseline == "rapid":
            raise ConfigurationError("not this one")
        if run.baseline == "lossless":
            raise ZeroDivisionError("by zero")
        return right_answers(run)


@pytest.fixture
def talk():
    """Sends runs to a serving thread and yields what comes back; ``talk(make)`` starts it."""
    ends, threads = [], []

    def start(make):
        connection, worker_end = multiprocessing.Pipe()
        thread = threading.Thread(target=processes.serve, args=(worker_end, make))
        thread.start()
        ends.append(connection)
        threads.append(thread)
        return connection

    yield start
    for end in ends:
        end.close()
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_runs_are_answered_and_failures_reported_until_the_connection_closes(talk):
    (task,) = demo_tasks(context=128, num_questions=1, seed=3)
    connection = talk(Scripted)
    assert connection.recv().hardware["threads"] >= 1
    for name in ("plain", "rapid", "lossless", "plain"):
        connection.send(Run(name, task))
    assert connection.recv() == right_answers(Run("plain", task))
    error = connection.recv().error
    assert isinstance(error, ConfigurationError)
    assert str(error) == "not this one"
    error = connection.recv().error
    assert isinstance(error, GenerationError)
    assert "ZeroDivisionError: by zero" in str(error)
    assert connection.recv() == right_answers(Run("plain", task))


def test_a_load_failure_is_reported(talk):
    def fail():
        raise OSError("no such model")

    assert "OSError: no such model" in str(talk(fail).recv().error)


@pytest.mark.slow
def test_a_process_that_cannot_load_ends_the_benchmark(tmp_path):
    models = ModelChoice(target=str(tmp_path / "nothing"))
    with pytest.raises(ConfigurationError, match="there is no folder"):
        processes.Workers(("transformers",), models)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("self_drafting", [False, True])
def test_the_engine_s_drafter_is_quantised_on_request(self_drafting: bool) -> None:
    """And the target is not, though it may draft for itself."""
    pipeline = ModelChoice(drafter_quantization="int8").load_pipeline(self_drafting=self_drafting)
    target, drafter = pipeline.engine.target, pipeline.engine.drafter
    assert drafter is not None
    assert drafter.model is not target.model
    for model, quantised in ((target.model, False), (drafter.model, True)):
        assert any(isinstance(module, Int8Linear) for module in model.modules()) == quantised
    pipeline.close()
