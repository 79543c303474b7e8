"""Asking every question with every method, and tuning methods to equal acceptance."""
