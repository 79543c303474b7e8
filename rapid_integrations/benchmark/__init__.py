"""How fast: RAPID beside transformers' own ways to generate and the frameworks' classes around them.

One run measures everybody in turns on the same machine, models and prompts, and compares the answers.
"""
