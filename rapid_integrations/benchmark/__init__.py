"""Measures the speed and memory of RAPID beside transformers' own generation methods and the host frameworks.

One run asks all baselines in turn, on the same machine, models and prompts, and compares their answers.
:mod:`~rapid_integrations.benchmark.command` is ``rapid bench``; the modules in
:mod:`~rapid_integrations.benchmark.shapes` are ``rapid bench-shape``.
"""
