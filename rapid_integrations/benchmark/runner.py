"""Measures the cells of a plan in turn, and compares the answers of lossless baselines with the reference.

Each repetition asks all baselines and starts with a different one, so that slow changes of the machine's
speed affect all of them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from rapid_integrations.benchmark.baselines import GENERATE
from rapid_integrations.benchmark.plan import CellPlan, Group
from rapid_integrations.benchmark.results import Cell, Difference
from rapid_integrations.benchmark.work import Answer, Outcome, Run
from rapid_integrations.evaluation.scoring.answer_metrics import exact_match
from rapid_integrations.evaluation.tasks.task import Task


@dataclass(slots=True)
class Measurement:
    """Measures groups of cells.

    Args:
        ask: Executes a run in the process of its baseline.
        on_run: Called before each run with the cell it belongs to.

    Attributes:
        cells: The cells measured so far.
        differences: Answers of lossless baselines that differ from the reference.
    """

    ask: Callable[[Run], Outcome]
    on_run: Callable[[CellPlan], None]
    cells: list[Cell] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    _reference: dict[tuple[str, str], Answer] = field(default_factory=dict)

    def warm_up(self, task: Task, cells: Iterable[CellPlan]) -> None:
        """Ask each baseline of these cells one short task that is not measured."""
        for name in dict.fromkeys(cell.baseline.name for cell in cells):
            self.ask(Run(name, task))

    def measure(self, group: Group) -> None:
        """Measure the cells of a group.

        Each cell that is not cold starts with a run that is not measured. It fills the caches with the
        document, and the engine learns the costs of its passes at this length.

        Raises:
            RapidError: A question cannot be answered.
        """
        for cell in group.cells:
            if not cell.cold:
                self.on_run(cell)
                self.ask(cell.run)
        samples: list[list[Outcome]] = [[] for _ in group.cells]
        order = list(range(len(group.cells)))
        for repeat in range(max(cell.repeats for cell in group.cells)):
            first = repeat % len(order)
            for index in (*order[first:], *order[:first]):
                if repeat < group.cells[index].repeats:
                    self.on_run(group.cells[index])
                    samples[index].append(self.ask(group.cells[index].run))
        # Last, because by now the document is usually in the cache of generate().
        self._ask_reference(group.task)
        for cell, outcomes in zip(group.cells, samples, strict=True):
            self.cells.append(self._cell(cell, outcomes))

    def _ask_reference(self, task: Task) -> None:
        """Store the answers of ``generate()`` to each question asked alone."""
        if all((task.document, question.question) in self._reference for question in task.questions):
            return
        outcome = self.ask(Run(GENERATE.name, task))
        for question, answer in zip(task.questions, outcome.answers, strict=True):
            self._reference[task.document, question.question] = answer

    def _cell(self, cell: CellPlan, outcomes: Sequence[Outcome]) -> Cell:
        task = cell.task
        compared = equal = 0
        for outcome in outcomes:
            if not (cell.baseline.lossless and outcome.same_prompt):
                continue
            for question, answer in zip(task.questions, outcome.answers, strict=True):
                compared += 1
                difference = Difference.between(
                    self._reference[task.document, question.question],
                    answer,
                    suite=cell.suite,
                    baseline=cell.baseline.name,
                    context=task.context,
                    question=question.question,
                )
                if difference is None:
                    equal += 1
                elif difference not in self.differences:
                    self.differences.append(difference)
        last = outcomes[-1].answers
        right = sum(exact_match(a.text, q.answers) for a, q in zip(last, task.questions, strict=True))
        return Cell(
            suite=cell.suite,
            baseline=cell.baseline.name,
            context=task.context,
            batch=len(task.questions),
            together=cell.together,
            cold=cell.cold,
            retrieval=cell.retrieval,
            samples=tuple(outcomes),
            compared=compared,
            equal=equal,
            asked=len(task.questions),
            right=right,
        )
