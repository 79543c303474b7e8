"""Speculative decoding: the round, the state of a sequence, acceptance, and the draft length."""
