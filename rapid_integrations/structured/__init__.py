"""Structured output: constraints that allow only the tokens with which an answer keeps to its format."""
