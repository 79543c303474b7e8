"""Answers and the figures computed from them, in memory and on disk."""
