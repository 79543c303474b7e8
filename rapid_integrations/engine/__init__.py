"""The speculative engine: models, caches, rounds and the worker thread. Knows no host framework."""
