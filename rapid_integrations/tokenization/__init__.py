"""From text to tokens and back: safe encoding, streaming detokenization, stop strings."""
