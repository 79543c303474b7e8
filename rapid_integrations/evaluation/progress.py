"""Progress bars on a terminal; other outputs get none."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rapid_integrations.events import PrefillProgress


class PrefillBar:
    """A bar that fills while the models read their prompts, and disappears at the end.

    Args:
        stderr: Draw it on stderr instead of stdout.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        console = Console(stderr=stderr)
        self._progress = Progress(
            TextColumn("Reading the document"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> PrefillBar:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def update(self, event: PrefillProgress) -> None:
        """Show the share of the prompts that is read."""
        self._progress.update(self._task, completed=event.done_tokens, total=event.total_tokens)

    def stop(self) -> None:
        """Remove the bar. Idempotent."""
        self._progress.stop()


def answering_progress(console: Console) -> Progress:
    """A bar that counts answers."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
