"""Trains the demo pair from scratch: ``python -m rapid_integrations.demo.training.train --output DIR``."""
