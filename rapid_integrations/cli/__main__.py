"""``python -m rapid_integrations.cli``."""

from rapid_integrations.cli.app import main

main()
