"""How right and how fast: RAPID beside long context, retrieval alone and plain speculation.

>>> from rapid_integrations import RapidPipeline
>>> from rapid_integrations.evaluation import demo_tasks, evaluate
>>> tasks = demo_tasks(context=1024, num_questions=20, seed=1)
>>> report = evaluate(RapidPipeline.demo(), tasks, ["lc", "rapid"])  # doctest: +SKIP
>>> report.result("rapid", 1024).accuracy.value  # doctest: +SKIP
"""

from rapid_integrations.evaluation.methods import METHOD_NAMES, Case, Method, make_method, question_prompt
from rapid_integrations.evaluation.metrics import Proportion, exact_match, wilson_interval
from rapid_integrations.evaluation.report import AnswerRecord, EvaluationReport, MethodResult
from rapid_integrations.evaluation.retrieval import RETRIEVAL_QUALITIES, RetrievalQuality, TaskRetrieval
from rapid_integrations.evaluation.runner import answer, evaluate
from rapid_integrations.evaluation.tasks import Task, TaskQuestion, demo_task, demo_tasks

__all__ = [
    "METHOD_NAMES",
    "RETRIEVAL_QUALITIES",
    "AnswerRecord",
    "Case",
    "EvaluationReport",
    "Method",
    "MethodResult",
    "Proportion",
    "RetrievalQuality",
    "Task",
    "TaskQuestion",
    "TaskRetrieval",
    "answer",
    "demo_task",
    "demo_tasks",
    "evaluate",
    "exact_match",
    "make_method",
    "question_prompt",
    "wilson_interval",
]
