"""Structured output: grammars that limit which tokens may come next."""
