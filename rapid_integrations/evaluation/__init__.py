"""Evaluation: accuracy, acceptance and speed of RAPID and other methods.

>>> from rapid_integrations import RapidPipeline
>>> from rapid_integrations.evaluation import demo_tasks, evaluate
>>> tasks = demo_tasks(context=1024, num_questions=20, seed=1)
>>> report = evaluate(RapidPipeline.demo(), tasks, ["lc", "rapid"])  # doctest: +SKIP
>>> report.result("rapid", 1024).accuracy.value  # doctest: +SKIP
"""

from rapid_integrations.evaluation.methods.choice import METHOD_NAMES, make_method
from rapid_integrations.evaluation.methods.method import Case, Method
from rapid_integrations.evaluation.methods.retrieval import TaskRetrieval
from rapid_integrations.evaluation.methods.settings import Setting, make_settings
from rapid_integrations.evaluation.results.answer_record import AnswerRecord
from rapid_integrations.evaluation.results.groups import group_rows
from rapid_integrations.evaluation.results.report import EvaluationReport, MethodResult
from rapid_integrations.evaluation.running.asking import answer
from rapid_integrations.evaluation.running.matching import (
    Match,
    calibration_source,
    match_acceptance,
    match_methods,
)
from rapid_integrations.evaluation.running.runner import evaluate
from rapid_integrations.evaluation.scoring.answer_metrics import METRIC_NAMES, exact_match, make_metric
from rapid_integrations.evaluation.scoring.intervals import (
    Difference,
    Proportion,
    score_difference,
    score_interval,
    wilson_interval,
)
from rapid_integrations.evaluation.tasks.infinitebench import InfiniteBench
from rapid_integrations.evaluation.tasks.longbench import LongBenchV2
from rapid_integrations.evaluation.tasks.own_data import OwnData
from rapid_integrations.evaluation.tasks.prompts import question_prompt
from rapid_integrations.evaluation.tasks.retrieval_quality import RETRIEVAL_QUALITIES, RetrievalQuality
from rapid_integrations.evaluation.tasks.ruler import RULER_TASKS, RulerSource, ruler_task
from rapid_integrations.evaluation.tasks.sources import DemoSource, TaskSource
from rapid_integrations.evaluation.tasks.task import Task, TaskFormat, TaskQuestion, demo_task, demo_tasks

__all__ = [
    "METHOD_NAMES",
    "METRIC_NAMES",
    "RETRIEVAL_QUALITIES",
    "RULER_TASKS",
    "AnswerRecord",
    "Case",
    "DemoSource",
    "Difference",
    "EvaluationReport",
    "InfiniteBench",
    "LongBenchV2",
    "Match",
    "Method",
    "MethodResult",
    "OwnData",
    "Proportion",
    "RetrievalQuality",
    "RulerSource",
    "Setting",
    "Task",
    "TaskFormat",
    "TaskQuestion",
    "TaskRetrieval",
    "TaskSource",
    "answer",
    "calibration_source",
    "demo_task",
    "demo_tasks",
    "evaluate",
    "exact_match",
    "group_rows",
    "make_method",
    "make_metric",
    "make_settings",
    "match_acceptance",
    "match_methods",
    "question_prompt",
    "ruler_task",
    "score_difference",
    "score_interval",
    "wilson_interval",
]
