"""Measures how fast a model of a given shape would be on this machine, with random weights."""
