"""From the options of ``rapid eval`` to the source of its questions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rapid_integrations.demo.domains import HANDBOOK
from rapid_integrations.errors import ConfigurationError
from rapid_integrations.evaluation.tasks.infinitebench import FILES, InfiniteBench
from rapid_integrations.evaluation.tasks.longbench import LongBenchV2
from rapid_integrations.evaluation.tasks.own_data import OwnData
from rapid_integrations.evaluation.tasks.retrieval_quality import RetrievalQuality
from rapid_integrations.evaluation.tasks.ruler import RULER_TASKS, RulerSource
from rapid_integrations.evaluation.tasks.sources import DemoSource, TaskSource

_CONTEXTS = (1024, 4096, 8192, 16384)
_QUESTIONS = 50
_OWN = "own questions"
# Options that only some tasks support.
_SUPPORTED_BY = {
    "--data": ("infinitebench", "longbench-v2", _OWN),
    "--metric": (_OWN,),
    "--prompt-template": (_OWN,),
    "--subsets": ("demo", "ruler", "infinitebench"),
    "--cot": ("longbench-v2",),
    "--contexts": ("demo", "ruler", "infinitebench", "longbench-v2"),
}


@dataclass(frozen=True, slots=True)
class TaskChoice:
    """The options of ``rapid eval`` about tasks; ``None`` is an option that was not given.

    Attributes:
        task: ``"demo"``, ``"ruler"``, ``"infinitebench"`` or ``"longbench-v2"``; ``None`` is the user's
            own questions if ``data`` is given, otherwise the demo's.
        data: The user's JSONL file, or the file or folder of a benchmark.
        metric: The metric for own questions.
        prompt_template: The prompt of own questions.
        subsets: Names of subsets.
        cot: LongBench v2 with chain of thought.
        contexts: Lengths in tokens.
        questions: Number of questions of each subset at each length.
        max_new_tokens: Maximum length of an answer in tokens.
        seed: Seed of generated tasks.
        retrievals: The retrieval qualities of the run.
    """

    task: str | None = None
    data: Path | None = None
    metric: str | None = None
    prompt_template: str | None = None
    subsets: tuple[str, ...] | None = None
    cot: bool = False
    contexts: tuple[int, ...] | None = None
    questions: int | None = None
    max_new_tokens: int | None = None
    seed: int = 0
    retrievals: tuple[RetrievalQuality, ...] = ("natural",)

    def source(self, *, default_template: str) -> TaskSource:
        """Make the source of the questions. Files are read and checked.

        Args:
            default_template: The prompt of own questions if ``prompt_template`` was not given.

        Raises:
            ConfigurationError: An option does not belong to the task, or is out of range.
            DocumentError: A file cannot be used.
        """
        name = self.task or (_OWN if self.data is not None else "demo")
        self._check(name)
        number = self.questions or _QUESTIONS
        match name:
            case "demo":
                return DemoSource(
                    self.contexts or _CONTEXTS,
                    number,
                    self.seed,
                    (HANDBOOK.name,) if self.subsets is None else self.subsets,
                )
            case "ruler":
                return RulerSource(
                    self.contexts or _CONTEXTS,
                    number,
                    self.seed,
                    RULER_TASKS if self.subsets is None else self.subsets,
                    self.max_new_tokens,
                )
            case "infinitebench":
                return InfiniteBench.read(
                    self.data,
                    subsets=tuple(FILES) if self.subsets is None else self.subsets,
                    contexts=self.contexts,
                    max_questions=self.questions,
                    max_new_tokens=self.max_new_tokens,
                )
            case "longbench-v2":
                return LongBenchV2.read(
                    self.data,
                    thinking=self.cot,
                    contexts=self.contexts,
                    max_questions=self.questions,
                    max_new_tokens=self.max_new_tokens,
                )
        assert self.data is not None
        return OwnData.read(
            self.data,
            metric=self.metric or "exact",
            prompt_template=self.prompt_template or default_template,
            max_questions=self.questions,
            retrievals=self.retrievals,
        )

    def _check(self, name: str) -> None:
        given = {
            "--data": self.data,
            "--metric": self.metric,
            "--prompt-template": self.prompt_template,
            "--subsets": self.subsets,
            "--cot": self.cot or None,
            "--contexts": self.contexts,
        }
        for option, value in given.items():
            if value is not None and name not in _SUPPORTED_BY[option]:
                supporting = " and ".join(_SUPPORTED_BY[option])
                raise ConfigurationError(
                    f"{option} is for {supporting}, not for {name}: leave it out, or choose other questions "
                    "with --task, or your own with --data."
                )
