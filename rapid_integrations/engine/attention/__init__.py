"""Attention over packed batches: one call for prefill, drafting and verification."""
