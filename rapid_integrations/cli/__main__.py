"""``python -m rapid_integrations.cli``."""

import sys

from rapid_integrations.cli.app import main

sys.exit(main())
