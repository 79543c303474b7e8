"""The application: commands, exit codes and errors.

Results go to stdout, progress and errors to stderr. Exit codes: 0; 2 for input that cannot be used, with the
reason in one line; 1 for a failure while answering, also in one line; 130 when interrupted. Heavy modules are
imported inside the commands, so that ``rapid --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from rapid_integrations.cli.ask import AskOptions, ask
from rapid_integrations.cli.bench import BenchOptions, bench
from rapid_integrations.cli.bench_shape import BenchShapeOptions, bench_shape
from rapid_integrations.cli.demo import DemoOptions, demo
from rapid_integrations.cli.evaluate import EvaluateOptions, evaluate
from rapid_integrations.cli.options import as_command
from rapid_integrations.errors import (
    DeadlineExceededError,
    EngineClosedError,
    GenerationError,
    QueueFullError,
    RapidError,
)

_FAILED, _UNUSABLE, _INTERRUPTED = 1, 2, 130
# Failures while answering. Any other RapidError means that the input cannot be used.
_RUNTIME_ERRORS = (GenerationError, EngineClosedError, QueueFullError, DeadlineExceededError)

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Answers over whole long documents from local models, fast (RAPID).",
)


@app.callback(invoke_without_command=True)
def rapid(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Answers over whole long documents from local models, fast (RAPID)."""
    if version:
        import rapid_integrations

        typer.echo(f"rapid {rapid_integrations.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command("demo")(as_command(DemoOptions, demo))
app.command("ask")(as_command(AskOptions, ask))
app.command("eval")(as_command(EvaluateOptions, evaluate))
app.command("bench")(as_command(BenchOptions, bench))
app.command("bench-shape")(as_command(BenchShapeOptions, bench_shape))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The arguments without the program's name; ``None`` takes those of the process.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal cannot show must not end the program.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        code = app(args=arguments, prog_name="rapid", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted.", _INTERRUPTED)
    except BrokenPipeError:
        # The reader has closed the pipe. Python flushes stdout at exit, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except _RUNTIME_ERRORS as error:
        return _complain(str(error), _FAILED)
    except RapidError as error:
        return _complain(str(error), _UNUSABLE)
    except Exception as error:
        # typer's usage errors have this method; their base class is private.
        if callable(usage := getattr(error, "format_message", None)):
            return _complain(usage(), _UNUSABLE)
        return _complain(f"{type(error).__name__}: {error}", _FAILED)


def _complain(message: str, code: int) -> int:
    """Write one line to stderr."""
    sys.stderr.write(f"rapid: {' '.join(message.split())}\n")
    return code
