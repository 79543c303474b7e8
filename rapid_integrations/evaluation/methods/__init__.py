"""The methods that an evaluation compares, their retrieved passages, and the settings they run in."""
