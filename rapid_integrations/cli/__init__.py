"""The command line: ``rapid demo``, ``ask``, ``eval``, ``bench`` and ``bench-shape``."""

from rapid_integrations.cli.app import main

__all__ = ["main"]
